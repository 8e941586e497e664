#include "conf/load.hpp"

#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <sstream>

#include "conf/resolve.hpp"
#include "conf/schema.hpp"
#include "conf/suggest.hpp"

namespace pgsidecar::conf {

namespace {

constexpr std::string_view kOfProcess = "allowExitOnIdle";  // no database's nor user's pool has it
constexpr int kDeepest = 16;                                // mappings in mappings
constexpr std::size_t kMostMappings = 100'000;

std::string joined(const std::vector<std::string>& lines) {
  std::string out;
  for (const std::string& line : lines) out += (out.empty() ? "" : "\n") + line;
  return out;
}

std::vector<std::string_view> pool_names() {
  std::vector<std::string_view> names;
  for (const auto& key : pool_keys()) names.push_back(key.path);
  return names;
}

std::vector<std::string_view> upstream_names() {
  auto names = connection_keywords();
  names.insert(names.end(), {"url", "passwordCommand"});
  for (const auto& key : upstream_keys()) names.push_back(key.path);
  return names;
}

constexpr std::string_view kScram = "SCRAM-SHA-256$";

/// As pg_authid has it, the keys' 32 bytes in base64.
bool is_verifier(std::string_view text) {
  const auto take = [&text](char end) {
    const std::string_view part = text.substr(0, text.find(end));
    text.remove_prefix(std::min(text.size(), part.size() + 1));
    return part;
  };
  const auto is_base64 = [](std::string_view part) {
    return part.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=") == part.npos;
  };
  constexpr std::size_t kKey = 44;
  text.remove_prefix(kScram.size());
  const std::string_view iterations = take(':'), salt = take('$'), stored = take(':');
  return !iterations.empty() && iterations.find_first_not_of("0123456789") == iterations.npos && !salt.empty() && is_base64(salt) &&
         stored.size() == kKey && is_base64(stored) && text.size() == kKey && is_base64(text);
}

/// Reads one YAML document into a Config, collecting mistakes.
class Reader {
 public:
  Reader(std::string_view file, const Environment& env, const FileChecks& checks, Config& config, std::vector<std::string>& mistakes)
      : file_(file), env_(env), checks_(checks), config_(config), mistakes_(mistakes) {}

  void read(const YAML::Node& root) {
    if (!root.IsNull() && !root.IsMap()) return mistake(root, "", "a mapping of keys is expected");
    if (!no_duplicates(root, "", 0)) return;
    for (const auto& entry : root) {
      const std::string name = entry.first.Scalar();
      if (name == "upstream")
        upstream(entry.second, "upstream", config_.upstream);
      else if (name != "databases" && name != "users")
        top(entry.first, entry.second, name);
      if (name == "alerts" && entry.second.IsMap() && entry.second["webhooks"])
        each_name(entry.second["webhooks"], "alerts.webhooks",
                  [this](const std::string& key, const YAML::Node& node) { webhook(key, node); });
    }
    environment();
    // What these leave out is the global sections' and the environment's, which are read by now.
    for (const auto& entry : root) {
      const std::string name = entry.first.Scalar();
      if (name == "databases")
        each_name(entry.second, name, [this](const std::string& key, const YAML::Node& node) { database(key, node); });
      if (name == "users") each_name(entry.second, name, [this](const std::string& key, const YAML::Node& node) { user(key, node); });
    }
    validate();
  }

  void read_admin(const YAML::Node& root) {
    for (const auto& entry : root)
      if (root.IsMap() && entry.first.Scalar() == "admin") top(entry.first, entry.second, "admin");
    environment("admin.");
  }

 private:
  void mistake(const YAML::Node& at, const std::string& path, const std::string& text) {
    lines_[path] = at.Mark().line + 1;
    mistake(path, text);
  }

  void mistake(const std::string& path, const std::string& text) {
    const auto line = lines_.find(path);
    std::string told =
        (line == lines_.end() ? "" : file_ + ":" + std::to_string(line->second) + ": ") + (path.empty() ? "" : path + ": ") + text;
    wrong_.insert(path.substr(0, path.rfind('.')));
    // What sections inherit is told once.
    if (std::find(mistakes_.begin(), mistakes_.end(), told) == mistakes_.end()) mistakes_.push_back(std::move(told));
  }

