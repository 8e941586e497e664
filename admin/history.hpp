// What the pool did in the last minutes, hours and day: rings of samples at three resolutions. Fed by the Monitor, asked by server.cpp;
// on the control loop. Bounded: 2100 steps, 210 KB, whatever the traffic.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "admin/monitor.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

class History {
 public:
  History();

  /// A sample, at about one a second. After a gap the counters' increase counts for the second in which it was seen; the seconds
  /// between have no data, or if nothing happened in them, the gauges as they were.
  void add(const Sample& sample);
  /// Nothing has happened since the last sample.
  void rest(Clock::time_point until);

  /// The last `window` seconds in steps of at least `step` seconds, by the finest ring that reaches so far. Times are the ends of steps.
  std::string json(std::uint32_t window, std::uint32_t step, Clock::time_point now) const;
  std::size_t footprint() const;  ///< bytes

 private:
  /// One step. Counters are increases, gauges the highest seen in it but memory and CPU.
  struct Step {
    std::int64_t number = -1;  ///< seconds since the epoch / the ring's step; another: no data
    float seconds = 0;         ///< that were seen of it
    float transactions = 0, queries = 0, errors = 0;
    float wait[3]{}, query[3]{};  ///< p50, p95, p99, milliseconds; negative: nothing happened
    float clients = 0, waiting = 0, active = 0, idle = 0, login = 0, other = 0, max = 0;
    float cpuSeconds = 0, memoryMb = 0;
  };
  struct Ring {
    std::uint32_t step;
    std::vector<Step> slots;
    pool::Histogram wait, query;  ///< of the step that is under way
  };
  /// The counters of all pools when last seen.
  struct Totals {
    std::uint64_t transactions = 0, queries = 0, errors = 0;
    double cpuSeconds = 0;
    pool::Histogram wait, query;
  };
  void add_to(Ring& ring, const Step& sample, const pool::Histogram& wait, const pool::Histogram& query, std::int64_t second);

  std::vector<Ring> rings_;
  std::optional<Totals> last_;
  Step last_step_;
  Clock::time_point last_at_{};
};

}  // namespace pgsidecar::admin
