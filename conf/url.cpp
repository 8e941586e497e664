#include "conf/url.hpp"

#include <netdb.h>
#include <pwd.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <limits>

#include "conf/load.hpp"
#include "conf/suggest.hpp"

namespace pgsidecar::conf {

namespace {

/// libpq's keywords, with the environment variable that fills each.
struct Keyword {
  std::string_view name, variable;
  bool used;  // else known and ignored, with a warning
};
constexpr Keyword kKeywords[] = {
    {"host", "PGHOST", true},
    {"hostaddr", "PGHOSTADDR", true},
    {"port", "PGPORT", true},
    {"dbname", "PGDATABASE", true},
    {"user", "PGUSER", true},
    {"password", "PGPASSWORD", true},
    {"passfile", "PGPASSFILE", true},
    {"require_auth", "PGREQUIREAUTH", true},
    {"channel_binding", "PGCHANNELBINDING", true},
    {"connect_timeout", "PGCONNECT_TIMEOUT", true},
    {"client_encoding", "PGCLIENTENCODING", true},
    {"options", "PGOPTIONS", true},
    {"application_name", "PGAPPNAME", true},
    {"fallback_application_name", "", true},
    {"keepalives", "", true},
    {"keepalives_idle", "", true},
    {"keepalives_interval", "", true},
    {"keepalives_count", "", true},
    {"tcp_user_timeout", "", true},
    {"sslmode", "PGSSLMODE", true},
    {"sslnegotiation", "PGSSLNEGOTIATION", true},
    {"sslcert", "PGSSLCERT", true},
    {"sslkey", "PGSSLKEY", true},
    {"sslpassword", "", true},
    {"sslrootcert", "PGSSLROOTCERT", true},
    {"sslcrl", "PGSSLCRL", true},
    {"sslsni", "PGSSLSNI", true},
    {"ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION", true},
    {"ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION", true},
    {"target_session_attrs", "PGTARGETSESSIONATTRS", true},
    {"load_balance_hosts", "PGLOADBALANCEHOSTS", true},
    {"replication", "", false},
    {"gssencmode", "PGGSSENCMODE", false},
    {"krbsrvname", "PGKRBSRVNAME", false},
    {"gsslib", "PGGSSLIB", false},
    {"gssdelegation", "PGGSSDELEGATION", false},
    {"service", "PGSERVICE", true},
    {"servicefile", "PGSERVICEFILE", true},
    {"sslcompression", "PGSSLCOMPRESSION", false},
    {"sslcrldir", "PGSSLCRLDIR", true},
    {"sslcertmode", "PGSSLCERTMODE", true},
    {"sslkeylogfile", "", false},
    {"requirepeer", "PGREQUIREPEER", false},
    {"requiressl", "PGREQUIRESSL", true},
    {"min_protocol_version", "PGMINPROTOCOLVERSION", false},
    {"max_protocol_version", "PGMAXPROTOCOLVERSION", false},
    {"scram_client_key", "", false},
    {"scram_server_key", "", false},
    {"oauth_issuer", "", false},
    {"oauth_client_id", "", false},
    {"oauth_client_secret", "", false},
    {"oauth_scope", "", false},
    // Other clients' own, found in the URLs that applications copy.
    {"pgbouncer", "", false},
    {"connection_limit", "", false},
    {"pool_timeout", "", false},
    {"schema", "", false},
    {"uselibpqcompat", "", false},
    {"statement_cache_size", "", false},
};

const Keyword* find_keyword(std::string_view name) {
  for (const Keyword& keyword : kKeywords)
    if (keyword.name == name) return &keyword;
  return nullptr;
}

constexpr const char* kEncode = "; a / ? # @ : or % in a user name or password is percent-encoded (/ is %2F)";

/// Keywords and their values.
struct Values : std::map<std::string, std::string, std::less<>> {
  explicit Values(Findings& to) : findings(to), incomplete(!to.mistakes.empty()) {}

