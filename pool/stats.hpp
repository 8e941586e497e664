// What the pool did: counters, histograms, and the snapshot that the control loop renders. The data loop alone writes;
// a snapshot is a copy made on the data loop, so that nothing here is atomic or locked.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "pool/activity.hpp"
#include "pool/pins.hpp"
#include "pool/profile.hpp"

namespace pgsidecar::pool {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

/// In microseconds; at least 0.
inline std::uint64_t micros(Clock::duration d) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(0, std::chrono::duration_cast<std::chrono::microseconds>(d).count()));
}

/// Durations in microseconds in log-linear buckets: 2^kBits a power of two, so that a quantile is at most 1/2^kBits off. What is
/// longer than 2^36 microseconds (19 hours) counts in the last bucket.
template <unsigned kBits, class Count>
class LogHistogram {
 public:
  static constexpr std::size_t kSteps = std::size_t{1} << kBits;
  static constexpr std::size_t kBuckets = kSteps * (37 - kBits);

  void record(std::uint64_t micros) {
    ++counts_[index(micros)];
    ++count_;
    sum_ += micros;
    if (micros > max_) max_ = micros;
  }
  std::uint64_t count() const { return count_; }
  std::uint64_t sum_micros() const { return sum_; }
  std::uint64_t max_micros() const { return max_; }
  /// The value in microseconds below which a share `q` (0..1) of the records lies; 0 if there are none.
  double quantile(double q) const;
  /// How many records lie at or below `micros`, to a bucket's exactness (for Prometheus' cumulative buckets).
  std::uint64_t count_at_most(std::uint64_t micros) const;
  void merge(const LogHistogram& other);
  /// What was recorded since `earlier`, a copy of this one then. Its greatest value is known to a bucket's exactness.
  LogHistogram since(const LogHistogram& earlier) const;

 private:
  static std::size_t index(std::uint64_t micros);
  static std::uint64_t upper(std::size_t index);

  std::array<Count, kBuckets> counts_{};
  std::uint64_t count_ = 0, sum_ = 0, max_ = 0;
};
using Histogram = LogHistogram<4, std::uint64_t>;         // 4.2 KB
using CompactHistogram = LogHistogram<3, std::uint32_t>;  // 1.1 KB

enum class CloseReason { Idle, MaxUses, Lifetime, Error, AdminShutdown, Tls, Broken, Reload, Surplus, Drain, Login, kCount };
/// Tls: none where it is required, or its handshake failed. Unsupported: what it asks for isn't served. Server: none to greet it with
/// could be had, or the server refused what the client brought. Disabled: its database, by an operator.
enum class RejectReason { MaxClients, Auth, Timeout, Draining, Protocol, UnknownDatabase, Tls, Unsupported, Server, Disabled, kCount };
const char* to_string(CloseReason);
const char* to_string(RejectReason);

/// Counters of one (database, user) pool since start.
struct PoolCounters {
  std::uint64_t transactions = 0, queries = 0, leases = 0;
  std::uint64_t clientBytesReceived = 0, clientBytesSent = 0, serverBytesReceived = 0, serverBytesSent = 0;
  std::uint64_t preparedHits = 0, preparedMisses = 0, preparedEvictions = 0;
  std::uint64_t clientParses = 0, serverParses = 0, binds = 0;  ///< of named statements, as PgBouncer counts them
  std::uint64_t connects = 0, connectFailures = 0, waitTimeouts = 0, resets = 0, cancels = 0;
  std::uint64_t leaks = 0;          ///< transactions that were idle for longer than idleInTransactionWarnMillis
  std::uint64_t limitsReached = 0;  ///< requests cancelled and clients closed by a limit of the pool's
  std::uint64_t residueChecks = 0;  ///< the server was asked what a session holds
  PinCounts pins{};                 ///< begun, by reason
  std::uint64_t notifications = 0, notificationOverflows = 0, listenerLosses = 0;
  std::array<std::uint64_t, static_cast<std::size_t>(CloseReason::kCount)> closed{};
  Histogram wait, query, transaction, connect, tlsHandshake;
};

/// One pool as it is now.
struct PoolSnapshot {
  std::string database, user;
  std::uint32_t max = 0, min = 0, idleTimeoutMillis = 0, connectionTimeoutMillis = 0, maxUses = 0;
  std::string mode;                                                      // transaction | session | statement
  bool paused = false;                                                   // no client gets a server connection
  std::uint32_t clientsActive = 0, clientsIdle = 0, clientsWaiting = 0;  // logged in; sum = this pool's clients
  std::uint32_t serversActive = 0, serversIdle = 0, serversLogin = 0, serversReset = 0, serversClosing = 0;
  std::uint32_t cancelling = 0;      // server connections with a cancel request on its way
  std::uint32_t beingCancelled = 0;  // of those, the ones that nobody has leased: they are idle once it has been answered
  std::uint32_t pinned = 0;
  std::uint32_t leaking = 0;  // transactions idle for longer than idleInTransactionWarnMillis
  std::uint64_t oldestLeakMicros = 0;
  std::string oldestLeaker;  // its application
  PinCounts pinnedBy{};      // a client may have several reasons
  std::vector<StatementEffects> effects;
  std::uint64_t effectsDropped = 0;
  std::vector<FunctionEffects> functions;                     // the first 100
  std::vector<std::string> everyText;                         // what any text may leave behind, as far as the catalogs tell
  std::uint32_t listeningClients = 0, listeningChannels = 0;  // served by the pool's listener
  std::uint64_t oldestWaitMicros = 0;
  std::size_t preparedStatements = 0;
  PoolCounters counters;
  std::string lastError;  // why the last connect failed, the server's own text; empty after one that worked

