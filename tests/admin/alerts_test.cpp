#include "admin/alerts.hpp"

#include <gtest/gtest.h>

#include <boost/json.hpp>

#include "admin/webhook.hpp"

namespace pgsidecar::admin {
namespace {

using namespace std::chrono_literals;
namespace json = boost::json;

/// Samples a second apart of one pool, whose numbers the test changes in between.
struct Watch {
  Watch() {
    snapshot.pools.emplace_back();
    snapshot.pools[0].database = "app";
    snapshot.pools[0].user = "u";
    snapshot.pools[0].max = 10;
    process.residentBytes = 20u << 20;
  }
  pool::PoolSnapshot& pool() { return snapshot.pools[0]; }

  /// What changed in `seconds`: "+name" began or changed its severity (then with it), "-name" ended.
  std::string after(int seconds = 1) {
    std::string told;
    for (int i = 0; i < seconds; ++i) {
      now += 1s;
      Sample sample;
      sample.snapshot = std::make_shared<const pool::Snapshot>(snapshot);
      sample.process = process;
      sample.at = now;
      for (const Alert& alert : alerts.look(sample))
        told += (told.empty() ? "" : " ") + std::string(alert.ended ? "-" : "+") + alert.name + (alert.severity == "critical" ? "!" : "");
    }
    return told;
  }
  /// A second's queries, each of `millis`, and errors.
  void query(int count, int millis, int errors = 0) {
    for (int i = 0; i < count; ++i) pool().counters.query.record(static_cast<std::uint64_t>(millis) * 1000);
    snapshot.errorsByClass["42"] += static_cast<std::uint64_t>(errors);
  }

