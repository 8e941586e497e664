// The configuration as one immutable value. Defaults stand only here; load.hpp fills it from YAML and the
// environment, url.hpp reads connection strings. Units are in the names, and the pool's names, units and
// meanings are node-postgres'.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace pgsidecar::conf {

/// host:port, with an IPv6 address in brackets.
inline std::string print_address(const std::string& host, unsigned port) {
  return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
}

/// One address to listen on. `port` 0 takes a free one (printed at start).
struct Listen {
  enum class Kind { Tcp, Unix };
  Kind kind = Kind::Tcp;
  std::string host;  ///< Tcp: IPv4, IPv6, a name, or * for every address of both
  std::uint16_t port = 0;
  std::string directory;  ///< Unix: the socket is directory/.s.PGSQL.port

  friend bool operator==(const Listen&, const Listen&) = default;
};

enum class PoolMode { Transaction, Session, Statement };
enum class ResidueCheck { Triggered, Always, Never };
enum class OnUnsupported { Pin, Error };
enum class AuthMethod { ScramSha256, Md5, Password, Trust, Cert };
enum class TlsMode { Disable, Allow, Require, VerifyFull };
enum class LogFormat { Text, Json };

/// `pool:`; also below a database or a user, where only the keys given there differ from the outer ones: a user's count before a
/// database's, and those before the global ones.
struct PoolSettings {
  PoolMode mode = PoolMode::Transaction;
  std::uint32_t max = 15;  ///< per (database, user); connections being opened and closed included
  std::uint32_t min = 2;
  std::uint32_t idleTimeoutMillis = 20000;       ///< 0: never
  std::uint32_t connectionTimeoutMillis = 5000;  ///< 0: wait without a limit
  std::uint32_t holdMillis = 0;                  ///< the same while the server is away or the database paused; 0: connectionTimeoutMillis
  std::uint32_t dnsCheckSeconds = 30;            ///< how often names are looked up anew while there is traffic; 0: at connects alone
  std::uint32_t maxUses = 5000;                  ///< leases; 0: no limit
  std::uint32_t maxLifetimeSeconds = 3600;       ///< 0: no limit
  bool allowExitOnIdle = false;
  bool keepAlive = true;
  std::uint32_t keepAliveInitialDelayMillis = 10000;
  ResidueCheck residueCheck = ResidueCheck::Triggered;
  OnUnsupported onUnsupported = OnUnsupported::Pin;  ///< what a statement gets that needs a server connection of its own
  bool noticePins = false;                           ///< a client that is pinned is told so by a NOTICE
  std::uint32_t maxPreparedStatements = 500;         ///< per server connection; least recently used leaves
  // Limits on clients; 0: none.
  std::uint32_t queryTimeoutMillis = 0;               ///< from a request to its last answer, a wait included: 57014
  std::uint32_t clientIdleTimeoutMillis = 0;          ///< outside a transaction: 57P05, and the client leaves
  std::uint32_t maxTransactionMillis = 0;             ///< from its lease on: 25P04, and the client leaves
  std::uint32_t idleInTransactionWarnMillis = 30000;  ///< then it is logged and listed as a leak
  std::uint32_t idleInTransactionTimeoutMillis = 0;   ///< 25P03, and the client leaves
  bool noticeLeaks = false;                           ///< a client is told of its leak by a NOTICE

  friend bool operator==(const PoolSettings&, const PoolSettings&) = default;
};

/// A server to connect to, as written: expanded and parsed anew at each connect (`resolve_upstream`, load.hpp),
/// so that a rotated secret in `${file:...}` counts from the next connect on.
struct Upstream {
  std::string url;                          ///< URI or keyword string, `${...}` not yet expanded
  std::map<std::string, std::string> keys;  ///< libpq keywords given beside the URL (they win), unexpanded
  std::string dbname;                       ///< the database if neither names one: the section's name
  std::uint32_t suspendAfterSeconds = 0;    ///< without a query for so long the server goes to sleep; 0: it doesn't
  /// A program and its arguments, `${...}` not yet expanded. Its first line of output is the server's password, whatever the URL says;
  /// that one is then for clients alone.
  std::vector<std::string> passwordCommand{};
  std::uint32_t passwordCommandTimeoutMillis = 10000;
  std::uint32_t passwordCacheSeconds = 600;  ///< for how long what the program gave is used; 0: for one connect

  friend bool operator==(const Upstream&, const Upstream&) = default;
};

/// `databases:` NAME, or "*" for every database of the server under its own name.
struct Database {
  std::string name;
  Upstream upstream;  ///< the global one overlaid with this section's keys; with a url of its own it begins anew
  PoolSettings pool;

  friend bool operator==(const Database&, const Database&) = default;
};

/// `users:` NAME, or "*" for any user that authenticates.
struct User {
  std::string name;
  /// Plain text, `md5...` or `SCRAM-SHA-256$...` (pg_authid's forms), `${...}` not yet expanded; absent: the
  /// upstream URL's password if the name is the URL's user.
  std::optional<std::string> password;
  std::map<std::string, std::string> pool;  ///< keys of PoolSettings that differ from the database's, with their values

