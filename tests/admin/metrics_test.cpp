// The series: what they are called, and that promtool agrees.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>

#include "admin/render.hpp"
#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using test::sample;
using test::sample_pool;

// Every sample's value by its name and labels; a duplicate fails.
std::map<std::string, std::string> samples(const std::string& text) {
  std::map<std::string, std::string> out;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with('#')) continue;
    const auto space = line.rfind(' ');
    EXPECT_TRUE(out.emplace(line.substr(0, space), line.substr(space + 1)).second) << line;
  }
  return out;
}

std::string prometheus(const pool::Snapshot& s, Exposition format = Exposition::Prometheus) {
  LabelSets labels;
  return metrics(s, read_process(), {}, labels, format);
}

TEST(Metrics, HoldTheSnapshot) {
  auto s = sample();
  const auto m = samples(prometheus(s));
  const std::string who = "database=\"app\",user=\"alice\"";
  const std::pair<std::string, const char*> rows[] = {{"pgsidecar_client_connections{" + who + ",state=\"idle\"}", "40"},
                                                      {"pgsidecar_client_connections{" + who + ",state=\"waiting\"}", "3"},
                                                      {"pgsidecar_server_connections{" + who + ",state=\"active\"}", "6"},
                                                      {"pgsidecar_server_connections{" + who + ",state=\"draining\"}", "1"},
                                                      {"pgsidecar_pool_max_connections{" + who + "}", "15"},
                                                      {"pgsidecar_pool_waiting_clients{" + who + "}", "3"},
                                                      {"pgsidecar_pool_oldest_wait_seconds{" + who + "}", "0.0125"},
                                                      {"pgsidecar_queries_total{" + who + "}", "1000"},
                                                      {"pgsidecar_received_bytes_total{" + who + ",side=\"client\"}", "4096"},
                                                      {"pgsidecar_query_seconds_count{" + who + "}", "1000"},
                                                      {"pgsidecar_query_seconds_bucket{" + who + ",le=\"+Inf\"}", "1000"},
                                                      {"pgsidecar_server_closed_total{reason=\"max_uses\"}", "4"},
                                                      {"pgsidecar_client_rejected_total{reason=\"max_clients\"}", "2"},
                                                      {"pgsidecar_errors_total{sqlstate_class=\"42\"}", "5"},
                                                      {"pgsidecar_health_up{upstream=\"db.example.com:5432\"}", "1"},
                                                      {"pgsidecar_backend_latency_seconds{upstream=\"db.example.com:5432\"}", "0.00125"},
                                                      {"pgsidecar_draining", "0"}};
  for (const auto& [name, value] : rows) {
    ASSERT_TRUE(m.contains(name)) << name;
    EXPECT_EQ(m.at(name), value) << name;
  }
  s.upstreams["db.example.com:5432"] = {};
  EXPECT_EQ(prometheus(s).find("\npgsidecar_health_up"), std::string::npos) << "not before the first connect";
}

TEST(Metrics, FurtherLabelSetsAreSummedAsOther) {
  pool::Snapshot s;
  for (int i = 0; i < 70; ++i) s.pools.push_back(sample_pool("db" + std::to_string(i), "u"));
  LabelSets labels;
  const auto first = samples(metrics(s, Process{}, {}, labels, Exposition::Prometheus));
  EXPECT_EQ(first.at("pgsidecar_queries_total{database=\"other\",user=\"other\"}"), "6000");
  EXPECT_EQ(first.at("pgsidecar_pool_waiting_clients{database=\"other\",user=\"other\"}"), "18");
  EXPECT_EQ(first.at("pgsidecar_query_seconds_count{database=\"other\",user=\"other\"}"), "6000");
  EXPECT_TRUE(first.contains("pgsidecar_queries_total{database=\"db63\",user=\"u\"}"));
  EXPECT_FALSE(first.contains("pgsidecar_queries_total{database=\"db64\",user=\"u\"}"));
  std::reverse(s.pools.begin(), s.pools.end());
  const auto second = samples(metrics(s, Process{}, {}, labels, Exposition::Prometheus));
  EXPECT_TRUE(second.contains("pgsidecar_queries_total{database=\"db0\",user=\"u\"}")) << "those shown stay";
}