  /// False: it can't be read, since it has no end.
  bool no_duplicates(const YAML::Node& map, const std::string& path, int depth) {
    if (!map.IsMap()) return true;
    if (depth > kDeepest || ++visited_ > kMostMappings) {
      mistake(map, path.substr(0, path.find('.')), "nested too deeply, or too much (an alias of what it is in?)");
      return false;
    }
    std::set<std::string> seen;
    for (const auto& entry : map) {
      const std::string inner = (path.empty() ? "" : path + ".") + entry.first.Scalar();
      if (!seen.insert(inner).second)
        mistake(entry.first, inner, "given twice");
      else
        lines_[inner] = entry.first.Mark().line + 1;
      if (!no_duplicates(entry.second, inner, depth + 1)) return false;
    }
    return true;
  }

  std::optional<std::string> scalar(const YAML::Node& node, const std::string& path, bool expanded) {
    if (node.IsNull()) return std::string();
    if (node.IsSequence()) {
      std::string out;
      for (const auto& item : node) {
        if (item.IsSequence()) {
          mistake(item, path, "a list of single values is expected");
          return std::nullopt;
        }
        const auto one = scalar(item, path, expanded);
        if (!one) return std::nullopt;
        out += (out.empty() ? "" : ",") + *one;
      }
      return out;
    }
    if (!node.IsScalar()) {
      mistake(node, path, "a single value is expected");
      return std::nullopt;
    }
    if (!expanded) return node.Scalar();
    try {
      return expand(node.Scalar(), env_);
    } catch (const ConfigError& e) {
      mistake(node, path, e.what());
      return std::nullopt;
    }
  }

  template <class Section>
  bool set(const std::vector<Key<Section>>& keys, Section& section, const std::string& name, const YAML::Node& node,
           const std::string& path) {
    for (const auto& key : keys) {
      if (key.path != name) continue;
      if (const auto text = scalar(node, path, true)) {
        try {
          key.set(section, *text);
        } catch (const std::invalid_argument& e) {
          mistake(node, path, e.what());
        }
      }
      return true;
    }
    return false;
  }

  void unknown(const YAML::Node& at, const std::string& path, const std::vector<std::string_view>& known) {
    mistake(at, path, "unknown key" + did_you_mean(path, known));
  }

  /// What is missed may stand a level deeper.
  void unknown_below(const YAML::Node& at, const std::string& path, const std::string& key,
                     const std::map<std::string, std::vector<std::string_view>>& sections) {
    std::vector<std::string> known;
    for (const auto& [section, keys] : sections) {
      known.push_back(section);
      for (const std::string_view one : keys) known.push_back(section + "." + std::string(one));
    }
    mistake(at, path + "." + key, "unknown key" + did_you_mean(key, {known.begin(), known.end()}));
  }

  void top(const YAML::Node& name_node, const YAML::Node& node, const std::string& path) {
    if (const auto dot = path.find('.'); dot != std::string::npos)
      return mistake(name_node, path, "keys are nested: " + path.substr(0, dot) + ": {" + path.substr(dot + 1) + ": ...}");
    if (set(config_keys(), config_, path, node, path)) return;
    std::vector<std::string_view> known{"upstream", "upstream.url", "databases", "users", "alerts.webhooks"};
    bool section = false;
    for (const auto& key : config_keys()) {
      known.push_back(key.path);
      section |= key.path.starts_with(path + ".");
      if (const auto dot = key.path.find('.'); dot != std::string_view::npos) known.push_back(key.path.substr(0, dot));
    }
    if (!section) return unknown(name_node, path, known);
    if (node.IsNull()) return;
    if (!node.IsMap()) return mistake(node, path, "a mapping of keys is expected");
    for (const auto& entry : node) {
      const std::string inner = path + "." + entry.first.Scalar();
      if (inner == "alerts.webhooks") continue;
      if (!set(config_keys(), config_, inner, entry.second, inner)) unknown(entry.first, inner, known);
    }
  }