  std::string get(std::string_view name) const {
    const auto it = find(name);
    return it == end() ? std::string() : it->second;
  }
  void complain(std::string_view name, const std::string& text) {
    const auto it = from.find(name);
    findings.mistakes.push_back(it == from.end() ? Mistake{"", "connection string: " + text} : Mistake{it->second, text});
  }
  /// What `f` throws is a mistake of this keyword. False: it has thrown.
  template <class F>
  bool check(std::string_view name, F&& f) {
    try {
      f();
      return true;
    } catch (const ConfigError& e) {
      complain(name, e.what());
      return false;
    }
  }
  /// The same with its value, if there is one.
  template <class F>
  void read(std::string_view name, F&& f) {
    if (const std::string value = get(name); !value.empty()) check(name, [&] { f(value); });
  }
  void uses(std::string_view name, const std::string& path) {
    const auto it = from.find(name);
    if (!path.empty() && path != "system") findings.files.push_back({std::string(name), it == from.end() ? "" : it->second, path});
  }

  std::map<std::string, std::string, std::less<>> from;  // Mistake::from of those that the string doesn't give
  Findings& findings;
  bool incomplete;  // not all could be read: what several values mean together isn't known
};

/// `secret`: the name may be a part of a password.
void set_value(Values& values, std::string_view raw_name, std::string value, bool secret = false) {
  std::string name(raw_name);
  if (name == "ssl" && value == "true") name = "sslmode", value = "require";  // JDBC's and libpq's old form
  if (!find_keyword(name) && secret) throw ConfigError(std::string("an unknown parameter") + kEncode);
  if (!find_keyword(name)) values.complain(name, "unknown parameter \"" + name + "\"" + did_you_mean(name, connection_keywords()));
  values[name] = std::move(value);
}

int hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string decode(std::string_view text, const char* part) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const int high = i + 2 < text.size() + 0 && i + 2 <= text.size() - 1 ? hex(text[i + 1]) : -1;
    const int low = high >= 0 ? hex(text[i + 2]) : -1;
    if (low < 0) throw ConfigError(std::string("invalid percent-encoding in the ") + part + " (a % is written %25)");
    if (high == 0 && low == 0) throw ConfigError(std::string("%00 is not allowed in the ") + part);
    out += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return out;
}

void parse_uri(std::string_view text, Values& values) {
  text.remove_prefix(text.find("://") + 3);
  if (const auto hash = text.find('#'); hash != std::string_view::npos && text.find('?') > hash && text.find('@') < hash)
    throw ConfigError("a # must be written %23");
  std::string_view query;
  // The authority ends at the first / or ?. A password may hold a @, and before the first of them a ?, as libpq reads it.
  const std::size_t first_at = text.find('@');
  const bool has_credentials = first_at < text.find('/');
  const std::size_t end = text.find_first_of("/?", has_credentials ? first_at : 0);
  std::string_view authority = text.substr(0, end);
  std::string_view rest = end == std::string_view::npos ? std::string_view() : text.substr(end);
  if (const auto question = rest.find('?'); question != std::string_view::npos) {
    query = rest.substr(question + 1);
    rest = rest.substr(0, question);
  }
  if (const auto at = authority.rfind('@'); at != std::string_view::npos) {
    const std::string_view credentials = authority.substr(0, at);
    authority.remove_prefix(at + 1);
    const auto colon = credentials.find(':');
    if (!credentials.substr(0, colon).empty()) values["user"] = decode(credentials.substr(0, colon), "user name");
    if (colon != std::string_view::npos) values["password"] = decode(credentials.substr(colon + 1), "password");
  }
  std::string hosts, ports;
  bool any_port = false, first = true;
  while (first || !authority.empty()) {
    std::string_view one;
    if (!authority.empty() && authority[0] == '[') {
      const auto close = authority.find(']');
      if (close == std::string_view::npos) throw ConfigError("end of string reached when looking for matching \"]\" in IPv6 host address");
      one = authority.substr(1, close - 1);
      if (one.empty()) throw ConfigError("IPv6 host address may not be empty");
      authority.remove_prefix(close + 1);
    } else {
      const auto stop = authority.find_first_of(":,");
      one = authority.substr(0, stop);
      authority.remove_prefix(one.size());
    }
    std::string_view port;
    if (!authority.empty() && authority[0] == ':') {
      const auto comma = authority.find(',');
      port = authority.substr(1, comma == std::string_view::npos ? comma : comma - 1);
      authority.remove_prefix(1 + port.size());
      any_port |= !port.empty();
    }
    if (!authority.empty() && authority[0] != ',') throw ConfigError("unexpected text after the host");
    // What stands here may be the beginning of a password with a / or ? in it: it isn't told.
    if (port.find_first_not_of("0123456789") != std::string_view::npos && port.find('%') == std::string_view::npos)
      throw ConfigError(std::string("the port is not a number") + kEncode);
    if (!first) hosts += ',', ports += ',';
    hosts += decode(one, "host");
    ports += decode(port, "port");
    first = false;
    if (authority.empty()) break;
    authority.remove_prefix(1);
    if (authority.empty()) {  // a trailing comma: one more, empty host
      hosts += ',';
      ports += ',';
    }
  }
  if (!hosts.empty()) values["host"] = hosts;
  if (any_port) values["port"] = ports;
  if (rest.find('@') != std::string_view::npos) throw ConfigError(std::string("a @ in the database name is written %40") + kEncode);
  if (rest.size() > 1) values["dbname"] = decode(rest.substr(1), "database name");
  const bool secret = query.find('@') != std::string_view::npos;
  while (!query.empty()) {
    const auto amp = query.find('&');
    const std::string_view pair = query.substr(0, amp);
    query = amp == std::string_view::npos ? std::string_view() : query.substr(amp + 1);
    const auto equals = pair.find('=');
    if (equals == std::string_view::npos) throw ConfigError("missing key/value separator \"=\" in a URI query parameter");
    set_value(values, decode(pair.substr(0, equals), "query"), decode(pair.substr(equals + 1), "query"), secret);
  }
}

void parse_keywords(std::string_view text, Values& values) {
  const auto blank = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  if (const auto colon = text.find("://"); colon < text.find('=')) {  // another client's URL: "postgresql+asyncpg://"
    const std::string scheme(text.substr(0, colon));
    const bool plain = scheme.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.:") == std::string::npos;
    throw ConfigError((plain ? "the scheme \"" + scheme + "://\" is not known" : std::string("unknown form")) +
                      "; it is postgresql://... or keyword=value ...");
  }
  std::size_t i = 0;
  bool after_password = false;
  const auto skip = [&] {
    while (i < text.size() && blank(text[i])) ++i;
  };
  for (skip(); i < text.size(); skip()) {
    const std::size_t begin = i;
    while (i < text.size() && text[i] != '=' && !blank(text[i])) ++i;
    const std::string name(text.substr(begin, i - begin));
    skip();
    if (i == text.size() || text[i] != '=') throw ConfigError("missing \"=\" after a keyword (neither a URI nor keyword=value)");
    ++i;
    skip();
    std::string value;
    if (i < text.size() && text[i] == '\'') {
      for (++i;; ++i) {
        if (i == text.size()) throw ConfigError("unterminated quoted string in the value of \"" + name + "\"");
        if (text[i] == '\'') break;
        if (text[i] == '\\' && i + 1 < text.size()) ++i;
        value += text[i];
      }
      ++i;
    } else {
      for (; i < text.size() && !blank(text[i]); ++i) {
        if (text[i] == '\\' && i + 1 < text.size()) ++i;
        value += text[i];
      }
    }
    // Neither the rest of a password with a blank in it nor a URL without its scheme is told.
    if (!find_keyword(name) && (after_password || name.find_first_of("/@:") != std::string::npos))
      throw ConfigError("an unknown parameter (a password with blanks is quoted: password='...')");
    after_password |= name == "password";
    set_value(values, name, std::move(value));
  }
}

std::vector<std::string> split(std::string_view text, char by) {
  std::vector<std::string> out;
  for (;;) {
    const auto at = text.find(by);
    out.emplace_back(text.substr(0, at));
    if (at == std::string_view::npos) return out;
    text.remove_prefix(at + 1);
  }
}

/// A value in quotes, unless it may be the end of a password.
std::string told(std::string_view value) {
  return value.find('@') == std::string_view::npos ? " \"" + std::string(value) + "\"" : std::string();
}

/// As libpq reads one: with a sign, and blanks around it.
int number(std::string_view name, std::string_view text, int max = std::numeric_limits<int>::max()) {
  constexpr std::string_view kBlanks = " \t\n\v\f\r";
  std::string_view digits = text.substr(std::min(text.find_first_not_of(kBlanks), text.size()));
  digits = digits.substr(0, digits.find_last_not_of(kBlanks) + 1);
  if (digits.starts_with('+') && !digits.starts_with("+-")) digits.remove_prefix(1);
  int n = 0;
  const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
  if (ec != std::errc() || end != digits.data() + digits.size() || n > max)
    throw ConfigError("invalid integer value" + told(text) + " for \"" + std::string(name) + "\"");
  return n;
}

template <class T, std::size_t N>
T choice(std::string_view name, std::string_view text, const std::pair<std::string_view, T> (&table)[N]) {
  std::vector<std::string_view> known;
  for (const auto& [word, value] : table) {
    if (word == text) return value;
    known.push_back(word);
  }
  throw ConfigError("invalid " + std::string(name) + " value" + told(text) + did_you_mean(text, known));
}

constexpr std::pair<std::string_view, SslMode> kModes[] = {
    {"disable", SslMode::Disable},   {"allow", SslMode::Allow},        {"prefer", SslMode::Prefer},          {"require", SslMode::Require},
    {"no-verify", SslMode::Require}, {"verify-ca", SslMode::VerifyCa}, {"verify-full", SslMode::VerifyFull},
};

constexpr std::pair<std::string_view, TargetSessionAttrs> kAttrs[] = {
    {"any", TargetSessionAttrs::Any},
    {"read-write", TargetSessionAttrs::ReadWrite},
    {"read-only", TargetSessionAttrs::ReadOnly},
    {"primary", TargetSessionAttrs::Primary},
    {"standby", TargetSessionAttrs::Standby},
    {"prefer-standby", TargetSessionAttrs::PreferStandby},
};

bool is_local(const Host& host) {
  return host.is_unix() || is_loopback(host.address.empty() ? host.name : host.address);
}

/// One line of a passfile: host:port:database:user:password, * for any, backslash escapes.
std::optional<std::string> password_from(const std::string& file, const Host& host, const std::string& dbname, const std::string& user,
                                         std::vector<std::string>& warnings) {
  struct stat info {};
  if (::stat(file.c_str(), &info) != 0) return std::nullopt;
  if ((info.st_mode & 077) != 0) {
    warnings.push_back("password file \"" + file + "\" has group or world access; permissions should be u=rw (0600) or less; ignored");
    return std::nullopt;
  }
  // As libpq: the directory that it uses if none is named is called localhost.
  const bool usual = host.name == "/var/run/postgresql" || host.name == "/tmp";
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty() || line[0] == '#') continue;
    std::vector<std::string> fields(1);
    std::vector<bool> any(1, true);
    for (std::size_t i = 0; i < line.size(); ++i) {
      if (line[i] == ':' && fields.size() < 5) {
        fields.emplace_back();
        continue;
      }
      if (line[i] == '\\' && i + 1 < line.size()) ++i;
      fields.back() += line[i];
    }
    if (fields.size() != 5) continue;
    const std::string wanted[] = {usual ? "localhost" : host.name, std::to_string(host.port), dbname, user};
    bool match = true;
    for (std::size_t i = 0; i < 4; ++i) match &= fields[i] == "*" || fields[i] == wanted[i];
    if (match) return fields[4];
  }
  return std::nullopt;
}

