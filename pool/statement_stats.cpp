#include "pool/statement_stats.hpp"

#include <algorithm>

#include "protocol/footprint.hpp"
#include "protocol/normalize.hpp"

namespace pgsidecar::pool {

StatementHandle StatementStats::find(std::uint32_t pool, std::uint64_t fingerprint, std::string_view sql, Time now) {
  const auto handle = [this](std::size_t slot) { return std::uint64_t{records_[slot].generation} << 32 | (slot + 1); };
  std::uint32_t& recent = recent_[fingerprint % recent_.size()];
  if (recent < records_.size() && records_[recent].fingerprint == fingerprint && records_[recent].pool == pool) return handle(recent);
  if (const auto it = index_.find({pool, fingerprint}); it != index_.end()) return handle(recent = it->second);
  const std::size_t slot = make_room();
  Record& record = records_[slot];
  record.pool = pool;
  record.fingerprint = fingerprint;
  record.row = {};
  record.row.id = next_id_++;
  record.row.text = protocol::normalize_sql(sql, kMostText);
  record.row.first = record.row.last = now;
  index_.emplace(Key{pool, fingerprint}, static_cast<std::uint32_t>(slot));
  return handle(slot);
}

std::size_t StatementStats::make_room() {
  if (records_.size() < kMost) {
    records_.emplace_back();
    weights_.push_back(0);
    return records_.size() - 1;
  }
  std::size_t least = hand_;
  for (std::size_t i = 1; i < kMost; ++i)
    if (const std::size_t slot = (hand_ + i) % kMost; weights_[slot] < weights_[least]) least = slot;
  hand_ = (least + 1) % kMost;
  Record& record = records_[least];
  index_.erase({record.pool, record.fingerprint});
  ++record.generation;
  ++evicted_;
  return least;
}

StatementStats::Record* StatementStats::at(StatementHandle handle) {
  const std::size_t slot = (handle & 0xffffffff) - 1;
  if (handle == kNoStatement || slot >= records_.size() || records_[slot].generation != handle >> 32) return nullptr;
  return &records_[slot];
}

void StatementStats::record(StatementHandle handle, const Execution& e, Time now) {
  Record* record = at(handle);
  if (!record) return;
  const std::uint64_t total = e.total();
  weights_[static_cast<std::size_t>(record - records_.data())] += total + 1;
  StatementRow& row = record->row;
  ++row.calls;
  row.rows += e.rows;
  row.bytes += e.bytes;
  row.waitMicros += e.wait;
  row.serverMicros += e.server;
  row.clientMicros += e.client;
  row.time.record(total);
  row.last = now;
  if (!e.tags.empty()) row.tags.assign(e.tags.substr(0, kMostTags));
  if (e.sqlstate.size() != 5) return;
  ++row.errorCount;
  for (auto& error : row.errors) {
    if (error.count == 0) std::copy(e.sqlstate.begin(), e.sqlstate.end(), error.sqlstate.begin());
    if (std::string_view(error.sqlstate.data(), 5) != e.sqlstate) continue;
    ++error.count;
    break;
  }
}

void StatementStats::add_client_time(StatementHandle handle, std::uint64_t micros) {
  if (Record* record = at(handle)) record->row.clientMicros += micros;
}

void StatementStats::add_left_idle(StatementHandle handle) {
  if (Record* record = at(handle)) ++record->row.leftIdle;
}

std::string_view StatementStats::text(StatementHandle handle) const {
  const Record* record = const_cast<StatementStats*>(this)->at(handle);
  return record ? std::string_view(record->row.text) : std::string_view();
}

void StatementStats::reset(Time now) {
  // Handles that are in use must find nothing: generations go on.
  for (Record& record : records_) {
    const std::uint32_t next = record.generation + 1;
    record = {};
    record.generation = next;
  }
  std::fill(weights_.begin(), weights_.end(), 0);
  index_.clear();
  evicted_ = 0;
  since_ = now;
}

StatementStats::Report StatementStats::report() const {
  Report report;
  report.evicted = evicted_;
  report.since = since_;
  for (const Record& record : records_)
    if (record.row.calls > 0) report.rows.emplace_back(record.pool, record.row);
  return report;
}

std::size_t StatementStats::footprint() const {
  std::size_t bytes = protocol::footprint(records_) + protocol::footprint(weights_) + protocol::footprint_of_slots(index_);
  for (const Record& record : records_) bytes += protocol::footprint(record.row.text) + protocol::footprint(record.row.tags);
  return bytes;
}

}  // namespace pgsidecar::pool
