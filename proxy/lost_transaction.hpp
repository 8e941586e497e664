// A transaction whose server connection is gone. Its client keeps its own connection and is answered as PostgreSQL answers
// in a failed transaction, until it ends it: the first request hears what happened, the others 25P02, COMMIT is a ROLLBACK.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "protocol/statements.hpp"
#include "protocol/wire.hpp"

namespace pgsidecar::proxy {

/// How one statement ends a transaction: by COMMIT or END, by ROLLBACK (not to a savepoint) or ABORT, or not at all.
enum class TransactionEnd { None, Commit, Rollback };
TransactionEnd transaction_end(std::string_view sql);

class LostTransaction {
 public:
  /// `told`: the client has heard the error already. `count`: called with the SQLSTATE of each that it hears from here.
  LostTransaction(std::string sqlstate, std::string message, bool told, std::function<void(std::string_view sqlstate)> count = {})
      : sqlstate_(std::move(sqlstate)), message_(std::move(message)), told_(told), count_(std::move(count)) {}

  /// Answers one whole request. `statements` are the client's: what ends transactions can be parsed, with this meaning; anything can be
  /// closed. True: the client has ended the transaction.
  bool answer(char type, protocol::Bytes body, protocol::ClientStatements& statements, protocol::StatementCache& cache,
              const std::shared_ptr<const void>& meaning, std::string& out);

 private:
  void refuse(std::string& out);

  std::string sqlstate_, message_;
  bool told_;
  std::function<void(std::string_view sqlstate)> count_;
  TransactionEnd bound_ = TransactionEnd::None;  // what the portal that is bound does
  bool ended_ = false;                           // it was executed; counts at Sync
  bool skipping_ = false;                        // up to Sync, after an error
};

}  // namespace pgsidecar::proxy