/// Fills what `values` leaves out from the section of a service file (section 34.17): name=value lines, # comments.
/// True if the file has the section.
bool fill_from_service(Values& values, const std::string& file, const std::string& service) {
  std::ifstream in(file);
  bool inside = false, found = false;
  int number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    while (!line.empty() && (line.back() == ' ' || line.back() == '\t' || line.back() == '\r')) line.pop_back();
    line.erase(0, line.find_first_not_of(" \t"));
    if (line.empty() || line[0] == '#') continue;
    if (line[0] == '[') {
      inside = line == "[" + service + "]";
      found |= inside;
      continue;
    }
    const auto equals = line.find('=');
    if (!inside) continue;
    if (equals == std::string::npos || !find_keyword(line.substr(0, equals)) || line.starts_with("service"))
      throw ConfigError("syntax error in service file \"" + file + "\", line " + std::to_string(number));
    if (values.try_emplace(line.substr(0, equals), line.substr(equals + 1)).second)
      values.from[line.substr(0, equals)] = "service file \"" + file + "\"";
  }
  if (found) values.uses("servicefile", file);
  return found;
}

void use_service(Values& values, const Environment& env) {
  for (const auto& [name, variable] : {std::pair{"service", "PGSERVICE"}, {"servicefile", "PGSERVICEFILE"}})
    if (const auto value = env(variable); value && values.try_emplace(name, *value).second) values.from[name] = variable;
  const std::string service = values.get("service"), file = values.get("servicefile");
  if (service.empty()) return;
  if (!file.empty() && ::access(file.c_str(), R_OK) != 0) throw ConfigError("service file \"" + file + "\" cannot be read");
  if (fill_from_service(values, file.empty() ? env("HOME").value_or("") + "/.pg_service.conf" : file, service)) return;
  if (fill_from_service(values, env("PGSYSCONFDIR").value_or("/etc/postgresql-common") + "/pg_service.conf", service)) return;
  throw ConfigError("definition of service \"" + service + "\" not found");
}

