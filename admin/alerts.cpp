#include "admin/alerts.hpp"

#include <algorithm>
#include <cmath>

namespace pgsidecar::admin {

using namespace std::chrono_literals;
using pool::PoolSnapshot;
using pool::Snapshot;

namespace {

constexpr auto kStep = 10s;
constexpr std::size_t kSteps = 6;             // of the window: a minute
constexpr std::uint64_t kFewestQueries = 20;  // that a share or a quantile means something
constexpr unsigned kMinutesToKnow = 5;        // before what is usual is known
constexpr double kNewness = 0.05;             // how much a minute changes what is usual

std::string plural(std::uint64_t n, std::string_view what) {
  return std::to_string(n) + " " + std::string(what) + (n == 1 ? "" : "s");
}

std::string rounded(double value) {
  return number(std::round(value * 10) / 10);
}

double age_seconds(Clock::duration d) {
  return std::chrono::duration<double>(d).count();
}

std::string pool_name(const PoolSnapshot& p) {
  return p.user + "@" + p.database;
}

}  // namespace

bool Alerts::is_active(std::string_view name, const Alert::Labels& labels) const {
  const auto it = tracked_.find({std::string(name), labels});
  return it != tracked_.end() && it->second.active;
}

double Alerts::level(std::string_view name, const Alert::Labels& labels, double threshold) const {
  return is_active(name, labels) ? threshold * 0.9 : threshold;
}

// --- the rules

void Alerts::find_in_pool(const PoolSnapshot& p, const Alert::Labels& labels, double waited, std::vector<Finding>& out) const {
  const double max = std::max<std::uint32_t>(p.max, 1);
  const bool many = settings_.waitingClients > 0 && p.clientsWaiting > settings_.waitingClients;
  const bool lasting = settings_.waitingSeconds > 0 && p.clientsWaiting > 0 && waited >= settings_.waitingSeconds;
  if (many || lasting)
    out.push_back({"pool_pressure", labels, many, true,
                   plural(p.clientsWaiting, "client") + (p.clientsWaiting == 1 ? " waits" : " wait") + " for one of " + pool_name(p) +
                       "'s " + std::to_string(p.max) + " server connections, the first for " +
                       rounded(static_cast<double>(p.oldestWaitMicros) / 1e6) + " s: pool.max, or who holds them (api/monitoring/servers)",
                   many ? static_cast<double>(p.clientsWaiting) : waited,
                   static_cast<double>(many ? settings_.waitingClients : settings_.waitingSeconds)});

  const double used = 100.0 * p.serversActive / max;
  const double critical = level("high_connections", labels, settings_.connectionsCriticalPercent);
  const double warning = level("high_connections", labels, settings_.connectionsPercent);
  const bool is_critical = settings_.connectionsCriticalPercent > 0 && used >= critical;
  if (is_critical || (settings_.connectionsPercent > 0 && used >= warning))
    out.push_back({"high_connections", labels, is_critical, false,
                   std::to_string(p.serversActive) + " of " + pool_name(p) + "'s " + std::to_string(p.max) +
                       " server connections are in use: clients will wait soon (pool.max)",
                   used, static_cast<double>(is_critical ? settings_.connectionsCriticalPercent : settings_.connectionsPercent)});

  if (p.leaking > 0) {
    const double age = static_cast<double>(p.oldestLeakMicros) / 1e6;
    out.push_back({"leaked_transactions", labels, false, true,
                   plural(p.leaking, "transaction") + " of " + pool_name(p) + (p.leaking == 1 ? " is" : " are") +
                       " left idle, the oldest open for " + rounded(age) + " s by application \"" + p.oldestLeaker +
                       "\" (api/monitoring/leaks names the clients and statements)",
                   static_cast<double>(p.leaking), 0});
  }

  const double pinned = 100.0 * p.pinned / max;
  if (settings_.pinnedPercent > 0 && pinned >= level("pinned_connections", labels, settings_.pinnedPercent))
    out.push_back({"pinned_connections", labels, pinned >= 90, false,
                   std::to_string(p.pinned) + " of " + pool_name(p) + "'s " + std::to_string(p.max) +
                       " server connections are kept by clients beyond their transactions (api/monitoring/pins says why)",
                   pinned, static_cast<double>(settings_.pinnedPercent)});
}

void Alerts::find_in_traffic(const Sample& sample, std::vector<Finding>& out) {
  // A quantile of what is being looked at takes a merge of all pools' histograms: every ten seconds.
  if (windows_.empty() || sample.at - step_at_ >= kStep || sample.at < step_at_) {
    Window total;
    for (const PoolSnapshot& p : sample.snapshot->pools) {
      total.queries += p.counters.query.count();
      total.times.merge(p.counters.query);
    }
    for (const auto& [sqlstate_class, n] : sample.snapshot->errorsByClass) total.errors += n;
    // A pool that has gone takes its counts with it.
    if (!windows_.empty() && total.queries < windows_.back().queries) windows_.clear();
    windows_.push_back(total);
    if (windows_.size() > kSteps + 1) windows_.pop_front();
    step_at_ = sample.at;
    const pool::Histogram minute = windows_.back().times.since(windows_.front().times);
    if (windows_.size() == kSteps + 1 && minute.count() >= kFewestQueries && !is_active("database_slow", {})) {
      const double p95 = minute.quantile(0.95) / 1000;
      usual_millis_ = usual_millis_ == 0 ? p95 : usual_millis_ + (p95 - usual_millis_) * kNewness;
      ++minutes_seen_;
    }
  }
  const Window &last = windows_.back(), &first = windows_.front();
  const std::uint64_t queries = last.queries - first.queries;
  if (queries < kFewestQueries) return;
  const double p95 = last.times.since(first.times).quantile(0.95) / 1000;
  const bool known = minutes_seen_ >= kMinutesToKnow * kSteps;
  if (settings_.databaseSlowMillis > 0 && p95 >= level("database_slow", {}, settings_.databaseSlowMillis) &&
      (!known || p95 >= level("database_slow", {}, usual_millis_ * settings_.databaseSlowFactor)))
    out.push_back({"database_slow",
                   {},
                   false,
                   false,
                   "95 % of the last minute's queries took up to " + rounded(p95) + " ms" +
                       (known ? ", usually " + rounded(usual_millis_) + " ms" : std::string()) + " (api/monitoring/queries names them)",
                   p95,
                   static_cast<double>(settings_.databaseSlowMillis)});
  const double errors = static_cast<double>(last.errors - std::min(first.errors, last.errors));
  const double percent = 100 * errors / static_cast<double>(queries);
  if (settings_.errorPercent > 0 && percent >= level("error_rate", {}, settings_.errorPercent))
    out.push_back({"error_rate",
                   {},
                   false,
                   false,
                   rounded(errors) + " errors in the last minute's " + std::to_string(queries) + " queries" +
                       " (api/monitoring/queries?sort=errors has their SQLSTATEs)",
                   percent,
                   static_cast<double>(settings_.errorPercent)});
}

std::vector<Alerts::Finding> Alerts::find(const Sample& sample) {
  std::vector<Finding> out;
  const Snapshot& s = *sample.snapshot;
  const auto waited_since = std::exchange(waiting_since_, {});
  for (const PoolSnapshot& p : s.pools) {
    const Alert::Labels labels{{"database", p.database}, {"user", p.user}};
    double waited = 0;
    if (p.clientsWaiting > 0) {
      // Who waits longest tells how long it has been so, also if nobody looked before.
      const auto before = waited_since.find(labels);
      const auto since = before == waited_since.end() ? sample.at - std::chrono::microseconds(p.oldestWaitMicros) : before->second;
      waiting_since_[labels] = since;
      waited = age_seconds(sample.at - since);
    }
    find_in_pool(p, labels, waited, out);
  }

  const double memory = static_cast<double>(sample.process.residentBytes) / 1048576;
  if (settings_.memoryMb > 0 && memory > level("high_memory", {}, settings_.memoryMb))
    out.push_back({"high_memory",
                   {},
                   false,
                   false,
                   rounded(memory) + " MB of memory are resident (api/monitoring/compute-health)",
                   memory,
                   static_cast<double>(settings_.memoryMb)});

  for (const auto& [name, upstream] : s.upstreams)
    if (upstream.state == Snapshot::Database::Down)
      out.push_back({"database_unreachable",
                     {{"upstream", name}},
                     true,
                     true,
                     name + " can't be reached" + (upstream.error.empty() ? std::string() : ": " + upstream.error),
                     1,
                     0});

  for (const auto& [what, expires] : s.certificates) {
    const double days = age_seconds(Clock::from_time_t(expires) - sample.at) / 86400;
    if (settings_.certificateDays == 0 || days > settings_.certificateDays) continue;
    out.push_back(
        {"certificate_expiry",
         {{"certificate", what}},
         days < 3,
         true,
         "the certificate of " + what + (days < 0 ? " expired " + rounded(-days) + " days ago" : " expires in " + rounded(days) + " days"),
         days,
         static_cast<double>(settings_.certificateDays)});
  }

  if (!s.draining) draining_since_.reset();
  if (s.draining && !draining_since_) draining_since_ = sample.at;
  const double drained = draining_since_ ? age_seconds(sample.at - *draining_since_) : 0;
  if (settings_.drainSeconds > 0 && drained >= settings_.drainSeconds)
    out.push_back({"drain_stuck",
                   {},
                   true,
                   true,
                   "the drain has taken " + rounded(drained) + " s and still waits for " + plural(s.clients, "client") +
                       " (api/monitoring/clients names them)",
                   drained,
                   static_cast<double>(settings_.drainSeconds)});

  find_in_traffic(sample, out);
  return out;
}

// --- their states

std::vector<Alert> Alerts::look(const Sample& sample) {
  std::vector<Alert> changes;
  if (!sample.snapshot) return changes;  // nothing is known; what is active stays so
  std::vector<Finding> findings;
  if (settings_.enabled) findings = find(sample);
  for (Finding& f : findings) {
    const auto key = std::make_pair(f.name, f.labels);
    auto it = tracked_.find(key);
    if (it == tracked_.end()) {
      if (tracked_.size() >= kMostActive) continue;
      it = tracked_.emplace(key, Tracked{{}, sample.at, sample.at}).first;
    }
    Tracked& tracked = it->second;
    tracked.last = sample.at;
    const bool begins = !tracked.active && (f.at_once || sample.at - tracked.first >= std::chrono::seconds(settings_.forSeconds));
    if (!begins && !tracked.active) continue;
    Alert& alert = tracked.alert;
    const std::string severity = f.critical ? "critical" : "warning";
    const bool changed = begins || severity != alert.severity;
    if (begins) alert = {f.name, f.labels, {}, {}, 0, 0, tracked.first, std::nullopt};
    tracked.active = true;
    alert.severity = severity;
    alert.summary = std::move(f.summary);
    alert.value = f.value;
    alert.threshold = f.threshold;
    if (changed) changes.push_back(alert);
  }
  for (auto it = tracked_.begin(); it != tracked_.end();) {
    Tracked& tracked = it->second;
    const auto quiet = sample.at - tracked.last;
    const bool over = !tracked.active || !settings_.enabled ? quiet > 0s : quiet >= std::chrono::seconds(settings_.clearSeconds);
    if (tracked.last == sample.at || !over) {
      ++it;
      continue;
    }
    if (tracked.active) {
      tracked.alert.ended = sample.at;
      changes.push_back(tracked.alert);
      recent_.push_front(std::move(tracked.alert));
      if (recent_.size() > kRecent) recent_.pop_back();
    }
    it = tracked_.erase(it);
  }
  return changes;
}

std::chrono::seconds Alerts::next() const {
  if (!settings_.enabled) return Monitor::kNever;
  if (!tracked_.empty() || !waiting_since_.empty() || draining_since_) return 1s;
  return 1h;  // certificates expire without anything happening
}

std::vector<Alert> Alerts::active() const {
  std::vector<Alert> out;
  for (const auto& [key, tracked] : tracked_)
    if (tracked.active) out.push_back(tracked.alert);
  std::stable_sort(out.begin(), out.end(), [](const Alert& a, const Alert& b) { return a.since < b.since; });
  return out;
}

// --- documents

void write_alert(Json& json, const Alert& alert) {
  json.begin('{').field("name", alert.name).field("severity", alert.severity).key("labels").begin('{');
  for (const auto& [name, value] : alert.labels) json.field(name, value);
  json.end('}').field("summary", alert.summary).field("value", std::round(alert.value * 100) / 100).field("threshold", alert.threshold);
  json.field("since", iso8601(alert.since));
  if (alert.ended)
    json.field("ended", iso8601(*alert.ended));
  else
    json.null("ended");
  json.end('}');
}

std::string alerts_json(const Alerts& alerts, const std::string& webhooks, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("active").begin('[');
  for (const Alert& alert : alerts.active()) write_alert(json, alert);
  json.end(']').key("recent").begin('[');
  for (const Alert& alert : alerts.recent()) write_alert(json, alert);
  json.end(']').key("webhooks").raw(webhooks).end('}');
  return json.take();
}

}  // namespace pgsidecar::admin
