// gcc 12: no aggregate temporary and no capturing lambda inside a co_await expression.
#include "admin/webhook.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl/ssl_stream.hpp>
#include <deque>
#include <optional>

#include "conf/http_url.hpp"

namespace pgsidecar::admin {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
namespace ssl = boost::asio::ssl;
using asio::use_awaitable;
using asio::ip::tcp;
using boost::system::error_code;
using conf::WebhookFormat;
using std::chrono::steady_clock;

namespace {

const char* format_name(WebhookFormat format) {
  switch (format) {
    case WebhookFormat::Alertmanager: return "alertmanager";
    case WebhookFormat::Slack: return "slack";
    default: return "json";
  }
}

std::string host_name() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? std::string(name.data()) : std::string();
}

/// Slack's "Formatting text": & < > are written as entities.
std::string slack_escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else
      out += c;
  }
  return out;
}

/// An answer that a later attempt may not get.
bool is_passing(unsigned status) {
  return status == 408 || status == 425 || status == 429 || status >= 500;
}

}  // namespace

std::string webhook_body(WebhookFormat format, const std::vector<Alert>& alerts, const std::string& instance) {
  Json json;
  if (format == WebhookFormat::Alertmanager) {
    json.begin('[');
    for (const Alert& alert : alerts) {
      json.begin('{').key("labels").begin('{').field("alertname", "pgsidecar_" + alert.name).field("severity", alert.severity);
      json.field("instance", instance);
      for (const auto& [name, value] : alert.labels) json.field(name, value);
      json.end('}').key("annotations").begin('{').field("summary", alert.summary).end('}');
      json.field("startsAt", iso8601(alert.since));
      if (alert.ended) json.field("endsAt", iso8601(*alert.ended));
      json.end('}');
    }
    json.end(']');
    return json.take();
  }
  const Alert& alert = alerts.front();
  json.begin('{');
  if (format == WebhookFormat::Slack) {
    std::string text = alert.ended                    ? ":white_check_mark: *[resolved] "
                       : alert.severity == "critical" ? ":red_circle: *[critical] "
                                                      : ":warning: *[warning] ";
    text += alert.name + "* on " + slack_escaped(instance) + ": " + slack_escaped(alert.summary);
    json.field("text", text);
  } else {
    json.field("version", std::uint64_t{1}).field("status", alert.ended ? "resolved" : "firing").field("instance", instance).key("alert");
    write_alert(json, alert);
  }
  json.end('}');
  return json.take();
}

struct Webhooks::Target : std::enable_shared_from_this<Target> {
  struct Message {
    std::string body;
    steady_clock::time_point queued;
  };
  /// Empty: delivered. `again`: a later attempt may work.
  struct Outcome {
    std::string error;
    bool again = true;
  };

  Target(asio::io_context& control, std::string its_name, conf::Webhook its_settings, Report its_report)
      : name(std::move(its_name)), settings(std::move(its_settings)), report(std::move(its_report)), control_(control), pause_(control) {
    url = conf::parse_http_url(settings.url);
    if (settings.format == WebhookFormat::Alertmanager) {
      while (url.target.ends_with('/')) url.target.pop_back();
      if (!url.target.ends_with("/api/v2/alerts")) url.target += "/api/v2/alerts";
    }
    if (!url.tls) return;
    tls_.emplace(ssl::context::tls_client);
    ::SSL_CTX_set_min_proto_version(tls_->native_handle(), TLS1_2_VERSION);
    tls_->set_verify_mode(ssl::verify_peer);
    error_code ec;
    if (settings.ca.empty())
      tls_->set_default_verify_paths(ec);
    else
      tls_->load_verify_file(settings.ca, ec);
    if (ec) last_error = "cannot read the CA certificates: " + ec.message();
  }

  asio::awaitable<void> run();
  void stop() {
    stopped_ = true;
    queue.clear();
    pause_.cancel();
    if (stream_) stream_->close();
  }

  const std::string name;
  const conf::Webhook settings;
  const Report report;
  conf::HttpUrl url;
  std::deque<Message> queue;
  bool running = false;
  std::uint64_t delivered = 0, retried = 0, dropped = 0;
  std::string last_error;
  steady_clock::time_point told{};  // an Alertmanager, of all that is active

 private:
  template <class Stream>
  asio::awaitable<Outcome> exchange(Stream& stream, const std::string& body);
  asio::awaitable<Outcome> post(std::string body);

  asio::io_context& control_;
  asio::steady_timer pause_;
  std::optional<ssl::context> tls_;
  beast::tcp_stream* stream_ = nullptr;  // in use
  bool stopped_ = false;
};

template <class Stream>
asio::awaitable<Webhooks::Target::Outcome> Webhooks::Target::exchange(Stream& stream, const std::string& body) {
  http::request<http::string_body> request(http::verb::post, url.target, 11);
  request.set(http::field::host, url.authority);
  request.set(http::field::user_agent, "pgsidecar/" PGSIDECAR_VERSION);
  request.set(http::field::content_type, "application/json");
  if (!settings.authorization.empty()) request.set(http::field::authorization, settings.authorization);
  request.keep_alive(false);
  request.body() = body;
  request.prepare_payload();
  error_code ec;
  Outcome outcome;
  co_await http::async_write(stream, request, asio::redirect_error(use_awaitable, ec));
  http::response_parser<http::string_body> parser;
  parser.body_limit(std::uint64_t{64} * 1024);
  if (!ec) {
    beast::flat_buffer buffer;
    co_await http::async_read(stream, buffer, parser, asio::redirect_error(use_awaitable, ec));
  }
  if (ec) {
    outcome.error = ec == beast::error::timeout ? std::string("timed out") : ec.message();
    co_return outcome;
  }
  const unsigned status = parser.get().result_int();
  if (status >= 200 && status < 300) co_return outcome;
  outcome.error = "answered " + std::to_string(status);
  outcome.again = is_passing(status);
  co_return outcome;
}

