#include "admin/render.hpp"

#include <openssl/crypto.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <span>
#include <vector>

#include "admin/alerts.hpp"
#include "admin/exposition.hpp"

namespace pgsidecar::admin {

using pool::PoolCounters;
using pool::PoolSnapshot;
using pool::Snapshot;
using Database = Snapshot::Database;

std::string number(double value) {
  if (!std::isfinite(value)) return "0";
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value);
  return {text.data(), end.ptr};
}

double seconds(std::uint64_t micros) {
  return static_cast<double>(micros) / 1e6;
}

namespace {

// When the process began: its start in ticks after boot, and the boot's time. The command's name in
// /proc/self/stat may contain spaces and parentheses, so fields are counted after the last ')'.
double read_start_time() {
  std::ifstream self("/proc/self/stat");
  std::string line;
  std::getline(self, line);
  const auto close = line.rfind(')');
  if (close == std::string::npos) return 0;
  std::size_t at = close + 2;
  for (int field = 3; field < 22 && at != std::string::npos; ++field) {
    at = line.find(' ', at);
    if (at != std::string::npos) ++at;
  }
  if (at == std::string::npos) return 0;
  double ticks = 0;
  std::from_chars(line.data() + at, line.data() + line.size(), ticks);
  const auto seconds = [](clockid_t clock) {
    timespec t{};
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) / 1e9;
  };
  const double booted = seconds(CLOCK_REALTIME) - seconds(CLOCK_BOOTTIME);  // the kernel's btime, where /proc/stat isn't to be seen
  return booted + ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

double to_seconds(const timeval& t) {
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
}

}  // namespace

Process read_process() {
  static const double start_time = read_start_time();
  Process p;
  p.pid = static_cast<int>(getpid());
  p.startTimeSeconds = start_time;
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  std::ifstream statm("/proc/self/statm");
  if (statm >> p.virtualBytes >> p.residentBytes) {
    p.virtualBytes *= page;
    p.residentBytes *= page;
  }
  std::uint64_t limit = 0;
  if (std::ifstream cgroup("/sys/fs/cgroup/memory.max"); cgroup >> limit) p.memoryLimitBytes = limit;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  p.cpuUserSeconds = to_seconds(usage.ru_utime);
  p.cpuSystemSeconds = to_seconds(usage.ru_stime);
  rlimit files{};
  getrlimit(RLIMIT_NOFILE, &files);
  p.maxFds = files.rlim_cur;
  return p;
}

std::uint64_t count_open_files() {
  std::uint64_t count = 0;
  std::error_code ec;
  for (std::filesystem::directory_iterator it("/proc/self/fd", ec), end; !ec && it != end; it.increment(ec)) ++count;
  return count > 0 ? count - 1 : 0;  // without the listing's own
}

Readiness readiness(const Snapshot& s) {
  if (s.draining) return {false, "draining"};
  if (s.leaving) return {false, "leaving: the drain begins after shutdown.delayMillis"};
  if (!s.started) return {false, "not listening yet"};
  if (s.database == Database::Down)
    return {false, "database down: " + (s.databaseError.empty() ? std::string("no reason known") : s.databaseError)};
  if (!s.loginRefused.empty()) return {false, "the database refuses the login: " + s.loginRefused};
  return {true, {}};
}

const char* health_status(const Snapshot& s) {
  if (!s.started || s.database == Database::Down || !s.loginRefused.empty()) return "unhealthy";
  if (s.draining || s.leaving) return "degraded";
  const auto is_down = [](const auto& one) { return one.second.state == Database::Down; };
  if (std::any_of(s.upstreams.begin(), s.upstreams.end(), is_down)) return "degraded";
  for (const auto& p : s.pools)
    if (!p.lastError.empty()) return "degraded";
  return "healthy";
}

namespace {

constexpr const char* kOther = "other";

template <class Set, class Value>
bool admit_to(Set& shown, const Value& value) {
  if (shown.contains(value)) return true;
  if (shown.size() >= LabelSets::kLimit) return false;
  shown.insert(value);
  return true;
}

}  // namespace