  void webhook(const std::string& name, const YAML::Node& node) {
    const std::string path = "alerts.webhooks." + name;
    Webhook& hook = config_.alerts.webhooks[name];
    std::vector<std::string_view> known;
    for (const auto& key : webhook_keys()) known.push_back(key.path);
    each(node, path, [&](const std::string& key, const YAML::Node& value) {
      if (!set(webhook_keys(), hook, key, value, path + "." + key))
        mistake(value, path + "." + key, "unknown key" + did_you_mean(key, known));
    });
    if (hook.url.empty() && !wrong_.contains(path)) mistake(node, path, "needs a url");
    if (!hook.ca.empty()) check_file(path + ".ca", hook.ca);
  }

  void pool(const YAML::Node& node, const std::string& path, PoolSettings& settings) {
    if (!node.IsMap()) return mistake(node, path, "a mapping of keys is expected");
    for (const auto& entry : node) {
      const std::string name = entry.first.Scalar();
      if (name == kOfProcess)
        mistake(entry.first, path + "." + name, "counts for the whole process: pool." + name);
      else if (!set(pool_keys(), settings, name, entry.second, path + "." + name))
        mistake(entry.first, path + "." + name, "unknown key" + did_you_mean(name, pool_names()));
    }
  }

  void upstream(const YAML::Node& node, const std::string& path, Upstream& up) {
    if (node.IsScalar()) {
      up.url = node.Scalar();
      return;
    }
    if (!node.IsMap()) return mistake(node, path, "a mapping with url, or libpq keywords, is expected");
    for (const auto& entry : node) {
      const std::string name = entry.first.Scalar();
      if (name == "passwordCommand") {
        password_command(entry.second, path + "." + name, up);
        continue;
      }
      if (set(upstream_keys(), up, name, entry.second, path + "." + name)) continue;
      const auto text = scalar(entry.second, path + "." + name, false);
      if (!text) continue;
      if (name == "url") {
        up.url = *text;
      } else if (is_keyword(name)) {
        up.keys[name] = *text;
      } else {
        mistake(entry.first, path + "." + name, "unknown key" + did_you_mean(name, upstream_names()));
      }
    }
  }

  /// A list is a program and its arguments; a text is one for the shell.
  void password_command(const YAML::Node& node, const std::string& path, Upstream& up) {
    up.passwordCommand.clear();
    if (node.IsScalar() && !node.Scalar().empty()) up.passwordCommand = {"/bin/sh", "-c", node.Scalar()};
    if (node.IsMap()) return mistake(node, path, "a list of a program and its arguments, or a text for /bin/sh, is expected");
    if (!node.IsSequence()) return;
    for (const auto& word : node) {
      if (!word.IsScalar()) return mistake(word, path, "a program and its arguments are texts");
      up.passwordCommand.push_back(word.Scalar());
    }
  }

  static bool is_keyword(std::string_view name) {
    const auto known = connection_keywords();
    return std::find(known.begin(), known.end(), name) != known.end();
  }

  void environment(std::string_view below) {
    for (const auto& key : config_keys())
      if (std::string_view(key.path).starts_with(below)) set_from_environment(key, std::string(key.path), config_);
  }

  template <class Section>
  void set_from_environment(const Key<Section>& key, const std::string& path, Section& section) {
    const std::string name = environment_name(path);
    const auto text = env_(name);
    if (!text) return;
    try {
      key.set(section, expand(*text, env_));
    } catch (const std::exception& e) {
      mistakes_.push_back(name + ": " + e.what());
    }
  }

  void password_command_of_environment(Upstream& up) {
    const std::string name = environment_name("upstream.passwordCommand");
    const auto text = env_(name);
    if (!text) return;
    try {
      password_command(text->starts_with("[") ? YAML::Load(*text) : YAML::Node(*text), name, up);
    } catch (const YAML::Exception&) {
      mistakes_.push_back(name + ": not a list as in YAML: [\"program\", \"argument\"]");
    }
  }

