#include "admin/render.hpp"

#include <boost/json/src.hpp>

#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using test::sample;
using test::sample_pool;
namespace json = boost::json;
using Database = pool::Snapshot::Database;

const Clock::time_point kNow{std::chrono::milliseconds(1700000000123)};

TEST(Render, PoolStats) {
  auto s = sample();
  s.pools.push_back(sample_pool("other", "bob"));
  s.pools[1].maxUses = 1;
  s.pools[1].lastError = "FATAL: no pg_hba.conf entry";
  const auto v = json::parse(pool_stats_json(s, {}, kNow));
  EXPECT_EQ(v.at("timestamp").as_string(), "2023-11-14T22:13:20.123Z");
  const std::pair<const char*, int> counts[] = {
      {"totalCount", 22},     {"idleCount", 4},      {"waitingCount", 6}, {"activeCount", 12}, {"expiredCount", 2},
      {"connectingCount", 2}, {"resettingCount", 2}, {"max", 30},         {"min", 4},          {"idleTimeoutMillis", 20000}};
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
  EXPECT_EQ(second.at("totalCount").to_number<int>(), 11);
  EXPECT_EQ(second.at("lastError").as_string(), "FATAL: no pg_hba.conf entry");
}

TEST(Render, PoolStatsWithoutPools) {
  const auto v = json::parse(pool_stats_json(pool::Snapshot{}, {}, kNow));
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
  EXPECT_EQ(v.at("checks").at("pool").at("totalCount").to_number<int>(), 11);
  EXPECT_EQ(v.at("version").as_string(), PGSIDECAR_VERSION);
}

TEST(Render, ProcessIsPlausible) {
  const auto p = read_process();
  EXPECT_GT(p.residentBytes, 1u << 20);
  EXPECT_GE(p.virtualBytes, p.residentBytes);
  EXPECT_GE(count_open_files(), 3u);
  EXPECT_GE(p.maxFds, count_open_files());
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

}  // namespace
}  // namespace pgsidecar::admin