  friend bool operator==(const User&, const User&) = default;
};

struct Auth {
  AuthMethod method = AuthMethod::ScramSha256;
  friend bool operator==(const Auth&, const Auth&) = default;
};

struct Tls {
  TlsMode mode = TlsMode::Disable;
  std::string certificate, key, ca;  ///< PEM files
  friend bool operator==(const Tls&, const Tls&) = default;
};

struct Limits {
  std::uint32_t maxClients = 1000;
  std::uint32_t maxLoginClients = 128;  ///< clients that haven't authenticated yet
  std::uint32_t loginTimeoutMillis = 10000;
  std::uint32_t maxPreparedStatementsPerClient = 10000;
  std::uint64_t maxParseBytes = 16u << 20;  ///< the largest Parse or Query whose text is looked at, bytes
  friend bool operator==(const Limits&, const Limits&) = default;
};

struct Admin {
  Listen listen{Listen::Kind::Tcp, "127.0.0.1", 5000, {}};
  bool enabled = true;                         ///< `admin.listen: off`
  std::string tokenFile;                       ///< bearer token for callers that aren't on loopback
  bool quitquitquit = false;                   ///< POST /quitquitquit answers
  std::vector<std::string> hosts;              ///< further names allowed in the Host header
  std::vector<std::string> users, statsUsers;  ///< of the SQL console: for all commands, for SHOW
  friend bool operator==(const Admin&, const Admin&) = default;
};

struct Log {
  std::string level = "info";  ///< trace debug info warn error off
  LogFormat format = LogFormat::Text;
  std::uint32_t slowQueryMillis = 0;  ///< statements that took so long are logged, the wait and the client's reading included; 0: none
  friend bool operator==(const Log&, const Log&) = default;
};

struct Metrics {
  bool pgbouncerCompatible = false;  ///< /metrics has the series of PgBouncer's exporter besides
  friend bool operator==(const Metrics&, const Metrics&) = default;
};

enum class WebhookFormat { Json, Alertmanager, Slack };

/// Where alerts are told.
struct Webhook {
  std::string url;  ///< http or https; of Alertmanager without /api/v2/alerts
  WebhookFormat format = WebhookFormat::Json;
  std::string authorization;  ///< the Authorization header
  std::string ca;             ///< PEM file; empty: the system's
  friend bool operator==(const Webhook&, const Webhook&) = default;
};

/// Thresholds; 0 switches an alert, or its part, off.
struct Alerts {
  bool enabled = true;
  std::uint32_t waitingClients = 5;               ///< more of them wait for a pool's connection
  std::uint32_t waitingSeconds = 30;              ///< some have waited for so long
  std::uint32_t connectionsPercent = 80;          ///< in use, of a pool's max
  std::uint32_t connectionsCriticalPercent = 90;  ///< the same
  std::uint32_t memoryMb = 100;                   ///< resident
  std::uint32_t databaseSlowMillis = 1000;        ///< p95 of the last minute's queries
  std::uint32_t databaseSlowFactor = 3;           ///< and so many times as slow as usual
  std::uint32_t errorPercent = 10;                ///< errors per query in the last minute
  std::uint32_t pinnedPercent = 50;               ///< connections that clients keep, of a pool's max
  std::uint32_t certificateDays = 14;             ///< until a certificate expires
  std::uint32_t drainSeconds = 15;                ///< a drain takes longer
  std::uint32_t forSeconds = 10;                  ///< how long connections, memory, times, errors and pins are past it before it is told
  std::uint32_t clearSeconds = 15;                ///< how long all is well before the end is told
  std::map<std::string, Webhook> webhooks;
  friend bool operator==(const Alerts&, const Alerts&) = default;
};

struct Shutdown {
  std::uint32_t timeoutMillis = 30000;
  bool acceptWhileDraining = false;
  std::uint32_t delayMillis = 0;         ///< from SIGTERM to the drain: all is served, but /health/ready is 503
  std::uint32_t exitIfUnusedMillis = 0;  ///< from the start; exit 0 if no client has logged in by then; 0: never
  friend bool operator==(const Shutdown&, const Shutdown&) = default;
};

struct Config {
  std::vector<Listen> listen{{Listen::Kind::Tcp, "127.0.0.1", 6432, {}}};
  bool watchConfig = false;  ///< a change of the file, or of those that it names, is a reload
  Upstream upstream{"${DATABASE_URL}", {}, {}};
  PoolSettings pool;
  std::map<std::string, Database> databases;  ///< empty: the upstream URL's database under its own name
  std::map<std::string, User> users;          ///< empty: the upstream URL's user
  Auth auth;
  Tls tls;
  Limits limits;
  Admin admin;
  Log log;
  Metrics metrics;
  Alerts alerts;
  Shutdown shutdown;

  friend bool operator==(const Config&, const Config&) = default;
};

}  // namespace pgsidecar::conf