  /// The keys of the environment. Those below upstream stay unexpanded, as in the file.
  void environment() {
    environment("");
    Upstream& up = config_.upstream;
    if (const auto url = env_("PGSIDECAR_UPSTREAM_URL"); url && !is_blank(*url)) up.url = *url;
    for (const std::string_view keyword : connection_keywords())
      if (const auto value = env_(environment_name("upstream." + std::string(keyword)))) up.keys[std::string(keyword)] = *value;
    for (const auto& key : upstream_keys()) set_from_environment(key, "upstream." + std::string(key.path), up);
    password_command_of_environment(up);
    // A server given in keywords alone. The default stays if it can be read: it may hold the rest.
    if (up.url == kDefaultUrl && up.keys.contains("host") && (up.keys.contains("user") || !has_database_url(env_))) up.url.clear();
  }

  template <class F>
  void each(const YAML::Node& node, const std::string& path, F&& f) {
    if (node.IsNull()) return;
    if (!node.IsMap()) return mistake(node, path, "a mapping of keys is expected");
    for (const auto& entry : node) f(entry.first.Scalar(), entry.second);
  }

  template <class F>
  void each_name(const YAML::Node& node, const std::string& path, F&& f) {
    if (!node.IsNull() && !node.IsMap()) return mistake(node, path, "a mapping of names is expected");
    each(node, path, [&](const std::string& name, const YAML::Node& value) {
      if (name.empty()) return mistake(value, path, "a name is expected");
      f(name, value);
    });
  }

  void database(const std::string& name, const YAML::Node& node) {
    const std::string path = "databases." + name;
    Database database{name, config_.upstream, config_.pool};
    bool named = false;
    each(node, path, [&](const std::string& key, const YAML::Node& value) {
      if (key == "upstream") {
        const auto gives = [&](const char* keyword) { return value.IsMap() && value[keyword]; };
        if (value.IsScalar() || gives("url"))
          database.upstream = {};  // another server, with credentials of its own
        else if (gives("host") && !gives("hostaddr"))
          database.upstream.keys.erase("hostaddr");
        upstream(value, path + ".upstream", database.upstream);
        named = gives("dbname");
      } else if (key == "pool") {
        pool(value, path + ".pool", database.pool);
      } else {
        unknown_below(value, path, key, {{"pool", pool_names()}, {"upstream", upstream_names()}});
      }
    });
    if (name != "*" && !named) {
      if (database.upstream.url == config_.upstream.url)
        database.upstream.keys["dbname"] = name;
      else
        database.upstream.dbname = name;
    }
    config_.databases[name] = std::move(database);
  }

  void user(const std::string& name, const YAML::Node& node) {
    const std::string path = "users." + name;
    User user{name, std::nullopt, {}};
    each(node, path, [&](const std::string& key, const YAML::Node& value) {
      if (key == "password") {
        user.password = scalar(value, path + ".password", false);
      } else if (key == "pool") {
        PoolSettings given;
        pool(value, path + ".pool", given);
        for (const auto& one : pool_keys())
          if (value.IsMap() && value[std::string(one.path)]) user.pool[std::string(one.path)] = one.get(given);
      } else {
        unknown_below(value, path, key, {{"password", {}}, {"pool", pool_names()}});
      }
    });
    config_.users[name] = std::move(user);
  }

  /// Where something of an upstream was given (`from`: as Mistake's): a variable, its own key, or the one that it inherits.
  std::string place_of(const std::string& path, const Upstream& upstream, const std::string& from) const {
    if (!from.empty() && !is_keyword(from)) return from;
    std::string key = from.empty() ? "url" : from, own = path + "." + key, global = "upstream." + key;
    if (own != global && lines_.contains(own)) return own;
    if (from.empty() && upstream.url != config_.upstream.url) return path;
    if (std::string variable = environment_name(global); !is_blank(env_(variable).value_or(""))) return variable;
    if (lines_.contains(global)) return global;
    if (!from.empty() || upstream.url != kDefaultUrl) return path;
    return has_database_url(env_) ? "DATABASE_URL" : global;
  }

