// The product's own alerts: which conditions hold, since when, and what to tell. Sans I/O: fed a sample a second by the Monitor; who is
// told (log, webhooks, page, metrics) is proxy/main.cpp's to join. Lives on the control loop. Bounded: kMostActive alerts at a time,
// kRecent that are over.
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "admin/json.hpp"
#include "admin/monitor.hpp"
#include "conf/config.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

struct Alert {
  using Labels = std::vector<std::pair<std::string, std::string>>;
  std::string name;      ///< snake_case, one of kAlertNames
  Labels labels;         ///< what it is about; empty: the whole proxy
  std::string severity;  ///< warning | critical
  std::string summary;   ///< one sentence: what is the matter, and where to look
  double value = 0, threshold = 0;
  Clock::time_point since;
  std::optional<Clock::time_point> ended;
};

/// All that there are, for the series that tell that an alert is not active.
inline constexpr const char* kAlertNames[] = {"pool_pressure",      "high_connections", "high_memory",         "database_unreachable",
                                              "database_slow",      "error_rate",       "leaked_transactions", "pinned_connections",
                                              "certificate_expiry", "drain_stuck"};

class Alerts {
 public:
  static constexpr std::size_t kMostActive = 200, kRecent = 100;

  explicit Alerts(conf::Alerts settings) : settings_(std::move(settings)) {}
  /// After a reload. What is active and switched off now ends with the next sample.
  void set(conf::Alerts settings) { settings_ = std::move(settings); }

  /// Returns the alerts that have begun, have become critical or no longer are, or have ended (then they say when).
  std::vector<Alert> look(const Sample& sample);
  /// When it needs another sample even if nothing happens.
  std::chrono::seconds next() const;
  std::vector<Alert> active() const;
  const std::deque<Alert>& recent() const { return recent_; }  ///< the latest to end first

 private:
  /// A condition that holds in this sample.
  struct Finding {
    std::string name;
    Alert::Labels labels;
    bool critical = false, at_once = false;  ///< without forSeconds
    std::string summary;
    double value = 0, threshold = 0;
  };
  struct Tracked {
    Alert alert;
    Clock::time_point first, last;  // seen
    bool active = false;
  };
  /// What has grown in the last minute, in steps of ten seconds.
  struct Window {
    std::uint64_t queries = 0, errors = 0;
    pool::Histogram times;
  };

  std::vector<Finding> find(const Sample& sample);
  /// `waited`: for how many seconds some have waited for a connection of it.
  void find_in_pool(const pool::PoolSnapshot& pool, const Alert::Labels& labels, double waited, std::vector<Finding>& out) const;
  void find_in_traffic(const Sample& sample, std::vector<Finding>& out);
  bool is_active(std::string_view name, const Alert::Labels& labels) const;
  /// The threshold, or a tenth less for what is active already, so that it doesn't come and go.
  double level(std::string_view name, const Alert::Labels& labels, double threshold) const;

  conf::Alerts settings_;
  std::map<std::pair<std::string, Alert::Labels>, Tracked> tracked_;
  std::map<Alert::Labels, Clock::time_point> waiting_since_;  // by pool
  std::deque<Alert> recent_;
  std::optional<Clock::time_point> draining_since_;
  std::deque<Window> windows_;  // the totals at the ends of the last steps
  Clock::time_point step_at_{};
  double usual_millis_ = 0;  // p95 of a minute, moving average; 0: not known yet
  unsigned minutes_seen_ = 0;
};

/// Written into an object or array that was begun.
void write_alert(Json& json, const Alert& alert);
/// The document of /api/monitoring/alerts; `webhooks` is a JSON value.
std::string alerts_json(const Alerts& alerts, const std::string& webhooks, Clock::time_point now);

}  // namespace pgsidecar::admin