asio::awaitable<Webhooks::Target::Outcome> Webhooks::Target::post(std::string body) {
  Outcome outcome;
  error_code ec;
  tcp::resolver resolver(control_);
  const std::string port = std::to_string(url.port);
  const auto endpoints = co_await resolver.async_resolve(url.host, port, asio::redirect_error(use_awaitable, ec));
  if (ec) {
    outcome.error = "cannot resolve " + url.host + ": " + ec.message();
    co_return outcome;
  }
  if (stopped_) co_return outcome;
  std::optional<beast::tcp_stream> plain;
  std::optional<beast::ssl_stream<beast::tcp_stream>> secure;
  if (tls_) {
    secure.emplace(control_, *tls_);
    stream_ = &secure->next_layer();
  } else {
    plain.emplace(control_);
    stream_ = &*plain;
  }
  stream_->expires_after(kPostTime);
  co_await stream_->async_connect(endpoints, asio::redirect_error(use_awaitable, ec));
  if (ec) {
    outcome.error = "cannot connect: " + (ec == beast::error::timeout ? std::string("timed out") : ec.message());
  } else if (secure) {
    secure->set_verify_callback(ssl::host_name_verification(url.host));
    error_code no_address;
    asio::ip::make_address(url.host, no_address);
    if (no_address) ::SSL_set_tlsext_host_name(secure->native_handle(), url.host.c_str());
    co_await secure->async_handshake(ssl::stream_base::client, asio::redirect_error(use_awaitable, ec));
    if (ec)
      outcome.error = "TLS: " + ec.message();
    else
      outcome = co_await exchange(*secure, body);
  } else {
    outcome = co_await exchange(*plain, body);
  }
  stream_ = nullptr;
  co_return outcome;
}

asio::awaitable<void> Webhooks::Target::run() {
  const auto keep = shared_from_this();
  auto pause = kFirstPause;
  bool failing = false;
  while (!queue.empty() && !stopped_) {
    const Message message = queue.front();
    const Outcome outcome = co_await post(message.body);
    if (stopped_) break;
    const bool same = !queue.empty() && queue.front().queued == message.queued;  // it may have been dropped meanwhile
    if (outcome.error.empty()) {
      ++delivered;
      if (std::exchange(failing, false)) report("webhook " + name + ": works again");
      pause = kFirstPause;
      last_error.clear();
      if (same) queue.pop_front();
      continue;
    }
    last_error = outcome.error;
    const bool late = steady_clock::now() - message.queued >= kKeep;
    if (!outcome.again || late) {
      ++dropped;
      report("webhook " + name + ": dropped an alert: " + outcome.error);
      if (same) queue.pop_front();
      continue;
    }
    ++retried;
    if (!std::exchange(failing, true)) report("webhook " + name + ": " + outcome.error + "; tried again");
    error_code ec;
    pause_.expires_after(pause);
    co_await pause_.async_wait(asio::redirect_error(use_awaitable, ec));
    pause = std::min(pause * 2, kLongestPause);
  }
  running = false;
}

void Webhooks::set(const std::map<std::string, conf::Webhook>& settings) {
  for (auto it = targets_.begin(); it != targets_.end();) {
    const auto now = settings.find(it->first);
    if (now != settings.end() && now->second == it->second->settings) {
      ++it;
      continue;
    }
    it->second->stop();
    it = targets_.erase(it);
  }
  for (const auto& [name, one] : settings)
    if (!targets_.contains(name)) targets_[name] = std::make_shared<Target>(control_, name, one, report_);
}

void Webhooks::enqueue(const std::shared_ptr<Target>& target, std::string body) {
  const auto now = steady_clock::now();
  target->queue.push_back({std::move(body), now});
  if (target->queue.size() > kQueue) {
    target->queue.pop_front();
    ++target->dropped;
  }
  if (std::exchange(target->running, true)) return;
  asio::co_spawn(control_, target->run(), asio::detached);
}

void Webhooks::tell(const std::vector<Alert>& changes, const std::vector<Alert>& active) {
  if (targets_.empty() || (changes.empty() && active.empty())) return;
  const std::string instance = host_name();
  const auto now = steady_clock::now();
  for (const auto& [name, target] : targets_) {
    if (target->settings.format != WebhookFormat::Alertmanager) {
      for (const Alert& change : changes) enqueue(target, webhook_body(target->settings.format, {change}, instance));
      continue;
    }
    const bool refresh = !active.empty() && now - target->told >= kRefresh;
    if (changes.empty() && !refresh) continue;
    std::vector<Alert> all = active;
    std::copy_if(changes.begin(), changes.end(), std::back_inserter(all), [](const Alert& a) { return a.ended.has_value(); });
    target->told = now;
    enqueue(target, webhook_body(target->settings.format, all, instance));
  }
}

std::string Webhooks::json() const {
  Json json;
  json.begin('[');
  for (const auto& [name, t] : targets_) {
    json.begin('{').field("name", name).field("format", format_name(t->settings.format)).field("host", t->url.host);
    json.field("queued", std::uint64_t{t->queue.size()}).field("delivered", t->delivered).field("retried", t->retried);
    json.field("dropped", t->dropped);
    if (t->last_error.empty())
      json.null("lastError");
    else
      json.field("lastError", t->last_error);
    json.end('}');
  }
  json.end(']');
  std::string out = json.take();
  out.pop_back();
  return out;
}

void Webhooks::stop() {
  for (const auto& [name, target] : targets_) target->stop();
  targets_.clear();
}

}  // namespace pgsidecar::admin