/// Of where libpq looks for what isn't named (sections 34.16 and 34.19); empty: it isn't there.
std::string existing(std::string file) {
  return ::access(file.c_str(), F_OK) == 0 ? std::move(file) : std::string();
}

bool is_uri(std::string_view text) {
  return text.starts_with("postgresql://") || text.starts_with("postgres://");
}

/// What protects the connection in a way that isn't there is refused, not ignored.
void refuse_unsupported(Values& values) {
  for (const auto& [name, harmless] :
       {std::pair{"requirepeer", ""}, {"gssencmode", "disable,prefer"}, {"sslcertmode", "allow,disable,require"}})
    values.read(name, [&, name = name, allowed = split(harmless, ',')](const std::string& value) {
      if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
        throw ConfigError(std::string(name) + "=" + value + " is not supported by pgsidecar");
    });
}

/// As libpq reads one. Nothing is looked up.
void check_address(const std::string& text) {
  addrinfo numeric{}, *found = nullptr;
  numeric.ai_flags = AI_NUMERICHOST;
  if (::getaddrinfo(text.c_str(), nullptr, &numeric, &found) != 0) throw ConfigError("hostaddr" + told(text) + " is not an IP address");
  ::freeaddrinfo(found);
}

void read_hosts(Values& values, ConnectParams& p) {
  const auto names = split(values.get("host"), ','), ports = split(values.get("port"), ',');
  const auto addresses = values.contains("hostaddr") ? split(values.get("hostaddr"), ',') : std::vector<std::string>();
  const std::size_t count = std::max(addresses.size(), names.size());
  if (!addresses.empty() && values.contains("host") && names.size() != addresses.size() && !values.incomplete)
    values.complain("hostaddr", std::to_string(names.size()) + " host names, but " + std::to_string(addresses.size()) + " hostaddr values");
  else if (ports.size() > 1 && ports.size() != count && !values.incomplete)
    values.complain("port", std::to_string(ports.size()) + " port numbers, but " + std::to_string(count) + " hosts");
  for (std::size_t i = 0; i < count; ++i) {
    Host host;
    if (i < names.size()) host.name = names[i];
    if (i < addresses.size()) host.address = addresses[i];
    if (!host.address.empty()) values.check("hostaddr", [&] { check_address(host.address); });
    if (host.name.empty()) host.name = host.address.empty() ? "localhost" : host.address;
    values.check("port", [&] {
      const std::string& port = ports[std::min(i, ports.size() - 1)];
      const int given = port.empty() ? host.port : number("port", port, 65535);
      if (given < 1) throw ConfigError("invalid port number: \"" + std::to_string(given) + "\"");
      host.port = static_cast<std::uint16_t>(given);
    });
    if (const std::string instead = instead_of_pooler(host); !instead.empty())
      p.warnings.push_back("host \"" + host.name +
                           "\" is a pooler in transaction mode, where what a client leaves in its session reaches others: use " + instead);
    p.hosts.push_back(std::move(host));
  }
}

