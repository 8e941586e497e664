// What the worker knows of the servers that it connects to: how many connections they allow and whether its pools fit in, whether they
// sleep, and how long they take to wake up. Part of Worker.
#include <algorithm>

#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace {

/// Within this time a server that sleeps is awake; what takes longer is an outage.
constexpr std::chrono::seconds kWakeUp{30};

constexpr int kMostNamed = 8;  // pools, in a line of the log

}  // namespace

// --- room

bool Worker::take_capacity_question(const std::string& upstream) {
  return std::exchange(upstream_times_[upstream].capacity_asked, now()) == pool::Time{};
}

void Worker::saw_capacity(const std::string& upstream, std::uint32_t max, std::uint32_t reserved, std::uint32_t used) {
  auto& seen = upstreams_[upstream];
  seen.maxConnections = max;
  seen.reserved = reserved;
  seen.used = used;
  upstream_times_[upstream].capacity_asked = now();
  weigh_capacity(upstream);
}

void Worker::weigh_capacity(const std::string& upstream) {
  const auto seen = upstreams_.find(upstream);
  if (seen == upstreams_.end() || seen->second.maxConnections == 0 || outweighed_.contains(upstream)) return;
  pool::Snapshot::Upstream weighed = seen->second;
  std::string sum;
  int pools = 0;
  for (const auto& [key, entry] : pools_) {
    if (upstream_of(entry->database) != upstream) continue;
    const std::uint32_t max = entry->pool.settings().max;
    weighed.maxByUs += max;
    if (++pools <= kMostNamed) sum += (sum.empty() ? "" : " + ") + fmt::format("{} ({}@{})", max, entry->user, entry->database);
  }
  if (pools > kMostNamed) sum += " + ...";
  const std::string left = fmt::format("upstream {} allows {} connections - {} reserved = {}", upstream, weighed.maxConnections,
                                       weighed.reserved, weighed.usable());
  if (!weighed.too_small()) {
    if (weighed_.insert(upstream).second)
      log::info("capacity", {}, "{}; this pgsidecar may open {}: there is room for {} such", left, weighed.maxByUs,
                weighed.usable() / std::max(1u, weighed.maxByUs));
  } else {
    outweighed_.insert(upstream);
    log::warn("capacity", {}, "{}; this pgsidecar may open {} = {}: lower pool.max, or raise the server's max_connections", left, sum,
              weighed.maxByUs);
  }
}

// --- sleep

void Worker::saw_suspend(PoolEntry& entry) {
  entry.pool.rest();
  upstream_times_[upstream_of(entry.database)].suspended = now();
}

// Attempts that follow each other belong together: an upstream may be waking up.
void Worker::connect_begins(const std::string& upstream) {
  UpstreamTimes& times = upstream_times_[upstream];
  const bool follows = times.connect_begun != pool::Time{} && now() - times.connect_begun < kWakeUp;
  if (!follows || is_connected(upstream)) times.waking_since = now();
  times.connect_begun = now();
}

bool Worker::may_be_waking(const std::string& upstream) const {
  const auto it = upstream_times_.find(upstream);
  return it != upstream_times_.end() && it->second.connect_begun != pool::Time{} && now() - it->second.waking_since < kWakeUp;
}

void Worker::database_took(const std::string& upstream, pool::Clock::duration time, bool probed) {
  auto& seen = upstreams_[upstream];
  database_latency_ = seen.latencyMicros =
      static_cast<std::uint64_t>(std::max<std::int64_t>(1, std::chrono::duration_cast<std::chrono::microseconds>(time).count()));
  database_probed_ = probed;
  UpstreamTimes& times = upstream_times_[upstream];
  const pool::Clock::duration woke = now() - times.waking_since;
  if (probed) return;
  times.connect_begun = {};
  if (woke < pool::Snapshot::kColdStart || woke > kWakeUp || is_connected(upstream)) return;
  ++seen.coldStarts;
  seen.coldStartMicros = static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(woke).count());
  times.cold_start = now();
  log::info("cold_start", {}, "upstream {}: answered {:.1f} s after the first attempt to connect", upstream,
            std::chrono::duration<double>(woke).count());
}

}  // namespace pgsidecar::proxy
