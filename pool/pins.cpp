#include "pool/pins.hpp"

#include <algorithm>
#include <tuple>

#include "protocol/footprint.hpp"

namespace pgsidecar::pool {

const char* to_string(PinReason reason) {
  switch (reason) {
    case PinReason::AdvisoryLock: return "advisory_lock";
    case PinReason::TemporaryObject: return "temporary_object";
    case PinReason::PreparedStatement: return "prepared_statement";
    case PinReason::HeldCursor: return "held_cursor";
    case PinReason::Listening: return "listening";
    case PinReason::Sequence: return "sequence";
    case PinReason::BackendPid: return "backend_pid";
    case PinReason::RandomSeed: return "random_seed";
    case PinReason::Library: return "library";
    case PinReason::CustomSetting: return "custom_setting";
    case PinReason::Unreadable: return "unreadable";
    case PinReason::Unexamined: return "unexamined";
    case PinReason::Meaning: return "statement_settings";
    case PinReason::kCount: break;
  }
  return "unknown";
}

const char* ends(PinReason reason) {
  switch (reason) {
    case PinReason::AdvisoryLock: return "the locks are released (pg_advisory_unlock; pg_advisory_xact_lock needs no pin)";
    case PinReason::TemporaryObject: return "the temporary objects are dropped (DROP, DISCARD TEMP)";
    case PinReason::PreparedStatement: return "DEALLOCATE (the protocol's prepared statements need no pin)";
    case PinReason::HeldCursor: return "the cursor is closed (CLOSE)";
    case PinReason::Listening: return "UNLISTEN";
    case PinReason::Sequence: return "DISCARD SEQUENCES (INSERT ... RETURNING needs no currval)";
    case PinReason::Unexamined: return "the server can be asked again";
    default: return "the client leaves";
  }
}

void Transparency::record(std::string_view statement, bool checked, bool carried, std::uint32_t reasons) {
  auto it = rows_.find(statement);
  if (it == rows_.end()) {
    if (rows_.size() >= kMost) {
      const auto least = std::min_element(rows_.begin(), rows_.end(), [](const auto& a, const auto& b) {
        return std::tie(a.second.pinned, a.second.checked) < std::tie(b.second.pinned, b.second.checked);
      });
      rows_.erase(least);
      ++dropped_;
    }
    it = rows_.emplace(statement, StatementEffects{}).first;
    it->second.statement = statement;
  }
  StatementEffects& row = it->second;
  row.checked += checked;
  row.carried += carried;
  row.pinned += reasons != 0;
  row.reasons |= reasons;
}

std::vector<StatementEffects> Transparency::rows() const {
  std::vector<StatementEffects> rows;
  for (const auto& [text, row] : rows_) rows.push_back(row);
  std::stable_sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) {
    return std::tie(a.pinned, a.checked, a.carried) > std::tie(b.pinned, b.checked, b.carried);
  });
  return rows;
}

std::size_t Transparency::footprint() const {
  std::size_t bytes = protocol::footprint_of_nodes(rows_);
  for (const auto& [text, row] : rows_) bytes += 2 * protocol::footprint(text);
  return bytes;
}

}  // namespace pgsidecar::pool