void read_login(Values& values, const Environment& env, ConnectParams& p) {
  p.user = values.get("user");
  if (p.user.empty()) {
    const passwd* entry = ::getpwuid(::geteuid());
    p.user = entry ? entry->pw_name : "postgres";
  }
  // libpq would read it anew, and it would be shown with its password.
  values.read("dbname", [](const std::string& name) {
    if (is_uri(name)) throw ConfigError("a dbname is a name, not a connection string");
  });
  p.dbname = values.get("dbname");
  if (p.dbname.empty()) p.dbname = p.user;
  p.password = values.get("password");
  if (!p.password.empty()) return;
  std::string file = values.get("passfile");
  if (file.empty()) file = existing(env("HOME").value_or("") + "/.pgpass");
  if (file.empty()) return;
  values.uses("passfile", file);
  for (Host& host : p.hosts) host.password = password_from(file, host, p.dbname, p.user, p.warnings).value_or("");
}

void read_tls(Values& values, const Environment& env, ConnectParams& p) {
  const bool local = std::all_of(p.hosts.begin(), p.hosts.end(), is_local);
  const std::string mode = !values.get("sslmode").empty()              ? values.get("sslmode")
                           : values.get("requiressl").starts_with("1") ? "require"
                                                                       : "";
  if (mode.empty() && values.get("sslrootcert") != "system" && local) p.sslmode = SslMode::Prefer;
  if (!mode.empty()) values.check("sslmode", [&] { p.sslmode = choice("sslmode", mode, kModes); });
  if (p.sslmode != SslMode::Disable) {
    const auto file = [&](std::string_view keyword, const char* usual) {
      const std::string named = values.get(keyword);
      return named.empty() ? existing(env("HOME").value_or("") + "/.postgresql/" + usual) : named;
    };
    p.sslrootcert = file("sslrootcert", "root.crt");
    p.sslcrldir = values.get("sslcrldir");
    p.sslcrl = p.sslcrldir.empty() ? file("sslcrl", "root.crl") : values.get("sslcrl");
    if (values.get("sslcertmode") != "disable") p.sslcert = file("sslcert", "postgresql.crt");
    p.sslkey = p.sslcert.empty() ? values.get("sslkey") : file("sslkey", "postgresql.key");
    p.sslpassword = values.get("sslpassword");
    for (const auto& [keyword, path] : {std::pair{"sslrootcert", &p.sslrootcert},
                                        {"sslcert", &p.sslcert},
                                        {"sslkey", &p.sslkey},
                                        {"sslcrl", &p.sslcrl},
                                        {"sslcrldir", &p.sslcrldir}})
      values.uses(keyword, *path);
  }
  p.sslcertRequired = values.get("sslcertmode") == "require";
  static constexpr std::pair<std::string_view, SslNegotiation> kNegotiation[] = {{"postgres", SslNegotiation::Postgres},
                                                                                 {"direct", SslNegotiation::Direct}};
  values.read("sslnegotiation", [&](const std::string& how) { p.sslnegotiation = choice("sslnegotiation", how, kNegotiation); });
  values.read("sslsni", [&](const std::string& sni) { p.sslsni = sni != "0"; });
  static constexpr std::pair<std::string_view, bool> kVersions[] = {
      {"TLSv1", true}, {"TLSv1.1", true}, {"TLSv1.2", true}, {"TLSv1.3", true}};
  for (const auto& [name, to] :
       {std::pair{"ssl_min_protocol_version", &p.sslMinProtocolVersion}, {"ssl_max_protocol_version", &p.sslMaxProtocolVersion}})
    values.read(name, [name = name, to = to](std::string version) {
      if (version.size() >= 5 && ::strncasecmp(version.c_str(), "TLSv1", 5) == 0) version.replace(0, 5, "TLSv1");
      if (choice(name, version, kVersions)) *to = version;
    });
  if (values.incomplete) return;
  if (!p.sslcert.empty() && p.sslkey.empty()) values.complain("sslcert", "sslcert needs sslkey");
  if (p.sslcertRequired && p.sslcert.empty()) values.complain("sslcertmode", "sslcertmode=require needs TLS and sslcert");
  if (p.sslrootcert == "system" && p.sslmode != SslMode::VerifyFull)
    values.complain("sslmode", "weak sslmode \"" + mode + "\" may not be used with sslrootcert=system (use verify-full)");
  if (p.sslnegotiation == SslNegotiation::Direct && p.sslmode < SslMode::Require)
    values.complain("sslnegotiation",
                    "weak sslmode may not be used with sslnegotiation=direct (use sslmode=require, verify-ca or verify-full)");
  if (!p.sslMaxProtocolVersion.empty() && p.sslMaxProtocolVersion < p.sslMinProtocolVersion)
    values.complain("ssl_max_protocol_version", "ssl_max_protocol_version is below ssl_min_protocol_version");
  if (!mode.empty() && !local &&
      (p.sslmode == SslMode::Prefer || p.sslmode == SslMode::Allow || (p.sslmode == SslMode::Require && p.sslrootcert.empty())))
    p.warnings.push_back("sslmode=" + mode + " does not verify the server's certificate (verify-full does)");
}

