#include "conf/schema.hpp"

#include <algorithm>
#include <charconv>
#include <limits>
#include <stdexcept>
#include <utility>

#include "conf/http_url.hpp"

namespace pgsidecar::conf {

namespace {

template <class T>
using Names = std::vector<std::pair<std::string_view, T>>;

const Names<PoolMode> kPoolModes{
    {"transaction", PoolMode::Transaction}, {"session", PoolMode::Session}, {"statement", PoolMode::Statement}};
const Names<OnUnsupported> kOnUnsupported{{"pin", OnUnsupported::Pin}, {"error", OnUnsupported::Error}};
const Names<ResidueCheck> kResidueChecks{
    {"triggered", ResidueCheck::Triggered}, {"always", ResidueCheck::Always}, {"never", ResidueCheck::Never}};
const Names<AuthMethod> kMethods{{"scram-sha-256", AuthMethod::ScramSha256},
                                 {"md5", AuthMethod::Md5},
                                 {"password", AuthMethod::Password},
                                 {"trust", AuthMethod::Trust},
                                 {"cert", AuthMethod::Cert}};
const Names<TlsMode> kTlsModes{
    {"disable", TlsMode::Disable}, {"allow", TlsMode::Allow}, {"require", TlsMode::Require}, {"verify-full", TlsMode::VerifyFull}};
const Names<WebhookFormat> kWebhookFormats{
    {"json", WebhookFormat::Json}, {"alertmanager", WebhookFormat::Alertmanager}, {"slack", WebhookFormat::Slack}};
const Names<LogFormat> kFormats{{"text", LogFormat::Text}, {"json", LogFormat::Json}};

template <class T>
T parse_name(const Names<T>& names, const std::string& text) {
  std::string known;
  for (const auto& [name, value] : names) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  throw std::invalid_argument("\"" + text + "\" is none of: " + known);
}

template <class T>
std::string print_name(const Names<T>& names, T value) {
  for (const auto& [name, v] : names)
    if (v == value) return std::string(name);
  return {};
}

bool parse_bool(const std::string& text) {
  for (const char* yes : {"true", "True", "TRUE", "on", "yes", "1"})
    if (text == yes) return true;
  for (const char* no : {"false", "False", "FALSE", "off", "no", "0"})
    if (text == no) return false;
  throw std::invalid_argument("\"" + text + "\" is neither true nor false");
}

template <class T>
T parse_number(const std::string& text, T min = 0, T max = std::numeric_limits<T>::max()) {
  T n{};
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (ec != std::errc() || end != text.data() + text.size() || n < min || n > max)
    throw std::invalid_argument("\"" + text + "\" is not a whole number from " + std::to_string(min) + " to " + std::to_string(max));
  return n;
}

Listen parse_listen(const std::string& text, std::uint16_t default_port) {
  Listen listen;
  if (text.starts_with("unix:")) {
    listen.kind = Listen::Kind::Unix;
    listen.directory = text.substr(5);
    listen.port = default_port;
    if (listen.directory.empty() || listen.directory[0] != '/')
      throw std::invalid_argument("\"" + text + "\": unix: takes the absolute path of a directory");
    if (const auto colon = listen.directory.rfind(':'); colon != std::string::npos) {
      listen.port = parse_number<std::uint16_t>(listen.directory.substr(colon + 1), 1);
      listen.directory.erase(colon);
    }
    return listen;
  }
  const auto colon = text.rfind(':');
  const auto bracket = text.rfind(']');
  if (colon == std::string::npos || (bracket != std::string::npos && colon < bracket))
    throw std::invalid_argument("\"" + text + "\" is not host:port, [v6]:port or unix:/directory");
  listen.host = text.substr(0, colon);
  if (listen.host.size() >= 2 && listen.host.front() == '[' && listen.host.back() == ']')
    listen.host = listen.host.substr(1, listen.host.size() - 2);
  else if (listen.host.find(':') != std::string::npos)
    throw std::invalid_argument("\"" + text + "\": an IPv6 address is written [address]:port");
  if (listen.host.empty()) listen.host = "*";
  listen.port = parse_number<std::uint16_t>(text.substr(colon + 1));
  return listen;
}

std::string print_listen(const Listen& listen) {
  if (listen.kind == Listen::Kind::Unix) return "unix:" + listen.directory + ":" + std::to_string(listen.port);
  return print_address(listen.host, listen.port);
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> out;
  std::string one;
  for (const char c : text + ",") {
    if (c == ',') {
      while (one.ends_with(' ')) one.pop_back();
      if (!one.empty()) out.push_back(std::exchange(one, {}));
    } else if (c != ' ' || !one.empty()) {
      one += c;
    }
  }
  return out;
}

/// The port of a unix socket that names none is the last one before it. Tells of all that is wrong.
std::vector<Listen> parse_addresses(const std::string& text) {
  std::vector<Listen> all;
  std::string mistakes;
  std::uint16_t port = 6432;
  for (const std::string& one : split_list(text)) {
    try {
      const Listen listen = parse_listen(one, port);
      if (std::any_of(all.begin(), all.end(), [&](const Listen& other) { return collide(listen, other); }))
        throw std::invalid_argument("\"" + one + "\" is listened on already");
      all.push_back(listen);
      if (listen.kind == Listen::Kind::Tcp) port = listen.port;
    } catch (const std::invalid_argument& e) {
      mistakes += (mistakes.empty() ? "" : "; ") + std::string(e.what());
    }
  }
  if (!mistakes.empty()) throw std::invalid_argument(mistakes);
  return all;
}

template <class Section, class T>
Key<Section> number_key(std::string_view path, T Section::*member, T min = 0) {
  return {path, [=](Section& s, const std::string& t) { s.*member = parse_number<T>(t, min); },
          [=](const Section& s) { return std::to_string(s.*member); }};
}

template <class Inner, class T>
Key<Config> inner_number(std::string_view path, Inner Config::*inner, T Inner::*member, T min = 0) {
  return {path, [=](Config& c, const std::string& t) { c.*inner.*member = parse_number<T>(t, min); },
          [=](const Config& c) { return std::to_string(c.*inner.*member); }};
}

Key<Config> alert_percent(std::string_view path, std::uint32_t Alerts::*member) {
  return {path, [=](Config& c, const std::string& t) { c.alerts.*member = parse_number<std::uint32_t>(t, 0, 100); },
          [=](const Config& c) { return std::to_string(c.alerts.*member); }};
}

template <class Inner>
Key<Config> inner_text(std::string_view path, Inner Config::*inner, std::string Inner::*member, bool needs_restart = false) {
  return {path, [=](Config& c, const std::string& t) { c.*inner.*member = t; }, [=](const Config& c) { return c.*inner.*member; },
          needs_restart};
}

template <class Inner>
Key<Config> inner_bool(std::string_view path, Inner Config::*inner, bool Inner::*member, bool needs_restart = false) {
  return {path, [=](Config& c, const std::string& t) { c.*inner.*member = parse_bool(t); },
          [=](const Config& c) { return std::string(c.*inner.*member ? "true" : "false"); }, needs_restart};
}

template <class Inner, class T>
Key<Config> inner_name(std::string_view path, Inner Config::*inner, T Inner::*member, const Names<T>& names, bool needs_restart = false) {
  return {path, [=, &names](Config& c, const std::string& t) { c.*inner.*member = parse_name(names, t); },
          [=, &names](const Config& c) { return print_name(names, c.*inner.*member); }, needs_restart};
}

Key<Config> admin_list(std::string_view path, std::vector<std::string> Admin::*member, bool needs_restart = false) {
  return {path, [=](Config& c, const std::string& t) { c.admin.*member = split_list(t); },
          [=](const Config& c) {
            std::string out;
            for (const std::string& one : c.admin.*member) out += (out.empty() ? "" : ",") + one;
            return out;
          },
          needs_restart};
}

std::vector<Key<PoolSettings>> make_pool_keys() {
  using P = PoolSettings;
  return {
      {"mode", [](P& p, const std::string& t) { p.mode = parse_name(kPoolModes, t); },
       [](const P& p) { return print_name(kPoolModes, p.mode); }},
      number_key("max", &P::max, 1u),
      number_key("min", &P::min),
      number_key("idleTimeoutMillis", &P::idleTimeoutMillis),
      number_key("connectionTimeoutMillis", &P::connectionTimeoutMillis),
      number_key("holdMillis", &P::holdMillis),
      number_key("dnsCheckSeconds", &P::dnsCheckSeconds),
      number_key("maxUses", &P::maxUses),
      number_key("maxLifetimeSeconds", &P::maxLifetimeSeconds),
      {"allowExitOnIdle", [](P& p, const std::string& t) { p.allowExitOnIdle = parse_bool(t); },
       [](const P& p) { return std::string(p.allowExitOnIdle ? "true" : "false"); }},
      {"keepAlive", [](P& p, const std::string& t) { p.keepAlive = parse_bool(t); },
       [](const P& p) { return std::string(p.keepAlive ? "true" : "false"); }},
      number_key("keepAliveInitialDelayMillis", &P::keepAliveInitialDelayMillis),
      {"residueCheck", [](P& p, const std::string& t) { p.residueCheck = parse_name(kResidueChecks, t); },
       [](const P& p) { return print_name(kResidueChecks, p.residueCheck); }},
      {"onUnsupported", [](P& p, const std::string& t) { p.onUnsupported = parse_name(kOnUnsupported, t); },
       [](const P& p) { return print_name(kOnUnsupported, p.onUnsupported); }},
      {"noticePins", [](P& p, const std::string& t) { p.noticePins = parse_bool(t); },
       [](const P& p) { return std::string(p.noticePins ? "true" : "false"); }},
      number_key("maxPreparedStatements", &P::maxPreparedStatements, 1u),
      number_key("queryTimeoutMillis", &P::queryTimeoutMillis),
      number_key("clientIdleTimeoutMillis", &P::clientIdleTimeoutMillis),
      number_key("maxTransactionMillis", &P::maxTransactionMillis),
      number_key("idleInTransactionWarnMillis", &P::idleInTransactionWarnMillis),
      number_key("idleInTransactionTimeoutMillis", &P::idleInTransactionTimeoutMillis),
      {"noticeLeaks", [](P& p, const std::string& t) { p.noticeLeaks = parse_bool(t); },
       [](const P& p) { return std::string(p.noticeLeaks ? "true" : "false"); }},
  };
}

std::vector<Key<Config>> make_config_keys() {
  std::vector<Key<Config>> keys;
  keys.push_back({"listen",
                  [](Config& c, const std::string& t) {
                    c.listen = parse_addresses(t);
                    if (c.listen.empty()) throw std::invalid_argument("at least one address is needed");
                  },
                  [](const Config& c) {
                    std::string out;
                    for (const Listen& listen : c.listen) out += (out.empty() ? "" : ",") + print_listen(listen);
                    return out;
                  },
                  true});
  keys.push_back({"watchConfig", [](Config& c, const std::string& t) { c.watchConfig = parse_bool(t); },
                  [](const Config& c) { return std::string(c.watchConfig ? "true" : "false"); }});
  static std::vector<std::string> names;  // keep the paths' texts
  names.reserve(pool_keys().size());
  for (const auto& key : pool_keys()) {
    names.push_back("pool." + std::string(key.path));
    keys.push_back({names.back(), [set = key.set](Config& c, const std::string& t) { set(c.pool, t); },
                    [get = key.get](const Config& c) { return get(c.pool); }});
  }
  keys.push_back(inner_name("auth.method", &Config::auth, &Auth::method, kMethods));
  keys.push_back(inner_name("tls.mode", &Config::tls, &Tls::mode, kTlsModes));
  keys.push_back(inner_text("tls.certificate", &Config::tls, &Tls::certificate));
  keys.push_back(inner_text("tls.key", &Config::tls, &Tls::key));
  keys.push_back(inner_text("tls.ca", &Config::tls, &Tls::ca));
  keys.push_back(inner_number("limits.maxClients", &Config::limits, &Limits::maxClients, 1u));
  keys.push_back(inner_number("limits.maxLoginClients", &Config::limits, &Limits::maxLoginClients, 1u));
  keys.push_back(inner_number("limits.loginTimeoutMillis", &Config::limits, &Limits::loginTimeoutMillis, 100u));
  keys.push_back(inner_number("limits.maxPreparedStatementsPerClient", &Config::limits, &Limits::maxPreparedStatementsPerClient, 1u));
  keys.push_back(inner_number("limits.maxParseBytes", &Config::limits, &Limits::maxParseBytes, std::uint64_t{65536}));
  keys.push_back({"admin.listen",
                  [](Config& c, const std::string& t) {
                    c.admin.enabled = t != "off" && t != "false";
                    if (!c.admin.enabled) return;
                    c.admin.listen = parse_listen(t, 5000);
                    if (c.admin.listen.kind != Listen::Kind::Tcp) throw std::invalid_argument("takes host:port or off");
                  },
                  [](const Config& c) { return c.admin.enabled ? print_listen(c.admin.listen) : std::string("off"); }, true});
  keys.push_back(inner_text("admin.tokenFile", &Config::admin, &Admin::tokenFile));
  keys.push_back(inner_bool("admin.quitquitquit", &Config::admin, &Admin::quitquitquit));
  keys.push_back(admin_list("admin.hosts", &Admin::hosts));
  keys.push_back(admin_list("admin.users", &Admin::users));
  keys.push_back(admin_list("admin.statsUsers", &Admin::statsUsers));
  keys.push_back({"log.level",
                  [](Config& c, const std::string& t) {
                    for (const std::string_view level : {"trace", "debug", "info", "warn", "error", "off"})
                      if (level == t) return void(c.log.level = t);
                    throw std::invalid_argument("\"" + t + "\" is none of: trace, debug, info, warn, error, off");
                  },
                  [](const Config& c) { return c.log.level; }});
  keys.push_back(inner_name("log.format", &Config::log, &Log::format, kFormats));
  keys.push_back(inner_number("log.slowQueryMillis", &Config::log, &Log::slowQueryMillis));
  keys.push_back(inner_bool("metrics.pgbouncerCompatible", &Config::metrics, &Metrics::pgbouncerCompatible));
  keys.push_back(inner_bool("alerts.enabled", &Config::alerts, &Alerts::enabled));
  keys.push_back(inner_number("alerts.waitingClients", &Config::alerts, &Alerts::waitingClients));
  keys.push_back(inner_number("alerts.waitingSeconds", &Config::alerts, &Alerts::waitingSeconds));
  keys.push_back(alert_percent("alerts.connectionsPercent", &Alerts::connectionsPercent));
  keys.push_back(alert_percent("alerts.connectionsCriticalPercent", &Alerts::connectionsCriticalPercent));
  keys.push_back(inner_number("alerts.memoryMb", &Config::alerts, &Alerts::memoryMb));
  keys.push_back(inner_number("alerts.databaseSlowMillis", &Config::alerts, &Alerts::databaseSlowMillis));
  keys.push_back(inner_number("alerts.databaseSlowFactor", &Config::alerts, &Alerts::databaseSlowFactor));
  keys.push_back(alert_percent("alerts.errorPercent", &Alerts::errorPercent));
  keys.push_back(alert_percent("alerts.pinnedPercent", &Alerts::pinnedPercent));
  keys.push_back(inner_number("alerts.certificateDays", &Config::alerts, &Alerts::certificateDays));
  keys.push_back(inner_number("alerts.drainSeconds", &Config::alerts, &Alerts::drainSeconds));
  keys.push_back(inner_number("alerts.forSeconds", &Config::alerts, &Alerts::forSeconds));
  keys.push_back(inner_number("alerts.clearSeconds", &Config::alerts, &Alerts::clearSeconds));
  keys.push_back(inner_number("shutdown.timeoutMillis", &Config::shutdown, &Shutdown::timeoutMillis));
  keys.push_back(inner_bool("shutdown.acceptWhileDraining", &Config::shutdown, &Shutdown::acceptWhileDraining));
  keys.push_back(inner_number("shutdown.delayMillis", &Config::shutdown, &Shutdown::delayMillis));
  keys.push_back(inner_number("shutdown.exitIfUnusedMillis", &Config::shutdown, &Shutdown::exitIfUnusedMillis));
  return keys;
}

}  // namespace

bool collide(const Listen& one, const Listen& other) {
  if (one.kind != other.kind || one.port != other.port || (one.port == 0 && one.kind == Listen::Kind::Tcp)) return false;
  return one.directory == other.directory && (one.host == other.host || one.host == "*" || other.host == "*");
}

const std::vector<Key<PoolSettings>>& pool_keys() {
  static const std::vector<Key<PoolSettings>> keys = make_pool_keys();
  return keys;
}

const std::vector<Key<Webhook>>& webhook_keys() {
  using W = Webhook;
  static const std::vector<Key<W>> keys{{"url",
                                         [](W& w, const std::string& t) {
                                           parse_http_url(t);
                                           w.url = t;
                                         },
                                         [](const W& w) { return w.url; }},
                                        {"format", [](W& w, const std::string& t) { w.format = parse_name(kWebhookFormats, t); },
                                         [](const W& w) { return print_name(kWebhookFormats, w.format); }},
                                        {"authorization",
                                         [](W& w, const std::string& t) {
                                           for (const char c : t)
                                             if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
                                               throw std::invalid_argument("control characters are not allowed");
                                           w.authorization = t;
                                         },
                                         [](const W& w) { return w.authorization; }},
                                        {"ca", [](W& w, const std::string& t) { w.ca = t; }, [](const W& w) { return w.ca; }}};
  return keys;
}

const std::vector<Key<Upstream>>& upstream_keys() {
  static const std::vector<Key<Upstream>> keys{number_key("suspendAfterSeconds", &Upstream::suspendAfterSeconds),
                                               number_key("passwordCommandTimeoutMillis", &Upstream::passwordCommandTimeoutMillis, 1u),
                                               number_key("passwordCacheSeconds", &Upstream::passwordCacheSeconds)};
  return keys;
}

const std::vector<Key<Config>>& config_keys() {
  static const std::vector<Key<Config>> keys = make_config_keys();
  return keys;
}

std::string environment_name(std::string_view path) {
  std::string out = "PGSIDECAR_";
  char before = '.';
  for (const char c : path) {
    const bool upper = c >= 'A' && c <= 'Z';
    if (c == '.') {
      out += '_';
    } else {
      if (upper && before != '.' && !(before >= 'A' && before <= 'Z')) out += '_';
      out += c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c;
    }
    before = c;
  }
  return out;
}

}  // namespace pgsidecar::conf