// Whose own name is that of the sum is part of it, so that no series comes twice.
bool LabelSets::admit(const std::string& database, const std::string& user) {
  return (database != kOther || user != kOther) && admit_to(pools_, std::make_pair(database, user));
}

bool LabelSets::admit(const std::string& database) {
  return database != kOther && admit_to(databases_, database);
}

namespace {

// Bounds in microseconds, with the text that OpenMetrics asks for.
struct Bound {
  std::uint64_t micros;
  const char* le;
};
constexpr Bound kWaitBounds[] = {{100, "0.0001"},  {250, "0.00025"}, {500, "0.0005"},  {1000, "0.001"},   {2500, "0.0025"}, {5000, "0.005"},
                                 {10000, "0.01"},  {25000, "0.025"}, {50000, "0.05"},  {100000, "0.1"},   {250000, "0.25"}, {500000, "0.5"},
                                 {1000000, "1.0"}, {2500000, "2.5"}, {5000000, "5.0"}, {10000000, "10.0"}};
constexpr std::span kQueryBounds = std::span(kWaitBounds).subspan(1);
constexpr Bound kConnectBounds[] = {{1000, "0.001"},  {5000, "0.005"}, {10000, "0.01"},  {25000, "0.025"}, {50000, "0.05"}, {100000, "0.1"},
                                    {250000, "0.25"}, {500000, "0.5"}, {1000000, "1.0"}, {2500000, "2.5"}, {5000000, "5.0"}};

struct HistogramFamily {
  const char *name, *help;
  pool::Histogram PoolCounters::*member;
  std::span<const Bound> bounds;
};
constexpr HistogramFamily kHistograms[] = {
    {"pgsidecar_pool_wait_seconds", "How long clients waited for a server connection.", &PoolCounters::wait, kWaitBounds},
    {"pgsidecar_query_seconds", "Time from a request's relay to its ReadyForQuery, the wait for a connection left out.",
     &PoolCounters::query, kQueryBounds},
    {"pgsidecar_transaction_seconds", "Time from a transaction's first request to its end.", &PoolCounters::transaction, kQueryBounds},
    {"pgsidecar_server_connect_seconds", "Time to connect and log in to the server.", &PoolCounters::connect, kConnectBounds},
    {"pgsidecar_server_tls_handshake_seconds", "Time of TLS handshakes with the server.", &PoolCounters::tlsHandshake, kConnectBounds}};

struct CounterFamily {
  const char *name, *help;
  std::uint64_t PoolCounters::*member;
};
constexpr CounterFamily kCounters[] = {
    {"pgsidecar_queries_total", "Queries relayed: simple ones, and of the extended protocol each Bind.", &PoolCounters::queries},
    {"pgsidecar_transactions_total", "Transactions ended, a statement outside of one included.", &PoolCounters::transactions},
    {"pgsidecar_server_assignments_total", "Leases: times that a server connection was given to a client.", &PoolCounters::leases},
    {"pgsidecar_server_connects_total", "Server connections opened.", &PoolCounters::connects},
    {"pgsidecar_server_connect_failures_total", "Server connections that could not be opened.", &PoolCounters::connectFailures},
    {"pgsidecar_server_resets_total", "Server connections reset before the next client.", &PoolCounters::resets},
    {"pgsidecar_pool_wait_timeouts_total", "Clients that waited connectionTimeoutMillis in vain.", &PoolCounters::waitTimeouts},
    {"pgsidecar_leaks_total", "Transactions that were idle for longer than idleInTransactionWarnMillis.", &PoolCounters::leaks},
    {"pgsidecar_limits_reached_total", "Requests cancelled and clients closed by a limit of the pool's.", &PoolCounters::limitsReached},
    {"pgsidecar_residue_checks_total", "Times that the server was asked what a session holds.", &PoolCounters::residueChecks},
    {"pgsidecar_cancels_total", "Cancel requests forwarded.", &PoolCounters::cancels},
    {"pgsidecar_notifications_total", "Notifications delivered to clients that the pool's listener listens for.",
     &PoolCounters::notifications},
    {"pgsidecar_notification_overflows_total", "Clients ended because they didn't take their notifications.",
     &PoolCounters::notificationOverflows},
    {"pgsidecar_listener_losses_total", "Times that the listener's connection was lost, and notifications may have been.",
     &PoolCounters::listenerLosses},
    {"pgsidecar_prepared_cache_hits_total", "Statements that were prepared already where they were needed.", &PoolCounters::preparedHits},
    {"pgsidecar_prepared_cache_misses_total", "Statements that had to be prepared.", &PoolCounters::preparedMisses},
    {"pgsidecar_prepared_cache_evictions_total", "Statements closed on a server to make room.", &PoolCounters::preparedEvictions},
    {"pgsidecar_client_parses_total", "Named statements that clients prepared.", &PoolCounters::clientParses},
    {"pgsidecar_server_parses_total", "Named statements prepared on servers.", &PoolCounters::serverParses},
    {"pgsidecar_binds_total", "Named statements bound.", &PoolCounters::binds}};

struct GaugeFamily {
  const char *name, *help;
  std::uint32_t PoolSnapshot::*member;
};
constexpr GaugeFamily kGauges[] = {
    {"pgsidecar_pool_max_connections", "The pool's max.", &PoolSnapshot::max},
    {"pgsidecar_pool_min_connections", "The pool's min.", &PoolSnapshot::min},
    {"pgsidecar_pool_waiting_clients", "Clients waiting for a server connection.", &PoolSnapshot::clientsWaiting},
    {"pgsidecar_leaking_transactions", "Transactions that are idle for longer than idleInTransactionWarnMillis.", &PoolSnapshot::leaking},
    {"pgsidecar_listening_clients", "Clients that the pool's listener listens for.", &PoolSnapshot::listeningClients},
    {"pgsidecar_listening_channels", "Channels that the pool's listener listens to.", &PoolSnapshot::listeningChannels},
    {"pgsidecar_pool_pinned_connections", "Server connections kept by one client beyond its transaction.", &PoolSnapshot::pinned}};

struct StateLabel {
  const char* state;
  std::uint32_t PoolSnapshot::*member;
};
constexpr StateLabel kClientStates[] = {
    {"active", &PoolSnapshot::clientsActive}, {"idle", &PoolSnapshot::clientsIdle}, {"waiting", &PoolSnapshot::clientsWaiting}};
constexpr StateLabel kServerStates[] = {{"active", &PoolSnapshot::serversActive},
                                        {"idle", &PoolSnapshot::serversIdle},
                                        {"login", &PoolSnapshot::serversLogin},
                                        {"reset", &PoolSnapshot::serversReset},
                                        {"draining", &PoolSnapshot::serversClosing}};

void add(PoolSnapshot& to, const PoolSnapshot& p) {
  for (const auto& g : kGauges)
    if (g.member != &PoolSnapshot::clientsWaiting) to.*g.member += p.*g.member;
  for (const auto& state : kClientStates) to.*state.member += p.*state.member;
  for (const auto& state : kServerStates) to.*state.member += p.*state.member;
  to.oldestWaitMicros = std::max(to.oldestWaitMicros, p.oldestWaitMicros);
  if (p.oldestLeakMicros > to.oldestLeakMicros) to.oldestLeakMicros = p.oldestLeakMicros, to.oldestLeaker = p.oldestLeaker;
  to.preparedStatements += p.preparedStatements;
  to.cancelling += p.cancelling;
  to.beingCancelled += p.beingCancelled;
  for (const auto& c : kCounters) to.counters.*c.member += p.counters.*c.member;
  for (const auto& h : kHistograms) (to.counters.*h.member).merge(p.counters.*h.member);
  for (std::size_t i = 0; i < to.pinnedBy.size(); ++i) {
    to.pinnedBy[i] += p.pinnedBy[i];
    to.counters.pins[i] += p.counters.pins[i];
  }
  to.counters.clientBytesReceived += p.counters.clientBytesReceived;
  to.counters.clientBytesSent += p.counters.clientBytesSent;
  to.counters.serverBytesReceived += p.counters.serverBytesReceived;
  to.counters.serverBytesSent += p.counters.serverBytesSent;
}

void write_pools(Writer& out, const std::vector<PoolRow>& rows) {
  for (const auto& g : kGauges) {
    out.family(g.name, MetricType::Gauge, g.help);
    for (const auto& row : rows) out.sample(row.labels, std::uint64_t{row.pool->*g.member});
  }
  out.family("pgsidecar_pool_oldest_wait_seconds", MetricType::Gauge, "How long the first client in the queue has waited.");
  for (const auto& row : rows) out.sample(row.labels, seconds(row.pool->oldestWaitMicros));
  out.family("pgsidecar_oldest_leak_seconds", MetricType::Gauge, "Age of the pool's oldest leaking transaction, with its application.");
  for (const auto& row : rows)
    if (row.pool->leaking > 0)
      out.sample(row.labels + "," + label("application", row.pool->oldestLeaker), seconds(row.pool->oldestLeakMicros));
  out.family("pgsidecar_server_connections", MetricType::Gauge, "Server connections by state; draining ones are being closed.");
  for (const auto& row : rows)
    for (const auto& s : kServerStates) out.sample(row.labels + "," + label("state", s.state), std::uint64_t{row.pool->*s.member});
  out.family("pgsidecar_prepared_statements", MetricType::Gauge, "Statements prepared on server connections.");
  for (const auto& row : rows) out.sample(row.labels, std::uint64_t{row.pool->preparedStatements});
  for (const auto& c : kCounters) {
    out.family(c.name, MetricType::Counter, c.help);
    for (const auto& row : rows) out.sample(row.labels, row.pool->counters.*c.member);
  }
  const auto bytes = [&](const char* name, const char* help, auto client, auto server) {
    out.family(name, MetricType::Counter, help);
    for (const auto& row : rows) {
      out.sample(row.labels + "," + label("side", "client"), row.pool->counters.*client);
      out.sample(row.labels + "," + label("side", "server"), row.pool->counters.*server);
    }
  };
  bytes("pgsidecar_received_bytes_total", "Bytes received from clients and from servers.", &PoolCounters::clientBytesReceived,
        &PoolCounters::serverBytesReceived);
  bytes("pgsidecar_sent_bytes_total", "Bytes sent to clients and to servers.", &PoolCounters::clientBytesSent,
        &PoolCounters::serverBytesSent);
  const auto by_reason = [&](const char* name, MetricType type, const char* help, auto value) {
    out.family(name, type, help);
    for (const auto& row : rows)
      for (std::size_t i = 0; i < row.pool->pinnedBy.size(); ++i)
        out.sample(row.labels + "," + label("reason", to_string(static_cast<pool::PinReason>(i))), value(*row.pool)[i]);
  };
  by_reason("pgsidecar_pins_total", MetricType::Counter, "Pins begun, by reason.", [](const PoolSnapshot& p) { return p.counters.pins; });
  by_reason("pgsidecar_pinned_clients", MetricType::Gauge, "Clients pinned now, by reason.",
            [](const PoolSnapshot& p) { return p.pinnedBy; });
  for (const auto& h : kHistograms) {
    out.family(h.name, MetricType::Histogram, h.help);
    for (const auto& row : rows) {
      const auto& histogram = row.pool->counters.*h.member;
      for (const auto& bound : h.bounds)
        out.sample(row.labels + ",le=\"" + bound.le + "\"", std::to_string(histogram.count_at_most(bound.micros)), "_bucket");
      out.sample(row.labels + ",le=\"+Inf\"", std::to_string(histogram.count()), "_bucket");
      out.sample(row.labels, number(seconds(histogram.sum_micros())), "_sum");
      out.sample(row.labels, std::to_string(histogram.count()), "_count");
    }
  }
}

}  // namespace

