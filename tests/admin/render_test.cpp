#include "admin/render.hpp"

#include <boost/json/src.hpp>
#include <cstdio>
#include <fstream>
#include <map>
#include <sstream>

#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using test::sample;
using test::sample_pool;
namespace json = boost::json;
using Database = pool::Snapshot::Database;

const Clock::time_point kNow{std::chrono::milliseconds(1700000000123)};

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
  return metrics(s, read_process(), labels, format);
}

TEST(Render, PoolStats) {
  auto s = sample();
  s.pools.push_back(sample_pool("other", "bob"));
  s.pools[1].maxUses = 1;
  s.pools[1].lastError = "FATAL: no pg_hba.conf entry";
  const auto v = json::parse(pool_stats_json(s, kNow));
  EXPECT_EQ(v.at("timestamp").as_string(), "2023-11-14T22:13:20.123Z");
  const std::pair<const char*, int> counts[] = {{"totalCount", 20},  {"idleCount", 4},    {"waitingCount", 6},
                                                {"activeCount", 12}, {"expiredCount", 2}, {"connectingCount", 2},
                                                {"max", 30},         {"min", 4},          {"idleTimeoutMillis", 20000}};
  for (const auto& [name, n] : counts) EXPECT_EQ(v.at(name).to_number<int>(), n) << name;
  EXPECT_TRUE(v.at("maxUses").is_null()) << "the pools differ";
  EXPECT_DOUBLE_EQ(v.at("utilization").to_number<double>(), 0.4);
  const auto& query = v.at("query");
  EXPECT_NEAR(query.at("p50").to_number<double>(), 50, 3.2);
  EXPECT_NEAR(query.at("p95").to_number<double>(), 95, 6);
  EXPECT_NEAR(query.at("p99").to_number<double>(), 99, 6.2);
  EXPECT_EQ(query.at("max").to_number<double>(), 100);
  EXPECT_NEAR(v.at("wait").at("p50").to_number<double>(), 5, 0.4);
  ASSERT_EQ(v.at("perPool").as_array().size(), 2u);
  const auto& second = v.at("perPool").at(1);
  EXPECT_EQ(second.at("database").as_string(), "other");
  EXPECT_EQ(second.at("user").as_string(), "bob");
  EXPECT_EQ(second.at("totalCount").to_number<int>(), 10);
  EXPECT_EQ(second.at("lastError").as_string(), "FATAL: no pg_hba.conf entry");
}

TEST(Render, PoolStatsWithoutPools) {
  const auto v = json::parse(pool_stats_json(pool::Snapshot{}, kNow));
  EXPECT_EQ(v.at("utilization").to_number<double>(), 0);
  EXPECT_TRUE(v.at("perPool").as_array().empty());
  EXPECT_TRUE(v.at("idleTimeoutMillis").is_null());
}

TEST(Render, ComputeHealthAndHealth) {
  auto s = sample();
  const auto process = read_process();
  auto v = json::parse(compute_health_json(s, process, kNow));
  EXPECT_EQ(v.at("status").as_string(), "healthy");
  EXPECT_EQ(v.at("pid").to_number<int>(), getpid());
  EXPECT_DOUBLE_EQ(v.at("uptime").to_number<double>(), 61.5);
  EXPECT_GT(v.at("memory").at("rssMb").to_number<double>(), 0);
  EXPECT_GE(v.at("cpu").at("totalSeconds").to_number<double>(), 0);
  EXPECT_EQ(v.at("database").at("status").as_string(), "up");
  EXPECT_DOUBLE_EQ(v.at("database").at("latencyMs").to_number<double>(), 1.25);
  EXPECT_EQ(v.at("database").at("lastOk").as_string(), "2023-11-14T22:13:17.123Z");
  EXPECT_TRUE(v.at("database").at("error").is_null());

  s.database = Database::Down;
  s.databaseError = "FATAL:  \"x\"\n\x01\tline\xff";
  v = json::parse(compute_health_json(s, process, kNow));
  EXPECT_EQ(v.at("status").as_string(), "unhealthy");
  EXPECT_EQ(v.at("database").at("error").as_string(), "FATAL:  \"x\"\n\x01\tline\xEF\xBF\xBD");

  s.database = Database::Unknown;
  v = json::parse(health_json(s, process, kNow));
  EXPECT_EQ(v.at("checks").at("database").at("status").as_string(), "unknown");
  EXPECT_TRUE(v.at("checks").at("database").at("latencyMs").is_null());
  EXPECT_EQ(v.at("checks").at("pool").at("totalCount").to_number<int>(), 10);
  EXPECT_EQ(v.at("version").as_string(), PGSIDECAR_VERSION);
}

