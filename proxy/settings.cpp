#include "proxy/settings.hpp"

#include <algorithm>
#include <boost/container_hash/hash.hpp>

#include "conf/utf8.hpp"
#include "protocol/footprint.hpp"
#include "protocol/sql_scan.hpp"

namespace pgsidecar::proxy {

namespace {

/// Lists of names, of which SET takes each by itself.
constexpr std::string_view kNameLists[] = {"search_path", "temp_tablespaces", "session_preload_libraries", "local_preload_libraries"};

/// What decides how a text is read, whatever the types in it.
constexpr std::string_view kReading[] = {
    "client_encoding", "standard_conforming_strings", "datestyle",   "timezone",   "timezone_abbreviations", "intervalstyle",
    "xmloption",       "transform_null_equals",       "array_nulls", "lc_monetary"};

/// A meaning's parts that functions' plans don't hang on: what names stand for is looked up anew, and bodies have one encoding.
constexpr std::string_view kUnplanned[] = {"search_path", "role", "session_authorization", "client_encoding",
                                           "standard_conforming_strings"};

constexpr std::size_t kMaxKnown = 4096, kMaxCustomNames = 64, kMaxDateStyles = 64;

std::string quoted(std::string_view text, char quote) {
  std::string out(1, quote);
  for (const char c : text) {
    if (c == quote) out += quote;
    if (c == '\\' && quote == '\'') out += '\\';
    out += c;
  }
  return out += quote;
}

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; });
}

/// An SQL expression for a text whose bytes are in the database's encoding, whatever the client's is.
std::string text_sql(std::string_view text) {
  if (is_ascii(text)) return literal(text);
  std::string digits;
  for (const char c : text)
    for (const int shift : {4, 0}) digits += "0123456789abcdef"[static_cast<unsigned char>(c) >> shift & 15];
  return "pg_catalog.convert_from(pg_catalog.decode('" + digits + "','hex'),pg_catalog.getdatabaseencoding())";
}

/// The server's login takes an application_name of any bytes, and replaces them later; by SQL it must be text.
void clean(std::string& application) {
  if (conf::to_utf8(application) == application) return;
  std::replace_if(
      application.begin(), application.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; }, '?');
}

std::string set_call(std::string_view name, std::string_view value, bool local = false) {
  return "pg_catalog.set_config(" + text_sql(name) + "," + text_sql(value) + (local ? ",true)" : ",false)");
}

std::string reset_call(std::string_view name) {
  return "pg_catalog.set_config(" + text_sql(name) + ",NULL,false)";
}

std::string quoted_name(std::string_view name) {
  std::string out;
  for (std::size_t at = 0;;) {
    const std::size_t dot = name.find('.', at);
    out += identifier(name.substr(at, dot - at));
    if (dot == std::string_view::npos) return out;
    out += '.';
    at = dot + 1;
  }
}

std::string reset_statement(std::string_view name) {
  return is_ascii(name) ? "RESET " + quoted_name(name) : "SELECT " + reset_call(name);
}

/// A list's names, as the server reads them. Empty: it can't be read, or has none.
std::vector<std::string> names_of(std::string_view list) {
  constexpr std::string_view kBlanks = " \t\n\r\f\v";
  std::vector<std::string> names;
  for (std::size_t at = 0;; ++at) {
    at = std::min(list.find_first_not_of(kBlanks, at), list.size());
    std::string name;
    if (at < list.size() && list[at] == '"') {
      for (++at; at < list.size() && (list[at] != '"' || (at + 1 < list.size() && list[at + 1] == '"' && ++at)); ++at) name += list[at];
      if (at++ >= list.size()) return {};
    } else {
      const std::size_t end = std::min(list.find_first_of(", \t\n\r\f\v", at), list.size());
      name = lower(list.substr(at, end - at));
      at = end;
    }
    if (name.empty()) return {};
    names.push_back(std::move(name));
    at = std::min(list.find_first_not_of(kBlanks, at), list.size());
    if (at == list.size()) return names;
    if (list[at] != ',') return {};
  }
}

