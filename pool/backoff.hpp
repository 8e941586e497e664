// When a pool may try to connect again after connects have failed. Decides only; time and chance are arguments.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "pool/stats.hpp"

namespace pgsidecar::pool {

class Backoff {
 public:
  /// A failed connect. `random` (0..1) keeps pools from coming together; `hopeless`: more tries won't mend it (a wrong password), so that
  /// clients who wait for it don't make it try more often.
  void failed(Time now, double random, bool hopeless) {
    ++failures_;
    const double seconds = std::min(5.0, 0.05 * static_cast<double>(1u << std::min(failures_, 8u))) * (0.75 + 0.5 * random);
    const auto pause = std::chrono::milliseconds(static_cast<int>(seconds * 1000));
    retry_at_ = now + pause;
    awaited_at_ = hopeless ? retry_at_ : now + std::min(pause, kAwaited);
  }
  void succeeded() { *this = {}; }
  void hurry() { retry_at_ = awaited_at_ = {}; }  ///< what was in the way may be gone

  /// `awaited`: clients wait. They are served within a second of the server's return, a tick and the connect included.
  bool may_try(Time now, bool awaited) const { return now >= (awaited ? awaited_at_ : retry_at_); }
  std::uint32_t failures() const { return failures_; }  ///< in a row

  static constexpr std::chrono::milliseconds kAwaited{500};

 private:
  Time retry_at_{}, awaited_at_{};
  std::uint32_t failures_ = 0;
};

}  // namespace pgsidecar::pool
