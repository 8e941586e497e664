#include "proxy/lost_transaction.hpp"

#include <strings.h>

#include <algorithm>
#include <cstring>

#include "protocol/messages.hpp"

namespace pgsidecar::proxy {

using protocol::Backend;
using protocol::Writer;

bool ends_transaction(std::string_view sql) {
  constexpr std::string_view kBlank = " \t\r\n\v\f;";
  bool first = true;
  const auto is = [](std::string_view a, const char* b) { return a.size() == std::strlen(b) && ::strncasecmp(a.data(), b, a.size()) == 0; };
  while (true) {
    const auto begin = sql.find_first_not_of(kBlank);
    if (begin == std::string_view::npos) return !first;
    sql.remove_prefix(begin);
    const std::string_view word = sql.substr(0, sql.find_first_of(kBlank));
    sql.remove_prefix(word.size());
    if (first ? !(is(word, "commit") || is(word, "end") || is(word, "rollback") || is(word, "abort"))
              : !(is(word, "work") || is(word, "transaction")))
      return false;
    first = false;
  }
}

/// Of a text that ends a transaction: by what asks for its effects to stay.
bool commits(std::string_view sql) {
  sql.remove_prefix(std::min(sql.find_first_not_of(" \t\r\n\v\f;"), sql.size()));
  return ::strncasecmp(sql.data(), "commit", std::min<std::size_t>(6, sql.size())) == 0 ||
         ::strncasecmp(sql.data(), "end", std::min<std::size_t>(3, sql.size())) == 0;
}

void LostTransaction::refuse(std::string& out) {
  if (!told_)
    protocol::write_error(out, protocol::Severity::Error, sqlstate_, message_);
  else
    protocol::write_error(out, protocol::Severity::Error, "25P02",
                          "current transaction is aborted, commands ignored until end of transaction block");
  told_ = true;
}

bool LostTransaction::answer(char type, protocol::Bytes body, protocol::ClientStatements& statements, protocol::StatementCache& cache,
                             std::string& out) {
  protocol::Reader reader(body);
  const auto ends = [](const protocol::StatementRef& statement) {
    return statement && ends_transaction(std::string_view(statement->body).substr(0, statement->body.find('\0')));
  };
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
      const std::string_view sql = reader.cstring();
      const bool over = ends_transaction(sql);
      // Who hasn't heard of the loss must not take a COMMIT for done: it fails, as one does that violates a deferred constraint.
      if (over && (told_ || !commits(sql)))
        complete();
      else
        refuse(out);
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
      if (!ends_transaction(text.cstring()) || text.left() < 2 || (!name.empty() && statements.find(name))) return fail();
      statements.set(name, cache.intern({reinterpret_cast<const char*>(rest.data()), rest.size()}));
      empty(Backend::ParseComplete);
      return false;
    }
    case 'B': {
      reader.cstring();
      const protocol::StatementRef statement = statements.find(reader.cstring());
      bound_ = ends(statement) && reader.ok();
      if (!bound_) return fail();
      commits_ = commits(statement->body);
      empty(Backend::BindComplete);
      return false;
    }
    case 'D':
      if (reader.u8() == 'S') {
        if (!ends(statements.find(reader.cstring())) || !reader.ok()) return fail();
        Writer(out).begin(Backend::ParameterDescription).u16(0).end();
      } else if (!bound_) {
        return fail();
      }
      empty(Backend::NoData);
      return false;
    case 'E':
      if (!bound_) return fail();
      ended_ = true;
      if (!told_ && commits_) return fail();
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
