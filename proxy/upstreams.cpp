// What the worker knows of the servers that it connects to: whether they answer, how many connections they allow and whether its pools
// fit in, whether they sleep, and how long they take to wake up. Part of Worker.
#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>

#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;

namespace {

/// Within this time a server that sleeps is awake; what takes longer is an outage.
constexpr std::chrono::seconds kWakeUp{30};

constexpr int kMostNamed = 8;  // pools, in a line of the log

}  // namespace

// --- health

pool::Snapshot::Upstream Worker::main_upstream() const {
  const auto seen = upstreams_.find(name_of(upstream_));
  return seen == upstreams_.end() ? pool::Snapshot::Upstream() : seen->second;
}

void Worker::database_seen(const std::string& upstream, bool up, std::string error) {
  auto& seen = upstreams_[upstream];
  seen.state = up ? pool::Snapshot::Database::Up : pool::Snapshot::Database::Down;
  seen.error = std::move(error);
  if (up) upstream_times_[upstream].seen = now();
  stir();
}

PoolEntry* Worker::refused_pool() const {
  const auto it = pools_.find({upstream_.dbname, upstream_.user});
  if (it == pools_.end() || !is_permanent(it->second->last_failure.sqlstate) || !stands_alone(*it->second)) return nullptr;
  return it->second.get();
}

// Of pools on the same upstream that of its own user and database speaks for all.
PoolEntry* Worker::shut_out() {
  PoolEntry* out = refused_pool();
  for (auto& [key, entry] : pools_)
    if (!out && entry->backoff.failures() > 0 && !is_answer(entry->last_failure.sqlstate) &&
        upstream_of(entry->database) == name_of(upstream_)) {
      PoolEntry* own = pool_of(upstream_.dbname, upstream_.user);
      out = own ? own : entry.get();
    }
  const bool may_log_in = out && !out->paused && stands_alone(*out) && out->pool.capacity() > 0 && !out->lacks_password();
  return may_log_in ? out : nullptr;
}

void Worker::connect_over(PoolEntry& entry) {
  for (const auto& done : std::exchange(entry.probes, {})) done();
}

void Worker::probe(std::function<void()> done) {
  // Where logins have failed nothing but a login shows that they succeed again. Nobody else may try one while the proxy isn't ready.
  if (PoolEntry* out = shut_out()) {
    const bool room = out->pool.room() > 0;  // logins that the server hasn't ended take it up
    if (out->connecting == 0 && room && out->backoff.may_try(now(), true)) open_server(*out, {});
    if (out->connecting == 0 && out->pool.hangs()) database_seen(name_of(upstream_), false, "no connection can be opened: " + use_of(*out));
    if (out->connecting == 0) return done();
    return out->probes.push_back(std::move(done));
  }
  // Else it does to knock: that needs no client and no query.
  conf::Upstream upstream = config_->upstream;
  upstream.passwordCommand.clear();  // nobody logs in
  control_.resolve(std::move(upstream), [this, done = std::move(done)](const std::shared_ptr<const Upstream>& found) {
    asio::co_spawn(data_, run_probe(found, done), asio::detached);
  });
}

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

void Worker::database_took(const std::string& upstream, pool::Clock::duration time) {
  auto& seen = upstreams_[upstream];
  seen.latencyMicros = std::max<std::uint64_t>(1, pool::micros(time));
  UpstreamTimes& times = upstream_times_[upstream];
  const pool::Clock::duration woke = now() - times.waking_since;
  times.probed = {};
  times.connect_begun = {};
  if (woke < pool::Snapshot::kColdStart || woke > kWakeUp || is_connected(upstream)) return;
  ++seen.coldStarts;
  seen.coldStartMicros = pool::micros(woke);
  times.cold_start = now();
  log::info("cold_start", {}, "upstream {}: answered {:.1f} s after the first attempt to connect", upstream,
            std::chrono::duration<double>(woke).count());
}

}  // namespace pgsidecar::proxy