/// SET takes no snapshot, as SELECT would, but writes a list in its own way.
std::string set_statement(std::string_view name, std::string_view value, bool local, bool in_transaction) {
  const bool list = std::find(std::begin(kNameLists), std::end(kNameLists), name) != std::end(kNameLists);
  const std::vector<std::string> values = list ? names_of(value) : std::vector{std::string(value)};
  if ((list && !in_transaction) || values.empty() || !is_ascii(name) || !is_ascii(value)) return "SELECT " + set_call(name, value, local);
  std::string sql = (local ? "SET LOCAL " : "SET ") + quoted_name(name);
  for (const std::string& one : values) sql += (&one == &values.front() ? " TO " : ",") + literal(one);
  return sql;
}

/// As the server tells them; empty: not named.
struct DateStyle {
  std::string_view style, order;
};

DateStyle read_date_style(std::string_view text) {
  DateStyle found;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = std::min(text.find_first_not_of(", \t\n\r\f\v", at), text.size());
    at = std::min(text.find_first_of(", \t\n\r\f\v", begin), text.size());
    const std::string word = lower(text.substr(begin, at - begin));
    if (word == "iso") found.style = "ISO";
    if (word == "sql") found.style = "SQL";
    if (word == "german") found.style = "German";
    if (word.starts_with("postgres")) found.style = "Postgres";
    if (word == "ymd") found.order = "YMD";
    if (word == "dmy" || word.starts_with("euro")) found.order = "DMY";
    if (word == "mdy" || word == "us" || word.starts_with("noneuro")) found.order = "MDY";
  }
  return found;
}

}  // namespace

std::string identifier(std::string_view name) {
  return quoted(name, '"');
}

std::string literal(std::string_view text) {
  return (text.find('\\') == std::string_view::npos ? "" : " E") + quoted(text, '\'');
}

namespace {

/// Of those that have no value of their own, after a reset that the text doesn't show.
std::string restore_sql(const Values& login) {
  std::string rows;
  for (const auto& [name, value] : login) rows += (rows.empty() ? "(" : ",(") + text_sql(name) + "," + text_sql(value) + ")";
  return "SELECT pg_catalog.set_config(n, v, false) FROM (VALUES " + rows +
         ") AS login (n, v) WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) OPERATOR(pg_catalog.=) n"
         " AND source OPERATOR(pg_catalog.=) 'session') AND (pg_catalog.strpos(n, '.') OPERATOR(pg_catalog.=) 0"
         " OR COALESCE(pg_catalog.current_setting(n, true), '') OPERATOR(pg_catalog.=) '')"
         " AND (n OPERATOR(pg_catalog.<>) 'role' OR pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) 'none')";
}

}  // namespace

std::vector<std::string> restore_statements(const Values& login, const std::optional<protocol::Reset>& reset, bool in_transaction) {
  const auto is_identity = [](const std::string& name) { return name == "role" || name == "session_authorization"; };
  const bool resets_identity =
      reset && reset->discard && std::any_of(login.begin(), login.end(), [&](const auto& e) { return is_identity(e.first); });
  if (login.empty()) return {};
  if (!reset || resets_identity) return {restore_sql(login)};
  std::vector<std::string> statements;
  for (const auto& [name, value] : login)
    if (reset->name.empty() ? !is_identity(name) : name == reset->name)
      statements.push_back(set_statement(name, value, reset->local, in_transaction || reset->begins));
  return statements;
}

std::size_t SettingsCache::footprint() const {
  using protocol::footprint_of_nodes;
  std::size_t bytes = footprint_of_nodes(known_) + footprint_of_nodes(meanings_) + footprint_of_nodes(date_styles_);
  for (const auto& [values, settings] : known_)
    bytes += sizeof *settings + protocol::kNode + 2 * footprint_of_nodes(values) + footprint_of_nodes(settings->welcome);
  for (const auto& [values, meaning] : meanings_) bytes += sizeof *meaning + protocol::kNode + 2 * footprint_of_nodes(values);
  return bytes;
}

