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
  p2.reset();
  EXPECT_EQ(pool->open(), 1u);
  b.condemned = true;
  EXPECT_EQ(pool->outdated(now + 10s, reason), &b);
  EXPECT_EQ(reason, CloseReason::Reload);
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
  EXPECT_EQ(reason, CloseReason::Drain);
  p2.leave();
  EXPECT_FALSE(pool->worn_out(slot, now, reason));
  EXPECT_EQ(pool->wanted(0), 0u);  // it counts until it is gone
  pool->set_lent(7);
  EXPECT_EQ(pool->capacity(), 0u);
  pool->set_lent(0);
  EXPECT_EQ(pool->wanted(0), 1u);
}

}  // namespace
}  // namespace pgsidecar::pool
