#include "proxy/console_config.hpp"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include "conf/schema.hpp"
#include "conf/suggest.hpp"

namespace pgsidecar::proxy {

namespace {

/// PgBouncer's name, ours, and how many of our units its unit is.
struct Alias {
  std::string_view name, path;
  unsigned factor;
};
constexpr Alias kAliases[] = {{"client_idle_timeout", "pool.clientIdleTimeoutMillis", 1000},
                              {"client_login_timeout", "limits.loginTimeoutMillis", 1000},
                              {"default_pool_size", "pool.max", 1},
                              {"idle_transaction_timeout", "pool.idleInTransactionTimeoutMillis", 1000},
                              {"max_client_conn", "limits.maxClients", 1},
                              {"max_prepared_statements", "pool.maxPreparedStatements", 1},
                              {"max_user_connections", "pool.max", 1},
                              {"min_pool_size", "pool.min", 1},
                              {"pool_mode", "pool.mode", 0},
                              {"query_timeout", "pool.queryTimeoutMillis", 1000},
                              {"query_wait_timeout", "pool.connectionTimeoutMillis", 1000},
                              {"server_idle_timeout", "pool.idleTimeoutMillis", 1000},
                              {"server_lifetime", "pool.maxLifetimeSeconds", 1},
                              {"transaction_timeout", "pool.maxTransactionMillis", 1000}};

std::string lowered(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
  return out;
}

const conf::Key<conf::Config>* find_key(std::string_view path) {
  for (const auto& key : conf::config_keys())
    if (lowered(key.path) == lowered(path)) return &key;
  return nullptr;
}

const Alias* find_alias(std::string_view name) {
  const auto it = std::find_if(std::begin(kAliases), std::end(kAliases), [&](const Alias& a) { return a.name == lowered(name); });
  return it == std::end(kAliases) ? nullptr : it;
}

/// What needs files to be read, or who may do what, is the file's.
bool changeable(const conf::Key<conf::Config>& key) {
  return !key.needs_restart && (key.path.starts_with("pool.") || key.path.starts_with("limits.") || key.path.starts_with("log.") ||
                                key.path.starts_with("metrics.") || key.path.starts_with("alerts.") || key.path.starts_with("shutdown."));
}

double parse_decimal(std::string_view text) {
  double n = 0;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
  return ec == std::errc() && end == text.data() + text.size() ? n : -1;
}

/// A value in PgBouncer's unit in ours.
std::string from_alias(const Alias& alias, std::string_view value) {
  if (alias.factor <= 1) return std::string(value);
  const double n = parse_decimal(value);
  if (!(n >= 0 && n <= 4e6)) throw std::invalid_argument("\"" + std::string(value) + "\" is not a number of seconds");
  const long long least = n > 0 ? 1 : 0;  // 0 is without a limit
  return std::to_string(std::max(least, std::llround(n * alias.factor)));
}

std::string to_alias(const Alias& alias, const std::string& value) {
  if (alias.factor <= 1) return value;
  const double n = parse_decimal(value) / alias.factor;
  char out[32];
  return {out, std::to_chars(out, out + sizeof out, n).ptr};
}

}  // namespace

std::string setting_text(const conf::Config& config, std::string_view path) {
  const auto* key = find_key(path);
  return key ? key->get(config) : std::string();
}

std::vector<ConfigRow> config_rows(const conf::Config& config) {
  const conf::Config standard;
  std::vector<ConfigRow> rows;
  for (const auto& key : conf::config_keys()) rows.push_back({std::string(key.path), key.get(config), key.get(standard), changeable(key)});
  for (const Alias& alias : kAliases)
    rows.push_back({std::string(alias.name), to_alias(alias, setting_text(config, alias.path)),
                    to_alias(alias, setting_text(standard, alias.path)), true});
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a.key < b.key; });
  return rows;
}

std::string apply_setting(conf::Config& config, std::string_view name, std::string_view value) {
  const Alias* alias = find_alias(name);
  const auto* key = find_key(alias ? alias->path : name);
  if (!key) {
    std::vector<std::string_view> known;
    for (const auto& one : conf::config_keys())
      if (changeable(one)) known.push_back(one.path);
    for (const Alias& one : kAliases) known.push_back(one.name);
    return "SET failed: there is no key \"" + std::string(name) + "\"" + conf::did_you_mean(name, known);
  }
  if (!changeable(*key))
    return "SET failed: \"" + std::string(key->path) + "\" can't be set here: change the configuration" +
           (key->needs_restart ? " and restart" : " and RELOAD");
  conf::Config next = config;
  try {
    key->set(next, alias ? from_alias(*alias, value) : std::string(value));
  } catch (const std::invalid_argument& e) {
    return "SET failed: " + std::string(key->path) + ": " + e.what();
  }
  if (key->path.starts_with("pool."))
    for (const auto& one : conf::pool_keys()) {
      if (key->path.substr(5) != one.path) continue;
      for (auto& [database, section] : next.databases)
        if (one.get(section.pool) == one.get(config.pool)) one.set(section.pool, one.get(next.pool));
    }
  const auto fits = [](const conf::PoolSettings& pool) { return pool.min <= pool.max; };
  const bool all_fit =
      fits(next.pool) && std::all_of(next.databases.begin(), next.databases.end(), [&](const auto& one) { return fits(one.second.pool); });
  if (!all_fit) return "SET failed: pool.min would be more than pool.max";
  if (next.pool.allowExitOnIdle && next.pool.idleTimeoutMillis == 0)
    return "SET failed: pool.allowExitOnIdle would wait for pool.idleTimeoutMillis, which would be 0, never";
  config = std::move(next);
  return {};
}

}  // namespace pgsidecar::proxy
