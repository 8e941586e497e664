// Who is connected and what they do: the rows of clients and server connections in a detailed snapshot. They name clients, so
// that only callers who may see names get them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace pgsidecar::pool {

/// One client as it is now.
struct ClientRow {
  std::uint32_t id = 0;
  std::string database, user, application;  ///< empty while it logs in
  std::string peer;                         ///< address:port, [v6]:port or "unix socket"
  bool tls = false;
  const char* state = "";                              ///< login | idle | waiting | active | idle in transaction | closing
  std::uint64_t stateMicros = 0, connectedMicros = 0;  ///< for how long
  std::uint64_t transactionMicros = 0;                 ///< since its server connection was leased; 0: it holds none
  std::uint64_t server = 0;                            ///< the connection that it holds; 0: none
  std::uint32_t serverPid = 0;
  std::uint64_t request = 0;     ///< the id of its last request; 0: none yet
  std::string statement;         ///< normalised text of the last that it sent, kept while it holds a server connection
  std::uint32_t pinReasons = 0;  ///< bits of PinReason
  std::uint64_t preparedStatements = 0;
  std::string local;                ///< our own end, as peer
  std::string cipher;               ///< TLS version and cipher; empty without
  std::uint64_t requestMicros = 0;  ///< since its last request; 0: none yet
  int fd = -1;
};

/// One server connection as it is now.
struct ServerRow {
  std::uint64_t id = 0;
  std::uint32_t pid = 0;
  std::string database, user;
  std::string address;  ///< host:port as connected; empty while connecting
  std::string local;    ///< our own end: address:port
  bool tls = false;
  const char* state = "";  ///< login | idle | active | idle in transaction | reset | listening | closing
  std::uint64_t stateMicros = 0, connectedMicros = 0;
  std::uint32_t uses = 0, useLimit = 0;  ///< leases so far and allowed; limit 0: none
  std::uint32_t client = 0;              ///< who holds it; 0: nobody
  std::string application, statement;    ///< that client's
  std::uint64_t preparedStatements = 0;
  std::string cipher;               ///< TLS version and cipher; empty without
  std::uint64_t requestMicros = 0;  ///< since the last request that was sent there; 0: none yet
  bool condemned = false;           ///< closed when it is released
  int fd = -1;
};

/// A transaction that has been idle for longer than pool.idleInTransactionWarnMillis.
struct LeakRow {
  std::uint32_t client = 0, serverPid = 0;
  std::string database, user, application, peer;
  std::uint64_t request = 0;                    ///< the id of its last request
  std::uint64_t ageMicros = 0, idleMicros = 0;  ///< of the transaction; since its last statement was answered
  std::string firstStatement, lastStatement;    ///< of the transaction, normalised
};

/// What an operator may have the data loop do.
struct Command {
  /// Those from Pause on are about one database, or all. Pause is done when their server connections are closed, WaitClose when
  /// those are that Reconnect or a reload has outdated.
  enum class Kind { CancelClient, CloseClient, CloseServer, ResetStatements, Pause, Resume, Reconnect, Kill, Disable, Enable, WaitClose };
  Kind kind{};
  std::uint64_t id = 0;  ///< of the client or server
  std::string database;  ///< empty: all
};

}  // namespace pgsidecar::pool