void read_authentication(Values& values, ConnectParams& p) {
  static constexpr std::pair<std::string_view, ChannelBinding> kBinding[] = {
      {"disable", ChannelBinding::Disable}, {"prefer", ChannelBinding::Prefer}, {"require", ChannelBinding::Require}};
  values.read("channel_binding", [&](const std::string& binding) { p.channelBinding = choice("channel_binding", binding, kBinding); });
  values.read("require_auth", [&](const std::string& methods) {
    p.requireAuth = split(methods, ',');
    static constexpr std::pair<std::string_view, bool> kAuthMethods[] = {{"password", true}, {"md5", true},           {"gss", true},
                                                                         {"sspi", true},     {"scram-sha-256", true}, {"none", true}};
    for (const std::string& method : p.requireAuth) {
      const bool negative = method.starts_with("!");
      choice("require_auth", std::string_view(method).substr(negative), kAuthMethods);
      if (negative != p.requireAuth.front().starts_with("!"))
        throw ConfigError("require_auth method \"" + method + "\" cannot be mixed with " + (negative ? "positive" : "negative") +
                          " methods");
    }
  });
}

void read_network(Values& values, ConnectParams& p) {
  // Zero or less is none of its own, as with libpq.
  const auto positive = [](std::string_view name, const std::string& given, int max) {
    return static_cast<std::uint32_t>(std::max(0, number(name, given, max)));
  };
  values.read("connect_timeout", [&](const std::string& seconds) {
    p.connectTimeoutMillis = std::min(positive("connect_timeout", seconds, std::numeric_limits<int>::max()), 2'000'000u) * 1000;
  });
  values.read("keepalives", [&](const std::string& on) { p.keepalives = number("keepalives", on) != 0; });
  for (const auto& [name, to] : {std::pair{"keepalives_idle", &p.keepalivesIdleSeconds},
                                 {"keepalives_interval", &p.keepalivesIntervalSeconds},
                                 {"keepalives_count", &p.keepalivesCount},
                                 {"tcp_user_timeout", &p.tcpUserTimeoutMillis}})
    values.read(name, [&, name = name, to = to](const std::string& n) { *to = positive(name, n, 86'400'000); });
  values.read("target_session_attrs",
              [&](const std::string& attrs) { p.targetSessionAttrs = choice("target_session_attrs", attrs, kAttrs); });
  static constexpr std::pair<std::string_view, bool> kBalance[] = {{"disable", false}, {"random", true}};
  values.read("load_balance_hosts", [&](const std::string& how) { p.loadBalanceHosts = choice("load_balance_hosts", how, kBalance); });
}

}  // namespace

