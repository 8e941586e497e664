// What the process spends itself on: the loops' load and lag, where a turn's time goes, what a transaction costs, who holds the
// memory. Fed by the Monitor, asked by server.cpp; on the control loop. Bounded: 61 points, 20 KB.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <string>

#include "admin/monitor.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

class Profile {
 public:
  static constexpr std::uint32_t kSeconds = 60;  ///< the longest window

  void add(const Sample& sample);
  /// About the last `window` seconds, as `now`, a snapshot with memory, and the points before it tell. `history`: bytes that the
  /// control loop's history holds.
  std::string json(const pool::Snapshot& now, std::uint32_t window, std::size_t history, Clock::time_point at) const;

 private:
  /// All that counts up.
  struct Point {
    pool::Time at{};
    pool::LoopCounters loop;
    pool::ThreadUsage data, control;
    std::uint64_t transactions = 0, fromClients = 0, toClients = 0, fromServers = 0, toServers = 0;
  };
  static Point point_of(const pool::Snapshot& snapshot);
  Point before(const pool::Snapshot& now, std::uint32_t window) const;

  std::deque<Point> points_;  // oldest first, at most kSeconds + 1
};

}  // namespace pgsidecar::admin
