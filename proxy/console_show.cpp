#include "proxy/console_show.hpp"

#include <algorithm>
#include <charconv>
#include <ctime>
#include <functional>
#include <limits>
#include <set>

#include "protocol/messages.hpp"
#include "proxy/console_config.hpp"

namespace pgsidecar::proxy {

using pool::ClientRow;
using pool::PoolSnapshot;
using pool::ServerRow;
using pool::Snapshot;
using Row = std::vector<Cell>;

namespace {

constexpr const char* kOwnName = "pgbouncer";

constexpr auto kInt = ColumnType::Int4;
constexpr auto kBig = ColumnType::Int8;
constexpr auto kNumeric = ColumnType::Numeric;

/// SHOW STATS' names, without total_ and avg_.
struct SumName {
  std::string_view total, average, plain;
};
constexpr SumName kSums[] = {{"total_server_assignment_count", "avg_server_assignment_count", "server_assignment_count"},
                             {"total_xact_count", "avg_xact_count", "xact_count"},
                             {"total_query_count", "avg_query_count", "query_count"},
                             {"total_received", "avg_recv", "bytes_received"},
                             {"total_sent", "avg_sent", "bytes_sent"},
                             {"total_xact_time", "avg_xact_time", "xact_time"},
                             {"total_query_time", "avg_query_time", "query_time"},
                             {"total_wait_time", "avg_wait_time", "wait_time"},
                             {"total_client_parse_count", "avg_client_parse_count", "client_parse_count"},
                             {"total_server_parse_count", "avg_server_parse_count", "server_parse_count"},
                             {"total_bind_count", "avg_bind_count", "bind_count"}};

/// PgBouncer's integers have 32 bits.
Cell number(std::uint64_t n) {
  return std::to_string(std::min<std::uint64_t>(n, std::numeric_limits<std::int32_t>::max()));
}
Cell big(std::uint64_t n) {
  return std::to_string(n);
}
Cell text_or_null(const std::string& text) {
  return text.empty() ? Cell() : Cell(text);
}
Cell in_seconds(std::uint64_t micros) {
  const std::string fraction = std::to_string(micros % 1000000 / 1000 + 1000).substr(1);
  return std::to_string(micros / 1000000) + "." + fraction;
}

std::string hex(std::uint64_t id) {
  char out[2 + 16] = {'0', 'x'};
  return {out, std::to_chars(out + 2, out + sizeof out, id, 16).ptr};
}

std::string time_text(std::chrono::system_clock::time_point clock, std::uint64_t micros_ago) {
  const std::time_t t = std::chrono::system_clock::to_time_t(clock - std::chrono::microseconds(micros_ago));
  std::tm utc{};
  ::gmtime_r(&t, &utc);
  char out[40];
  return {out, std::strftime(out, sizeof out, "%Y-%m-%d %H:%M:%S UTC", &utc)};
}

/// "address:port" or "[v6]:port" in two; anything else is a unix socket.
std::pair<std::string, Cell> split_address(const std::string& shown) {
  const auto colon = shown.rfind(':');
  std::uint64_t port = 0;
  if (colon == std::string::npos) return {"unix", number(0)};
  std::from_chars(shown.data() + colon + 1, shown.data() + shown.size(), port);
  std::string host = shown.substr(0, colon);
  if (host.size() > 1 && host.front() == '[') host = host.substr(1, host.size() - 2);
  return {host, number(port)};
}

std::uint64_t first_number(const std::string& text) {
  std::uint64_t n = 0;
  std::from_chars(text.data(), text.data() + text.size(), n);
  return n;
}

// --- sockets

/// As PgBouncer names them; none: it doesn't list such.
const char* client_state(const ClientRow& client) {
  const std::string_view state = client.state;
  if (state == "waiting") return "waiting";
  if (state == "idle") return "idle";
  return state == "login" || state == "closing" ? nullptr : "active";
}
const char* server_state(const ServerRow& server) {
  const std::string_view state = server.state;
  if (state == "idle" && server.client == 0) return "idle";
  if (state == "login") return "new";
  if (state == "reset") return "tested";
  return state == "closing" ? nullptr : "active";
}

Row client_row(const ClientRow& c, std::string state, const ShowInput& in) {
  const auto [address, port] = split_address(c.peer);
  const auto [local, local_port] = split_address(c.local);
  const std::uint64_t wait = std::string_view(c.state) == "waiting" ? c.stateMicros : 0;
  return {"C",
          c.user.empty() ? "(nouser)" : c.user,
          c.database.empty() ? "(nodb)" : c.database,
          "none",
          std::move(state),
          address,
          port,
          local,
          local_port,
          time_text(in.clock, c.connectedMicros),
          time_text(in.clock, c.requestMicros == 0 ? c.connectedMicros : c.requestMicros),
          number(wait / 1000000),
          number(wait % 1000000),
          number(0),
          hex(c.id),
          c.server == 0 ? std::string() : hex(c.server),
          number(0),
          c.cipher,
          c.application,
          number(c.preparedStatements),
          number(c.id)};
}

Row server_row(const ServerRow& s, std::string state, const ShowInput& in) {
  const auto [address, port] = split_address(s.address);
  const auto [local, local_port] = split_address(s.local);
  return {"S",
          s.user,
          s.database,
          "none",
          std::move(state),
          address,
          port,
          local,
          local_port,
          time_text(in.clock, s.connectedMicros),
          time_text(in.clock, s.requestMicros == 0 ? s.connectedMicros : s.requestMicros),
          number(0),
          number(0),
          number(s.condemned),
          hex(s.id),
          s.client == 0 ? std::string() : hex(s.client),
          number(s.pid),
          s.cipher,
          s.application,
          number(s.preparedStatements),
          number(s.id)};
}

void fill_sockets(Table& table, const ShowInput& in, bool only_active) {
  // Positions in buffers: connections hold none between turns of the loop.
  const auto add = [&](Row row) {
    for (int i = 0; i < 7; ++i) row.push_back(number(0));
    table.rows.push_back(std::move(row));
  };
  for (const ClientRow& c : in.snapshot.clientRows) {
    const char* state = c.database.empty() ? "login" : client_state(c);
    if (state && (!only_active || std::string_view(state) == "active"))
      add(client_row(c, std::string("cl_") + (std::string_view(state) == "idle" ? "active" : state), in));
  }
  for (const ServerRow& s : in.snapshot.serverRows) {
    const char* state = server_state(s);
    if (state && (!only_active || std::string_view(state) == "active"))
      add(server_row(s, std::string("sv_") + (std::string_view(state) == "new" ? "login" : state), in));
  }
}

void fill_fds(Table& table, const ShowInput& in) {
  // Never the cancel keys nor what authenticates: those are secrets.
  const auto add = [&](int fd, const char* task, const std::string& user, const std::string& database, const std::string& peer, int link) {
    const auto [address, port] = split_address(peer);
    Row row{std::to_string(fd), task, text_or_null(user), text_or_null(database), address, port, big(0), std::to_string(link)};
    row.resize(table.columns.size());
    table.rows.push_back(std::move(row));
  };
  std::map<std::uint64_t, int> servers;
  std::map<std::uint32_t, int> clients;
  for (const ServerRow& s : in.snapshot.serverRows) servers[s.id] = s.fd;
  for (const ClientRow& c : in.snapshot.clientRows) {
    clients[c.id] = c.fd;
    if (c.fd >= 0) add(c.fd, "client", c.user, c.database, c.peer, c.server == 0 ? 0 : servers[c.server]);
  }
  for (const ServerRow& s : in.snapshot.serverRows)
    if (s.fd >= 0) add(s.fd, "server", s.user, s.database, s.address, s.client == 0 ? 0 : clients[s.client]);
}

// --- pools and databases

void fill_pools(Table& table, const ShowInput& in) {
  for (const PoolSnapshot& p : in.snapshot.pools)
    table.rows.push_back({p.database, p.user, number(std::uint64_t{p.clientsActive} + p.clientsIdle), number(p.clientsWaiting),
                          number(p.cancelling), number(0), number(p.serversActive), number(p.cancelling), number(p.beingCancelled),
                          number(p.serversIdle), number(0), number(p.serversReset), number(p.serversLogin),
                          number(p.oldestWaitMicros / 1000000), number(p.oldestWaitMicros % 1000000), p.mode, Cell()});
  Row own{kOwnName, kOwnName, number(in.snapshot.consoles)};
  own.resize(table.columns.size() - 2, number(0));
  own.emplace_back("statement");
  own.emplace_back();
  table.rows.push_back(std::move(own));
}

void fill_databases(Table& table, const ShowInput& in) {
  struct Count {
    std::uint64_t servers = 0, clients = 0;
  };
  std::map<std::string_view, Count> counts;
  for (const PoolSnapshot& p : in.snapshot.pools) {
    counts[p.database].servers += p.total();
    counts[p.database].clients += std::uint64_t{p.clientsActive} + p.clientsIdle + p.clientsWaiting;
  }
  const std::string mode = setting_text(in.config, "pool.mode");
  for (const auto& d : in.snapshot.databases) {
    const bool several = d.host.find(',') != std::string::npos;
    table.rows.push_back({d.name, text_or_null(d.host), number(first_number(d.port)), d.database, text_or_null(d.forceUser), number(d.max),
                          number(d.min), number(0), number(0), number(d.maxLifetimeSeconds), d.mode == mode ? Cell() : Cell(d.mode),
                          several ? Cell("disable") : Cell(), number(0), number(counts[d.name].servers), number(0),
                          number(counts[d.name].clients), number(d.paused), number(d.disabled)});
  }
  const std::uint64_t port = in.config.listen.empty() ? 0 : in.config.listen.front().port;
  table.rows.push_back({kOwnName, Cell(), number(port), kOwnName, kOwnName, number(2), number(0), number(0), number(0), number(0),
                        "statement", Cell(), number(0), number(0), number(0), number(in.snapshot.consoles), number(0), number(0)});
}

void fill_users(Table& table, const ShowInput& in) {
  std::map<std::string_view, std::pair<std::uint64_t, std::uint64_t>> counts;  // servers, clients
  for (const PoolSnapshot& p : in.snapshot.pools) {
    counts[p.user].first += p.total();
    counts[p.user].second += std::uint64_t{p.clientsActive} + p.clientsIdle + p.clientsWaiting;
  }
  for (const std::string& name : in.snapshot.userNames) {
    const auto own = [&](const char* key) -> Cell {
      const auto user = in.config.users.find(name);
      if (user == in.config.users.end()) return {};
      const auto found = user->second.pool.find(key);
      return found == user->second.pool.end() ? Cell() : Cell(found->second);
    };
    table.rows.push_back(
        {name, own("max"), Cell(), own("mode"), number(0), number(counts[name].first), number(0), number(counts[name].second)});
  }
}

// --- statistics

std::uint64_t average(const Sums& now, const Sums& before, Sum sum, double seconds) {
  const auto grown = [&](Sum s) { return static_cast<double>(now[s] - std::min(now[s], before[s])); };
  // Times are per transaction, query and assignment, the rest is per second.
  const Sum per = sum == Sum::TransactionTime ? Sum::Transactions : sum == Sum::QueryTime ? Sum::Queries : Sum::Assignments;
  if (sum == Sum::TransactionTime || sum == Sum::QueryTime || sum == Sum::WaitTime)
    return grown(per) == 0 ? 0 : static_cast<std::uint64_t>(grown(sum) / grown(per));
  return seconds <= 0 ? 0 : static_cast<std::uint64_t>(grown(sum) / seconds);
}

struct Stats {
  SumsByDatabase now;
  const SumsByDatabase& before;
  double seconds;