  void check_upstream(const std::string& path, const Upstream& upstream) {
    Findings found;
    const ConnectParams params = resolve_upstream(upstream, env_, found);
    for (const Mistake& one : found.mistakes) mistake(place_of(path, upstream, one.from), one.text);
    bool readable = found.mistakes.empty();
    for (const UsedFile& file : found.files)
      if (file.keyword.starts_with("ssl")) readable &= check_file(place_of(path, upstream, file.from), file.path, file.keyword);
    if (readable && checks_.upstream)
      check_content(checks_.upstream, params, [&](const std::string& text) {
        const auto of = std::find_if(found.files.begin(), found.files.end(),
                                     [&](const UsedFile& file) { return text.find('"' + file.path + '"') != text.npos; });
        mistake(place_of(path, upstream, of == found.files.end() ? std::string() : of->from), text);
      });
  }

  template <class Checked, class F>
  void check_content(const std::function<void(const Checked&)>& check, const Checked& checked, F&& wrong) {
    try {
      check(checked);
    } catch (const std::exception& e) {
      wrong(std::string(e.what()));
    }
  }

  void check_tls(const Tls& tls) {
    if (tls.mode == TlsMode::Disable) return;
    bool usable = !tls.certificate.empty() && !tls.key.empty();
    if (!usable) mistake("tls", "mode is not disable, which needs tls.certificate and tls.key");
    if (tls.mode == TlsMode::VerifyFull && tls.ca.empty()) {
      mistake("tls.ca", "mode verify-full needs it: the CA of the clients' certificates");
      usable = false;
    }
    for (const auto& [path, file] : {std::pair{"tls.certificate", tls.certificate}, {"tls.key", tls.key}, {"tls.ca", tls.ca}})
      usable &= check_file(path, file);
    if (usable && checks_.tls)
      check_content(checks_.tls, tls, [&](const std::string& text) {
        const auto colon = text.find(": ");
        if (text.starts_with("tls.") && colon != text.npos) return mistake(text.substr(0, colon), text.substr(colon + 2));
        mistake("tls", text);
      });
  }

  void check_password_command(const std::string& path, const std::vector<std::string>& command) {
    if (command.empty()) return;
    try {
      const std::string program = expand_arguments(command, env_).front();
      if (!is_executable(program)) mistake(path, "cannot find the program \"" + program + "\", or it may not be executed");
    } catch (const ConfigError& e) {
      mistake(path, e.what());
    }
  }

  /// The server's password is a program's affair: clients need one of their own.
  void check_clients_password() {
    if (config_.upstream.passwordCommand.empty() || !nobody_can_log_in(config_, env_)) return;
    mistake("upstream.passwordCommand", "gives the server's password, and clients need one to log in with here: set users.\"" +
                                            resolve_upstream(config_.upstream, env_).user +
                                            "\".password, put one into upstream.url, or set auth.method to trust");
  }

  /// As execvp finds it.
  bool is_executable(const std::string& program) const {
    if (program.find('/') != std::string::npos) return ::access(program.c_str(), X_OK) == 0;
    std::istringstream path(env_("PATH").value_or("/usr/local/bin:/usr/bin:/bin"));
    for (std::string directory; std::getline(path, directory, ':');)
      if (!program.empty() && ::access((directory + "/" + program).c_str(), X_OK) == 0) return true;
    return false;
  }

  bool check_file(const std::string& path, const std::string& file, const std::string& keyword = {}) {
    if (file.empty() || ::access(file.c_str(), R_OK) == 0) return true;
    mistake(path, "cannot read " + (keyword.empty() ? "" : keyword + " ") + "\"" + file + "\": " + std::strerror(errno));
    return false;
  }

  void check_pool(const std::string& path, const PoolSettings& pool) {
    if (pool.min > pool.max && !wrong_.contains(path) && !wrong_.contains("pool"))
      mistake(path + ".min", std::to_string(pool.min) + " is more than " + path + ".max (" + std::to_string(pool.max) + ")");
  }

  void check_exit_on_idle() {
    if (config_.pool.allowExitOnIdle && config_.pool.idleTimeoutMillis == 0)
      mistake("pool.allowExitOnIdle", "waits until there was no client for pool.idleTimeoutMillis, and that is 0, never");
  }