std::string metrics(const Snapshot& s, const Process& process, const std::vector<Alert>& active, LabelSets& labels, Exposition format) {
  std::vector<PoolRow> rows;
  PoolSnapshot other;
  bool others = false;
  for (const auto& p : s.pools) {
    if (labels.admit(p.database, p.user))
      rows.emplace_back(p.database, p.user, &p);
    else
      add(other, p), others = true;
  }
  if (others) rows.emplace_back(kOther, kOther, &other);

  Writer out(format);
  out.family("pgsidecar_build_info", MetricType::Info, "What this is; always 1.");
  out.sample(label("version", PGSIDECAR_VERSION) + "," + label("commit", kCommit) + "," +
                 label("openssl", OpenSSL_version(OPENSSL_VERSION_STRING)),
             std::uint64_t{1});
  out.one("pgsidecar_draining", MetricType::Gauge, "1 while shutting down.", std::uint64_t{s.draining});
  out.family("pgsidecar_health_up", MetricType::Gauge, "1 if the server answered last, 0 if it failed; none before the first connect.");
  for (const auto& [name, upstream] : s.upstreams)
    if (upstream.state != Database::Unknown) out.sample(label("upstream", name), std::uint64_t{upstream.state == Database::Up});
  out.family("pgsidecar_backend_latency_seconds", MetricType::Gauge, "What the last connect took, its login included.");
  for (const auto& [name, upstream] : s.upstreams)
    if (upstream.latencyMicros != 0) out.sample(label("upstream", name), seconds(upstream.latencyMicros));
  out.family("pgsidecar_cold_starts_total", MetricType::Counter, "Times that a server had to wake up for the first connection.");
  for (const auto& [name, upstream] : s.upstreams) out.sample(label("upstream", name), upstream.coldStarts);
  out.family("pgsidecar_upstream_usable_connections", MetricType::Gauge,
             "The server's max_connections without those that it reserves; none before it has said so.");
  for (const auto& [name, upstream] : s.upstreams)
    if (upstream.maxConnections != 0) out.sample(label("upstream", name), std::uint64_t{upstream.usable()});

  out.family("pgsidecar_client_connections", MetricType::Gauge, "Client connections by state; those still logging in have no pool yet.");
  for (const auto& row : rows)
    for (const auto& state : kClientStates)
      out.sample(row.labels + "," + label("state", state.state), std::uint64_t{row.pool->*state.member});
  out.sample(label("state", "login"), std::uint64_t{s.clientsLogin});
  out.one("pgsidecar_client_connections_max", MetricType::Gauge, "limits.maxClients.", std::uint64_t{s.maxClients});
  write_pools(out, rows);

  out.family("pgsidecar_server_closed_total", MetricType::Counter, "Server connections closed, by reason.");
  for (std::size_t i = 0; i < static_cast<std::size_t>(pool::CloseReason::kCount); ++i) {
    std::uint64_t n = 0;
    for (const auto& p : s.pools) n += p.counters.closed[i];
    out.sample(label("reason", to_string(static_cast<pool::CloseReason>(i))), n);
  }
  out.family("pgsidecar_client_rejected_total", MetricType::Counter, "Clients refused, by reason.");
  for (std::size_t i = 0; i < s.rejected.size(); ++i)
    out.sample(label("reason", to_string(static_cast<pool::RejectReason>(i))), s.rejected[i]);
  out.family("pgsidecar_errors_total", MetricType::Counter, "Errors sent to clients, by the SQLSTATE's class.");
  for (const auto& [sqlstate_class, n] : s.errorsByClass) out.sample(label("sqlstate_class", sqlstate_class), n);

  out.family("pgsidecar_alert_active", MetricType::Gauge, "1 while an alert of this name is active.");
  for (const char* name : kAlertNames)
    out.sample(label("alert", name),
               std::uint64_t{std::any_of(active.begin(), active.end(), [&](const Alert& alert) { return alert.name == name; })});

  out.one("process_cpu_seconds_total", MetricType::Counter, "User and system CPU time.", process.cpuUserSeconds + process.cpuSystemSeconds);
  out.one("process_resident_memory_bytes", MetricType::Gauge, "Resident memory.", process.residentBytes);
  out.one("process_virtual_memory_bytes", MetricType::Gauge, "Virtual memory.", process.virtualBytes);
  out.one("process_open_fds", MetricType::Gauge, "Open file descriptors.", count_open_files());
  out.one("process_max_fds", MetricType::Gauge, "The limit of open file descriptors.", process.maxFds);
  out.one("process_start_time_seconds", MetricType::Gauge, "Start of the process since the epoch.", process.startTimeSeconds);
  if (s.pgbouncerCompatible) write_pgbouncer(out, s, rows, labels);
  return out.take();
}

}  // namespace pgsidecar::admin
