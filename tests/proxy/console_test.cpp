// The SQL console without sockets: what a text means, what the tables hold, how a session answers.
#include "proxy/console.hpp"

#include <gtest/gtest.h>

#include "proxy/console_command.hpp"
#include "proxy/console_config.hpp"
#include "proxy/console_show.hpp"

namespace pgsidecar::proxy {
namespace {

using Kind = ConsoleCommand::Kind;
using namespace std::chrono_literals;

ConsoleCommand one(std::string_view sql) {
  auto commands = parse_console(sql);
  EXPECT_EQ(commands.size(), 1u) << sql;
  return commands.empty() ? ConsoleCommand() : commands.front();
}

struct ParseCase {
  const char* sql;
  Kind kind;
  const char *name, *tag;
};

TEST(ConsoleCommand, Commands) {
  const ParseCase cases[] = {
      {"PAUSE", Kind::Pause, "", "PAUSE"},
      {" pause ;", Kind::Pause, "", "PAUSE"},
      {"Pause my-Db;", Kind::Pause, "my-Db", "PAUSE"},
      {"PAUSE \"a \"\"b\"\" ;c\"", Kind::Pause, "a \"b\" ;c", "PAUSE"},
      {"RESUME app", Kind::Resume, "app", "RESUME"},
      {"/* why */ RECONNECT -- now\n", Kind::Reconnect, "", "RECONNECT"},
      {"DISABLE app", Kind::Disable, "app", "DISABLE"},
      {"ENABLE app", Kind::Enable, "app", "ENABLE"},
      {"KILL", Kind::Kill, "", "KILL"},
      {"WAIT_CLOSE app", Kind::WaitClose, "app", "WAIT_CLOSE"},
      {"RELOAD", Kind::Reload, "", "RELOAD"},
      {"SUSPEND", Kind::Suspend, "", "SUSPEND"},
      {"BEGIN", Kind::Noise, "", "BEGIN"},
      {"START TRANSACTION ISOLATION LEVEL SERIALIZABLE", Kind::Noise, "", "START TRANSACTION"},
      {"end", Kind::Noise, "", "COMMIT"},
      {"DISCARD ALL", Kind::Noise, "", "DISCARD ALL"},
      {"SET application_name = 'x'", Kind::SetIgnored, "", "SET"},
      {"set session characteristics as transaction read only", Kind::SetIgnored, "", "SET"},
      {"SET extra_float_digits TO 3", Kind::SetIgnored, "", "SET"},
      {"SET pool.max = 7", Kind::Set, "pool.max", "SET pool.max=7"},
      {"set default_pool_size='7';", Kind::Set, "default_pool_size", "SET default_pool_size=7"},
      {"SET log.file = /a/b", Kind::Set, "log.file", "SET log.file=/a/b"},
      {"SHOW timezone", Kind::Parameter, "timezone", "SHOW"},
      {"SHOW TRANSACTION ISOLATION LEVEL", Kind::Parameter, "transaction_isolation", "SHOW"},
  };
  for (const auto& c : cases) {
    const auto command = one(c.sql);
    EXPECT_EQ(command.kind, c.kind) << c.sql;
    EXPECT_EQ(command.name, c.name) << c.sql;
    EXPECT_EQ(command.tag, c.tag) << c.sql;
  }
  EXPECT_EQ(one("KILL_CLIENT 123456").id, 123456u);
  EXPECT_EQ(one("shutdown wait_for_clients").stop, ConsoleCommand::Stop::WaitForClients);
  EXPECT_EQ(one("shutdown wait_for_servers").stop, ConsoleCommand::Stop::WaitForServers);
  EXPECT_EQ(one("shutdown").stop, ConsoleCommand::Stop::Now);
  for (const char* name :
       {"active_sockets", "CLIENTS", "Config", "databases",  "dns_hosts",      "dns_zones",    "fds",    "help",
        "leaks",          "lists",   "mem",    "peer_pools", "peers",          "pins",         "pools",  "prepared_statements",
        "servers",        "sockets", "state",  "stats",      "stats_averages", "stats_totals", "totals", "users",
        "version"})
    EXPECT_EQ(one(std::string("SHOW ") + name + ";").kind, Kind::Show) << name;
  EXPECT_EQ(one("select stats").kind, Kind::Show);
}

TEST(ConsoleCommand, Mistakes) {
  for (const char* sql : {"SELECT 1",
                          "SHOW",
                          "SHOW nosuch",
                          "SHOW STATS TOTALS",
                          "frob",
                          "PAUSE a b",
                          "RELOAD now",
                          "SHUTDOWN soon",
                          "DISABLE",
                          "KILL_CLIENT",
                          "KILL_CLIENT x",
                          "KILL_CLIENT -1",
                          "KILL_CLIENT 99999999999999999999",
                          "SET",
                          "SET pool.max",
                          "SET pool.max 7",
                          "SET pool.max = 3 0",
                          "SET pool.max = 3 '0'",
                          "PAUSE ''",
                          "RESUME \"\"",
                          "PAUSE 'open",
                          "PAUSE /* open",
                          "=",
                          "''",
                          "\"pause\""}) {
    const auto command = one(sql);
    EXPECT_EQ(command.kind, Kind::Invalid) << sql;
    EXPECT_FALSE(command.error.empty()) << sql;
  }
  EXPECT_NE(one("SHOW POLLS").error.find("\"pools\""), std::string::npos);
  EXPECT_LT(one("frob " + std::string(100000, 'x')).error.size(), 300u);
}

TEST(ConsoleCommand, Several) {
  EXPECT_TRUE(parse_console("").empty());
  EXPECT_TRUE(parse_console(" ;; ; -- nothing\n/* at all */").empty());
  const auto commands = parse_console("PAUSE app; SHOW POOLS;;RESUME \"a;b\"");
  ASSERT_EQ(commands.size(), 3u);
  EXPECT_EQ(commands[2].name, "a;b");
}

// --- configuration

TEST(ConsoleConfig, Set) {
  conf::Config config;
  config.databases["own"].pool.max = 3;
  config.databases["same"].pool = config.pool;
  EXPECT_EQ(apply_setting(config, "pool.max", "20"), "");
  EXPECT_EQ(config.pool.max, 20u);
  EXPECT_EQ(config.databases["own"].pool.max, 3u);
  EXPECT_EQ(config.databases["same"].pool.max, 20u);
  EXPECT_EQ(apply_setting(config, "POOL.IDLETIMEOUTMILLIS", "7"), "");
  EXPECT_EQ(config.pool.idleTimeoutMillis, 7u);
  EXPECT_EQ(apply_setting(config, "query_timeout", "1.5"), "");
  EXPECT_EQ(config.pool.queryTimeoutMillis, 1500u);
  EXPECT_EQ(apply_setting(config, "query_timeout", "0.0001"), "");
  EXPECT_EQ(config.pool.queryTimeoutMillis, 1u);  // 0 is without a limit
  EXPECT_EQ(apply_setting(config, "query_timeout", "0"), "");
  EXPECT_EQ(config.pool.queryTimeoutMillis, 0u);
  EXPECT_EQ(apply_setting(config, "max_client_conn", "12"), "");
  EXPECT_EQ(config.limits.maxClients, 12u);
  EXPECT_EQ(apply_setting(config, "log.level", "debug"), "");

  const conf::Config before = config;
  for (const auto& [key, value, says] : {std::tuple{"pool.max", "x", "pool.max"},
                                         {"pool.max", "0", "pool.max"},
                                         {"pool.max", "1", "pool.min"},
                                         {"query_timeout", "-1", "seconds"},
                                         {"query_timeout", "1e300", "seconds"},
                                         {"listen", "x", "restart"},
                                         {"auth.method", "trust", "RELOAD"},
                                         {"admin.users", "me", "RELOAD"},
                                         {"pool.maxx", "1", "pool.max"},
                                         {"upstream.url", "x", "no key"},
                                         {"log.level", "loud", "log.level"}}) {
    const std::string error = apply_setting(config, key, value);
    EXPECT_TRUE(error.starts_with("SET failed")) << key;
    EXPECT_NE(error.find(says), std::string::npos) << error;
    EXPECT_EQ(config, before) << key;
  }
}

TEST(ConsoleConfig, Rows) {
  conf::Config config;
  config.limits.maxClients = 77;
  config.pool.queryTimeoutMillis = 2500;
  std::map<std::string, ConfigRow> rows;
  for (auto& row : config_rows(config)) rows[row.key] = row;
  EXPECT_EQ(rows["max_client_conn"].value, "77");
  EXPECT_EQ(rows["limits.maxClients"].value, "77");
  EXPECT_EQ(rows["max_client_conn"].standard, "1000");
  EXPECT_EQ(rows["query_timeout"].value, "2.5");
  EXPECT_EQ(rows["max_user_connections"].value, "15");
  EXPECT_TRUE(rows["pool.max"].changeable);
  EXPECT_FALSE(rows["listen"].changeable);
}

// --- tables

constexpr Show kAll[] = {Show::ActiveSockets, Show::Clients,     Show::Config, Show::Databases,
                         Show::DnsHosts,      Show::DnsZones,    Show::Fds,    Show::Help,
                         Show::Leaks,         Show::Lists,       Show::Mem,    Show::PeerPools,
                         Show::Peers,         Show::Pins,        Show::Pools,  Show::PreparedStatements,
                         Show::Servers,       Show::Sockets,     Show::State,  Show::Stats,
                         Show::StatsAverages, Show::StatsTotals, Show::Totals, Show::Users,
                         Show::Version};

pool::Snapshot full() {
  pool::Snapshot s;
  s.databases.push_back({"app", "db1,db2", "5432,5433", "real", "", "transaction", 15, 2, 3600, true, false});
  auto& p = s.pools.emplace_back();
  p.database = "app";
  p.user = "u";
  p.mode = "transaction";
  p.clientsActive = 2;
  p.clientsIdle = 3;
  p.clientsWaiting = 1;
  p.serversActive = 2;
  p.serversReset = 1;
  p.oldestWaitMicros = 2'000'003;
  p.counters.transactions = 600;
  p.counters.leases = 10;
  p.counters.wait.record(5000);
  s.userNames = {"u"};
  s.clientRows.resize(3);
  s.clientRows[0] = {7, "app", "u", "web", "[::1]:999", true, "idle in transaction", 1,  2'000'000, 5,
                     3, 44,    9,   "",    0,           4,    "[::1]:6432",          "", 0,         -1};
  s.clientRows[1].state = "login";
  s.clientRows[2] = s.clientRows[0];
  s.clientRows[2].state = "waiting";
  s.clientRows[2].stateMicros = 1'000'002;
  s.clientRows[2].peer = "unix socket";
  s.serverRows.resize(1);
  s.serverRows[0].id = 3;
  s.serverRows[0].state = "reset";
  s.serverRows[0].address = "db1:5432";
  s.serverRows[0].condemned = true;
  s.pins.push_back({7, 44, "app", "u", "web", 1, "lock 1", "SELECT pg_advisory_lock($1)", 1'500'000});
  s.leaks.emplace_back();
  return s;
}

struct Shown {
  pool::Snapshot snapshot = full();
  conf::Config config;
  pool::Time start{};
  Averages averages{start};
  pool::Time now = start + 60s;
  Table operator()(Show what) const {
    return console_table(what, {snapshot, config, averages, now, std::chrono::system_clock::time_point{}});
  }
  std::string cell(Show what, std::size_t row, std::string_view column) const {
    const Table t = (*this)(what);
    for (std::size_t i = 0; i < t.columns.size(); ++i)
      if (t.columns[i].name == column) return t.rows.at(row).at(i).value_or("NULL");
    return "no such column";
  }
};

TEST(ConsoleShow, RowsAreAsWideAsTheirColumns) {
  const Shown shown;
  for (const Show what : kAll) {
    const Table table = shown(what);
    for (const auto& row : table.rows) EXPECT_EQ(row.size(), table.columns.size()) << static_cast<int>(what);
    for (const auto& row : table.rows)
      for (std::size_t i = 0; i < row.size(); ++i)
        if (row[i] && table.columns[i].type != ColumnType::Text) {
          EXPECT_EQ(row[i]->find_first_not_of("0123456789."), std::string::npos) << table.columns[i].name << " " << *row[i];
        }
    EXPECT_EQ(table.columns.size(), console_columns(what).size());
  }
}

TEST(ConsoleShow, Values) {
  const Shown shown;
  EXPECT_EQ(shown.cell(Show::Pools, 0, "cl_active"), "5");
  EXPECT_EQ(shown.cell(Show::Pools, 0, "cl_waiting"), "1");
  EXPECT_EQ(shown.cell(Show::Pools, 0, "sv_tested"), "1");
  EXPECT_EQ(shown.cell(Show::Pools, 0, "maxwait"), "2");
  EXPECT_EQ(shown.cell(Show::Pools, 0, "maxwait_us"), "3");
  EXPECT_EQ(shown.cell(Show::Pools, 1, "database"), "pgbouncer");
  EXPECT_EQ(shown.cell(Show::Databases, 0, "port"), "5432");
  EXPECT_EQ(shown.cell(Show::Databases, 0, "paused"), "1");
  EXPECT_EQ(shown.cell(Show::Databases, 0, "disabled"), "0");
  EXPECT_EQ(shown.cell(Show::Databases, 0, "pool_mode"), "NULL");
  EXPECT_EQ(shown.cell(Show::Databases, 0, "current_client_connections"), "6");
  EXPECT_EQ(shown.cell(Show::Clients, 0, "addr"), "::1");
  EXPECT_EQ(shown.cell(Show::Clients, 0, "port"), "999");
  EXPECT_EQ(shown.cell(Show::Clients, 0, "state"), "active");
  EXPECT_EQ(shown.cell(Show::Clients, 0, "link"), "0x3");
  EXPECT_EQ(shown.cell(Show::Clients, 0, "connect_time"), "1969-12-31 23:59:58 UTC");
  EXPECT_EQ(shown.cell(Show::Clients, 1, "state"), "waiting");
  EXPECT_EQ(shown.cell(Show::Clients, 1, "wait"), "1");
  EXPECT_EQ(shown.cell(Show::Clients, 1, "wait_us"), "2");
  EXPECT_EQ(shown.cell(Show::Clients, 1, "addr"), "unix");
  EXPECT_EQ(shown(Show::Clients).rows.size(), 2u);
  EXPECT_EQ(shown(Show::Sockets).rows.size(), 4u);
  EXPECT_EQ(shown.cell(Show::Servers, 0, "state"), "tested");
  EXPECT_EQ(shown.cell(Show::Servers, 0, "close_needed"), "1");
  EXPECT_EQ(shown.cell(Show::Pins, 0, "seconds"), "1.500");
  EXPECT_TRUE(shown.cell(Show::Version, 0, "version").starts_with("PgBouncer 1."));
  EXPECT_NE(shown.cell(Show::Version, 0, "version").find("pgsidecar " PGSIDECAR_VERSION), std::string::npos);
}

TEST(ConsoleShow, AveragesAreOverTheLastPeriods) {
  Shown shown;
  EXPECT_EQ(shown.cell(Show::StatsTotals, 0, "xact_count"), "600");
  EXPECT_EQ(shown.cell(Show::Stats, 0, "avg_xact_count"), "10");  // since the start
  EXPECT_EQ(shown.cell(Show::StatsAverages, 0, "wait_time"), "500");
  SumsByDatabase sums;
  sums["app"].add(shown.snapshot.pools[0].counters);
  EXPECT_TRUE(shown.averages.due(shown.now));
  shown.averages.take(sums, shown.now);
  EXPECT_FALSE(shown.averages.due(shown.now + 59s));
  shown.averages.take(sums, shown.now + 60s);
  shown.now += 120s;
  shown.snapshot.pools[0].counters.transactions += 240;
  EXPECT_EQ(shown.cell(Show::Stats, 0, "avg_xact_count"), "2");
  EXPECT_EQ(shown.cell(Show::Stats, 0, "avg_wait_time"), "0");
}

TEST(ConsoleShow, Binary) {
  const auto bytes = [](std::initializer_list<int> list) {
    std::string out;
    for (const int b : list) out.push_back(static_cast<char>(b));
    return out;
  };
  EXPECT_EQ(to_binary({"x", ColumnType::Text}, "ab"), "ab");
  EXPECT_EQ(to_binary({"x", ColumnType::Int4}, "258"), bytes({0, 0, 1, 2}));
  EXPECT_EQ(to_binary({"x", ColumnType::Int8}, "4294967297"), bytes({0, 0, 0, 1, 0, 0, 0, 1}));
  EXPECT_EQ(to_binary({"x", ColumnType::Numeric}, "12345"), bytes({0, 2, 0, 1, 0, 0, 0, 0, 0, 1, 9, 41}));
  EXPECT_EQ(to_binary({"x", ColumnType::Numeric}, "1.500"), bytes({0, 2, 0, 0, 0, 0, 0, 3, 0, 1, 0x13, 0x88}));
}

// --- sessions

struct Host : ConsoleHost {
  Table table(Show what) override { return {console_columns(what), {{"a", "1"}, {"b", "2"}, {"c", "3"}}}; }
  void perform(const ConsoleCommand& command, std::function<void(std::string)> done) override {
    asked.push_back(command.tag);
    if (later)
      pending = std::move(done);
    else
      done(error);
  }
  std::vector<std::string> asked;
  std::string error;
  bool later = false;
  std::function<void(std::string)> pending;
};

struct Session {
  explicit Session(ConsoleRole role = ConsoleRole::Admin) : console(host, role, "me") {}
  /// The types of the messages that it is answered with; errors by their SQLSTATE.
  std::string operator()(char type, const std::string& body = {}) {
    std::string out;
    if (console.idle()) console.receive(type, {reinterpret_cast<const std::uint8_t*>(body.data()), body.size()}, out);
    return rest(std::move(out));
  }
  std::string rest(std::string out = {}) {
    while (console.has_work()) console.advance(out);
    std::string types;
    for (std::size_t at = 0; at < out.size();) {
      const auto* p = reinterpret_cast<const std::uint8_t*>(out.data()) + at;
      const std::size_t size = protocol::load_u32(p + 1) + std::size_t{1};
      types += static_cast<char>(p[0]);
      if (p[0] == 'E') types += "(" + protocol::parse_error({p + 5, size - 5})->sqlstate + ")";
      at += size;
    }
    return types;
  }
  std::string query(std::string sql) { return (*this)('Q', sql + '\0'); }
  Host host;
  Console console;
};

/// Braces keep the order in which messages are sent; operands of + don't.
std::string joined(std::initializer_list<std::string> answers) {
  std::string all;
  for (const auto& answer : answers) all += answer;
  return all;
}

std::string parse(std::string name, std::string sql) {
  return name + '\0' + sql + '\0' + std::string(2, '\0');
}
std::string bind_body(std::string portal, std::string name, std::string tail = std::string(6, '\0')) {
  return portal + '\0' + name + '\0' + tail;
}

TEST(Console, SimpleQueries) {
  Session s;
  EXPECT_EQ(s.query("SHOW LISTS"), "TDDDCZ");
  EXPECT_EQ(s.query("SHOW LISTS; show timezone;BEGIN"), "TDDDCTDCCZ");
  EXPECT_EQ(s.query(""), "IZ");
  EXPECT_EQ(s.query(";"), "IZ");
  EXPECT_EQ(s.query("SHOW HELP"), "NCZ");
  EXPECT_EQ(s.query("SET extra_float_digits=3"), "NCZ");
  EXPECT_EQ(s.query("SELECT 1; SHOW LISTS"), "E(42601)Z");
  EXPECT_EQ(s.query("RELOAD; PAUSE app"), "CCZ");
  EXPECT_EQ(s.host.asked, (std::vector<std::string>{"RELOAD", "PAUSE"}));
  EXPECT_EQ(s.query("SUSPEND"), "E(0A000)Z");
  EXPECT_EQ(s('Q', "no end"), "E(08P01)Z");
  EXPECT_EQ(s('F'), "E(0A000)Z");
  EXPECT_EQ(s('d'), "");
  s.host.error = "no such database: x";
  EXPECT_EQ(s.query("PAUSE x; RELOAD"), "E(3D000)Z");
  EXPECT_EQ(s.query("SHOW LISTS"), "TDDDCZ");
}

TEST(Console, WhoMayWhat) {
  Session s(ConsoleRole::Stats);
  EXPECT_EQ(s.query("SHOW LISTS"), "TDDDCZ");
  for (const char* sql : {"SHOW FDS", "RELOAD", "PAUSE", "RESUME", "RECONNECT", "DISABLE a", "ENABLE a", "KILL", "KILL_CLIENT 1",
                          "WAIT_CLOSE", "SHUTDOWN", "SET pool.max=1"}) {
    EXPECT_EQ(s.query(sql), "E(42501)Z") << sql;
    EXPECT_EQ(joined({s('P', parse("", sql)), s('S')}), "E(42501)Z") << sql;
  }
  EXPECT_TRUE(s.host.asked.empty());
}

TEST(Console, WaitsForWhatTakesTime) {
  Session s;
  s.host.later = true;
  EXPECT_EQ(s.query("PAUSE; SHOW LISTS"), "");
  EXPECT_TRUE(s.console.waiting());
  EXPECT_FALSE(s.console.idle());
  s.host.pending({});
  EXPECT_EQ(s.rest(), "CTDDDCZ");
  EXPECT_EQ(s.query("PAUSE; SHOW LISTS"), "");
  s.console.finish("canceling statement due to user request", "57014");
  EXPECT_EQ(s.rest(), "E(57014)Z");
  s.host.pending("late");  // of what was cancelled
  EXPECT_EQ(s.rest(), "");
}

TEST(Console, ExtendedQueries) {
  Session s;
  EXPECT_EQ(s('P', parse("s", "SHOW LISTS")), "1");
  EXPECT_EQ(s('D', std::string("Ss") + '\0'), "tT");
  EXPECT_EQ(s('B', bind_body("", "s")), "2");
  EXPECT_EQ(s('D', std::string("P") + '\0'), "T");
  EXPECT_EQ(s('H'), "");
  EXPECT_EQ(s('E', std::string("\0\0\0\0\2", 5)), "DDs");
  EXPECT_EQ(s('E', std::string("\0\0\0\0\2", 5)), "DC");
  EXPECT_EQ(s('S'), "Z");
  EXPECT_EQ(s('E', std::string("\0\0\0\0\0", 5)), "E(34000)");  // portals end with the transaction
  EXPECT_EQ(s('B', bind_body("", "s")), "");                    // skipped up to Sync
  EXPECT_EQ(s('S'), "Z");
  EXPECT_EQ(joined({s('P', parse("s", "PAUSE")), s('S')}), "E(42P05)Z");
  EXPECT_EQ(s('C', std::string("Ss") + '\0'), "3");
  EXPECT_EQ(joined({s('B', bind_body("", "s")), s('S')}), "E(26000)Z");
  EXPECT_EQ(joined({s('P', parse("", "")), s('B', bind_body("", "")), s('D', std::string("P") + '\0'), s('E', std::string("\0\0\0\0\0", 5)),
                    s('S')}),
            "12nIZ");
  EXPECT_EQ(joined({s('P', parse("", "RELOAD")), s('B', bind_body("", "")), s('E', std::string("\0\0\0\0\0", 5)), s('S')}), "12CZ");
  EXPECT_EQ(joined({s('P', parse("", "RELOAD; PAUSE")), s('S')}), "E(42601)Z");
  EXPECT_EQ(joined({s('P', parse("", "SHOW LISTS")), s('B', bind_body("", "", std::string("\0\0\0\0\0\1\0\1", 8))), s('S')}),
            "12Z");  // all in binary
  for (const std::string& tail :
       {std::string("\0\0\0\1\0\0\0\1x\0\0", 11), std::string("\0\0\0\0\0\1\0\7", 8), std::string("\0\0\0\0\0\3\0\1\0\1\0\1", 12),
        std::string("\0\0\0\0\377\377", 6), std::string("\377\377", 2), std::string()})
    EXPECT_EQ(joined({s('B', bind_body("", "", tail)), s('S')}), "E(08P01)Z");
  for (const char type : {'P', 'D', 'E', 'C'}) EXPECT_EQ(joined({s(type, "x"), s('S')}), "E(08P01)Z") << type;
}

TEST(Console, NamesAreBounded) {
  Session s;
  for (std::size_t i = 0; i < Console::kMostNames; ++i) EXPECT_EQ(s('P', parse("s" + std::to_string(i), "SHOW LISTS")), "1");
  EXPECT_EQ(joined({s('P', parse("more", "SHOW LISTS")), s('S')}), "E(53000)Z");
  for (std::size_t i = 0; i < Console::kMostNames; ++i) EXPECT_EQ(s('B', bind_body("p" + std::to_string(i), "s1")), "2");
  EXPECT_EQ(joined({s('B', bind_body("more", "s1")), s('S')}), "E(53000)Z");
}

}  // namespace
}  // namespace pgsidecar::proxy