bool is_loopback(std::string_view host) {
  const bool v4 = host.starts_with("127.") && host.find_first_not_of("0123456789.") == host.npos;  // 127.example.com is none
  return v4 || host == "localhost" || host == "::1";
}

void Findings::refuse() const {
  if (mistakes.empty()) return;
  std::vector<std::string> lines;
  for (const Mistake& one : mistakes) lines.push_back((one.from.empty() ? "" : one.from + ": ") + one.text);
  throw ConfigError(std::move(lines));
}

const std::string& ConnectParams::users_password() const {
  const auto known = std::find_if(hosts.begin(), hosts.end(), [](const Host& host) { return !host.password.empty(); });
  return password.empty() && known != hosts.end() ? known->password : password;
}

std::string ConnectParams::destination() const {
  std::string names, ports;
  for (const Host& host : hosts) {
    names += (names.empty() ? "" : ",") + host.name;
    ports += (ports.empty() ? "" : ",") + std::to_string(host.port);
  }
  const auto mode = std::find_if(std::begin(kModes), std::end(kModes), [this](const auto& row) { return row.second == sslmode; });
  return "host=" + names + " port=" + ports + " dbname=" + dbname + " user=" + user + " sslmode=" + std::string(mode->first);
}

std::string_view name_of(TargetSessionAttrs attrs) {
  return std::find_if(std::begin(kAttrs), std::end(kAttrs), [&](const auto& row) { return row.second == attrs; })->first;
}

