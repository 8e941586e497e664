#include "admin/history.hpp"

#include <gtest/gtest.h>

#include <boost/json.hpp>

namespace pgsidecar::admin {
namespace {

namespace json = boost::json;
using namespace std::chrono_literals;

// A pool that is asked for more each second.
class HistoryTest : public ::testing::Test {
 protected:
  const Clock::time_point begin_{std::chrono::seconds(1'700'000'040)};  // a minute's begin
  History history_;
  pool::Snapshot snapshot_;
  Process process_;

  HistoryTest() { snapshot_.pools.resize(1); }
  pool::PoolSnapshot& pool() { return snapshot_.pools[0]; }
  void run(std::uint64_t transactions, std::uint64_t micros = 1000) {
    pool().counters.transactions += transactions;
    for (std::uint64_t i = 0; i < transactions; ++i) pool().counters.query.record(micros);
  }
  void add(std::chrono::milliseconds at, bool rested = false) {
    history_.add({std::make_shared<pool::Snapshot>(snapshot_), process_, begin_ + at, rested});
  }
  json::value ask(std::uint32_t window, std::uint32_t step, std::chrono::milliseconds at) {
    return json::parse(history_.json(window, step, begin_ + at));
  }
  static std::vector<double> values(const json::value& document, std::string_view name) {
    std::vector<double> out;
    for (const json::value& v : document.at("series").at(name).as_array()) out.push_back(v.is_null() ? -1 : v.to_number<double>());
    return out;
  }
};
using Values = std::vector<double>;

TEST_F(HistoryTest, RatesGaugesAndQuantilesOfEachSecond) {
  add(0s);
  run(10);
  pool().serversActive = 3;
  add(1s);
  run(20, 50000);
  pool().serversActive = 1;
  add(2s);
  const auto document = ask(3, 1, 2s);
  EXPECT_EQ(document.at("step").to_number<int>(), 1);
  EXPECT_EQ(document.at("t").as_array().size(), 3u);
  EXPECT_EQ(values(document, "transactions"), (Values{0, 10, 20}));
  EXPECT_EQ(values(document, "serversActive"), (Values{0, 3, 1}));
  const Values p95 = values(document, "queryP95Ms");
  EXPECT_EQ(p95[0], -1) << "nothing was asked";
  EXPECT_NEAR(p95[1], 1, 0.1);
  EXPECT_NEAR(p95[2], 50, 4);
}

TEST_F(HistoryTest, WhatWasCountedBeforeTheFirstSampleIsNobodysRate) {
  run(1000);
  add(0s);
  EXPECT_EQ(values(ask(1, 1, 0s), "transactions"), Values{0});
}

TEST_F(HistoryTest, CoarserRingsHoldSumsAndPeaks) {
  add(0s);
  for (int second = 1; second <= 119; ++second) {
    run(60);
    pool().clientsWaiting = second == 30 ? 7 : 0;
    add(std::chrono::seconds(second));
  }
  EXPECT_EQ(values(ask(300, 1, 119s), "transactions").size(), 300u);
  const auto hour = ask(3600, 1, 119s);
  EXPECT_EQ(hour.at("step").to_number<int>(), 10);
  EXPECT_EQ(values(hour, "transactions").size(), 360u);
  EXPECT_EQ(values(hour, "transactions").back(), 60);
  const auto day = ask(86400, 1, 119s);
  EXPECT_EQ(day.at("step").to_number<int>(), 60);
  const Values waiting = values(day, "clientsWaiting");
  EXPECT_EQ(waiting.size(), 1440u);
  EXPECT_EQ(waiting[1438], 7) << "the highest seen in the minute";
  EXPECT_EQ(waiting[1439], 0);
  EXPECT_EQ(values(ask(300, 10, 119s), "transactions").size(), 30u);
}

TEST_F(HistoryTest, AGapHasNoData) {
  add(0s);
  run(40);
  add(4s);
  EXPECT_EQ(values(ask(5, 1, 4s), "transactions"), (Values{0, -1, -1, -1, 20})) << "of a gap at most two seconds count as seen";
}

TEST_F(HistoryTest, ARestHasTheGaugesAndNoTraffic) {
  add(0s);
  run(40);
  pool().serversIdle = 5;
  add(1s);
  run(7);
  add(5s, true);
  EXPECT_EQ(values(ask(6, 1, 5s), "transactions"), (Values{0, 40, 0, 0, 0, 7}));
  EXPECT_EQ(values(ask(6, 1, 5s), "serversIdle"), (Values{0, 5, 5, 5, 5, 5}));
  EXPECT_EQ(values(ask(6, 1, 5s), "queryP50Ms")[3], -1);
}

TEST_F(HistoryTest, ALongRestIsFilledInEachRing) {
  add(0s);
  run(40);
  pool().serversIdle = 5;
  add(1s);
  history_.rest(begin_ + 30h);
  history_.rest(begin_ + 30h);
  for (const std::uint32_t window : {300u, 3600u, 86400u}) {
    const auto document = ask(window, 1, 30h);
    for (const double v : values(document, "transactions")) EXPECT_EQ(v, 0);
    for (const double v : values(document, "serversIdle")) EXPECT_EQ(v, 5);
  }
  run(3);
  add(30h + 1s, true);
  EXPECT_EQ(values(ask(2, 1, 30h + 1s), "transactions"), (Values{0, 3}));
}

TEST_F(HistoryTest, ASilentDataLoopLeavesAGap) {
  add(0s);
  history_.add({nullptr, process_, begin_ + 1s, false});
  add(2s);
  EXPECT_EQ(values(ask(3, 1, 2s), "transactions"), (Values{0, -1, 0}));
}

}  // namespace
}  // namespace pgsidecar::admin
