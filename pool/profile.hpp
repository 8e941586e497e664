// What the loops cost and who holds the memory: numbers that the data loop counts while it works, copied into snapshots. Decides what
// is counted; proxy/meter.hpp counts it, admin/profile.hpp reckons with it.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace pgsidecar::pool {

/// What a turn's time goes into. Wait: telling the kernel which readiness is waited for next. Decide: all the rest.
enum class Phase : std::uint8_t { Decide, Receive, Send, Tls, Wait, kCount };
inline constexpr std::size_t kPhases = static_cast<std::size_t>(Phase::kCount);
const char* to_string(Phase);

/// TLS handshakes of one side since start.
struct Handshakes {
  std::uint64_t full = 0, resumed = 0, failed = 0;
  std::uint64_t nanos = 0;  ///< spent in them; waiting for the peer isn't
};

/// What the data loop did since start. System calls are counted one by one; one turn in so many is timed.
struct LoopCounters {
  std::uint64_t turns = 0;  ///< handlers run: something was readable, or a client went on
  std::uint64_t receives = 0, sends = 0, waits = 0;
  std::uint64_t sampled = 0;                   ///< turns that were timed
  std::array<std::uint64_t, kPhases> nanos{};  ///< of those
  std::uint64_t ticks = 0, tickNanos = 0;      ///< runs of the timer that serves all deadlines
  Handshakes clientHandshakes, serverHandshakes;
};

/// How late a loop was: from when something was due to when it ran.
class Lag {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kSeconds = 64;  ///< of each the worst is kept

  void record(Clock::time_point due, Clock::time_point ran);
  /// In the last `window`, at most kSeconds.
  std::uint64_t worst_micros(Clock::time_point now, std::chrono::seconds window) const;
  std::uint64_t max_micros() const { return max_; }  ///< since start
  double mean_micros() const { return count_ == 0 ? 0 : static_cast<double>(sum_) / static_cast<double>(count_); }

 private:
  struct Second {
    std::int64_t number = -1;
    std::uint64_t worst = 0;
  };
  std::array<Second, kSeconds> seconds_{};
  std::uint64_t count_ = 0, sum_ = 0, max_ = 0;
};

/// A loop's thread, as the kernel counts it since start.
struct ThreadUsage {
  std::uint64_t userMicros = 0, systemMicros = 0;
  std::uint64_t wakeups = 0;      ///< it had nothing to do and slept
  std::uint64_t preemptions = 0;  ///< it had, and another got the CPU
};

struct LoopSnapshot {
  ThreadUsage usage;
  Lag lag;
};

/// Who holds how much of the heap, in bytes; to some percent.
struct MemoryOwners {
  std::uint64_t clients = 0;     ///< sessions, their TLS, what they have sent and not taken, names of prepared statements
  std::uint64_t servers = 0;     ///< the same of server connections
  std::uint64_t statements = 0;  ///< texts of prepared statements
  std::uint64_t statistics = 0;  ///< of statements and pools
  std::uint64_t settings = 0;    ///< clients' session settings
  std::uint64_t catalog = 0;     ///< what is known of the databases' functions
  std::uint64_t log = 0;         ///< the queue
};

}  // namespace pgsidecar::pool
