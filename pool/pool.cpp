#include "pool/pool.hpp"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace pgsidecar::pool {

void Pool::admit(Slot& slot, Time now, double random) {
  slot.connected = now;
  const double fewer = 0.1 * (1 - random);
  if (settings_.maxUses != 0) slot.use_limit = settings_.maxUses - static_cast<std::uint32_t>(settings_.maxUses * fewer);
  if (settings_.maxLifetimeSeconds != 0)
    slot.lifetime_end = now + std::chrono::milliseconds(static_cast<std::int64_t>(settings_.maxLifetimeSeconds * (1 - fewer) * 1000));
}

Slot* Pool::take(Time) {
  if (!waiters_.empty() || idle_.empty()) return nullptr;
  Slot* slot = &idle_.front();
  slot->unlink();
  return slot;
}

void Pool::wait(Waiter& waiter, Time now) {
  waiter.since = now;
  waiters_.push_back(waiter);
  resting_ = false;
}

Waiter* Pool::next_waiter() {
  if (waiters_.empty()) return nullptr;
  Waiter* waiter = &waiters_.front();
  waiter->unlink();
  return waiter;
}

Waiter* Pool::expired(Time now) {
  return !waiters_.empty() && waited_out(waiters_.front().since, now) ? next_waiter() : nullptr;
}

bool Pool::waited_out(Time since, Time now) const {
  const std::uint32_t limit = wait_limit();
  return limit != 0 && now - std::max(since, away_ ? Time{} : back_) >= std::chrono::milliseconds(limit);
}

void Pool::set_away(bool away, Time now) {
  if (std::exchange(away_, away) && !away && settings_.holdMillis != 0) back_ = now;
}

bool Pool::worn_out(const Slot& slot, Time now, CloseReason& reason) const {
  if (slot.condemned) return reason = CloseReason::Reload, true;
  // One that nobody has had yet serves who waits first.
  if (staying() + stuck_here() > capacity() && (slot.uses > 0 || waiters_.empty())) return reason = CloseReason::Surplus, true;
  if (slot.use_limit != 0 && slot.uses >= slot.use_limit) return reason = CloseReason::MaxUses, true;
  if (now >= slot.lifetime_end) return reason = CloseReason::Lifetime, true;
  return false;
}

void Pool::put_idle(Slot& slot, Time now) {
  slot.idle_since = now;
  idle_.push_front(slot);
}

void Pool::set_settings(const conf::PoolSettings& settings) {
  settings_ = settings;
  set_checks();
}

void Pool::set_rest(std::chrono::milliseconds after) {
  rest_after_ = after;
  set_checks();
}

void Pool::set_checks() {
  using std::chrono::milliseconds;
  const auto least = [](std::initializer_list<milliseconds> limits) {
    milliseconds shortest = std::chrono::hours(1);
    for (const milliseconds limit : limits)
      if (limit.count() != 0) shortest = std::min(shortest, limit);
    return shortest;
  };
  const conf::PoolSettings& s = settings_;
  limit_check_ = least({milliseconds(s.queryTimeoutMillis), milliseconds(s.clientIdleTimeoutMillis), milliseconds(s.maxTransactionMillis),
                        milliseconds(s.idleInTransactionWarnMillis), milliseconds(s.idleInTransactionTimeoutMillis)});
  idle_check_ = least({milliseconds(std::chrono::seconds(s.maxLifetimeSeconds)) / 10, rest_after_});
  surplus_check_ = least({idle_check_, milliseconds(s.idleTimeoutMillis)});
}

Slot* Pool::outdated(Time now, CloseReason& reason) {
  if (idle_.empty()) return nullptr;
  const auto idle_limit = std::chrono::milliseconds(settings_.idleTimeoutMillis);
  const bool rests = rest_after_.count() != 0 && idle_count() == staying() && now - idle_.front().idle_since >= rest_after_;
  resting_ |= rests;
  // The back has been idle longest; `min` connections are spared from the idle timeout, not from their lifetime.
  if (Slot& slot = idle_.back();
      rests || (settings_.idleTimeoutMillis != 0 && staying() > settings_.min && now - slot.idle_since >= idle_limit)) {
    reason = CloseReason::Idle;
    slot.unlink();
    return &slot;
  }
  for (Slot& slot : idle_) {
    if (!worn_out(slot, now, reason)) continue;
    slot.unlink();
    return &slot;
  }
  return nullptr;
}

std::uint32_t Pool::wanted(std::uint32_t connecting) const {
  if (room() == 0) return 0;
  const std::uint32_t most = connecting + room();
  std::uint32_t waiting = 0;
  for (auto it = waiters_.begin(); it != waiters_.end() && waiting < most; ++it) ++waiting;
  return waiting - std::min(waiting, connecting);
}

}  // namespace pgsidecar::pool