  /// The default isn't more than a `max` that was given.
  void fit_min() {
    if (!lines_.contains("pool.min") && !env_("PGSIDECAR_POOL_MIN")) config_.pool.min = std::min(config_.pool.min, config_.pool.max);
    for (auto& [name, database] : config_.databases)
      if (!lines_.contains("databases." + name + ".pool.min")) database.pool.min = std::min(database.pool.min, database.pool.max);
  }

  /// What one key alone doesn't show.
  void validate() {
    fit_min();
    check_upstream("upstream", config_.upstream);
    for (const auto& [name, database] : config_.databases) check_upstream("databases." + name + ".upstream", database.upstream);
    check_password_command("upstream.passwordCommand", config_.upstream.passwordCommand);
    check_clients_password();
    for (const auto& [name, database] : config_.databases)
      if (database.upstream.passwordCommand != config_.upstream.passwordCommand)
        check_password_command("databases." + name + ".upstream.passwordCommand", database.upstream.passwordCommand);
    if (const auto any = config_.users.find("*"); any != config_.users.end()) {
      if (config_.auth.method == AuthMethod::ScramSha256 || config_.auth.method == AuthMethod::Md5)
        mistake("users.*", "needs auth.method password (each user's password is passed on to the server), cert or trust: by " +
                               std::string(config_.auth.method == AuthMethod::Md5 ? "md5" : "scram-sha-256") +
                               " no password reaches pgsidecar");
      if (any->second.password) mistake("users.*.password", "users that aren't named have passwords of their own");
    }
    for (const auto& [name, user] : config_.users) {
      if (!user.password) continue;
      try {
        const std::string secret = expand(*user.password, env_);
        const bool md5 = secret.size() == 35 && secret.starts_with("md5") && secret.find_first_not_of("0123456789abcdef", 3) == secret.npos;
        if (md5 && config_.auth.method == AuthMethod::ScramSha256)
          mistake("users." + name + ".password",
                  "an md5 hash can't be used with auth.method scram-sha-256 (use a password, a SCRAM-SHA-256 verifier or method md5)");
        if (secret.starts_with(kScram) && !is_verifier(secret))
          mistake("users." + name + ".password",
                  "begins as a SCRAM verifier and is none (SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey)");
      } catch (const ConfigError& e) {
        mistake("users." + name + ".password", e.what());
      }
    }
    check_tls(config_.tls);
    if (config_.auth.method == AuthMethod::Cert && (config_.tls.ca.empty() || config_.tls.mode == TlsMode::Disable))
      mistake("auth.method", "cert needs TLS (tls.mode) and tls.ca, the CA of the clients' certificates");
    check_file("admin.tokenFile", config_.admin.tokenFile);
    check_exit_on_idle();
    for (const Listen& listen : config_.listen)
      if (config_.admin.enabled && collide(listen, config_.admin.listen))
        mistake("admin.listen", "\"" + print_address(listen.host, listen.port) + "\" is where clients connect (listen)");
    check_pool("pool", config_.pool);
    if (config_.pool.min > config_.pool.max) return;  // told once
    for (const auto& [name, database] : config_.databases) check_pool("databases." + name + ".pool", database.pool);
    for (const auto& [name, user] : config_.users) {
      check_pool("users." + name + ".pool", overlay(config_.pool, user.pool));
      for (const auto& [of, database] : config_.databases) check_pool("users." + name + ".pool", overlay(database.pool, user.pool));
    }
  }