  pool::Snapshot snapshot;
  Process process;
  Clock::time_point now{Clock::duration(1'700'000'000s)};
  conf::Alerts settings;
  Alerts alerts{settings};
};

TEST(Alerts, NothingIsTheMatter) {
  Watch watch;
  watch.pool().serversActive = 7;
  watch.query(100, 5);
  EXPECT_EQ(watch.after(100), "");
  EXPECT_GE(watch.alerts.next(), 1h) << "no samples are needed while nothing happens";
}

TEST(Alerts, ManyWaitersAreToldAtOnce) {
  Watch watch;
  watch.pool().clientsWaiting = 5;
  EXPECT_EQ(watch.after(), "");
  watch.pool().clientsWaiting = 6;
  EXPECT_EQ(watch.after(), "+pool_pressure!");
  EXPECT_EQ(watch.after(5), "") << "once";
  watch.pool().clientsWaiting = 0;
  EXPECT_EQ(watch.after(14), "");
  watch.pool().clientsWaiting = 6;
  EXPECT_EQ(watch.after(), "") << "still the same one";
  watch.pool().clientsWaiting = 0;
  EXPECT_EQ(watch.after(15), "-pool_pressure!");
  EXPECT_TRUE(watch.alerts.active().empty());
  ASSERT_EQ(watch.alerts.recent().size(), 1u);
  EXPECT_TRUE(watch.alerts.recent()[0].ended);
}

TEST(Alerts, AFewWaitersWhoWaitLong) {
  Watch watch;
  watch.pool().clientsWaiting = 1;
  EXPECT_EQ(watch.after(30), "");
  EXPECT_EQ(watch.after(2), "+pool_pressure");
  watch.pool().clientsWaiting = 8;
  EXPECT_EQ(watch.after(), "+pool_pressure!") << "it has become worse";
  Watch late;  // it wasn't looked at while they began to wait
  late.pool().clientsWaiting = 1;
  late.pool().oldestWaitMicros = 31'000'000;
  EXPECT_EQ(late.after(), "+pool_pressure");
  EXPECT_NE(late.alerts.active()[0].summary.find("31 s"), std::string::npos);
}

TEST(Alerts, ConnectionsComeAndGoAtDifferentLevels) {
  Watch watch;
  watch.pool().serversActive = 8;
  EXPECT_EQ(watch.after(10), "");
  EXPECT_EQ(watch.after(), "+high_connections");
  watch.pool().serversActive = 9;
  EXPECT_EQ(watch.after(), "+high_connections!");
  watch.pool().max = 100;
  watch.pool().serversActive = 85;
  EXPECT_EQ(watch.after(5), "") << "critical down to 81 %";
  watch.pool().serversActive = 75;
  EXPECT_EQ(watch.after(30), "+high_connections") << "a warning down to 72 %";
  watch.pool().serversActive = 71;
  EXPECT_EQ(watch.after(15), "-high_connections");
  watch.pool().serversActive = 85;
  EXPECT_EQ(watch.after(5), "");
  watch.pool().serversActive = 0;
  EXPECT_EQ(watch.after(5), "") << "too short to be told";
}

TEST(Alerts, EachOfTheOthers) {
  Watch watch;
  watch.process.residentBytes = 101u << 20;
  EXPECT_EQ(watch.after(11), "+high_memory");
  watch.snapshot.upstreams["db:5432"].state = pool::Snapshot::Database::Down;
  watch.snapshot.upstreams["db:5432"].error = "connection refused";
  EXPECT_EQ(watch.after(), "+database_unreachable!");
  EXPECT_EQ(watch.alerts.active().back().summary, "db:5432 can't be reached: connection refused");
  watch.pool().leaking = 1;
  watch.pool().oldestLeakMicros = 42'000'000;
  watch.pool().oldestLeaker = "cron";
  EXPECT_EQ(watch.after(), "+leaked_transactions");
  EXPECT_NE(watch.alerts.active().back().summary.find("open for 42 s by application \"cron\""), std::string::npos);
  watch.pool().pinned = 5;
  EXPECT_EQ(watch.after(11), "+pinned_connections");
  watch.snapshot.certificates["tls.certificate"] = Clock::to_time_t(watch.now + 10 * 24h);
  watch.snapshot.certificates["db:5432"] = Clock::to_time_t(watch.now + 20 * 24h);
  EXPECT_EQ(watch.after(), "+certificate_expiry");
  watch.snapshot.certificates["tls.certificate"] = Clock::to_time_t(watch.now - 24h);
  EXPECT_EQ(watch.after(), "+certificate_expiry!");
  watch.snapshot.draining = true;
  EXPECT_EQ(watch.after(15), "");
  EXPECT_EQ(watch.after(), "+drain_stuck!");
  EXPECT_EQ(watch.alerts.active().size(), 6u);
}

TEST(Alerts, SlownessIsMeasuredByWhatIsUsual) {
  Watch watch;
  std::string told;
  for (int i = 0; i < 600; ++i) watch.query(10, 800), told += watch.after();
  for (int i = 0; i < 120; ++i) watch.query(10, 1500), told += watch.after();
  EXPECT_EQ(told, "") << "past a second, but less than thrice the usual";
  for (int i = 0; i < 90; ++i) watch.query(10, 9000), told += watch.after();
  EXPECT_EQ(told, "+database_slow");
  told.clear();
  for (int i = 0; i < 120; ++i) watch.query(10, 800), told += watch.after();
  EXPECT_EQ(told, "-database_slow");

  Watch fresh;  // what is usual isn't known yet: the threshold alone counts
  for (int i = 0; i < 60; ++i) fresh.query(10, 1500), told += fresh.after();
  EXPECT_EQ(told, "-database_slow+database_slow");
}

TEST(Alerts, ErrorsPerQuery) {
  Watch watch;
  std::string told;
  for (int i = 0; i < 60; ++i) watch.query(20, 1, 1), told += watch.after();
  EXPECT_EQ(told, "");
  for (int i = 0; i < 60; ++i) watch.query(20, 1, 5), told += watch.after();
  EXPECT_EQ(told, "+error_rate");
}

TEST(Alerts, SwitchedOff) {
  Watch watch;
  watch.pool().clientsWaiting = 6;
  EXPECT_EQ(watch.after(), "+pool_pressure!");
  watch.settings.enabled = false;
  watch.alerts.set(watch.settings);
  EXPECT_EQ(watch.after(), "-pool_pressure!");
  Watch none;
  none.settings = {true, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}};
  none.alerts.set(none.settings);
  none.pool().clientsWaiting = 100;
  none.pool().serversActive = 10;
  none.pool().pinned = 10;
  none.process.residentBytes = 1u << 30;
  none.snapshot.draining = true;
  none.query(100, 5000, 100);
  EXPECT_EQ(none.after(100), "");
}

TEST(Alerts, AreBounded) {
  Watch watch;
  for (int i = 0; i < 500; ++i) {
    watch.snapshot.pools.push_back(watch.pool());
    watch.snapshot.pools.back().database = std::to_string(i);
    watch.snapshot.pools.back().leaking = 1;
  }
  watch.after();
  EXPECT_EQ(watch.alerts.active().size(), Alerts::kMostActive);
  watch.snapshot.pools.resize(1);
  watch.after(20);
  EXPECT_TRUE(watch.alerts.active().empty());
  EXPECT_EQ(watch.alerts.recent().size(), Alerts::kRecent);
}

TEST(Alerts, Document) {
  Watch watch;
  watch.pool().clientsWaiting = 6;
  watch.after();
  const auto v = json::parse(alerts_json(watch.alerts, "[]", watch.now));
  const auto& active = v.at("active").as_array().at(0);
  EXPECT_EQ(active.at("name").as_string(), "pool_pressure");
  EXPECT_EQ(active.at("severity").as_string(), "critical");
  EXPECT_EQ(active.at("labels").at("database").as_string(), "app");
  EXPECT_EQ(active.at("value").to_number<double>(), 6);
  EXPECT_TRUE(active.at("ended").is_null());
  EXPECT_TRUE(v.at("recent").as_array().empty());
}

TEST(Webhooks, Bodies) {
  Alert alert{"pool_pressure", {{"database", "app"}}, "critical", "6 clients wait & <more>", 6, 5, Clock::time_point(1'700'000'000s), {}};
  const auto generic = json::parse(webhook_body(conf::WebhookFormat::Json, {alert}, "pod-1"));
  EXPECT_EQ(generic.at("status").as_string(), "firing");
  EXPECT_EQ(generic.at("instance").as_string(), "pod-1");
  EXPECT_EQ(generic.at("alert").at("summary").as_string(), alert.summary);
  const auto slack = json::parse(webhook_body(conf::WebhookFormat::Slack, {alert}, "pod-1"));
  EXPECT_EQ(slack.at("text").as_string(), ":red_circle: *[critical] pool_pressure* on pod-1: 6 clients wait &amp; &lt;more&gt;");
  auto manager = json::parse(webhook_body(conf::WebhookFormat::Alertmanager, {alert}, "pod-1")).as_array().at(0);
  EXPECT_EQ(manager.at("labels").at("alertname").as_string(), "pgsidecar_pool_pressure");
  EXPECT_EQ(manager.at("labels").at("database").as_string(), "app");
  EXPECT_EQ(manager.at("startsAt").as_string(), "2023-11-14T22:13:20.000Z");
  EXPECT_FALSE(manager.as_object().contains("endsAt")) << "it decides when to forget";
  alert.ended = alert.since + 60s;
  manager = json::parse(webhook_body(conf::WebhookFormat::Alertmanager, {alert}, "pod-1")).as_array().at(0);
  EXPECT_EQ(manager.at("endsAt").as_string(), "2023-11-14T22:14:20.000Z");
  EXPECT_EQ(json::parse(webhook_body(conf::WebhookFormat::Json, {alert}, "pod-1")).at("status").as_string(), "resolved");
}

}  // namespace
}  // namespace pgsidecar::admin