TEST(Metrics, OpenMetricsNamesCountersWithoutTotal) {
  const std::string text = prometheus(sample(), Exposition::OpenMetrics);
  EXPECT_NE(text.find("# TYPE pgsidecar_queries counter\n"), std::string::npos);
  EXPECT_NE(text.find("\npgsidecar_queries_total{"), std::string::npos);
  EXPECT_NE(text.find("# TYPE pgsidecar_build info\n"), std::string::npos);
  EXPECT_NE(text.find("\npgsidecar_build_info{"), std::string::npos);
  EXPECT_NE(text.find("# UNIT pgsidecar_received_bytes bytes\n"), std::string::npos);
  EXPECT_NE(text.find("# UNIT pgsidecar_query_seconds seconds\n"), std::string::npos);
  EXPECT_NE(text.find("le=\"1.0\""), std::string::npos);
  EXPECT_TRUE(text.ends_with("\n# EOF\n"));
  for (const char* only : {"# EOF", "# UNIT", " info\n"}) EXPECT_EQ(prometheus(sample()).find(only), std::string::npos) << only;
}

TEST(Metrics, BucketsGrowAndEndAtTheCount) {
  std::istringstream in(prometheus(sample()));
  std::uint64_t last = 0;
  for (std::string line; std::getline(in, line);) {
    if (line.find("_bucket{") == std::string::npos) {
      last = 0;
      continue;
    }
    const auto n = std::stoull(line.substr(line.rfind(' ') + 1));
    EXPECT_GE(n, last) << line;
    last = n;
  }
}

// Buckets are as documented, so that series of several instances can be added up.
TEST(Metrics, Buckets) {
  std::map<std::string, std::string> bounds;
  std::istringstream in(prometheus(sample()));
  for (std::string line; std::getline(in, line);) {
    const auto bucket = line.find("_bucket{"), le = line.find("le=\"");
    if (bucket == std::string::npos) continue;
    auto& all = bounds[line.substr(0, bucket)];
    all += (all.empty() ? "" : " ") + line.substr(le + 4, line.find('"', le + 4) - le - 4);
  }
  const std::string long_ones = "0.00025 0.0005 0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 +Inf";
  const std::map<std::string, std::string> expected{
      {"pgsidecar_pool_wait_seconds", "0.0001 " + long_ones},
      {"pgsidecar_query_seconds", long_ones},
      {"pgsidecar_transaction_seconds", long_ones},
      {"pgsidecar_server_connect_seconds", "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 +Inf"},
      {"pgsidecar_server_tls_handshake_seconds", "0.001 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 +Inf"}};
  EXPECT_EQ(bounds, expected);
}

TEST(Metrics, APoolThatIsCalledOtherIsPartOfTheSum) {
  pool::Snapshot s;
  for (int i = 0; i < 70; ++i) s.pools.push_back(sample_pool("db" + std::to_string(i), "u"));
  s.pools.insert(s.pools.begin(), sample_pool("other", "other"));
  EXPECT_EQ(samples(prometheus(s)).at("pgsidecar_queries_total{database=\"other\",user=\"other\"}"), "7000");
}