  std::uint32_t total() const { return serversActive + serversIdle + serversLogin + serversReset + serversClosing; }
};

/// How many statements are told apart.
constexpr std::size_t kMostStatements = 1000;

/// One statement's record.
struct StatementRow {
  static constexpr std::size_t kErrors = 8;  ///< SQLSTATEs told apart; what comes after counts in errorCount alone
  struct Error {
    std::array<char, 5> sqlstate{};
    std::uint64_t count = 0;
  };
  std::string database, user;  ///< filled in copies
  std::string text, tags;
  std::uint64_t id = 0;  ///< of this record
  std::uint64_t calls = 0, errorCount = 0, rows = 0, bytes = 0, leftIdle = 0;
  std::uint64_t waitMicros = 0, serverMicros = 0, clientMicros = 0;
  CompactHistogram time;  ///< of whole executions
  std::array<Error, kErrors> errors{};
  Time first{}, last{};
  std::uint64_t firstMicrosAgo = 0, lastMicrosAgo = 0;  ///< filled in copies
};

/// A database as clients know it, and where its server connections go.
struct DatabaseSnapshot {
  std::string name;
  std::string host, port, database;  ///< the server's, as configured: of several hosts their names and ports, joined by commas
  std::string forceUser;             ///< the server's user for the upstream URL's; empty: the same
  std::string mode;                  ///< transaction | session | statement
  std::uint32_t max = 0, min = 0, maxLifetimeSeconds = 0;
  bool paused = false;    ///< itself or all; by an operator
  bool disabled = false;  ///< refuses new clients
};

/// The whole proxy as it is now.
struct Snapshot {
  bool draining = false;
  bool leaving = false;  // told to end, and the drain hasn't begun
  bool started = false;  // listening
  bool paused = false;   // all databases, by an operator
  std::uint64_t uptimeMicros = 0;
  std::uint32_t maxClients = 0, clients = 0, clientsLogin = 0;
  std::array<std::uint64_t, static_cast<std::size_t>(RejectReason::kCount)> rejected{};
  std::map<std::string, std::uint64_t> errorsByClass;  // SQLSTATE's first two characters, from servers and our own
  std::vector<PoolSnapshot> pools;
  std::vector<PinSnapshot> pins;            // oldest first
  std::vector<DatabaseSnapshot> databases;  // configured or in use, by name
  std::uint32_t users = 0;                  // configured or in use
  std::uint32_t consoles = 0;               // sessions of the SQL console; no clients
  std::uint32_t poolMax = 0;                // pool.max of the configuration
  bool pgbouncerCompatible = false;         // metrics.pgbouncerCompatible

  Time takenAt{};
  LoopCounters loop;
  LoopSnapshot dataLoop, controlLoop;

  // Only in detailed snapshots: Rows has the first four, Memory the last, Statements the others.
  enum class Detail { None, Rows, Statements, Memory };
  std::vector<ClientRow> clientRows;  // oldest first
  std::vector<ServerRow> serverRows;  // oldest first
  std::vector<LeakRow> leaks;         // oldest transaction first
  std::vector<std::string> userNames;
  std::vector<StatementRow> statements;
  std::uint64_t statementsEvicted = 0, statementsMicros = 0;  // for how long they have been counted
  MemoryOwners memory;

  // The database of upstream.url, seen passively: from connects and traffic.
  enum class Database { Unknown, Up, Down };
  Database database = Database::Unknown;
  std::uint64_t databaseLatencyMicros = 0;  // of the last connect or probe
  std::uint64_t databaseSeenMicrosAgo = 0;  // when it last answered; 0 with Unknown
  bool databaseProbed = false;              // the latency is a probe's
  std::string databaseError;                // the server's own text of the last failure
  std::string loginRefused;                 // what the server says to the upstream's own user, whom it lets in no more
  std::string databaseVersion;

  /// The same of each server, or group of servers, that a database may be on.
  struct Upstream {
    Database state = Database::Unknown;
    std::uint64_t latencyMicros = 0;  ///< of the last connect
    std::string error{};              ///< why the last connect failed, the server's own text; empty: it didn't
    /// Times that it took kColdStart or more to connect, failed attempts included, when there was no other connection: it had to wake up.
    std::uint64_t coldStarts = 0;
    std::uint64_t coldStartMicros = 0, coldStartMicrosAgo = 0;  ///< what the last one took, and when it was over
    std::optional<std::uint64_t> suspendMicrosAgo{};            ///< when it last ended idle connections of ours
    bool isPooler = false;                                      ///< a provider's, in transaction mode
    // As the server said last; no maxConnections: it wasn't asked yet.
    std::uint32_t maxConnections = 0, reserved = 0, used = 0;  ///< reserved for superusers and such; used by anyone
    std::uint64_t askedMicrosAgo = 0;
    std::uint32_t usedByUs = 0;  ///< now, as this proxy counts
    std::uint32_t maxByUs = 0;   ///< what this proxy's pools may open

    std::uint32_t usable() const { return maxConnections - std::min(maxConnections, reserved); }
    bool too_small() const { return maxConnections != 0 && maxByUs > usable(); }
  };
  static constexpr std::chrono::milliseconds kColdStart{500};
  std::string upstream;                       // the name of that of upstream.url
  std::map<std::string, Upstream> upstreams;  // by host:port, of several hosts joined by commas
  /// When certificates expire, seconds since the epoch: tls.certificate, and by host:port what servers have shown.
  std::map<std::string, std::int64_t> certificates;
};

}  // namespace pgsidecar::pool
