// Counts what a data loop does: system calls each, time in one turn of kEvery. Decides what that costs: two increments and a branch a
// turn, an increment and a branch a system call; the clock is read in the turns that are timed. Owned by the Worker.
#pragma once

#include <utility>

#include "pool/profile.hpp"

namespace pgsidecar::proxy {

class Meter {
 public:
  using Clock = std::chrono::steady_clock;
  using Phase = pool::Phase;
  static constexpr int kEvery = 127;  // a prime, so that it doesn't keep step with turns that alternate

  pool::LoopCounters counters;

  void begin_turn() {
    ++counters.turns;
    if (--until_ == 0) [[unlikely]]
      start();
  }
  void end_turn() {
    if (timing_) [[unlikely]]
      finish();
  }
  /// From now on the turn's time is this phase's. Returns whose it was.
  Phase enter(Phase next) {
    if (timing_) [[unlikely]]
      return change(next);
    return next;
  }

  /// The same for a scope.
  class Span {
   public:
    Span(Meter& meter, Phase phase) : meter_(meter), before_(meter.enter(phase)) {}
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;
    ~Span() { meter_.enter(before_); }

   private:
    Meter& meter_;
    const Phase before_;
  };

 private:
  void start();
  void finish();
  Phase change(Phase next);

  int until_ = kEvery;
  bool timing_ = false;
  Phase phase_ = Phase::Decide;
  Clock::time_point since_{};
  std::array<std::uint64_t, pool::kPhases> nanos_{};  // of this turn
  std::uint64_t switches_ = 0;                        // of the thread, before it
};

/// The calling thread as the kernel counts it.
pool::ThreadUsage this_thread();

}  // namespace pgsidecar::proxy
