#include "pool/backoff.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::pool {
namespace {

using namespace std::chrono_literals;

TEST(Backoff, GrowsToAFewSecondsWhileNobodyWaits) {
  const Time now = Time{} + 1h;
  Backoff backoff;
  EXPECT_TRUE(backoff.may_try(now, false));
  for (const auto pause : {100ms, 200ms, 400ms, 800ms, 1600ms, 3200ms, 5000ms, 5000ms}) {
    backoff.failed(now, 0.5, false);
    EXPECT_FALSE(backoff.may_try(now + pause - 1ms, false)) << pause.count();
    EXPECT_TRUE(backoff.may_try(now + pause, false)) << pause.count();
  }
  EXPECT_EQ(backoff.failures(), 8u);
  backoff.succeeded();
  EXPECT_TRUE(backoff.may_try(now, false));
  EXPECT_EQ(backoff.failures(), 0u);
}

TEST(Backoff, ThoseWhoWaitAreServedWithinASecondOfTheServersReturn) {
  const Time now = Time{} + 1h;
  for (const double random : {0.0, 0.5, 1.0}) {
    Backoff backoff;
    for (int i = 0; i < 40; ++i) {
      backoff.failed(now, random, false);
      EXPECT_FALSE(backoff.may_try(now, true));
      EXPECT_TRUE(backoff.may_try(now + 500ms, true));
    }
    EXPECT_FALSE(backoff.may_try(now + 3s, false)) << "somebody may come to wait later: it counts from then on";
  }
}

TEST(Backoff, AWrongPasswordIsNotTriedMoreOftenForThem) {
  const Time now = Time{} + 1h;
  Backoff backoff;
  for (int i = 0; i < 8; ++i) backoff.failed(now, 0.5, true);
  EXPECT_FALSE(backoff.may_try(now + 4999ms, true));
  EXPECT_TRUE(backoff.may_try(now + 5s, true));
  backoff.hurry();
  EXPECT_TRUE(backoff.may_try(now, false));
  EXPECT_EQ(backoff.failures(), 8u);
}

TEST(Backoff, IsSpreadByChance) {
  const Time now = Time{} + 1h;
  Backoff early, late;
  early.failed(now, 0, false);
  late.failed(now, 1, false);
  EXPECT_TRUE(early.may_try(now + 75ms, true));
  EXPECT_FALSE(late.may_try(now + 124ms, true));
  EXPECT_TRUE(late.may_try(now + 125ms, true));
}

}  // namespace
}  // namespace pgsidecar::pool