TEST(Render, ProcessIsPlausible) {
  const auto p = read_process();
  EXPECT_GT(p.residentBytes, 1u << 20);
  EXPECT_GE(p.virtualBytes, p.residentBytes);
  EXPECT_GE(p.openFds, 3u);
  EXPECT_GE(p.maxFds, p.openFds);
  const double now = static_cast<double>(std::time(nullptr));
  EXPECT_GT(p.startTimeSeconds, now - 3600);
  EXPECT_LE(p.startTimeSeconds, now + 2);
}

TEST(Render, ToUtf8) {
  const std::pair<std::string_view, const char*> rows[] = {{"", ""},
                                                           {"plain", "plain"},
                                                           {"\xC3\xA4\xE2\x82\xAC\xF0\x9F\x90\x98", "\xC3\xA4\xE2\x82\xAC\xF0\x9F\x90\x98"},
                                                           {"a\xFF"
                                                            "b",
                                                            "a\xEF\xBF\xBD"
                                                            "b"},
                                                           {"\xC3", "\xEF\xBF\xBD"},
                                                           {"\xC0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD"},
                                                           {"\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
                                                           {"\xF4\x90\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}};
  for (const auto& [in, out] : rows) EXPECT_EQ(to_utf8(in), out);
}

TEST(Render, MetricsHoldTheSnapshot) {
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
                                                      {"pgsidecar_health_up", "1"},
                                                      {"pgsidecar_backend_latency_seconds", "0.00125"},
                                                      {"pgsidecar_draining", "0"}};
  for (const auto& [name, value] : rows) {
    ASSERT_TRUE(m.contains(name)) << name;
    EXPECT_EQ(m.at(name), value) << name;
  }
  s.database = Database::Unknown;
  EXPECT_FALSE(samples(prometheus(s)).contains("pgsidecar_health_up"));
}

TEST(Render, FurtherLabelSetsAreSummedAsOther) {
  pool::Snapshot s;
  for (int i = 0; i < 70; ++i) s.pools.push_back(sample_pool("db" + std::to_string(i), "u"));
  LabelSets labels;
  const auto first = samples(metrics(s, Process{}, labels, Exposition::Prometheus));
  EXPECT_EQ(first.at("pgsidecar_queries_total{database=\"other\",user=\"other\"}"), "6000");
  EXPECT_EQ(first.at("pgsidecar_pool_waiting_clients{database=\"other\",user=\"other\"}"), "18");
  EXPECT_EQ(first.at("pgsidecar_query_seconds_count{database=\"other\",user=\"other\"}"), "6000");
  EXPECT_TRUE(first.contains("pgsidecar_queries_total{database=\"db63\",user=\"u\"}"));
  EXPECT_FALSE(first.contains("pgsidecar_queries_total{database=\"db64\",user=\"u\"}"));
  std::reverse(s.pools.begin(), s.pools.end());
  const auto second = samples(metrics(s, Process{}, labels, Exposition::Prometheus));
  EXPECT_TRUE(second.contains("pgsidecar_queries_total{database=\"db0\",user=\"u\"}")) << "those shown stay";
}

TEST(Render, OpenMetricsNamesCountersWithoutTotal) {
  const std::string text = prometheus(sample(), Exposition::OpenMetrics);
  EXPECT_NE(text.find("# TYPE pgsidecar_queries counter\n"), std::string::npos);
  EXPECT_NE(text.find("\npgsidecar_queries_total{"), std::string::npos);
  EXPECT_NE(text.find("le=\"1.0\""), std::string::npos);
  EXPECT_TRUE(text.ends_with("\n# EOF\n"));
  EXPECT_EQ(prometheus(sample()).find("# EOF"), std::string::npos);
}

TEST(Render, BucketsGrowAndEndAtTheCount) {
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

TEST(Render, PromtoolFindsNothing) {
  if (std::system("promtool --version >/dev/null 2>&1") != 0) GTEST_SKIP() << "no promtool";
  auto hostile = sample();
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
