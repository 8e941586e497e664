// The policy of one pool, a (database, user): which server connection a client gets, who waits, when to open and when to
// close. Decides only; connections and clearing up are the caller's, time is an argument. Servers last used first, waiters
// first come first served. The permits bound what exists, connections being opened and closed included.
#pragma once

#include <algorithm>
#include <boost/intrusive/list.hpp>
#include <chrono>
#include <cstdint>
#include <limits>
#include <utility>

#include "conf/config.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::pool {

using Hook = boost::intrusive::list_base_hook<boost::intrusive::link_mode<boost::intrusive::auto_unlink>>;

struct Permits {
  std::uint32_t held = 0, leaving = 0, stuck = 0;
};

/// One of the pool's `max` places. A member of the connection, so that the count can't leak.
class Permit {
 public:
  explicit Permit(Permits& permits) : permits_(permits) { take(); }
  Permit(const Permit&) = delete;
  Permit& operator=(const Permit&) = delete;
  ~Permit() { release(); }
  void take() {
    if (!std::exchange(held_, true)) ++permits_.held;
  }
  bool held() const { return held_; }
  /// The connection is being closed: it counts for `max` still, for `min` no more.
  void leave() {
    if (held_ && !std::exchange(leaving_, true)) ++permits_.leaving;
  }
  /// The server doesn't close it: nobody counts on its place becoming free soon.
  void stick() {
    if (held_ && !std::exchange(stuck_, true)) ++permits_.stuck;
  }
  bool stuck() const { return stuck_; }
  void release() {
    if (!std::exchange(held_, false)) return;
    --permits_.held;
    if (std::exchange(leaving_, false)) --permits_.leaving;
    if (std::exchange(stuck_, false)) --permits_.stuck;
  }

 private:
  Permits& permits_;
  bool held_ = false, leaving_ = false, stuck_ = false;
};

/// A server connection as the pool sees it. On the idle list while nobody has leased it.
struct Slot : Hook {
  Time connected{}, idle_since{};
  std::uint32_t uses = 0, use_limit = 0;  // leases so far and allowed; limit 0: none
  Time lifetime_end = Time::max();
  bool condemned = false;  // closed when it comes back
};

/// A client that waits for a server connection.
struct Waiter : Hook {
  Time since{};
  bool waiting() const { return is_linked(); }
};

class Pool {
 public:
  explicit Pool(const conf::PoolSettings& settings) { set_settings(settings); }

  const conf::PoolSettings& settings() const { return settings_; }
  void set_settings(const conf::PoolSettings& settings);
  PoolCounters& counters() { return counters_; }
  Permits& permits() { return permits_; }
  std::uint32_t open() const { return permits_.held; }                        ///< those being opened and closed included
  std::uint32_t staying() const { return permits_.held - permits_.leaving; }  ///< those being closed left out
  std::uint32_t stuck() const { return permits_.stuck; }                      ///< of those being closed, which the server doesn't end
  /// They count at their own server. So many do at the one that has fewest of those that a connection could be made to.
  void set_stuck_here(std::uint32_t stuck) { stuck_here_ = stuck; }
  std::uint32_t stuck_here() const { return std::min(permits_.stuck, stuck_here_); }
  std::uint32_t open_where(std::uint32_t stuck) const { return permits_.held - permits_.stuck + stuck; }  ///< at a server that has so many
  std::uint32_t open_here() const { return open_where(stuck_here()); }
  bool hangs() const { return stuck_here() > 0 && room() == 0; }  ///< nothing can be opened until one of those has ended
  /// Places that another process has, for a time (an online restart).
  void set_lent(std::uint32_t places) { lent_ = places; }
  std::uint32_t lent() const { return lent_; }
  std::uint32_t capacity() const { return settings_.max - std::min(settings_.max, lent_); }  ///< of `max`, this process's
  std::uint32_t room() const { return capacity() - std::min(capacity(), open_here()); }      ///< for connections to be opened
  std::size_t idle_count() const { return idle_.size(); }                                    ///< walks them all
  std::size_t waiting_count() const { return waiters_.size(); }                              ///< walks them all
  bool any_waiting() const { return !waiters_.empty(); }
  Time oldest_wait() const { return waiters_.empty() ? Time::max() : waiters_.front().since; }

  /// A connection was made: its limits, jittered by `random` (0..1) so that connections don't end together.
  void admit(Slot& slot, Time now, double random);
  /// The last used idle connection, leased to a client; nullptr if there is none or others wait already.
  Slot* take(Time now);
  void wait(Waiter& waiter, Time now);
  /// The next to be served, off the queue; nullptr if none.
  Waiter* next_waiter();
  /// The first that has waited for wait_limit(), off the queue; nullptr if none.
  Waiter* expired(Time now);
  /// Who waits since then has waited for wait_limit().
  bool waited_out(Time since, Time now) const;
  /// In milliseconds; 0: none.
  std::uint32_t wait_limit() const { return away_ && settings_.holdMillis != 0 ? settings_.holdMillis : settings_.connectionTimeoutMillis; }
  /// Whether the server is away, or the database paused: who waits is held. When that is over, who was held waits anew.
  void set_away(bool away, Time now);
  void lease(Slot& slot) {
    resting_ = false;
    ++slot.uses;
    ++counters_.leases;
  }
  /// Why a connection that comes back must be closed, if it must; also when the capacity is less than it was.
  bool worn_out(const Slot& slot, Time now, CloseReason& reason) const;
  void put_idle(Slot& slot, Time now);
  /// An idle connection that has been idle or alive too long, off the idle list; nullptr if none.
  Slot* outdated(Time now, CloseReason& reason);
  /// How many connections to open now: one for each waiter that none being opened is for, within the capacity.
  std::uint32_t wanted(std::uint32_t connecting) const;
  /// Without use for so long nothing is kept, `min` or not; zero: what `min` says is.
  void set_rest(std::chrono::milliseconds after);
  /// `min` isn't filled up until a client wants a connection again.
  void rest() { resting_ = true; }
  bool resting() const { return resting_; }
  /// After what time an idle connection may be outdated.
  std::chrono::milliseconds idle_check() const { return staying() > settings_.min ? surplus_check_ : idle_check_; }
  /// After what time a client may have reached one of its limits.
  std::chrono::milliseconds limit_check() const { return limit_check_; }
  Slot* any_idle() { return idle_.empty() ? nullptr : &idle_.front(); }

 private:
  using Slots = boost::intrusive::list<Slot, boost::intrusive::constant_time_size<false>>;
  using Waiters = boost::intrusive::list<Waiter, boost::intrusive::constant_time_size<false>>;

  void set_checks();

  conf::PoolSettings settings_;
  std::chrono::milliseconds limit_check_{}, idle_check_{}, surplus_check_{};  // surplus: beyond `min`
  PoolCounters counters_;
  Permits permits_;
  std::uint32_t stuck_here_ = std::numeric_limits<std::uint32_t>::max();
  std::chrono::milliseconds rest_after_{};
  bool resting_ = false;
  std::uint32_t lent_ = 0;
  Slots idle_;       // front: last used
  Waiters waiters_;  // front: first come
  bool away_ = false;
  Time back_{};  // since when those who were held wait anew
};

}  // namespace pgsidecar::pool
