// The JSON documents of render.hpp.
#include "admin/json.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>

#include "admin/alerts.hpp"
#include "admin/render.hpp"

namespace pgsidecar::admin {

double millis(double micros) {
  return std::round(micros) / 1000;
}
double millis(std::uint64_t micros) {
  return static_cast<double>(micros) / 1000;
}
double megabytes(std::uint64_t bytes) {
  return std::round(static_cast<double>(bytes) / 1048576 * 10) / 10;
}

std::string iso8601(Clock::time_point time) {
  const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count();
  const std::time_t whole = ms / 1000;
  std::tm utc{};
  gmtime_r(&whole, &utc);
  std::array<char, 40> text{};
  const auto n = std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S.", &utc);
  const std::string fraction = std::to_string(1000 + ms % 1000);
  return std::string(text.data(), n) + fraction.substr(1) + "Z";
}

namespace {

using pool::PoolSnapshot;
using pool::Snapshot;
using Database = Snapshot::Database;

const char* status_of(Database database) {
  return database == Database::Up ? "up" : database == Database::Down ? "down" : "unknown";
}

void write_database(Json& json, const Snapshot& s, Clock::time_point now) {
  json.key("database").begin('{').field("status", status_of(s.database));
  if (s.database == Database::Unknown || s.databaseLatencyMicros == 0)
    json.null("latencyMs");
  else
    json.field("latencyMs", millis(s.databaseLatencyMicros));
  if (s.database == Database::Up || s.databaseSeenMicrosAgo != 0)
    json.field("lastOk", iso8601(now - std::chrono::microseconds(s.databaseSeenMicrosAgo)));
  else
    json.null("lastOk");
  json.field("source", s.databaseProbed ? "probe" : "passive");
  if (!s.databaseVersion.empty()) json.field("version", s.databaseVersion);
  const std::string& error = s.databaseError.empty() ? s.loginRefused : s.databaseError;
  if (error.empty())
    json.null("error");
  else
    json.field("error", error);
  json.end('}');
}

void write_memory(Json& json, const Process& process) {
  json.key("memory").begin('{').field("rssMb", megabytes(process.residentBytes));
  if (process.memoryLimitBytes)
    json.field("limitMb", megabytes(*process.memoryLimitBytes));
  else
    json.null("limitMb");
  json.field("virtualMb", megabytes(process.virtualBytes)).end('}');
}

/// What the server allows and who uses it; null before it has said so.
void write_capacity(Json& json, const Snapshot::Upstream& upstream, Clock::time_point now) {
  const bool known = upstream.maxConnections > 0;
  const auto number = [&](const char* name, std::uint64_t value) { known ? json.field(name, value) : json.null(name); };
  number("maxConnections", upstream.maxConnections);
  number("reserved", upstream.reserved);
  json.field("usedByUs", std::uint64_t{upstream.usedByUs});
  number("usedByOthers", upstream.used - std::min(upstream.used, upstream.usedByUs));
  if (known)
    json.field("askedAt", iso8601(now - std::chrono::microseconds(upstream.askedMicrosAgo)));
  else
    json.null("askedAt");
  json.field("maxByUs", std::uint64_t{upstream.maxByUs}).field("fits", !upstream.too_small());
  json.field("isPooler", upstream.isPooler).field("coldStarts", upstream.coldStarts);
  if (upstream.coldStarts > 0) {
    json.field("lastColdStart", iso8601(now - std::chrono::microseconds(upstream.coldStartMicrosAgo)));
    json.field("lastColdStartMs", millis(upstream.coldStartMicros));
  } else {
    json.null("lastColdStart").null("lastColdStartMs");
  }
  if (upstream.suspendMicrosAgo)
    json.field("lastSuspend", iso8601(now - std::chrono::microseconds(*upstream.suspendMicrosAgo)));
  else
    json.null("lastSuspend");
}

// What the top level and each pool of pool-stats have in common.
struct Counts {
  std::uint64_t total = 0, idle = 0, waiting = 0, active = 0, connecting = 0, resetting = 0, closing = 0, max = 0, min = 0, pinned = 0;

