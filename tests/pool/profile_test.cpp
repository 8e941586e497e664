#include "pool/profile.hpp"

#include <gtest/gtest.h>

#include <string>

namespace pgsidecar::pool {
namespace {

using namespace std::chrono_literals;
constexpr Lag::Clock::time_point kBegin{1000s};

TEST(Lag, NothingIsLateAtFirst) {
  const Lag lag;
  EXPECT_EQ(lag.worst_micros(kBegin, 60s), 0u);
  EXPECT_EQ(lag.max_micros(), 0u);
  EXPECT_EQ(lag.mean_micros(), 0);
}

TEST(Lag, TheWorstOfTheWindow) {
  Lag lag;
  lag.record(kBegin, kBegin + 2ms);
  lag.record(kBegin, kBegin + 5ms);
  lag.record(kBegin + 10s, kBegin + 10s + 1ms);
  EXPECT_EQ(lag.worst_micros(kBegin + 10s, 60s), 5000u);
  EXPECT_EQ(lag.worst_micros(kBegin + 10s, 10s), 5000u);
  EXPECT_EQ(lag.worst_micros(kBegin + 10s, 9s), 1000u);
  EXPECT_EQ(lag.worst_micros(kBegin + 71s, 60s), 0u) << "it is over";
  EXPECT_EQ(lag.max_micros(), 5000u);
  EXPECT_NEAR(lag.mean_micros(), 8000.0 / 3, 1);
}

TEST(Lag, ASecondsPlaceIsTakenByALaterOne) {
  Lag lag;
  lag.record(kBegin, kBegin + 900ms);
  const auto later = kBegin + std::chrono::seconds(Lag::kSeconds);
  lag.record(later, later + 1ms);
  EXPECT_EQ(lag.worst_micros(later, 60s), 1000u);
}

TEST(Lag, WhatRanEarlyWasNotLate) {
  Lag lag;
  lag.record(kBegin + 1s, kBegin);
  lag.record(Lag::Clock::time_point::max(), kBegin);  // nothing was due
  EXPECT_EQ(lag.max_micros(), 0u);
}

TEST(Phase, EachHasAName) {
  std::string names;
  for (std::size_t i = 0; i < kPhases; ++i) names += std::string(to_string(static_cast<Phase>(i))) + " ";
  EXPECT_EQ(names, "decide receive send tls wait ");
}

}  // namespace
}  // namespace pgsidecar::pool
