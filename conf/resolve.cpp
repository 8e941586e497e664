#include "conf/resolve.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>

#include "conf/load.hpp"
#include "conf/suggest.hpp"

namespace pgsidecar::conf {

namespace {

constexpr std::size_t kMaxFile = 1u << 20;
constexpr std::string_view kBlank = " \t\r\n";

}  // namespace

std::string read_file(const std::string& path, const std::string& what) {
  errno = 0;
  std::ifstream in(path, std::ios::binary);
  std::ostringstream content;
  if (!in || (in.peek() != std::ifstream::traits_type::eof() && !(content << in.rdbuf())) || in.bad())
    throw ConfigError("cannot read " + what + (errno == 0 ? "" : std::string(": ") + std::strerror(errno)));
  if (content.str().size() > kMaxFile) throw ConfigError(what + " is larger than 1 MiB");
  return content.str();
}

namespace {

/// Percent-encodes what isn't unreserved (RFC 3986).
std::string encoded(std::string_view text) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_' || c == '~')
      out += c;
    else
      out.append({'%', kHex[u >> 4], kHex[u & 15]});
  }
  return out;
}

/// Files named before `encode_before` are percent-encoded.
std::string expand_until(std::string_view text, const Environment& env, std::size_t encode_before) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '$' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    if (text[i + 1] == '$') {
      out += '$';
      ++i;
      continue;
    }
    if (text[i + 1] != '{') {
      out += '$';
      continue;
    }
    const auto close = text.find('}', i);
    if (close == std::string_view::npos) throw ConfigError("${ without its }");
    const std::string_view inside = text.substr(i + 2, close - i - 2);
    i = close;
    if (inside.starts_with("file:")) {
      const std::string path(inside.substr(5));
      std::string value = read_file(path, "file \"" + path + "\" named by ${file:}");
      if (!value.empty() && value.back() == '\n') value.pop_back();
      if (!value.empty() && value.back() == '\r') value.pop_back();
      out += i < encode_before ? encoded(value) : value;
      continue;
    }
    const auto colon = inside.find(":-");
    const std::string name(inside.substr(0, colon));
    if (const auto value = env(name); value && !(colon != std::string_view::npos && value->empty()))
      out += *value;
    else if (colon != std::string_view::npos)
      out += inside.substr(colon + 2);
    else
      throw ConfigError("environment variable " + name + " is not set (${" + name + ":-default} gives a default)");
  }
  return out;
}

}  // namespace

bool is_blank(std::string_view text) {
  return text.find_first_not_of(kBlank) == text.npos;
}

bool has_database_url(const Environment& env) {
  return !is_blank(env("DATABASE_URL").value_or(""));
}

std::string expand(std::string_view text, const Environment& env) {
  return expand_until(text, env, 0);
}

std::vector<std::string> expand_arguments(std::vector<std::string> arguments, const Environment& env) {
  for (std::string& argument : arguments) argument = expand(argument, env);
  return arguments;
}

ConnectParams resolve_upstream(const Upstream& upstream, const Environment& env, Findings& findings) {
  const auto expanded = [&](const std::string& from, std::string_view text, std::size_t encode_before) -> std::optional<std::string> {
    try {
      return expand_until(text, env, encode_before);
    } catch (const ConfigError& e) {
      findings.mistakes.push_back({from, e.what()});
      return std::nullopt;
    }
  };
  std::map<std::string, std::string> keys;
  for (const auto& [name, value] : upstream.keys)
    if (auto text = expanded(name, value, 0)) keys[name] = std::move(*text);
  // A file holds a password as it is: where a URI wants one, it is encoded.
  const std::string_view url = upstream.url;
  const std::size_t at = url.starts_with("postgres") && url.find("://") != url.npos ? url.rfind('@') : url.npos;
  const bool unset = url == kDefaultUrl && !has_database_url(env);
  const auto given = [&](const char* keyword, const char* variable) {
    return keys.contains(keyword) || !is_blank(env(variable).value_or(""));
  };
  const bool elsewhere = given("host", "PGHOST") || given("hostaddr", "PGHOSTADDR") || given("service", "PGSERVICE");
  const std::string text = unset ? "" : expanded("", url, at == url.npos ? 0 : at).value_or("");
  if (!elsewhere && (unset || (findings.mistakes.empty() && !url.empty() && is_blank(text))))
    findings.mistakes.push_back(
        {"",
         "no database to connect to: set DATABASE_URL (or PGSIDECAR_UPSTREAM_URL, or upstream.url in the file) to a "
         "connection string such as postgresql://user:password@host:5432/dbname, or PGHOST and libpq's other variables"});
  return read_connection_string(text, keys, env, upstream.dbname, findings);
}