  void add(const PoolSnapshot& p) {
    total += p.total();
    idle += p.serversIdle;
    waiting += p.clientsWaiting;
    active += p.serversActive;
    connecting += p.serversLogin;
    resetting += p.serversReset;
    closing += p.serversClosing;
    max += p.max;
    min += p.min;
    pinned += p.pinned;
  }
  /// More than max are active after a reload that lowers it.
  double utilization() const {
    return max == 0 ? 0 : std::min(1.0, std::round(static_cast<double>(active) / static_cast<double>(max) * 1000) / 1000);
  }
  // pg-pool's expired connections are those that will be closed and not used again: here, the ones being
  // closed.
  void write(Json& json) const {
    json.field("totalCount", total).field("idleCount", idle).field("waitingCount", waiting);
    json.field("activeCount", active).field("connectingCount", connecting).field("resettingCount", resetting);
    json.field("expiredCount", closing);
    json.field("pinnedCount", pinned).field("max", max).field("min", min).field("utilization", utilization());
  }
};

void write_quantiles(Json& json, std::string_view name, const pool::Histogram& h) {
  json.key(name).begin('{').field("count", h.count());
  json.field("p50", millis(h.quantile(0.50))).field("p95", millis(h.quantile(0.95)));
  json.field("p99", millis(h.quantile(0.99))).field("max", millis(h.max_micros())).end('}');
}

// A setting that all pools share; null if they differ or there are none.
std::optional<std::uint64_t> common(const Snapshot& s, std::uint32_t PoolSnapshot::*member) {
  std::optional<std::uint64_t> value;
  for (const auto& p : s.pools) {
    if (value && *value != p.*member) return std::nullopt;
    value = p.*member;
  }
  return value;
}

void write_pool(Json& json, const PoolSnapshot& p) {
  Counts counts;
  counts.add(p);
  json.begin('{').field("database", p.database).field("user", p.user).field("mode", p.mode).field("paused", p.paused);
  counts.write(json);
  json.field("idleTimeoutMillis", std::uint64_t{p.idleTimeoutMillis});
  json.field("connectionTimeoutMillis", std::uint64_t{p.connectionTimeoutMillis});
  json.field("maxUses", std::uint64_t{p.maxUses});
  json.key("clients").begin('{').field("active", std::uint64_t{p.clientsActive});
  json.field("idle", std::uint64_t{p.clientsIdle}).field("waiting", std::uint64_t{p.clientsWaiting}).end('}');
  json.field("oldestWaitMs", millis(p.oldestWaitMicros));
  json.field("preparedStatements", std::uint64_t{p.preparedStatements});
  json.field("transactions", p.counters.transactions).field("queries", p.counters.queries);
  json.field("leakingCount", std::uint64_t{p.leaking}).field("leaks", p.counters.leaks);
  json.field("limitsReached", p.counters.limitsReached);
  json.field("leases", p.counters.leases).field("waitTimeouts", p.counters.waitTimeouts);
  json.field("residueChecks", p.counters.residueChecks);
  json.field("connects", p.counters.connects).field("connectFailures", p.counters.connectFailures);
  json.key("listening").begin('{').field("clients", std::uint64_t{p.listeningClients});
  json.field("channels", std::uint64_t{p.listeningChannels}).field("notifications", p.counters.notifications);
  json.field("overflows", p.counters.notificationOverflows).field("losses", p.counters.listenerLosses).end('}');
  write_quantiles(json, "wait", p.counters.wait);
  write_quantiles(json, "query", p.counters.query);
  write_quantiles(json, "transaction", p.counters.transaction);
  if (p.lastError.empty())
    json.null("lastError");
  else
    json.field("lastError", p.lastError);
  json.end('}');
}

}  // namespace

std::string health_json(const Snapshot& s, const Process& process, Clock::time_point now) {
  Counts counts;
  for (const auto& p : s.pools) counts.add(p);
  Json json;
  json.begin('{').field("status", health_status(s)).field("timestamp", iso8601(now));
  json.field("uptime", seconds(s.uptimeMicros)).field("version", PGSIDECAR_VERSION);
  json.field("started", s.started).field("draining", s.draining);
  json.key("checks").begin('{');
  write_database(json, s, now);
  json.key("pool").begin('{').field("totalCount", counts.total).field("idleCount", counts.idle);
  json.field("waitingCount", counts.waiting).field("activeCount", counts.active).field("max", counts.max);
  json.field("utilization", counts.utilization()).end('}');
  write_memory(json, process);
  json.end('}').end('}');
  return json.take();
}

std::string ready_json(const Snapshot& s) {
  const Readiness r = readiness(s);
  Json json;
  json.begin('{').field("ready", r.ready);
  if (r.ready)
    json.null("reason");
  else
    json.field("reason", r.reason);
  json.field("database", status_of(s.database)).end('}');
  return json.take();
}

std::string pool_stats_json(const Snapshot& s, const std::vector<Alert>& active, Clock::time_point now) {
  Counts counts;
  pool::Histogram wait, query, transaction;
  for (const auto& p : s.pools) {
    counts.add(p);
    wait.merge(p.counters.wait);
    query.merge(p.counters.query);
    transaction.merge(p.counters.transaction);
  }
  Json json;
  json.begin('{').field("schemaVersion", std::uint64_t{1}).field("timestamp", iso8601(now));
  counts.write(json);
  json.field("idleTimeoutMillis", common(s, &PoolSnapshot::idleTimeoutMillis));
  json.field("connectionTimeoutMillis", common(s, &PoolSnapshot::connectionTimeoutMillis));
  json.field("maxUses", common(s, &PoolSnapshot::maxUses));
  json.key("clients").begin('{').field("total", std::uint64_t{s.clients});
  json.field("login", std::uint64_t{s.clientsLogin}).field("max", std::uint64_t{s.maxClients}).end('}');
  write_quantiles(json, "wait", wait);
  write_quantiles(json, "query", query);
  write_quantiles(json, "transaction", transaction);
  json.key("alerts").begin('[');
  for (const Alert& alert : active) write_alert(json, alert);
  json.end(']').key("perPool").begin('[');
  for (const auto& p : s.pools) write_pool(json, p);
  json.end(']').end('}');
  return json.take();
}

std::string pools_json(const Snapshot& s, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("pools").begin('[');
  for (const auto& p : s.pools) write_pool(json, p);
  json.end(']').end('}');
  return json.take();
}

std::string sample_json(const Snapshot& s, const Process& process, const std::vector<Alert>& active, Clock::time_point now) {
  const auto line = [](std::string document) {
    document.pop_back();  // its newline
    return document;
  };
  return "{\"health\":" + line(health_json(s, process, now)) + ",\"stats\":" + line(pool_stats_json(s, active, now)) + "}";
}

std::string pins_json(const Snapshot& s, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("pins").begin('[');
  for (const auto& pin : s.pins) {
    json.begin('{').field("client", std::uint64_t{pin.client}).field("application", pin.application);
    json.field("database", pin.database).field("user", pin.user).field("serverPid", std::uint64_t{pin.serverPid});
    json.field("since", iso8601(now - std::chrono::microseconds(pin.micros))).field("seconds", seconds(pin.micros));
    json.field("statement", pin.statement).field("detail", pin.detail).key("reasons").begin('[');
    pool::for_each_reason(pin.reasons, [&](pool::PinReason reason) {
      json.begin('{').field("reason", pool::to_string(reason)).field("ends", pool::ends(reason)).end('}');
    });
    json.end(']').end('}');
  }
  json.end(']').end('}');
  return json.take();
}

std::string transparency_json(const Snapshot& s, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("pools").begin('[');
  for (const auto& p : s.pools) {
    const auto pinning = std::count_if(p.effects.begin(), p.effects.end(), [](const auto& e) { return e.pinned > 0; });
    json.begin('{').field("database", p.database).field("user", p.user).field("mode", p.mode);
    json.field("transactionModeSafe", true).field("pinningStatements", static_cast<std::uint64_t>(pinning));
    json.field("verdict", pinning == 0 ? "nothing seen needs a server connection of its own: transaction mode shares them all"
                                       : "transaction mode gives the right answers, but each client that runs one of the pinning "
                                         "statements keeps a server connection meanwhile");
    json.field("transactions", p.counters.transactions).field("residueChecks", p.counters.residueChecks);
    json.field("droppedStatements", p.effectsDropped).key("statements").begin('[');
    for (const auto& e : p.effects) {
      json.begin('{').field("statement", e.statement).field("pinned", e.pinned).field("carried", e.carried);
      json.field("checked", e.checked).key("reasons").begin('[');
      pool::for_each_reason(e.reasons, [&](pool::PinReason reason) { json.string(pool::to_string(reason)); });
      json.end(']').end('}');
    }
    json.end(']').key("functions").begin('[');
    for (const auto& f : p.functions) {
      json.begin('{').field("function", f.function).key("leaves").begin('[');
      for (const std::string& what : f.leaves) json.string(what);
      json.end(']').end('}');
    }
    json.end(']').key("everyTransactionCheckedFor").begin('[');
    for (const std::string& what : p.everyText) json.string(what);
    json.end(']').end('}');
  }
  json.end(']').end('}');
  return json.take();
}

std::string compute_health_json(const Snapshot& s, const Process& process, Clock::time_point now) {
  Json json;
  json.begin('{').field("schemaVersion", std::uint64_t{1}).field("status", health_status(s)).field("timestamp", iso8601(now));
  json.field("version", PGSIDECAR_VERSION).field("pid", static_cast<std::uint64_t>(process.pid));
  json.field("uptime", seconds(s.uptimeMicros)).field("draining", s.draining);
  if (s.database == Database::Unknown || s.databaseLatencyMicros == 0)
    json.null("latencyMs");
  else
    json.field("latencyMs", millis(s.databaseLatencyMicros));
  json.field("endpoint", s.upstream);
  const auto own = s.upstreams.find(s.upstream);
  write_capacity(json, own == s.upstreams.end() ? Snapshot::Upstream() : own->second, now);
  json.key("upstreams").begin('[');
  for (const auto& [name, upstream] : s.upstreams) {
    json.begin('{').field("name", name).field("status", status_of(upstream.state));
    if (upstream.error.empty())
      json.null("error");
    else
      json.field("error", upstream.error);
    write_capacity(json, upstream, now);
    json.end('}');
  }
  json.end(']');
  write_memory(json, process);
  json.key("cpu").begin('{').field("userSeconds", process.cpuUserSeconds);
  json.field("systemSeconds", process.cpuSystemSeconds);
  json.field("totalSeconds", process.cpuUserSeconds + process.cpuSystemSeconds).end('}');
  write_database(json, s, now);
  json.end('}');
  return json.take();
}

std::string error_json(std::string_view error, std::string_view hint) {
  Json json;
  json.begin('{').field("error", error);
  if (!hint.empty()) json.field("hint", hint);
  json.end('}');
  return json.take();
}

}  // namespace pgsidecar::admin