bool SettingsCache::learn(const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    // A library's own, which only connections that have it loaded know, and check.
    if (name.starts_with("plpgsql.") || !is_ascii(name)) return false;
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

bool is_sessions(std::string_view parameter) {
  for (const std::string_view other : {"in_hot_standby", "default_transaction_read_only", "is_superuser", "session_authorization"})
    if (parameter == other) return false;
  return !parameter.starts_with("server_");
}

std::uint32_t fingerprint_of(const Values& parameters) {
  std::size_t hash = 0;
  for (const auto& [name, value] : parameters)
    if (is_sessions(name)) boost::hash_combine(hash, value);
  return static_cast<std::uint32_t>(hash ^ hash >> 32) | 1u;
}

SettingsRef SettingsCache::intern(std::map<std::string, std::string> values) {
  // These are set anew by each transaction, whatever pg_settings says of them.
  for (const char* name : {"transaction_isolation", "transaction_read_only", "transaction_deferrable"}) values.erase(name);
  if (const auto it = known_.find(values); it != known_.end()) return it->second;
  if (known_.size() >= kMaxKnown) std::erase_if(known_, [](const auto& e) { return e.second.use_count() == 1; });
  if (meanings_.size() >= kMaxKnown) std::erase_if(meanings_, [](const auto& e) { return e.second.use_count() == 1; });
  static std::uint64_t last_number = 0;
  auto settings = std::make_shared<Settings>();
  settings->number = ++last_number;
  settings->values = values;
  auto meaning = values;
  std::erase_if(meaning, [](const auto& e) { return protocol::leaves_meaning(e.first); });
  auto& known = meanings_[meaning];
  if (!known) known = std::make_shared<Meaning>(Meaning{meaning});
  settings->meaning = known;
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
  date_styles_.clear();
}

void SettingsCache::saw_parameters(const Values& own, const Values& told) {
  const auto usual = known_.find({});
  if (usual == known_.end()) return;
  bool differs = false;
  for (const auto& [name, value] : usual->second->welcome) {
    const auto it = told.find(name);
    if (it == told.end() || it->second == value || name == "is_superuser" || name == "session_authorization") continue;
    if (own.contains(lower(name))) continue;
    differs = true;
    if (name == "DateStyle") date_styles_.clear();
  }
  if (differs)
    for (auto& [values, settings] : known_) settings->welcome.clear();
}

const std::string* SettingsCache::date_style(const std::vector<std::string>& asked) const {
  const auto it = date_styles_.find(asked);
  return it == date_styles_.end() ? nullptr : &it->second;
}

void SettingsCache::learn_date_style(const std::vector<std::string>& asked, const std::string& told) {
  if (date_styles_.size() >= kMaxDateStyles) date_styles_.clear();
  // Proxies on the way may have kept it from the server's login.
  const DateStyle wanted = read_date_style(asked.back());
  const bool heard = told.find(wanted.style) != std::string::npos && told.find(wanted.order) != std::string::npos;
  date_styles_[asked] = heard ? told : asked.back();
}

std::optional<StartupSettings> settings_of(const protocol::Startup& startup, std::string& sqlstate, std::string& complaint) {
  StartupSettings asked;
  const auto add = [&asked](const std::string& name, const std::string& value) {
    std::string& taken = asked.values[lower(name)] = value;
    if (lower(name) == "application_name") clean(taken);
    if (lower(name) == "datestyle") asked.date_styles.push_back(value);
  };
  // The server takes `options` first, then the other parameters in order.
  if (const auto options = startup.get("options"); !options.empty()) {
    const auto parsed = protocol::parse_options(options, complaint);
    if (!parsed) {
      sqlstate = complaint.empty() ? "0A000" : "42601";
      if (complaint.empty()) complaint = "unsupported startup options: only settings (-c name=value) can be given through pgsidecar";
      return std::nullopt;
    }
    for (const auto& [name, value] : *parsed) add(name, value);
  }
  for (const auto& [name, value] : startup.parameters) {
    if (name == "user" || name == "database" || name == "options" || name == "replication" || name.starts_with("_pq_.")) continue;
    add(name, value);
  }
  if (!asked.date_styles.empty()) {
    const DateStyle last = read_date_style(asked.date_styles.back());
    if (asked.date_styles.size() == 1 && !last.style.empty() && !last.order.empty())
      asked.date_styles.clear();
    else
      asked.values.erase("datestyle");
  }
  return asked;
}

namespace {

bool alike(const Values& one, const Values& other, std::string_view name) {
  const auto a = one.find(std::string(name)), b = other.find(std::string(name));
  return a == one.end() || b == other.end() ? a == one.end() && b == other.end() : a->second == b->second;
}

}  // namespace

std::vector<std::string> reading_settings() {
  std::vector<std::string> names(std::begin(kReading), std::end(kReading));
  names.insert(names.end(), {"extra_float_digits", "bytea_output"});
  return names;
}

bool read_alike(const Values& one, const Values& other) {
  return std::ranges::all_of(kReading, [&](std::string_view name) { return alike(one, other, name); });
}

// What is computed when it is planned depends on how values are written too: extra_float_digits, bytea_output...
bool plans_alike(const Values& one, const Values& other) {
  const auto counts = [](const auto& setting) { return std::ranges::find(kUnplanned, setting.first) == std::end(kUnplanned); };
  const auto shows_all_digits = [](const auto& setting) {
    return setting.first == "extra_float_digits" && setting.second.size() == 1 && setting.second > "0";
  };
  auto a = one.begin(), b = other.begin();
  for (;; ++a, ++b) {
    a = std::find_if(a, one.end(), counts);
    b = std::find_if(b, other.end(), counts);
    if (a == one.end() || b == other.end()) return a == one.end() && b == other.end();
    if (*a != *b && !(shows_all_digits(*a) && shows_all_digits(*b))) return false;
  }
}

std::string reading_statement(const Values& meaning, bool path) {
  std::string calls;
  const auto add = [&](std::string_view name) {
    const auto it = meaning.find(std::string(name));
    calls += (calls.empty() ? "SELECT " : ",") + (it == meaning.end() ? reset_call(name) : set_call(name, it->second));
  };
  for (const std::string_view name : kReading) add(name);
  if (path)
    for (const std::string_view name : {"search_path", "role"}) add(name);
  return calls;
}

std::vector<std::string> settings_statements(const Values& have, const Values& want) {
  const auto value = [](const Values& values, const char* name) {
    const auto it = values.find(name);
    return it == values.end() ? std::string_view() : std::string_view(it->second);
  };
  const auto is_identity = [](const std::string& name) { return name == "role" || name == "session_authorization"; };
  std::vector<std::string> statements;
  std::string sets;
  for (const auto& [name, wanted] : want)
    if (!is_identity(name) && (!have.contains(name) || have.at(name) != wanted))
      sets += (sets.empty() ? "SELECT " : ",") + set_call(name, wanted);
  for (const auto& [name, old] : have)
    if (!is_identity(name) && !want.contains(name)) statements.push_back(reset_statement(name));
  if (!sets.empty()) statements.push_back(std::move(sets));
  // Only who has logged in may change everything, so a role is put on last and off first. A new session user has no role.
  const bool others = !statements.empty();
  const std::string_view user = value(have, "session_authorization"), wanted_user = value(want, "session_authorization");
  const std::string_view role = value(have, "role"), wanted_role = value(want, "role");
  const bool change_user = user != wanted_user || (others && !user.empty());
  const bool change_role = role != wanted_role || ((others || change_user) && !role.empty());
  if (change_user && !user.empty()) statements.insert(statements.begin(), "RESET SESSION AUTHORIZATION");
  if (change_role && !role.empty()) statements.insert(statements.begin(), "RESET ROLE");
  if (change_user && !wanted_user.empty()) statements.push_back("SELECT " + set_call("session_authorization", wanted_user));
  if (change_role && !wanted_role.empty()) statements.push_back("SELECT " + set_call("role", wanted_role));
  return statements;
}

}  // namespace pgsidecar::proxy