ConnectParams resolve_upstream(const Upstream& upstream, const Environment& env) {
  Findings findings;
  ConnectParams p = resolve_upstream(upstream, env, findings);
  findings.refuse();
  return p;
}

bool nobody_can_log_in(const Config& config, const Environment& env) {
  if (config.auth.method == AuthMethod::Trust || config.auth.method == AuthMethod::Cert) return false;
  for (const auto& [name, user] : config.users)
    if (user.password || name == "*") return false;
  try {
    return resolve_upstream(config.upstream, env).users_password().empty();
  } catch (const ConfigError&) {  // its password can't be read now
    return false;
  }
}

namespace {

/// What the server gets as the user's password is a SCRAM verifier. The URL's user has the URL's password there.
bool logs_in_by_verifier(const Config& config, const User& user, const Environment& env) {
  const auto asks_program = [](const auto& database) { return !database.second.upstream.passwordCommand.empty(); };
  if (config.databases.empty() ? !config.upstream.passwordCommand.empty()
                               : std::all_of(config.databases.begin(), config.databases.end(), asks_program))
    return false;
  try {
    return expand(*user.password, env).starts_with("SCRAM-SHA-256$") && resolve_upstream(config.upstream, env).user != user.name;
  } catch (const ConfigError&) {  // a secret can't be read now
    return false;
  }
}

/// Who has a user below `users` alone, by which nobody can log in. `known`: users whose password upstreams have.
std::vector<std::string> users_without_password(const Config& config, const std::set<std::string>& known) {
  std::vector<std::string> names;
  if (config.auth.method == AuthMethod::Trust || config.auth.method == AuthMethod::Cert) return names;
  for (const auto& [name, user] : config.users)
    if (!user.password && name != "*" && !known.contains(name)) names.push_back(name);
  return names;
}

std::string key_warning(const Tls& tls) {
  struct stat info {};
  if (tls.mode == TlsMode::Disable || ::stat(tls.key.c_str(), &info) != 0 || (info.st_mode & S_IRWXO) == 0) return {};
  return "tls.key: \"" + tls.key + "\" is open to everybody on this machine: chmod it 0600, or 0640 with a group";
}

std::string token_warning(const std::string& file) {
  try {
    const std::string text = file.empty() ? "?" : read_file(file, "the token");
    if (is_blank(text)) return "admin.tokenFile: \"" + file + "\" is empty: no token admits anybody";
    const auto begin = text.find_first_not_of(kBlank), end = text.find_last_not_of(kBlank);
    if (text.find_first_of("\r\n", begin) < end) return "admin.tokenFile: \"" + file + "\" has more than one line, as no token has";
  } catch (const ConfigError&) {
    // It can't be read now.
  }
  return {};
}

/// What anybody on the network can do, or read.
std::string network_warning(const Config& config) {
  const auto open = std::find_if(config.listen.begin(), config.listen.end(),
                                 [](const Listen& one) { return one.kind == Listen::Kind::Tcp && !is_loopback(one.host); });
  if (open == config.listen.end() || config.tls.mode == TlsMode::VerifyFull) return {};
  const std::string where = print_address(open->host, open->port);
  if (config.auth.method == AuthMethod::Trust)
    return "auth.method trust lets in whoever can connect to " + where + ": listen on 127.0.0.1 or a Unix socket, or take another method";
  if (config.auth.method == AuthMethod::Password && config.tls.mode != TlsMode::Require)
    return "auth.method password: passwords may pass to " + where + " in clear text: set tls.mode to require";
  return {};
}

}  // namespace

