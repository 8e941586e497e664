#include "pool/pool.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

namespace pgsidecar::pool {
namespace {

using namespace std::chrono_literals;

struct PoolTest : testing::Test {
  Time now = Time{} + 1h;
  conf::PoolSettings settings;
  std::unique_ptr<Pool> pool;

  void make() { pool = std::make_unique<Pool>(settings); }
};

TEST_F(PoolTest, LastUsedFirstLeased) {
  make();
  Slot a, b;
  pool->put_idle(a, now);
  pool->put_idle(b, now);
  EXPECT_EQ(pool->take(now), &b);
  EXPECT_EQ(pool->take(now), &a);
  EXPECT_EQ(pool->take(now), nullptr);
}

TEST_F(PoolTest, NothingIsKeptForAServerThatGoesToSleep) {
  settings.min = 2;
  settings.idleTimeoutMillis = 0;
  settings.maxLifetimeSeconds = 0;
  make();
  pool->set_rest(270s);
  EXPECT_EQ(pool->idle_check(), 270s);
  Permit one(pool->permits()), two(pool->permits());
  Slot a, b;
  pool->put_idle(a, now);
  CloseReason reason{};
  EXPECT_EQ(pool->outdated(now + 300s, reason), nullptr) << "the other one is in use";
  pool->put_idle(b, now + 200s);
  EXPECT_EQ(pool->outdated(now + 469s, reason), nullptr) << "the last use counts";
  EXPECT_FALSE(pool->resting());
  EXPECT_EQ(pool->outdated(now + 470s, reason), &a);
  EXPECT_EQ(reason, CloseReason::Idle);
  one.release();
  EXPECT_EQ(pool->outdated(now + 470s, reason), &b);
  EXPECT_TRUE(pool->resting());
  Waiter waiter;
  pool->wait(waiter, now + 500s);
  EXPECT_FALSE(pool->resting());
}

TEST_F(PoolTest, FirstComeFirstServed) {
  make();
  Waiter a, b, c;
  for (Waiter* w : {&a, &b, &c}) pool->wait(*w, now);
  b.unlink();  // its client has left
  EXPECT_EQ(pool->waiting_count(), 2u);
  EXPECT_EQ(pool->next_waiter(), &a);
  EXPECT_EQ(pool->next_waiter(), &c);
  EXPECT_EQ(pool->next_waiter(), nullptr);
}

TEST_F(PoolTest, NobodyOvertakesAWaiter) {
  make();
  Waiter waiter;
  Slot slot;
  pool->wait(waiter, now);
  pool->put_idle(slot, now);
  EXPECT_EQ(pool->take(now), nullptr);
}

TEST_F(PoolTest, WaitersExpireInOrder) {
  settings.connectionTimeoutMillis = 5000;
  make();
  Waiter a, b;
  pool->wait(a, now);
  pool->wait(b, now + 1s);
  EXPECT_EQ(pool->expired(now + 4999ms), nullptr);
  EXPECT_EQ(pool->expired(now + 5000ms), &a);
  EXPECT_EQ(pool->expired(now + 5000ms), nullptr);
  EXPECT_EQ(pool->oldest_wait(), now + 1s);
}

TEST_F(PoolTest, WithoutATimeoutNobodyExpires) {
  settings.connectionTimeoutMillis = 0;
  make();
  Waiter a;
  pool->wait(a, now);
  EXPECT_EQ(pool->expired(now + 1000h), nullptr);
}

TEST_F(PoolTest, HoldsWhileTheServerIsAway) {
  settings.connectionTimeoutMillis = 5000;
  settings.holdMillis = 60000;
  make();
  Waiter a, b;
  pool->wait(a, now);
  pool->set_away(true, now);
  pool->wait(b, now + 20s);
  EXPECT_EQ(pool->expired(now + 59999ms), nullptr);
  EXPECT_EQ(pool->expired(now + 60000ms), &a);
  EXPECT_EQ(pool->expired(now + 60000ms), nullptr);
  // It is back: who was held has connectionTimeoutMillis more.
  pool->set_away(true, now + 60s);
  pool->set_away(false, now + 61s);
  pool->set_away(false, now + 65s);
  EXPECT_EQ(pool->expired(now + 65999ms), nullptr);
  EXPECT_EQ(pool->expired(now + 66s), &b);
}

TEST_F(PoolTest, HoldsNobodyLongerWithoutHoldMillis) {
  settings.connectionTimeoutMillis = 5000;
  make();
  Waiter a;
  pool->wait(a, now);
  pool->set_away(true, now);
  pool->set_away(false, now + 4s);
  EXPECT_EQ(pool->expired(now + 4999ms), nullptr);
  EXPECT_EQ(pool->expired(now + 5s), &a);
}

TEST_F(PoolTest, GivesUpSoonerWhileTheServerIsAway) {
  settings.connectionTimeoutMillis = 0;
  settings.holdMillis = 1000;
  make();
  Waiter a;
  pool->wait(a, now);
  EXPECT_EQ(pool->expired(now + 1h), nullptr);
  pool->set_away(true, now + 1h);
  EXPECT_EQ(pool->expired(now + 1h), &a);
}

TEST_F(PoolTest, ShrinksToALowerMax) {
  settings.max = 3;
  settings.idleTimeoutMillis = 0;
  make();
  Slot slots[3];
  std::vector<std::unique_ptr<Permit>> permits;
  for (Slot& slot : slots) {
    permits.push_back(std::make_unique<Permit>(pool->permits()));
    pool->admit(slot, now, 0);
    pool->put_idle(slot, now);
  }
  CloseReason reason{};
  EXPECT_EQ(pool->outdated(now, reason), nullptr);
  settings.max = 1;
  pool->set_settings(settings);
  for (int left = 3; left > 1; --left) {
    EXPECT_NE(pool->outdated(now, reason), nullptr);
    EXPECT_EQ(reason, CloseReason::Surplus);
    permits[left - 1]->leave();
  }
  EXPECT_EQ(pool->outdated(now, reason), nullptr);
}

TEST_F(PoolTest, OpensForWaitersWithinMax) {
  settings.max = 3;
  make();
  std::vector<Waiter> waiters(5);
  for (Waiter& w : waiters) pool->wait(w, now);
  EXPECT_EQ(pool->wanted(0), 3u);
  Permit one(pool->permits()), two(pool->permits());
  EXPECT_EQ(pool->wanted(2), 1u);
  {
    Permit three(pool->permits());
    EXPECT_EQ(pool->wanted(3), 0u);
  }
  one.release();
  one.release();
  EXPECT_EQ(pool->open(), 1u);
}

TEST_F(PoolTest, APlaceThatWasGivenUpIsTakenAnew) {
  make();
  Permit permit(pool->permits());
  permit.leave();
  permit.stick();
  permit.release();
  EXPECT_FALSE(permit.held());
  EXPECT_EQ(pool->open(), 0u);
  for (int i = 0; i < 2; ++i) permit.take();
  EXPECT_TRUE(permit.held());
  EXPECT_FALSE(permit.stuck());
  EXPECT_EQ(pool->open(), 1u);
  EXPECT_EQ(pool->staying(), 1u);
  EXPECT_EQ(pool->stuck(), 0u);
}

TEST_F(PoolTest, WearsOut) {
  settings.maxUses = 100;
  settings.maxLifetimeSeconds = 60;
  make();
  Slot slot;
  pool->admit(slot, now, 1.0);
  CloseReason reason{};
  for (int i = 0; i < 99; ++i) pool->lease(slot);
  EXPECT_FALSE(pool->worn_out(slot, now, reason));
  pool->lease(slot);
  EXPECT_TRUE(pool->worn_out(slot, now, reason));
  EXPECT_EQ(reason, CloseReason::MaxUses);
  Slot old;
  pool->admit(old, now, 0.0);
  EXPECT_FALSE(pool->worn_out(old, now + 53s, reason));
  EXPECT_TRUE(pool->worn_out(old, now + 54s, reason));
  EXPECT_EQ(reason, CloseReason::Lifetime);
}

TEST_F(PoolTest, JitterLeavesAFewUsesAsTheyAre) {
  const struct {
    std::uint32_t maxUses;
    double random;
    std::uint32_t limit;
  } rows[] = {{1, 0.0, 1},       {2, 0.0, 2},       {3, 0.5, 3},
              {9, 0.0, 9},       {10, 0.01, 10},    {20, 0.1, 19},
              {5000, 1.0, 5000}, {5000, 0.0, 4500}, {4294967295u, 1.0, 4294967295u}};
  for (const auto& row : rows) {
    settings.maxUses = row.maxUses;
    make();
    Slot slot;
    pool->admit(slot, now, row.random);
    EXPECT_EQ(slot.use_limit, row.limit) << row.maxUses << " " << row.random;
  }
}

TEST_F(PoolTest, IdlesOutDownToMin) {
  settings.min = 1;
  settings.idleTimeoutMillis = 1000;
  settings.maxLifetimeSeconds = 0;
  make();
  Permit p1(pool->permits());
  auto p2 = std::make_unique<Permit>(pool->permits());
  Slot a, b;
  pool->admit(a, now, 0);
  pool->admit(b, now, 0);
  pool->put_idle(a, now);
  pool->put_idle(b, now + 500ms);
  CloseReason reason{};
  EXPECT_EQ(pool->outdated(now + 999ms, reason), nullptr);
  EXPECT_EQ(pool->outdated(now + 1000ms, reason), &a);
  EXPECT_EQ(reason, CloseReason::Idle);
  p2->leave();
  EXPECT_EQ(pool->open(), 2u);
  EXPECT_EQ(pool->outdated(now + 10s, reason), nullptr);  // min is spared, and one that is being closed isn't of it
  p2->stick();
  EXPECT_EQ(pool->stuck(), 1u);
  EXPECT_EQ(pool->open(), 2u);
  p2.reset();
  EXPECT_EQ(pool->stuck(), 0u);
  EXPECT_EQ(pool->open(), 1u);
  b.condemned = true;
  EXPECT_EQ(pool->outdated(now + 10s, reason), &b);
  EXPECT_EQ(reason, CloseReason::Reload);
}

TEST_F(PoolTest, WhatIsStuckCountsAtItsOwnServer) {
  settings.max = 2;
  make();
  Permit one(pool->permits()), two(pool->permits());
  for (Permit* permit : {&one, &two}) permit->leave(), permit->stick();
  EXPECT_EQ(pool->room(), 0u) << "until more is known";
  EXPECT_TRUE(pool->hangs());
  const struct {
    std::uint32_t stuck_here, open, room;
    bool hangs;
  } rows[] = {{2, 2, 0, true}, {1, 1, 1, false}, {0, 0, 2, false}, {3, 2, 0, true}};
  for (const auto& row : rows) {
    pool->set_stuck_here(row.stuck_here);
    EXPECT_EQ(pool->open_here(), row.open) << row.stuck_here;
    EXPECT_EQ(pool->room(), row.room) << row.stuck_here;
    EXPECT_EQ(pool->hangs(), row.hangs) << row.stuck_here;
  }
  EXPECT_EQ(pool->open(), 2u);
  pool->set_stuck_here(0);
  Waiter waiters[3];
  for (Waiter& waiter : waiters) pool->wait(waiter, now);
  EXPECT_EQ(pool->wanted(0), 2u);
  Permit three(pool->permits());
  EXPECT_EQ(pool->room(), 1u);
  EXPECT_EQ(pool->open_where(2), 3u);
  one.release();
  EXPECT_EQ(pool->room(), 1u) << "of another server's";
  pool->set_stuck_here(1);
  EXPECT_EQ(pool->room(), 0u);
  two.release();
  EXPECT_EQ(pool->room(), 1u);
  EXPECT_FALSE(pool->hangs());
}

TEST_F(PoolTest, LentPlacesAreNotItsOwn) {
  settings.max = 3;
  make();
  pool->set_lent(2);
  EXPECT_EQ(pool->capacity(), 1u);
  Waiter first, second;
  pool->wait(first, now);
  pool->wait(second, now);
  EXPECT_EQ(pool->wanted(0), 1u);
  Permit p1(pool->permits()), p2(pool->permits());
  EXPECT_EQ(pool->wanted(0), 0u);
  Slot slot;
  pool->admit(slot, now, 0);
  CloseReason reason{};
  EXPECT_FALSE(pool->worn_out(slot, now, reason));
  pool->lease(slot);
  EXPECT_TRUE(pool->worn_out(slot, now, reason));  // there is one too many, and it has served
  EXPECT_EQ(reason, CloseReason::Surplus);
  p2.leave();
  EXPECT_FALSE(pool->worn_out(slot, now, reason));
  EXPECT_EQ(pool->wanted(0), 0u);  // it counts until it is gone
  p2.stick();
  EXPECT_TRUE(pool->worn_out(slot, now, reason));  // which it won't be soon
  pool->set_lent(7);
  EXPECT_EQ(pool->capacity(), 0u);
  pool->set_lent(0);
  EXPECT_EQ(pool->wanted(0), 1u);
}

}  // namespace
}  // namespace pgsidecar::pool
