// What pgbouncer_exporter would tell of a PgBouncer in this place, for dashboards and alerts that exist. What PgBouncer counts and
// this doesn't have (reserve pools, connections to be checked before use, DNS) is 0, as it is there when it isn't in use.
#include <algorithm>
#include <map>

#include "admin/exposition.hpp"

namespace pgsidecar::admin {
namespace {

using pool::DatabaseSnapshot;
using pool::PoolCounters;
using pool::PoolSnapshot;
using pool::Snapshot;

struct PoolGauge {
  const char *name, *help;
  std::uint64_t (*value)(const PoolSnapshot&);
};
constexpr PoolGauge kPools[] = {
    {"pgbouncer_pools_client_active_connections", "Clients that have a server connection or want none.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.clientsActive} + p.clientsIdle; }},
    {"pgbouncer_pools_client_waiting_connections", "Clients waiting for a server connection.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.clientsWaiting}; }},
    {"pgbouncer_pools_client_active_cancel_connections", "Cancel requests that the server hasn't answered yet.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.cancelling}; }},
    {"pgbouncer_pools_client_waiting_cancel_connections", "Cancel requests not forwarded yet: none, since they don't wait.",
     [](const PoolSnapshot&) { return std::uint64_t{0}; }},
    {"pgbouncer_pools_server_active_connections", "Server connections that a client has.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.serversActive}; }},
    {"pgbouncer_pools_server_idle_connections", "Server connections that are free.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.serversIdle}; }},
    {"pgbouncer_pools_server_used_connections", "Server connections to be checked before use: none.",
     [](const PoolSnapshot&) { return std::uint64_t{0}; }},
    {"pgbouncer_pools_server_testing_connections", "Server connections being reset.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.serversReset}; }},
    {"pgbouncer_pools_server_login_connections", "Server connections being opened.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.serversLogin}; }},
    {"pgbouncer_pools_server_active_cancel_connections", "Server connections with a cancel request on its way.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.cancelling}; }},
    {"pgbouncer_pools_server_being_canceled_connections", "Server connections that are free once a cancel request has been answered.",
     [](const PoolSnapshot& p) { return std::uint64_t{p.beingCancelled}; }}};

// PgBouncer counts a query from a request to its ReadyForQuery, an extended one from Parse to Sync.
struct Stat {
  const char *name, *help;
  double (*value)(const PoolCounters&);
};
constexpr Stat kStats[] = {
    {"pgbouncer_stats_queries_pooled_total", "Requests answered up to ReadyForQuery.",
     [](const PoolCounters& c) { return static_cast<double>(c.query.count()); }},
    {"pgbouncer_stats_queries_duration_seconds_total", "Time that servers spent on them.",
     [](const PoolCounters& c) { return seconds(c.query.sum_micros()); }},
    {"pgbouncer_stats_received_bytes_total", "Bytes received from clients.",
     [](const PoolCounters& c) { return static_cast<double>(c.clientBytesReceived); }},
    {"pgbouncer_stats_sent_bytes_total", "Bytes sent to clients.",
     [](const PoolCounters& c) { return static_cast<double>(c.clientBytesSent); }},
    {"pgbouncer_stats_client_wait_seconds_total", "Time that clients spent waiting for a server connection.",
     [](const PoolCounters& c) { return seconds(c.wait.sum_micros()); }},
    {"pgbouncer_stats_sql_transactions_pooled_total", "Transactions ended.",
     [](const PoolCounters& c) { return static_cast<double>(c.transactions); }},
    {"pgbouncer_stats_server_in_transaction_seconds_total", "Time spent in transactions, idle in them included.",
     [](const PoolCounters& c) { return seconds(c.transaction.sum_micros()); }},
    {"pgbouncer_stats_client_parses_total", "Named statements that clients prepared.",
     [](const PoolCounters& c) { return static_cast<double>(c.clientParses); }},
    {"pgbouncer_stats_server_parses_total", "Named statements prepared on servers.",
     [](const PoolCounters& c) { return static_cast<double>(c.serverParses); }},
    {"pgbouncer_stats_binds_total", "Named statements bound.", [](const PoolCounters& c) { return static_cast<double>(c.binds); }}};

void write_pgbouncer_pools(Writer& out, const std::vector<PoolRow>& rows) {
  for (const auto& gauge : kPools) {
    out.family(gauge.name, MetricType::Gauge, gauge.help);
    for (const auto& row : rows) out.sample(row.labels, gauge.value(*row.pool));
  }
  out.family("pgbouncer_pools_client_maxwait_seconds", MetricType::Gauge, "How long the first client in the queue has waited.");
  for (const auto& row : rows) out.sample(row.labels, seconds(row.pool->oldestWaitMicros));
}

void write_stats(Writer& out, const std::vector<PoolRow>& rows) {
  for (const auto& stat : kStats) {
    std::map<std::string_view, double> sums;  // by database
    for (const auto& row : rows) sums[row.database] += stat.value(row.pool->counters);
    out.family(stat.name, MetricType::Counter, stat.help);
    for (const auto& [database, sum] : sums) out.sample(label("database", database), sum);
  }
}

void write_databases(Writer& out, const Snapshot& s, LabelSets& labels) {
  struct Row {
    std::string labels;
    std::uint64_t poolSize = 0, connections = 0;
    bool paused = false, disabled = false;  // of several: one of them
  };
  std::map<std::string_view, std::uint64_t> connections;
  for (const auto& p : s.pools) connections[p.database] += p.total();
  std::vector<Row> rows;
  Row other;
  for (const auto& d : s.databases) {
    const bool shown = labels.admit(d.name);
    Row row;
    if (shown)
      row.labels = label("name", d.name) + "," + label("host", d.host) + "," + label("port", d.port) + "," + label("database", d.database) +
                   "," + label("force_user", d.forceUser) + "," + label("pool_mode", d.mode);
    Row& to = shown ? row : other;
    to.poolSize += d.max;
    to.connections += connections[d.name];
    to.paused |= d.paused;
    to.disabled |= d.disabled;
    if (shown) rows.push_back(std::move(row));
  }
  if (rows.size() < s.databases.size()) {
    other.labels = R"(name="other",host="",port="",database="",force_user="",pool_mode="")";
    rows.push_back(std::move(other));
  }
  const auto gauge = [&](const char* name, const char* help, auto value) {
    out.family(name, MetricType::Gauge, help);
    for (const auto& row : rows) out.sample(row.labels, std::uint64_t{value(row)});
  };
  const auto none = [](const Row&) { return 0u; };
  gauge("pgbouncer_databases_pool_size", "Server connections that a user of it may have.", [](const Row& r) { return r.poolSize; });
  gauge("pgbouncer_databases_reserve_pool", "Further ones for clients that wait too long: none.", none);
  gauge("pgbouncer_databases_max_connections", "Server connections that all its users may have: 0, no limit of its own.", none);
  gauge("pgbouncer_databases_current_connections", "Server connections that there are.", [](const Row& r) { return r.connections; });
  gauge("pgbouncer_databases_paused", "1 if it is paused.", [](const Row& r) { return r.paused; });
  gauge("pgbouncer_databases_disabled", "1 if it is disabled.", [](const Row& r) { return r.disabled; });
}

}  // namespace

void write_pgbouncer(Writer& out, const Snapshot& s, const std::vector<PoolRow>& rows, LabelSets& labels) {
  const auto gauge = [&](const char* name, const char* help, std::uint64_t value) { out.one(name, MetricType::Gauge, help, value); };
  gauge("pgbouncer_up", "Always 1: this answers.", 1);
  out.family("pgbouncer_version_info", MetricType::Info, "What this is; always 1.");
  out.sample(label("version", "pgsidecar " PGSIDECAR_VERSION), std::uint64_t{1});
  gauge("pgbouncer_config_max_client_connections", "limits.maxClients.", s.maxClients);
  gauge("pgbouncer_config_max_user_connections", "pool.max.", s.poolMax);

  std::uint64_t servers = 0;
  for (const auto& p : s.pools) servers += p.total();
  gauge("pgbouncer_databases", "Databases configured or in use.", s.databases.size());
  gauge("pgbouncer_users", "Users configured or in use.", s.users);
  gauge("pgbouncer_pools", "Pools: databases and users in use.", s.pools.size());
  gauge("pgbouncer_free_clients", "Memory kept for further clients: none.", 0);
  gauge("pgbouncer_used_clients", "Clients, those logging in included.", std::uint64_t{s.clients} + s.clientsLogin);
  gauge("pgbouncer_login_clients", "Clients logging in.", s.clientsLogin);
  gauge("pgbouncer_free_servers", "Memory kept for further server connections: none.", 0);
  gauge("pgbouncer_used_servers", "Server connections.", servers);
  gauge("pgbouncer_cached_dns_names", "Names whose addresses are kept: none, each connect looks them up.", 0);
  gauge("pgbouncer_cached_dns_zones", "DNS zones that are kept: none.", 0);
  gauge("pgbouncer_in_flight_dns_queries", "DNS queries counted here: none.", 0);

  write_pgbouncer_pools(out, rows);
  write_stats(out, rows);
  write_databases(out, s, labels);
}

}  // namespace pgsidecar::admin