std::vector<std::string> upstream_warnings(const Config& config, const Environment& env) {
  std::vector<std::string> warnings;
  std::set<std::string> told, known_users;
  const auto add = [&](const std::string& path, const Upstream& upstream) {
    try {
      const ConnectParams params = resolve_upstream(upstream, env);
      if (!params.users_password().empty()) known_users.insert(params.user);
      for (const std::string& warning : params.warnings)
        if (told.insert(warning).second) warnings.push_back(path + ": " + warning);
    } catch (const ConfigError&) {
      // A secret can't be read now. Whoever connects is told so.
    }
  };
  add("upstream", config.upstream);
  for (const auto& [name, database] : config.databases) add("databases." + name + ".upstream", database.upstream);
  for (const auto& [name, user] : config.users)
    if (user.password && logs_in_by_verifier(config, user, env))
      warnings.push_back("users." + name +
                         ".password: a SCRAM verifier shows who a client is, but nobody can log in to the server by it: if that asks for a "
                         "password, put the password here");
  if (nobody_can_log_in(config, env))
    warnings.push_back(
        "nobody can log in, since no password is known that a client must prove: put one into upstream.url or users, or set auth.method");
  else
    for (const std::string& name : users_without_password(config, known_users))
      warnings.push_back("users." + name + ": without a password nobody can log in as " + name);
  for (std::string warning : {network_warning(config), key_warning(config.tls), token_warning(config.admin.tokenFile)})
    if (!warning.empty()) warnings.push_back(std::move(warning));
  return warnings;
}

namespace {

/// NAME_SERVICE_HOST, NAME_PORT=tcp://..., NAME_PORT_6432_TCP_ADDR and so on (Kubernetes documentation, Accessing the Service).
bool of_a_service(std::string_view name, std::string_view value) {
  const auto port = name.find("_PORT_");
  return name.find("_SERVICE_HOST") != name.npos || name.find("_SERVICE_PORT") != name.npos ||
         (name.ends_with("_PORT") && value.find("://") != value.npos) ||
         (port != name.npos && port + 6 < name.size() && name[port + 6] >= '0' && name[port + 6] <= '9');
}

}  // namespace

Environment noting(const Environment& env, std::set<std::string, std::less<>>& asked) {
  return [env, &asked](std::string_view name) {
    asked.emplace(name);
    return env(name);
  };
}

std::vector<std::string> unused_variables(const std::set<std::string, std::less<>>& asked, const char* const* variables) {
  constexpr std::string_view kPrefix = "PGSIDECAR_", kFile = "PGSIDECAR_CONFIG";
  std::vector<std::string_view> known{kFile.substr(kPrefix.size())};  // what all begin with makes none nearer
  for (const std::string& name : asked)
    if (name.starts_with(kPrefix)) known.push_back(std::string_view(name).substr(kPrefix.size()));
  std::vector<std::string> lines;
  for (; *variables; ++variables) {
    const std::string_view variable = *variables;
    const std::string_view name = variable.substr(0, variable.find('='));
    if (!name.starts_with(kPrefix) || name == kFile || asked.contains(name) || of_a_service(name, variable.substr(name.size()))) continue;
    const std::string_view meant = nearest(name.substr(kPrefix.size()), known);
    lines.push_back("the environment variable " + std::string(name) + " is no setting and is ignored" +
                    (meant.empty() ? "" : " (did you mean \"" + std::string(kPrefix) + std::string(meant) + "\"?)"));
  }
  return lines;
}

}  // namespace pgsidecar::conf