std::string instead_of_pooler(const Host& host) {
  const std::string label = host.name.substr(0, host.name.find('.'));
  constexpr std::string_view kNeon = "-pooler";
  if (label.size() < host.name.size() && label.ends_with(kNeon))
    return "host \"" + label.substr(0, label.size() - kNeon.size()) + host.name.substr(label.size()) + "\"";
  if (host.name.ends_with(".pooler.supabase.com") && host.port == 6543) return "port 5432 of the same host, or the direct host";
  return {};
}

Environment process_environment() {
  return [](std::string_view name) -> std::optional<std::string> {
    const char* value = std::getenv(std::string(name).c_str());
    return value ? std::optional<std::string>(value) : std::nullopt;
  };
}

std::vector<std::string_view> connection_keywords() {
  std::vector<std::string_view> names;
  for (const Keyword& keyword : kKeywords) names.push_back(keyword.name);
  return names;
}

ConnectParams read_connection_string(std::string_view text, const std::map<std::string, std::string>& overrides, const Environment& env,
                                     const std::string& default_dbname, Findings& findings) {
  Values values(findings);
  ConnectParams p;
  while (text.ends_with('\n') || text.ends_with('\r')) text.remove_suffix(1);  // of a secret that `echo` has made
  if (!values.check("", [&] { is_uri(text) ? parse_uri(text, values) : parse_keywords(text, values); })) {
    values.clear();
    values.incomplete = true;
  }
  for (const auto& [name, value] : overrides) {
    values.from[name] = name;
    set_value(values, name, value);
  }
  if (!values.check("service", [&] { use_service(values, env); })) values.incomplete = true;
  if (!default_dbname.empty()) values.try_emplace("dbname", default_dbname);
  for (const Keyword& keyword : kKeywords) {
    const std::string name(keyword.name);
    if (values.contains(name)) {
      if (!keyword.used) p.warnings.push_back("parameter \"" + name + "\" has no effect here and is ignored");
    } else if (const auto value = keyword.variable.empty() ? std::nullopt : env(keyword.variable); value && !value->empty()) {
      values[name] = *value;
      values.from[name] = keyword.variable;
    }
  }
  refuse_unsupported(values);
  read_hosts(values, p);
  read_login(values, env, p);
  read_tls(values, env, p);
  read_authentication(values, p);
  read_network(values, p);
  const std::string application = values.get("application_name"), encoding = values.get("client_encoding");
  if (const auto name = application.empty() ? values.get("fallback_application_name") : application; !name.empty())
    p.startup.emplace_back("application_name", name);
  if (!encoding.empty() && encoding != "auto") p.startup.emplace_back("client_encoding", encoding);
  if (const auto options = values.get("options"); !options.empty()) p.startup.emplace_back("options", options);
  return p;
}

ConnectParams parse_connection_string(std::string_view text, const std::map<std::string, std::string>& overrides, const Environment& env,
                                      const std::string& default_dbname) {
  Findings findings;
  ConnectParams p = read_connection_string(text, overrides, env, default_dbname, findings);
  findings.refuse();
  return p;
}

}  // namespace pgsidecar::conf
