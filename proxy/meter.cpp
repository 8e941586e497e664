#include "proxy/meter.hpp"

#include <sys/resource.h>

namespace pgsidecar::proxy {

namespace {

std::uint64_t switches() {
  const pool::ThreadUsage usage = this_thread();
  return usage.wakeups + usage.preemptions;
}

}  // namespace

void Meter::start() {
  until_ = kEvery;
  nanos_ = {};
  phase_ = Phase::Decide;
  switches_ = switches();
  timing_ = true;
  since_ = Clock::now();
}

// A turn in which others had the CPU tells of them: whom a send wakes up often runs at once, in its middle.
void Meter::finish() {
  change(Phase::Decide);
  timing_ = false;
  if (switches() != switches_) return;
  ++counters.sampled;
  for (std::size_t i = 0; i < nanos_.size(); ++i) counters.nanos[i] += nanos_[i];
}

Meter::Phase Meter::change(Phase next) {
  const auto now = Clock::now();
  nanos_[static_cast<std::size_t>(phase_)] += static_cast<std::uint64_t>((now - since_).count());
  since_ = now;
  return std::exchange(phase_, next);
}

pool::ThreadUsage this_thread() {
  rusage used{};
  ::getrusage(RUSAGE_THREAD, &used);
  const auto micros = [](const timeval& t) {
    return static_cast<std::uint64_t>(t.tv_sec) * 1'000'000 + static_cast<std::uint64_t>(t.tv_usec);
  };
  return {micros(used.ru_utime), micros(used.ru_stime), static_cast<std::uint64_t>(used.ru_nvcsw),
          static_cast<std::uint64_t>(used.ru_nivcsw)};
}

}  // namespace pgsidecar::proxy