  std::map<std::string, int> lines_;  // where a path was given
  std::set<std::string> wrong_;       // sections with a mistake
  std::size_t visited_ = 0;           // mappings
  std::string file_;
  const Environment& env_;
  const FileChecks& checks_;
  Config& config_;
  std::vector<std::string>& mistakes_;
};

}  // namespace

ConfigError::ConfigError(std::vector<std::string> mistakes) : std::runtime_error(joined(mistakes)), mistakes_(std::move(mistakes)) {}

namespace {

std::string read_config(const std::string& path) {
  return read_file(path, "the configuration file \"" + path + "\"");
}

}  // namespace

Config load_text(std::string_view yaml, std::string_view name, const Environment& env, const FileChecks& checks) {
  Config config;
  std::vector<std::string> mistakes;
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(yaml));
    if (documents.size() > 1)
      mistakes.push_back(std::string(name) + ":" + std::to_string(documents[1].Mark().line + 1) + ": a second document, which isn't read");
    Reader(name, env, checks, config, mistakes).read(documents.empty() ? YAML::Node() : documents[0]);
  } catch (const YAML::Exception& e) {
    mistakes.push_back(std::string(name) + ":" + std::to_string(e.mark.line + 1) + ": not valid YAML: " + e.msg);
  }
  if (!mistakes.empty()) throw ConfigError(std::move(mistakes));
  return config;
}

Config load(const std::string& path, const Environment& env, const FileChecks& checks) {
  return path.empty() ? load_text("", "", env, checks) : load_text(read_config(path), path, env, checks);
}

std::set<std::string> files_of(const Config& config, const std::string& path, const Environment& env) {
  std::set<std::string> files{path, config.tls.certificate, config.tls.key, config.tls.ca};
  const auto named_in = [&](std::string_view text) {
    static constexpr std::string_view kBegin = "${file:";
    for (auto at = text.find(kBegin); at != text.npos; at = text.find(kBegin, at + 1))
      if (const auto end = text.find('}', at); end != text.npos) files.emplace(text.substr(at + kBegin.size(), end - at - kBegin.size()));
  };
  const auto used_by = [&](const Upstream& upstream) {
    Findings found;
    resolve_upstream(upstream, env, found);
    for (const UsedFile& file : found.files) files.insert(file.path);
  };
  if (!path.empty()) named_in(read_config(path));
  const auto named_in_environment = [&](std::string_view key) { named_in(env(environment_name(key)).value_or("")); };
  for (const auto& key : config_keys()) named_in_environment(key.path);
  for (const std::string_view keyword : connection_keywords()) named_in_environment("upstream." + std::string(keyword));
  named_in_environment("upstream.url");
  used_by(config.upstream);
  for (const auto& [name, database] : config.databases) used_by(database.upstream);
  for (const auto& [name, hook] : config.alerts.webhooks) files.insert(hook.ca);
  files.erase("");
  return files;
}

Admin load_admin(const std::string& path, const Environment& env) {
  Config config;
  std::vector<std::string> mistakes;
  try {
    const FileChecks none;
    Reader(path, env, none, config, mistakes).read_admin(YAML::Load(path.empty() ? std::string() : read_config(path)));
  } catch (const YAML::Exception& e) {
    mistakes.push_back(path + ":" + std::to_string(e.mark.line + 1) + ": not valid YAML: " + e.msg);
  }
  if (!mistakes.empty()) throw ConfigError(std::move(mistakes));
  return config.admin;
}

namespace {

/// `-c app.token=***`: what a setting is set to may be a secret.
std::string without_values(std::string_view options) {
  constexpr std::string_view kBlanks = " \t\n\v\f\r";
  std::string out;
  bool in_value = false;
  for (std::size_t i = 0; i < options.size(); ++i) {
    const std::size_t length = options[i] == '\\' && i + 1 < options.size() ? 2 : 1;
    if (length == 1 && kBlanks.find(options[i]) != kBlanks.npos) in_value = false;
    if (!in_value) out += options.substr(i, length);
    if (!in_value && options[i] == '=') in_value = true, out += "***";
    i += length - 1;
  }
  return out;
}

}  // namespace

