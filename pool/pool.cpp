#include "pool/pool.hpp"

#include <algorithm>

namespace pgsidecar::pool {

void Pool::admit(Slot& slot, Time now, double random) {
  slot.connected = now;
  const double jitter = 0.9 + 0.1 * random;
  if (settings_.maxUses != 0) slot.use_limit = std::max(1u, static_cast<std::uint32_t>(settings_.maxUses * jitter));
  if (settings_.maxLifetimeSeconds != 0)
    slot.lifetime_end = now + std::chrono::milliseconds(static_cast<std::int64_t>(settings_.maxLifetimeSeconds * jitter * 1000));
}

Slot* Pool::take(Time) {
  if (!waiters_.empty() || idle_.empty()) return nullptr;
  Slot* slot = &idle_.front();
  slot->unlink();
  return slot;
}

void Pool::wait(Waiter& waiter, Time now) {
  waiter.since = now;
  waiter.deadline =
      settings_.connectionTimeoutMillis == 0 ? Time::max() : now + std::chrono::milliseconds(settings_.connectionTimeoutMillis);
  waiters_.push_back(waiter);
}

Waiter* Pool::next_waiter() {
  if (waiters_.empty()) return nullptr;
  Waiter* waiter = &waiters_.front();
  waiter->unlink();
  return waiter;
}

Waiter* Pool::expired(Time now) {
  if (waiters_.empty() || waiters_.front().deadline > now) return nullptr;
  return next_waiter();
}

bool Pool::worn_out(const Slot& slot, Time now, CloseReason& reason) const {
  if (slot.condemned) return reason = CloseReason::Reload, true;
  if (slot.use_limit != 0 && slot.uses >= slot.use_limit) return reason = CloseReason::MaxUses, true;
  if (now >= slot.lifetime_end) return reason = CloseReason::Lifetime, true;
  // One that nobody has had yet serves somebody first.
  if (lent_ > 0 && slot.uses > 0 && staying() > capacity()) return reason = CloseReason::Drain, true;
  return false;
}

void Pool::put_idle(Slot& slot, Time now) {
  slot.idle_since = now;
  idle_.push_front(slot);
}

std::chrono::milliseconds Pool::idle_check() const {
  const std::chrono::milliseconds idle(staying() > settings_.min ? settings_.idleTimeoutMillis : 0);
  const std::chrono::milliseconds lifetime = std::chrono::seconds(settings_.maxLifetimeSeconds) / 10;
  if (idle.count() == 0 && lifetime.count() == 0) return std::chrono::hours(1);
  return idle.count() == 0 ? lifetime : lifetime.count() == 0 ? idle : std::min(idle, lifetime);
}

std::chrono::milliseconds Pool::limit_check() const {
  std::chrono::milliseconds least = std::chrono::hours(1);
  for (const std::uint32_t limit : {settings_.queryTimeoutMillis, settings_.clientIdleTimeoutMillis, settings_.maxTransactionMillis,
                                    settings_.idleInTransactionWarnMillis, settings_.idleInTransactionTimeoutMillis})
    if (limit != 0) least = std::min(least, std::chrono::milliseconds(limit));
  return least;
}

Slot* Pool::outdated(Time now, CloseReason& reason) {
  if (idle_.empty()) return nullptr;
  const auto idle_limit = std::chrono::milliseconds(settings_.idleTimeoutMillis);
  // The back has been idle longest; `min` connections are spared from the idle timeout, not from their lifetime.
  if (Slot& slot = idle_.back(); settings_.idleTimeoutMillis != 0 && staying() > settings_.min && now - slot.idle_since >= idle_limit) {
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
  const auto waiting = static_cast<std::uint32_t>(waiters_.size());
  if (waiting <= connecting || open() >= capacity()) return 0;
  return std::min(waiting - connecting, capacity() - open());
}

}  // namespace pgsidecar::pool