TEST(Metrics, PgBouncersNamesAndMeanings) {
  auto s = sample();
  EXPECT_EQ(prometheus(s).find("pgbouncer"), std::string::npos);
  s.pgbouncerCompatible = true;
  s.poolMax = 15;
  s.users = 2;
  s.clientsLogin = 1;
  s.pools.push_back(sample_pool("app", "bob"));
  s.pools[1].cancelling = 2;
  s.pools[1].beingCancelled = 1;
  s.databases.push_back({"app", "db.example.com", "5432", "app_1", "", "transaction", 15});
  const auto m = samples(prometheus(s));
  const std::string alice = "{database=\"app\",user=\"alice\"}", bob = "{database=\"app\",user=\"bob\"}", app = "{database=\"app\"}";
  const std::string database = R"({name="app",host="db.example.com",port="5432",database="app_1",force_user="",pool_mode="transaction"})";
  const std::pair<std::string, const char*> rows[] = {{"pgbouncer_up", "1"},
                                                      {"pgbouncer_version_info{version=\"pgsidecar " PGSIDECAR_VERSION "\"}", "1"},
                                                      {"pgbouncer_config_max_client_connections", "1000"},
                                                      {"pgbouncer_config_max_user_connections", "15"},
                                                      {"pgbouncer_databases", "1"},
                                                      {"pgbouncer_users", "2"},
                                                      {"pgbouncer_pools", "2"},
                                                      {"pgbouncer_free_clients", "0"},
                                                      {"pgbouncer_used_clients", "50"},
                                                      {"pgbouncer_login_clients", "1"},
                                                      {"pgbouncer_free_servers", "0"},
                                                      {"pgbouncer_used_servers", "22"},
                                                      {"pgbouncer_cached_dns_names", "0"},
                                                      {"pgbouncer_cached_dns_zones", "0"},
                                                      {"pgbouncer_in_flight_dns_queries", "0"},
                                                      {"pgbouncer_pools_client_active_connections" + alice, "46"},
                                                      {"pgbouncer_pools_client_waiting_connections" + alice, "3"},
                                                      {"pgbouncer_pools_client_active_cancel_connections" + bob, "2"},
                                                      {"pgbouncer_pools_client_waiting_cancel_connections" + alice, "0"},
                                                      {"pgbouncer_pools_server_active_connections" + alice, "6"},
                                                      {"pgbouncer_pools_server_idle_connections" + alice, "2"},
                                                      {"pgbouncer_pools_server_used_connections" + alice, "0"},
                                                      {"pgbouncer_pools_server_testing_connections" + alice, "1"},
                                                      {"pgbouncer_pools_server_login_connections" + alice, "1"},
                                                      {"pgbouncer_pools_server_active_cancel_connections" + bob, "2"},
                                                      {"pgbouncer_pools_server_being_canceled_connections" + bob, "1"},
                                                      {"pgbouncer_pools_client_maxwait_seconds" + alice, "0.0125"},
                                                      {"pgbouncer_stats_queries_pooled_total" + app, "2000"},
                                                      {"pgbouncer_stats_queries_duration_seconds_total" + app, "100.1"},
                                                      {"pgbouncer_stats_received_bytes_total" + app, "8192"},
                                                      {"pgbouncer_stats_sent_bytes_total" + app, "0"},
                                                      {"pgbouncer_stats_client_wait_seconds_total" + app, "10.01"},
                                                      {"pgbouncer_stats_sql_transactions_pooled_total" + app, "1800"},
                                                      {"pgbouncer_stats_server_in_transaction_seconds_total" + app, "200.2"},
                                                      {"pgbouncer_stats_client_parses_total" + app, "0"},
                                                      {"pgbouncer_stats_server_parses_total" + app, "0"},
                                                      {"pgbouncer_stats_binds_total" + app, "0"},
                                                      {"pgbouncer_databases_pool_size" + database, "15"},
                                                      {"pgbouncer_databases_reserve_pool" + database, "0"},
                                                      {"pgbouncer_databases_max_connections" + database, "0"},
                                                      {"pgbouncer_databases_current_connections" + database, "22"},
                                                      {"pgbouncer_databases_paused" + database, "0"},
                                                      {"pgbouncer_databases_disabled" + database, "0"}};
  for (const auto& [name, value] : rows) {
    ASSERT_TRUE(m.contains(name)) << name;
    EXPECT_EQ(m.at(name), value) << name;
  }
}

TEST(Metrics, PgBouncersDatabasesAreBoundedToo) {
  pool::Snapshot s;
  s.pgbouncerCompatible = true;
  for (int i = 0; i < 70; ++i) s.databases.push_back({"db" + std::to_string(i), "h", "5432", "d", "", "transaction", 10});
  const auto m = samples(prometheus(s));
  EXPECT_EQ(m.at(R"(pgbouncer_databases_pool_size{name="other",host="",port="",database="",force_user="",pool_mode=""})"), "60");
  EXPECT_EQ(std::count_if(m.begin(), m.end(), [](const auto& one) { return one.first.starts_with("pgbouncer_databases_pool_size"); }), 65);
}

TEST(Metrics, PromtoolFindsNothing) {
  if (std::system("promtool --version >/dev/null 2>&1") != 0) GTEST_SKIP() << "no promtool";
  auto hostile = sample();
  hostile.pgbouncerCompatible = true;
  hostile.pools.push_back(sample_pool("a\"b\\c\nd\xFF", "\xC3\xA4"));
  hostile.errorsByClass["08"] = 1;
  for (const auto& s : {sample(), hostile, pool::Snapshot{}}) {
    const std::string path = testing::TempDir() + "metrics." + std::to_string(getpid());
    std::ofstream(path) << prometheus(s);
    std::string said;
    FILE* out = popen(("promtool check metrics < " + path + " 2>&1").c_str(), "r");
    ASSERT_NE(out, nullptr);
    for (int c; (c = std::fgetc(out)) != EOF;) said += static_cast<char>(c);
    EXPECT_EQ(pclose(out), 0) << said;
    EXPECT_EQ(said, "");
    unlink(path.c_str());
  }
}

}  // namespace
}  // namespace pgsidecar::admin
