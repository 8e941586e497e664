// The log: spdlog, written by a thread of its own so that no loop waits for a slow reader; when its queue is full the
// oldest lines go. Text or JSON, one event a line.
#pragma once

#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdint>
#include <utility>

#include "conf/config.hpp"

namespace pgsidecar::proxy::log {

using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::warn;

/// Bounds what peers can make the log say: 20 events in 10 seconds, then one line that tells how many were left out.
class PeerEvents {
 public:
  template <class... Args>
  void warn(std::chrono::steady_clock::time_point now, spdlog::format_string_t<Args...> format, Args&&... args) {
    if (now - window_ >= std::chrono::seconds(10)) {
      if (count_ > kMost) spdlog::warn("{} more events of clients in 10 s are not shown", count_ - kMost);
      window_ = now;
      count_ = 0;
    }
    if (++count_ <= kMost) spdlog::warn(format, std::forward<Args>(args)...);
  }

 private:
  static constexpr std::uint64_t kMost = 20;
  std::chrono::steady_clock::time_point window_{};
  std::uint64_t count_ = 0;
};

void start(const conf::Log& settings);
/// Writes what is queued, for at most a second: then nobody reads it, and the process ends with this exit code.
void stop(int exit_code);

}  // namespace pgsidecar::proxy::log
