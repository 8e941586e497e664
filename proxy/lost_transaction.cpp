#include "proxy/lost_transaction.hpp"

#include <strings.h>

#include <cstring>

#include "protocol/messages.hpp"

namespace pgsidecar::proxy {

using protocol::Backend;
using protocol::Writer;

TransactionEnd transaction_end(std::string_view sql) {
  constexpr std::string_view kBlank = " \t\r\n\v\f;";
  auto end = TransactionEnd::None;
  const auto is = [](std::string_view a, const char* b) { return a.size() == std::strlen(b) && ::strncasecmp(a.data(), b, a.size()) == 0; };
  while (true) {
    const auto begin = sql.find_first_not_of(kBlank);
    if (begin == std::string_view::npos) return end;
    sql.remove_prefix(begin);
    const std::string_view word = sql.substr(0, sql.find_first_of(kBlank));
    sql.remove_prefix(word.size());
    if (end != TransactionEnd::None) {
      if (!is(word, "work") && !is(word, "transaction")) return TransactionEnd::None;
    } else if (is(word, "commit") || is(word, "end")) {
      end = TransactionEnd::Commit;
    } else if (is(word, "rollback") || is(word, "abort")) {
      end = TransactionEnd::Rollback;
    } else {
      return end;
    }
  }
}

void LostTransaction::refuse(std::string& out) {
  const bool again = std::exchange(told_, true);
  const std::string_view sqlstate = again ? "25P02" : std::string_view(sqlstate_);
  if (count_) count_(sqlstate);
  protocol::write_error(
      out, protocol::Severity::Error, sqlstate,
      again ? "current transaction is aborted, commands ignored until end of transaction block" : std::string_view(message_));
}

bool LostTransaction::answer(char type, protocol::Bytes body, protocol::ClientStatements& statements, protocol::StatementCache& cache,
                             const std::shared_ptr<const void>& meaning, std::string& out) {
  protocol::Reader reader(body);
  const auto end_of = [](const protocol::StatementRef& statement) {
    return statement ? transaction_end(std::string_view(statement->body).substr(0, statement->body.find('\0'))) : TransactionEnd::None;
  };
  // Who hasn't heard of the loss must not take a COMMIT for done: it fails, as one does that violates a deferred constraint.
  const auto fails = [&](TransactionEnd end) { return end == TransactionEnd::None || (end == TransactionEnd::Commit && !told_); };
  const auto complete = [&] { Writer(out).begin(Backend::CommandComplete).cstring("ROLLBACK").end(); };
  const auto empty = [&](Backend reply) { Writer(out).begin(reply).end(); };
  const auto fail = [&] {
    refuse(out);
    skipping_ = true;
    return false;
  };
  if (type == 'S') {
    skipping_ = false;
    protocol::write_ready_for_query(out, ended_ ? protocol::TxStatus::Idle : protocol::TxStatus::Failed);
    return ended_;
  }
  if (skipping_) return false;
  switch (type) {
    case 'Q': {
      statements.clear_unnamed();
      const TransactionEnd end = transaction_end(reader.cstring());
      const bool over = end != TransactionEnd::None;
      if (fails(end))
        refuse(out);
      else
        complete();
      protocol::write_ready_for_query(out, over ? protocol::TxStatus::Idle : protocol::TxStatus::Failed);
      return over;
    }
    case 'F':
      refuse(out);
      protocol::write_ready_for_query(out, protocol::TxStatus::Failed);
      return false;
    case 'P': {
      const std::string_view name = reader.cstring();
      const protocol::Bytes rest = reader.rest();
      protocol::Reader text(rest);
      if (transaction_end(text.cstring()) == TransactionEnd::None || text.left() < 2 || (!name.empty() && statements.find(name)))
        return fail();
      statements.set(name, cache.intern({reinterpret_cast<const char*>(rest.data()), rest.size()}, meaning));
      empty(Backend::ParseComplete);
      return false;
    }
    case 'B': {
      reader.cstring();
      bound_ = end_of(statements.find(reader.cstring()));
      if (!reader.ok()) bound_ = TransactionEnd::None;
      if (bound_ == TransactionEnd::None) return fail();
      empty(Backend::BindComplete);
      return false;
    }
    case 'D':
      if (reader.u8() == 'S') {
        if (end_of(statements.find(reader.cstring())) == TransactionEnd::None || !reader.ok()) return fail();
        Writer(out).begin(Backend::ParameterDescription).u16(0).end();
      } else if (bound_ == TransactionEnd::None) {
        return fail();
      }
      empty(Backend::NoData);
      return false;
    case 'E':
      ended_ |= bound_ != TransactionEnd::None;
      if (fails(bound_)) return fail();
      complete();
      return false;
    case 'C':
      if (reader.u8() == 'S') {
        const std::string_view name = reader.cstring();
        if (reader.ok()) statements.erase(name);
      }
      empty(Backend::CloseComplete);
      return false;
    default: return false;
  }
}

}  // namespace pgsidecar::proxy