  explicit Stats(const ShowInput& in)
      : before(in.averages.before()), seconds(std::chrono::duration<double>(in.now - in.averages.since()).count()) {
    for (const PoolSnapshot& p : in.snapshot.pools) now[p.database].add(p.counters);
    now[kOwnName];
  }
  void add_totals(const Sums& sums, Row& row) const {
    for (const std::uint64_t n : sums) row.push_back(big(n));
  }
  void add_averages(const std::string& database, const Sums& sums, Row& row) const {
    const auto it = before.find(database);
    for (std::size_t i = 0; i < sums.size(); ++i)
      row.push_back(big(average(sums, it == before.end() ? Sums() : it->second, static_cast<Sum>(i), seconds)));
  }
};

void fill_stats(Table& table, const ShowInput& in, bool totals, bool averages) {
  const Stats stats(in);
  for (const auto& [database, sums] : stats.now) {
    Row row{database};
    if (totals) stats.add_totals(sums, row);
    if (averages) stats.add_averages(database, sums, row);
    table.rows.push_back(std::move(row));
  }
}

void fill_totals(Table& table, const ShowInput& in) {
  const Stats stats(in);
  Sums now, before;
  for (const auto& [database, sums] : stats.now)
    for (std::size_t i = 0; i < sums.size(); ++i) now[static_cast<Sum>(i)] += sums[static_cast<Sum>(i)];
  for (const auto& [database, sums] : stats.before)
    for (std::size_t i = 0; i < sums.size(); ++i) before[static_cast<Sum>(i)] += sums[static_cast<Sum>(i)];
  // PgBouncer calls these two otherwise here than in SHOW STATS.
  const auto name = [](std::string_view prefix, std::size_t i, std::string_view otherwise) {
    const Sum sum = static_cast<Sum>(i);
    const std::string_view bytes = sum == Sum::Received ? "client_bytes" : "server_bytes";
    return sum == Sum::Received || sum == Sum::Sent ? std::string(prefix) + std::string(bytes) : std::string(otherwise);
  };
  for (std::size_t i = 0; i < now.size(); ++i) table.rows.push_back({name("total_", i, kSums[i].total), big(now[static_cast<Sum>(i)])});
  for (std::size_t i = 0; i < now.size(); ++i)
    table.rows.push_back({name("avg_", i, kSums[i].average), big(average(now, before, static_cast<Sum>(i), stats.seconds))});
}

// --- the rest

void fill_lists(Table& table, const ShowInput& in) {
  const Snapshot& s = in.snapshot;
  std::uint64_t servers = 0;
  for (const PoolSnapshot& p : s.pools) servers += p.total();
  const std::pair<const char*, std::uint64_t> rows[] = {{"databases", s.databases.size() + 1},
                                                        {"users", s.users},
                                                        {"peers", 0},
                                                        {"pools", s.pools.size() + 1},
                                                        {"peer_pools", 0},
                                                        {"free_clients", 0},
                                                        {"used_clients", std::uint64_t{s.clients} + s.clientsLogin + s.consoles},
                                                        {"login_clients", s.clientsLogin},
                                                        {"free_servers", 0},
                                                        {"used_servers", servers},
                                                        {"dns_names", 0},
                                                        {"dns_zones", 0},
                                                        {"dns_queries", 0},
                                                        {"dns_pending", 0}};
  for (const auto& [name, items] : rows) table.rows.push_back({name, number(items)});
}

void fill_memory(Table& table, const ShowInput& in) {
  const Snapshot& s = in.snapshot;
  const auto add = [&](const char* name, std::uint64_t size, std::uint64_t used) {
    table.rows.push_back({name, number(size), number(used), number(0), number(size * used)});
  };
  add("user_cache", sizeof(conf::User), s.users);
  add("db_cache", sizeof(pool::DatabaseSnapshot), s.databases.size());
  add("pool_cache", in.pool_size, s.pools.size());
  add("server_cache", in.server_size, s.serverRows.size());
  add("client_cache", in.client_size, s.clientRows.size());
  add("iobuf_cache", 0, 0);
}

std::string reasons_text(std::uint32_t reasons, const char* (*word)(pool::PinReason)) {
  std::string out;
  pool::for_each_reason(reasons, [&](pool::PinReason reason) { out += (out.empty() ? "" : ", ") + std::string(word(reason)); });
  return out;
}

void fill_pins(Table& table, const ShowInput& in) {
  for (const auto& p : in.snapshot.pins)
    table.rows.push_back({number(p.client), p.user, p.database, p.application, number(p.serverPid), in_seconds(p.micros),
                          reasons_text(p.reasons, pool::to_string), reasons_text(p.reasons, pool::ends), p.detail, p.statement});
}

void fill_leaks(Table& table, const ShowInput& in) {
  for (const auto& l : in.snapshot.leaks)
    table.rows.push_back({number(l.client), l.user, l.database, l.application, l.peer, number(l.serverPid), in_seconds(l.ageMicros),
                          in_seconds(l.idleMicros), l.firstStatement, l.lastStatement});
}

void fill_prepared(Table& table, const ShowInput& in) {
  for (const ClientRow& c : in.snapshot.clientRows)
    if (c.preparedStatements > 0)
      table.rows.push_back({"C", number(c.id), c.user, c.database, c.application, number(c.serverPid), number(c.preparedStatements)});
  for (const ServerRow& s : in.snapshot.serverRows)
    if (s.preparedStatements > 0)
      table.rows.push_back({"S", number(s.id), s.user, s.database, s.application, number(s.pid), number(s.preparedStatements)});
}

const Columns kSocketColumns{{"type"},
                             {"user"},
                             {"database"},
                             {"replication"},
                             {"state"},
                             {"addr"},
                             {"port", kInt},
                             {"local_addr"},
                             {"local_port", kInt},
                             {"connect_time"},
                             {"request_time"},
                             {"wait", kInt},
                             {"wait_us", kInt},
                             {"close_needed", kInt},
                             {"ptr"},
                             {"link"},
                             {"remote_pid", kInt},
                             {"tls"},
                             {"application_name"},
                             {"prepared_statements", kInt},
                             {"id", kInt}};

Columns with_positions(Columns columns) {
  for (const char* name : {"recv_pos", "pkt_pos", "pkt_remain", "send_pos", "send_remain", "pkt_avail", "send_avail"})
    columns.push_back({name, kInt});
  return columns;
}

Columns stats_columns(std::initializer_list<std::string_view SumName::*> parts) {
  Columns columns{{"database"}};
  for (const auto part : parts)
    for (const SumName& name : kSums) columns.push_back({name.*part, kNumeric});
  return columns;
}

}  // namespace

void Sums::add(const pool::PoolCounters& c) {
  auto& self = *this;
  self[Sum::Assignments] += c.leases;
  self[Sum::Transactions] += c.transactions;
  self[Sum::Queries] += c.query.count();
  self[Sum::Received] += c.clientBytesReceived;
  self[Sum::Sent] += c.clientBytesSent;
  self[Sum::TransactionTime] += c.transaction.sum_micros();
  self[Sum::QueryTime] += c.query.sum_micros();
  self[Sum::WaitTime] += c.wait.sum_micros();
  self[Sum::ClientParses] += c.clientParses;
  self[Sum::ServerParses] += c.serverParses;
  self[Sum::Binds] += c.binds;
}

void Averages::take(SumsByDatabase sums, pool::Time now) {
  older_ = std::exchange(newer_, std::move(sums));
  older_at_ = std::exchange(newer_at_, now);
}

Columns console_columns(Show what) {
  switch (what) {
    case Show::Help: return {};
    case Show::Version: return {{"version"}};
    case Show::State: return {{"key"}, {"value"}};
    case Show::Stats: return stats_columns({&SumName::total, &SumName::average});
    case Show::StatsTotals:
    case Show::StatsAverages: return stats_columns({&SumName::plain});
    case Show::Totals: return {{"name"}, {"value", kNumeric}};
    case Show::Pools:
      return {{"database"},
              {"user"},
              {"cl_active", kInt},
              {"cl_waiting", kInt},
              {"cl_active_cancel_req", kInt},
              {"cl_waiting_cancel_req", kInt},
              {"sv_active", kInt},
              {"sv_active_cancel", kInt},
              {"sv_being_canceled", kInt},
              {"sv_idle", kInt},
              {"sv_used", kInt},
              {"sv_tested", kInt},
              {"sv_login", kInt},
              {"maxwait", kInt},
              {"maxwait_us", kInt},
              {"pool_mode"},
              {"load_balance_hosts"}};
    case Show::Databases:
      // reserve_pool is what reserve_pool_size was called before PgBouncer 1.24.
      return {{"name"},
              {"host"},
              {"port", kInt},
              {"database"},
              {"force_user"},
              {"pool_size", kInt},
              {"min_pool_size", kInt},
              {"reserve_pool", kInt},
              {"reserve_pool_size", kInt},
              {"server_lifetime", kInt},
              {"pool_mode"},
              {"load_balance_hosts"},
              {"max_connections", kInt},
              {"current_connections", kInt},
              {"max_client_connections", kInt},
              {"current_client_connections", kInt},
              {"paused", kInt},
              {"disabled", kInt}};
    case Show::Users:
      return {{"name"},
              {"pool_size"},
              {"reserve_pool_size"},
              {"pool_mode"},
              {"max_user_connections", kInt},
              {"current_connections", kInt},
              {"max_user_client_connections", kInt},
              {"current_client_connections", kInt}};
    case Show::Clients:
    case Show::Servers: return kSocketColumns;
    case Show::Sockets:
    case Show::ActiveSockets: return with_positions(kSocketColumns);
    case Show::Lists: return {{"list"}, {"items", kInt}};
    case Show::Config: return {{"key"}, {"value"}, {"default"}, {"changeable"}};
    case Show::Mem: return {{"name"}, {"size", kInt}, {"used", kInt}, {"free", kInt}, {"memtotal", kInt}};
    case Show::Fds:
      return {{"fd", kInt},
              {"task"},
              {"user"},
              {"database"},
              {"addr"},
              {"port", kInt},
              {"cancel", kBig},
              {"link", kInt},
              {"client_encoding"},
              {"std_strings"},
              {"datestyle"},
              {"timezone"},
              {"password"},
              {"scram_client_key", ColumnType::Bytea},
              {"scram_server_key", ColumnType::Bytea}};
    case Show::DnsHosts: return {{"hostname"}, {"ttl", kBig}, {"addrs"}};
    case Show::DnsZones: return {{"zonename"}, {"serial", kBig}, {"count", kInt}};
    case Show::Peers: return {{"peer_id", kInt}, {"host"}, {"port", kInt}, {"pool_size", kInt}};
    case Show::PeerPools:
      return {{"peer_id", kInt},
              {"cl_active_cancel_req", kInt},
              {"cl_waiting_cancel_req", kInt},
              {"sv_active_cancel", kInt},
              {"sv_login", kInt}};
    case Show::PreparedStatements:
      return {{"type"}, {"id", kInt}, {"user"}, {"database"}, {"application_name"}, {"remote_pid", kInt}, {"prepared_statements", kInt}};
    case Show::Pins:
      return {{"client_id", kInt},   {"user"},    {"database"}, {"application_name"}, {"remote_pid", kInt},
              {"seconds", kNumeric}, {"reasons"}, {"ends"},     {"detail"},           {"statement"}};
    case Show::Leaks:
      return {{"client_id", kInt},
              {"user"},
              {"database"},
              {"application_name"},
              {"addr"},
              {"remote_pid", kInt},
              {"age_seconds", kNumeric},
              {"idle_seconds", kNumeric},
              {"first_statement"},
              {"last_statement"}};
  }
  return {};
}

Table console_table(Show what, const ShowInput& in) {
  Table table;
  table.columns = console_columns(what);
  switch (what) {
    case Show::Version: table.rows.push_back({console_version()}); break;
    case Show::State:
      table.rows = {{"active", in.snapshot.paused ? "no" : "yes"}, {"paused", in.snapshot.paused ? "yes" : "no"}, {"suspended", "no"}};
      break;
    case Show::Stats: fill_stats(table, in, true, true); break;
    case Show::StatsTotals: fill_stats(table, in, true, false); break;
    case Show::StatsAverages: fill_stats(table, in, false, true); break;
    case Show::Totals: fill_totals(table, in); break;
    case Show::Pools: fill_pools(table, in); break;
    case Show::Databases: fill_databases(table, in); break;
    case Show::Users: fill_users(table, in); break;
    case Show::Clients:
      for (const ClientRow& c : in.snapshot.clientRows)
        if (const char* state = client_state(c); state && !c.database.empty()) table.rows.push_back(client_row(c, state, in));
      break;
    case Show::Servers:
      for (const ServerRow& s : in.snapshot.serverRows)
        if (const char* state = server_state(s)) table.rows.push_back(server_row(s, state, in));
      break;
    case Show::Sockets: fill_sockets(table, in, false); break;
    case Show::ActiveSockets: fill_sockets(table, in, true); break;
    case Show::Lists: fill_lists(table, in); break;
    case Show::Config:
      for (auto& one : config_rows(in.config)) table.rows.push_back({one.key, one.value, one.standard, one.changeable ? "yes" : "no"});
      break;
    case Show::Mem: fill_memory(table, in); break;
    case Show::Fds: fill_fds(table, in); break;
    case Show::PreparedStatements: fill_prepared(table, in); break;
    case Show::Pins: fill_pins(table, in); break;
    case Show::Leaks: fill_leaks(table, in); break;
    // Each connect looks a name up anew, and there are no peers.
    case Show::Help:
    case Show::DnsHosts:
    case Show::DnsZones:
    case Show::Peers:
    case Show::PeerPools: break;
  }
  return table;
}

std::string console_help() {
  return "\n\tSHOW HELP|CONFIG|DATABASES|POOLS|CLIENTS|SERVERS|USERS|VERSION\n"
         "\tSHOW PEERS|PEER_POOLS\n"
         "\tSHOW FDS|SOCKETS|ACTIVE_SOCKETS|LISTS|MEM|STATE\n"
         "\tSHOW DNS_HOSTS|DNS_ZONES\n"
         "\tSHOW STATS|STATS_TOTALS|STATS_AVERAGES|TOTALS\n"
         "\tSHOW PINS|LEAKS|PREPARED_STATEMENTS\n"
         "\tSET key = value\n"
         "\tRELOAD\n"
         "\tPAUSE [<db>]\n"
         "\tRESUME [<db>]\n"
         "\tDISABLE <db>\n"
         "\tENABLE <db>\n"
         "\tRECONNECT [<db>]\n"
         "\tKILL [<db>]\n"
         "\tKILL_CLIENT <client_id>\n"
         "\tSHUTDOWN\n"
         "\tSHUTDOWN WAIT_FOR_SERVERS|WAIT_FOR_CLIENTS\n"
         "\tWAIT_CLOSE [<db>]";
}

std::string console_version() {
  return "PgBouncer " + std::string(kConsoleVersion) + " (the console of pgsidecar " PGSIDECAR_VERSION ")";
}

std::string to_binary(const Column& column, const std::string& value) {
  std::string out;
  protocol::Writer writer(out);
  switch (column.type) {
    case ColumnType::Text:
    case ColumnType::Bytea: return value;
    case ColumnType::Int4:
    case ColumnType::Int8: {
      std::int64_t n = 0;
      std::from_chars(value.data(), value.data() + value.size(), n);
      if (column.type == ColumnType::Int8) writer.u32(static_cast<std::uint32_t>(static_cast<std::uint64_t>(n) >> 32));
      writer.u32(static_cast<std::uint32_t>(n));
      return out;
    }
    case ColumnType::Numeric: {
      // Digits of base 10000, the first one's weight, no sign, the decimals shown.
      const auto point = std::min(value.find('.'), value.size());
      std::string whole = value.substr(0, point), fraction = value.substr(std::min(point + 1, value.size()));
      const auto scale = static_cast<std::uint16_t>(fraction.size());
      whole.insert(0, (4 - whole.size() % 4) % 4, '0');
      fraction.append((4 - fraction.size() % 4) % 4, '0');
      const auto weight = static_cast<std::uint16_t>(whole.size() / 4 - 1);
      const std::string digits = whole + fraction;
      writer.u16(static_cast<std::uint16_t>(digits.size() / 4)).u16(weight).u16(0).u16(scale);
      for (std::size_t i = 0; i < digits.size(); i += 4) writer.u16(static_cast<std::uint16_t>(first_number(digits.substr(i, 4))));
      return out;
    }
  }
  return value;
}

}  // namespace pgsidecar::proxy
