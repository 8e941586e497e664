#include "admin/profile.hpp"

#include <malloc.h>

#include <algorithm>
#include <cmath>

#include "admin/json.hpp"

namespace pgsidecar::admin {

namespace {

using pool::LoopCounters;
using pool::ThreadUsage;

double rounded(double value) {
  return std::round(value * 1000) / 1000;
}

/// Something per something else; null if there was none of that.
void write_ratio(Json& json, std::string_view name, double what, double per) {
  if (per > 0)
    json.field(name, rounded(what / per));
  else
    json.null(name);
}

double cpu_micros(const ThreadUsage& now, const ThreadUsage& before) {
  return static_cast<double>(now.userMicros + now.systemMicros - before.userMicros - before.systemMicros);
}

void write_loop(Json& json, std::string_view name, const pool::LoopSnapshot& loop, const ThreadUsage& before, pool::Time now, double span) {
  json.key(name).begin('{');
  write_ratio(json, "utilization", cpu_micros(loop.usage, before) / 1e6, span);
  write_ratio(json, "wakeupsPerSecond", static_cast<double>(loop.usage.wakeups - before.wakeups), span);
  write_ratio(json, "preemptionsPerSecond", static_cast<double>(loop.usage.preemptions - before.preemptions), span);
  json.field("userSeconds", static_cast<double>(loop.usage.userMicros) / 1e6);
  json.field("systemSeconds", static_cast<double>(loop.usage.systemMicros) / 1e6);
  json.key("lagMs").begin('{').field("worst", millis(loop.lag.worst_micros(now, std::chrono::seconds(Profile::kSeconds))));
  json.field("worstSinceStart", millis(loop.lag.max_micros())).field("mean", millis(loop.lag.mean_micros())).end('}');
  json.end('}');
}

void write_turns(Json& json, const LoopCounters& now, const LoopCounters& before, double span) {
  const auto sampled = static_cast<double>(now.sampled - before.sampled);
  double all = 0;
  for (std::size_t i = 0; i < pool::kPhases; ++i) all += static_cast<double>(now.nanos[i] - before.nanos[i]);
  json.key("turns").begin('{');
  write_ratio(json, "perSecond", static_cast<double>(now.turns - before.turns), span);
  json.field("timed", now.sampled - before.sampled);
  write_ratio(json, "microsPerTurn", all / 1000, sampled);
  json.key("phases").begin('{');
  for (std::size_t i = 0; i < pool::kPhases; ++i) {
    const auto nanos = static_cast<double>(now.nanos[i] - before.nanos[i]);
    json.key(to_string(static_cast<pool::Phase>(i))).begin('{');
    write_ratio(json, "microsPerTurn", nanos / 1000, sampled);
    write_ratio(json, "share", nanos, all);
    json.end('}');
  }
  json.end('}').end('}');
  json.key("timers").begin('{');
  write_ratio(json, "perSecond", static_cast<double>(now.ticks - before.ticks), span);
  write_ratio(json, "microsPerRun", static_cast<double>(now.tickNanos - before.tickNanos) / 1000,
              static_cast<double>(now.ticks - before.ticks));
  json.end('}');
}

void write_handshakes(Json& json, std::string_view name, const pool::Handshakes& shakes) {
  json.key(name).begin('{').field("full", shakes.full).field("resumed", shakes.resumed).field("failed", shakes.failed);
  write_ratio(json, "msEach", static_cast<double>(shakes.nanos) / 1e6, static_cast<double>(shakes.full + shakes.resumed + shakes.failed));
  json.end('}');
}

/// The heap is what malloc has given out; what it keeps for later or can't give back is `freeBytes`.
void write_memory(Json& json, const pool::MemoryOwners& owners, std::size_t history) {
  const auto heap = ::mallinfo2();
  const std::uint64_t used = heap.uordblks + heap.hblkhd;
  const std::pair<const char*, std::uint64_t> named[] = {{"clients", owners.clients},
                                                         {"servers", owners.servers},
                                                         {"statements", owners.statements},
                                                         {"settings", owners.settings},
                                                         {"statistics", owners.statistics},
                                                         {"catalog", owners.catalog},
                                                         {"history", history},
                                                         {"log", owners.log}};
  json.key("memory").begin('{').field("rssBytes", read_process().residentBytes);
  json.field("heapBytes", used).field("freeBytes", std::uint64_t{heap.fordblks}).key("owners").begin('{');
  std::uint64_t sum = 0;
  for (const auto& [name, bytes] : named) {
    json.field(name, bytes);
    sum += bytes;
  }
  json.field("other", used - std::min(used, sum)).end('}').end('}');
}

}  // namespace

Profile::Point Profile::point_of(const pool::Snapshot& s) {
  Point point{s.takenAt, s.loop, s.dataLoop.usage, s.controlLoop.usage};
  for (const auto& p : s.pools) {
    point.transactions += p.counters.transactions;
    point.fromClients += p.counters.clientBytesReceived;
    point.toClients += p.counters.clientBytesSent;
    point.fromServers += p.counters.serverBytesReceived;
    point.toServers += p.counters.serverBytesSent;
  }
  return point;
}

void Profile::add(const Sample& sample) {
  if (!sample.snapshot) return;
  const Point point = point_of(*sample.snapshot);
  // Nothing has happened since the last one, until now: it is as good as one that was taken a second ago.
  if (sample.rested && !points_.empty()) points_.back().at = std::max(points_.back().at, point.at - std::chrono::seconds(1));
  points_.push_back(point);
  if (points_.size() > kSeconds + 1) points_.pop_front();
}

Profile::Point Profile::before(const pool::Snapshot& now, std::uint32_t window) const {
  for (auto it = points_.rbegin(); it != points_.rend(); ++it)
    if (now.takenAt - it->at >= std::chrono::seconds(window)) return *it;
  if (!points_.empty()) return points_.front();
  Point start;
  start.at = now.takenAt - std::chrono::microseconds(now.uptimeMicros);
  return start;
}

std::string Profile::json(const pool::Snapshot& s, std::uint32_t window, std::size_t history, Clock::time_point at) const {
  const Point now = point_of(s), then = before(s, window);
  const double span = std::chrono::duration<double>(now.at - then.at).count();
  const auto transactions = static_cast<double>(now.transactions - then.transactions);
  const auto each = [&](Json& json, std::string_view name, std::uint64_t a, std::uint64_t b) {
    write_ratio(json, name, static_cast<double>(a - b), transactions);
  };
  Json json;
  json.begin('{').field("schemaVersion", std::uint64_t{1}).field("timestamp", iso8601(at)).field("seconds", rounded(span));
  json.key("loops").begin('{');
  write_loop(json, "data", s.dataLoop, then.data, now.at, span);
  write_loop(json, "control", s.controlLoop, then.control, now.at, span);
  json.end('}');
  write_turns(json, now.loop, then.loop, span);
  json.field("transactions", now.transactions - then.transactions).key("perTransaction").begin('{');
  write_ratio(json, "cpuMicros", cpu_micros(now.data, then.data), transactions);
  each(json, "turns", now.loop.turns, then.loop.turns);
  each(json, "receives", now.loop.receives, then.loop.receives);
  each(json, "sends", now.loop.sends, then.loop.sends);
  each(json, "waits", now.loop.waits, then.loop.waits);
  each(json, "wakeups", now.data.wakeups, then.data.wakeups);
  each(json, "systemCalls", now.loop.receives + now.loop.sends + now.loop.waits + now.data.wakeups,
       then.loop.receives + then.loop.sends + then.loop.waits + then.data.wakeups);
  each(json, "bytesFromClients", now.fromClients, then.fromClients);
  each(json, "bytesToClients", now.toClients, then.toClients);
  each(json, "bytesFromServers", now.fromServers, then.fromServers);
  each(json, "bytesToServers", now.toServers, then.toServers);
  json.end('}').key("tlsHandshakes").begin('{');
  write_handshakes(json, "clients", s.loop.clientHandshakes);
  write_handshakes(json, "servers", s.loop.serverHandshakes);
  json.end('}');
  write_memory(json, s.memory, history);
  json.end('}');
  return json.take();
}

}  // namespace pgsidecar::admin