std::string to_redacted_yaml(const Config& config, const Environment& env) {
  YAML::Emitter out;
  const auto pool = [&](const PoolSettings& settings) {
    out << YAML::BeginMap;
    for (const auto& key : pool_keys())
      if (key.path != kOfProcess) out << YAML::Key << std::string(key.path) << YAML::Value << key.get(settings);
    out << YAML::EndMap;
  };
  const auto upstream = [&](const Upstream& up) {
    // A URL may hold a password anywhere; only what is a reference (without a default) is shown.
    const bool reference = up.url.starts_with("${") && up.url.find('}') == up.url.size() - 1 && up.url.find(":-") == std::string::npos;
    out << YAML::BeginMap;
    try {
      out << YAML::Comment(resolve_upstream(up, env).destination());
    } catch (const ConfigError&) {
      // A secret can't be read now.
    }
    out << YAML::Key << "url" << YAML::Value << (up.url.empty() || reference ? up.url : "***");
    for (const auto& [name, value] : up.keys) {
      const bool secret =
          name.find("password") != std::string::npos || name.find("secret") != std::string::npos || name.starts_with("scram_");
      out << YAML::Key << name << YAML::Value << (secret ? "***" : name == "options" ? without_values(value) : value);
    }
    for (const auto& key : upstream_keys()) out << YAML::Key << std::string(key.path) << YAML::Value << key.get(up);
    if (!up.passwordCommand.empty()) {  // its arguments may be secrets
      out << YAML::Key << "passwordCommand" << YAML::Value << YAML::Flow << YAML::BeginSeq << up.passwordCommand.front();
      for (std::size_t i = 1; i < up.passwordCommand.size(); ++i) out << "***";
      out << YAML::EndSeq;
    }
    out << YAML::EndMap;
  };
  const auto webhooks = [&] {
    out << YAML::Key << "webhooks" << YAML::Value << YAML::BeginMap;
    for (const auto& [name, hook] : config.alerts.webhooks) {
      out << YAML::Key << name << YAML::Value << YAML::BeginMap;
      for (const auto& key : webhook_keys()) {
        const bool secret = key.path == "url" || key.path == "authorization";  // Slack's URLs are secrets
        if (!key.get(hook).empty()) out << YAML::Key << std::string(key.path) << YAML::Value << (secret ? "***" : key.get(hook));
      }
      out << YAML::EndMap;
    }
    out << YAML::EndMap;
  };
  out << YAML::BeginMap;
  std::string section;
  for (const auto& key : config_keys()) {
    const auto dot = key.path.find('.');
    const std::string head(dot == std::string_view::npos ? std::string_view() : key.path.substr(0, dot));
    if (head != section) {
      if (!section.empty()) out << YAML::EndMap;
      if (!head.empty()) out << YAML::Key << head << YAML::Value << YAML::BeginMap;
      section = head;
    }
    out << YAML::Key << std::string(key.path.substr(dot == std::string_view::npos ? 0 : dot + 1)) << YAML::Value << key.get(config);
    if (key.path == "alerts.clearSeconds" && !config.alerts.webhooks.empty()) webhooks();
  }
  if (!section.empty()) out << YAML::EndMap;
  out << YAML::Key << "upstream" << YAML::Value;
  upstream(config.upstream);
  if (!config.databases.empty()) {
    out << YAML::Key << "databases" << YAML::Value << YAML::BeginMap;
    for (const auto& [name, database] : config.databases) {
      out << YAML::Key << name << YAML::Value << YAML::BeginMap << YAML::Key << "upstream" << YAML::Value;
      upstream(database.upstream);
      out << YAML::Key << "pool" << YAML::Value;
      pool(database.pool);
      out << YAML::EndMap;
    }
    out << YAML::EndMap;
  }
  if (!config.users.empty()) {
    out << YAML::Key << "users" << YAML::Value << YAML::BeginMap;
    for (const auto& [name, user] : config.users) {
      out << YAML::Key << name << YAML::Value << YAML::BeginMap;
      if (user.password) out << YAML::Key << "password" << YAML::Value << "***";
      if (!user.pool.empty()) out << YAML::Key << "pool" << YAML::Value << user.pool;
      out << YAML::EndMap;
    }
    out << YAML::EndMap;
  }
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

PoolSettings overlay(PoolSettings settings, const std::map<std::string, std::string>& keys) {
  for (const auto& key : pool_keys())
    if (const auto it = keys.find(std::string(key.path)); it != keys.end()) key.set(settings, it->second);
  if (!keys.contains("min")) settings.min = std::min(settings.min, settings.max);
  return settings;
}

}  // namespace pgsidecar::conf
