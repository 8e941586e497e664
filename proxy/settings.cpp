#include "proxy/settings.hpp"

#include <algorithm>

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kMaxKnown = 4096;

std::string quoted(std::string_view text, char quote) {
  std::string out(1, quote);
  for (const char c : text) {
    if (c == quote) out += quote;
    if (c == '\\' && quote == '\'') out += '\\';
    out += c;
  }
  return out += quote;
}

std::string reset_name(std::string_view name) {
  std::string out;
  for (std::size_t at = 0;;) {
    const std::size_t dot = name.find('.', at);
    out += quoted(name.substr(at, dot - at), '"');
    if (dot == std::string_view::npos) return out;
    out += '.';
    at = dot + 1;
  }
}

}  // namespace

namespace {

constexpr const char* kResidueSql =
    "SELECT 's', name, setting FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'"
    " UNION ALL SELECT 'l', 'advisory lock', '' FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory'"
    " AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()"
    " UNION ALL (SELECT 't', relname::pg_catalog.text, '' FROM pg_catalog.pg_class"
    " WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL (SELECT 't', proname::pg_catalog.text, '' FROM pg_catalog.pg_proc"
    " WHERE pronamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL (SELECT 't', typname::pg_catalog.text, '' FROM pg_catalog.pg_type"
    " WHERE typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL SELECT 'p', name, '' FROM pg_catalog.pg_prepared_statements WHERE from_sql"
    " UNION ALL SELECT 'c', name, '' FROM pg_catalog.pg_cursors WHERE is_holdable"
    " UNION ALL SELECT 'n', c, '' FROM pg_catalog.pg_listening_channels() AS c"
    " UNION ALL SELECT 'r', pg_catalog.current_setting('role'), session_user::pg_catalog.text";
constexpr std::size_t kMaxCustomNames = 64;

}  // namespace

std::string residue_sql(const std::vector<std::string>& custom_names) {
  std::string sql = kResidueSql;
  for (const std::string& name : custom_names) {
    const std::string value = "pg_catalog.current_setting(" + literal(name) + ",true)";
    sql += " UNION ALL SELECT 's'," + literal(name) + "," + value + " WHERE " + value + " OPERATOR(pg_catalog.<>) ''";
  }
  return sql;
}

std::string literal(std::string_view text) {
  return (text.find('\\') == std::string_view::npos ? "" : " E") + quoted(text, '\'');
}

std::string restore_sql(const Settings& login) {
  std::string rows;
  for (const auto& [name, value] : login.values) rows += (rows.empty() ? "(" : ",(") + literal(name) + "," + literal(value) + ")";
  return "SELECT pg_catalog.set_config(n, v, false) FROM (VALUES " + rows +
         ") AS login (n, v) WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) OPERATOR(pg_catalog.=) n"
         " AND source OPERATOR(pg_catalog.=) 'session') AND (pg_catalog.strpos(n, '.') OPERATOR(pg_catalog.=) 0"
         " OR COALESCE(pg_catalog.current_setting(n, true), '') OPERATOR(pg_catalog.=) '')";
}

bool SettingsCache::learn(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (std::find(custom_names_.begin(), custom_names_.end(), name) != custom_names_.end()) continue;
    if (custom_names_.size() >= kMaxCustomNames) return false;
    custom_names_.push_back(name);
  }
  return true;
}

std::string lower(std::string_view name) {
  std::string out(name);
  std::transform(out.begin(), out.end(), out.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  return out;
}

std::string residue_name(char kind) {
  switch (kind) {
    case 'l': return "";
    case 't': return "temporary object ";
    case 'p': return "prepared statement ";
    case 'c': return "cursor ";
    case 'n': return "listening on ";
    default: return "";
  }
}

SettingsRef SettingsCache::intern(std::map<std::string, std::string> values) {
  if (const auto it = known_.find(values); it != known_.end()) return it->second;
  if (known_.size() >= kMaxKnown) std::erase_if(known_, [](const auto& e) { return e.second.use_count() == 1; });
  auto settings = std::make_shared<Settings>();
  settings->values = values;
  if (const auto path = values.find("search_path"); path != values.end())
    settings->temporary = path->second.find("pg_temp") != std::string::npos;
  known_.emplace(std::move(values), settings);
  return settings;
}

void SettingsCache::derive_welcome(Settings& settings) {
  const auto name = settings.values.find("application_name");
  if (!settings.welcome.empty() || name == settings.values.end()) return;
  // The server cuts it at 63 bytes and replaces what isn't printable ASCII.
  const bool plain =
      name->second.size() < 64 && std::all_of(name->second.begin(), name->second.end(), [](char c) { return c >= 32 && c < 127; });
  if (!plain) return;
  auto others = settings.values;
  others.erase("application_name");
  const auto it = known_.find(others);
  if (it == known_.end() || it->second->welcome.empty()) return;
  settings.welcome = it->second->welcome;
  settings.welcome["application_name"] = name->second;
}

void SettingsCache::forget_welcomes() {
  for (auto& [values, settings] : known_) settings->welcome.clear();
}

bool settings_of(const protocol::Startup& startup, std::map<std::string, std::string>& values, std::string& complaint) {
  // The server takes `options` first, then the other parameters in order.
  if (const auto options = startup.get("options"); !options.empty()) {
    const auto parsed = protocol::parse_options(options);
    if (!parsed) {
      complaint = "unsupported startup options: only settings (-c name=value) can be given through pgsidecar";
      return false;
    }
    for (const auto& [name, value] : *parsed) values[lower(name)] = value;
  }
  for (const auto& [name, value] : startup.parameters) {
    if (name == "user" || name == "database" || name == "options" || name == "replication" || name.starts_with("_pq_.")) continue;
    values[lower(name)] = value;
  }
  return true;
}

std::string settings_sql(const Settings& have, const Settings& want) {
  std::string sets, resets;
  for (const auto& [name, value] : want.values) {
    const auto it = have.values.find(name);
    if (it != have.values.end() && it->second == value) continue;
    sets += sets.empty() ? "SELECT " : ",";
    sets += "pg_catalog.set_config(" + literal(name) + "," + literal(value) + ",false)";
  }
  for (const auto& [name, value] : have.values)
    if (!want.values.contains(name)) resets += "RESET " + reset_name(name) + ";";
  return resets + sets;
}

}  // namespace pgsidecar::proxy
