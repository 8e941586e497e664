// Tells others of alerts: generic JSON, Alertmanager's API v2, Slack's incoming webhooks, by POST. Retries with backoff what may work
// later; each has a queue of its own, so that one that fails holds up no other. Bounded: kQueue messages a webhook, the oldest leave
// first. Lives on the control loop; proxy/main.cpp joins it with Alerts.
#pragma once

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "admin/alerts.hpp"
#include "conf/config.hpp"

namespace pgsidecar::admin {

class Webhooks {
 public:
  static constexpr std::size_t kQueue = 100;
  static constexpr std::chrono::seconds kPostTime{10};      ///< for one attempt
  static constexpr std::chrono::seconds kFirstPause{1};     ///< before the second attempt; doubled up to
  static constexpr std::chrono::seconds kLongestPause{60};  ///< this
  static constexpr std::chrono::hours kKeep{1};             ///< what couldn't be told for so long is dropped
  static constexpr std::chrono::seconds kRefresh{60};       ///< an Alertmanager is told anew of what is active: it forgets

  /// What is worth a line in the log.
  using Report = std::function<void(std::string line)>;

  Webhooks(boost::asio::io_context& control, Report report) : control_(control), report_(std::move(report)) {}
  ~Webhooks() { stop(); }
  Webhooks(const Webhooks&) = delete;
  Webhooks& operator=(const Webhooks&) = delete;

  /// At the start and after a reload. A webhook that has changed begins anew, without what its queue held.
  void set(const std::map<std::string, conf::Webhook>& settings);
  void tell(const std::vector<Alert>& changes, const std::vector<Alert>& active);
  /// [{name, format, host, queued, delivered, retried, dropped, lastError}, ...]
  std::string json() const;
  void stop();

 private:
  struct Target;
  void enqueue(const std::shared_ptr<Target>& target, std::string body);

  boost::asio::io_context& control_;
  const Report report_;
  std::map<std::string, std::shared_ptr<Target>> targets_;
};

/// The body that a webhook of this format gets for alerts; the formats but Alertmanager's take one alert at a time.
std::string webhook_body(conf::WebhookFormat format, const std::vector<Alert>& alerts, const std::string& instance);

}  // namespace pgsidecar::admin
