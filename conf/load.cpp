#include "conf/load.hpp"

#include <yaml-cpp/yaml.h>

#include <fstream>
#include <sstream>

#include "conf/schema.hpp"
#include "conf/suggest.hpp"

namespace pgsidecar::conf {

namespace {

constexpr std::size_t kMaxFile = 1u << 20;

std::string joined(const std::vector<std::string>& lines) {
  std::string out;
  for (const std::string& line : lines) out += (out.empty() ? "" : "\n") + line;
  return out;
}

/// Reads one YAML document into a Config, collecting mistakes.
class Reader {
 public:
  Reader(std::string_view file, const Environment& env, Config& config, std::vector<std::string>& mistakes)
      : file_(file), env_(env), config_(config), mistakes_(mistakes) {}

  void read(const YAML::Node& root) {
    if (root.IsNull()) return;
    if (!root.IsMap()) return mistake(root, "", "a mapping of keys is expected");
    for (const auto& entry : root) {
      const std::string name = entry.first.Scalar();
      if (name == "upstream") upstream(entry.second, "upstream", config_.upstream);
      else if (name != "databases" && name != "users") top(entry.first, entry.second, name);
    }
    // What these leave out is the global sections', which are read by now.
    for (const auto& entry : root) {
      const std::string name = entry.first.Scalar();
      if (name == "databases") each(entry.second, name, [this](const std::string& key, const YAML::Node& node) { database(key, node); });
      if (name == "users") each(entry.second, name, [this](const std::string& key, const YAML::Node& node) { user(key, node); });
    }
  }

 private:
  void mistake(const YAML::Node& at, const std::string& path, const std::string& text) {
    const auto mark = at.Mark();
    mistakes_.push_back(file_ + ":" + std::to_string(mark.line + 1) + ": " + (path.empty() ? "" : path + ": ") + text);
  }

  std::optional<std::string> scalar(const YAML::Node& node, const std::string& path, bool expanded) {
    if (node.IsNull()) return std::string();
    if (node.IsSequence()) {
      std::string out;
      for (const auto& item : node) {
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
  bool set(const std::vector<Key<Section>>& keys, Section& section, const std::string& name, const YAML::Node& node, const std::string& path) {
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

  void top(const YAML::Node& name_node, const YAML::Node& node, const std::string& path) {
    if (set(config_keys(), config_, path, node, path)) return;
    std::vector<std::string_view> known{"upstream", "databases", "users"};
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
      if (!set(config_keys(), config_, inner, entry.second, inner)) unknown(entry.first, inner, known);
    }
  }

  void pool(const YAML::Node& node, const std::string& path, PoolSettings& settings) {
    if (!node.IsMap()) return mistake(node, path, "a mapping of keys is expected");
    std::vector<std::string_view> known;
    for (const auto& key : pool_keys()) known.push_back(key.path);
    for (const auto& entry : node) {
      const std::string name = entry.first.Scalar();
      if (!set(pool_keys(), settings, name, entry.second, path + "." + name))
        mistake(entry.first, path + "." + name, "unknown key" + did_you_mean(name, known));
    }
  }

  void upstream(const YAML::Node& node, const std::string& path, Upstream& up) {
    if (node.IsScalar()) {
      up.url = node.Scalar();
      return;
    }
    if (!node.IsMap()) return mistake(node, path, "a mapping with url, or libpq keywords, is expected");
    bool url = false;
    for (const auto& entry : node) {
      const std::string name = entry.first.Scalar();
      const auto text = scalar(entry.second, path + "." + name, false);
      if (!text) continue;
      if (name == "url") up.url = *text, url = true;
      else up.keys[name] = *text;
    }
    if (!url && up.keys.contains("host")) up.url.clear();  // given in keywords alone
  }

  template <class F>
  void each(const YAML::Node& node, const std::string& path, F&& f) {
    if (node.IsNull()) return;
    if (!node.IsMap()) return mistake(node, path, "a mapping of names is expected");
    for (const auto& entry : node) f(entry.first.Scalar(), entry.second);
  }

  void database(const std::string& name, const YAML::Node& node) {
    const std::string path = "databases." + name;
    Database database{name, config_.upstream, config_.pool};
    bool named = false;
    each(node, path, [&](const std::string& key, const YAML::Node& value) {
      if (key == "upstream") {
        upstream(value, path + ".upstream", database.upstream);
        named = true;
      } else if (key == "pool") {
        pool(value, path + ".pool", database.pool);
      } else {
        mistake(value, path + "." + key, "unknown key" + did_you_mean(key, {"upstream", "pool"}));
      }
    });
    if (name != "*" && !named) database.upstream.keys["dbname"] = name;
    config_.databases[name] = std::move(database);
  }

  void user(const std::string& name, const YAML::Node& node) {
    const std::string path = "users." + name;
    User user{name, std::nullopt, std::nullopt};
    each(node, path, [&](const std::string& key, const YAML::Node& value) {
      if (key == "password") {
        user.password = scalar(value, path + ".password", false);
      } else if (key == "pool") {
        user.pool = config_.pool;
        pool(value, path + ".pool", *user.pool);
      } else {
        mistake(value, path + "." + key, "unknown key" + did_you_mean(key, {"password", "pool"}));
      }
    });
    config_.users[name] = std::move(user);
  }

  std::string file_;
  const Environment& env_;
  Config& config_;
  std::vector<std::string>& mistakes_;
};

void overlay_environment(Config& config, const Environment& env, std::vector<std::string>& mistakes) {
  if (const auto url = env("PGSIDECAR_UPSTREAM_URL")) config.upstream.url = *url;
  for (const auto& key : config_keys()) {
    const std::string name = environment_name(key.path);
    const auto text = env(name);
    if (!text) continue;
    try {
      key.set(config, expand(*text, env));
    } catch (const std::exception& e) {
      mistakes.push_back(name + ": " + e.what());
    }
  }
}

void validate(const Config& config, const Environment& env, std::vector<std::string>& mistakes) {
  const auto check_upstream = [&](const std::string& path, const Upstream& upstream) {
    try {
      resolve_upstream(upstream, env);
    } catch (const ConfigError& e) {
      mistakes.push_back(path + ": " + e.what());
    }
  };
  if (config.upstream.url == "${DATABASE_URL}" && !env("DATABASE_URL"))
    mistakes.emplace_back("upstream.url: no database to connect to: set DATABASE_URL (or PGSIDECAR_UPSTREAM_URL, or upstream.url in the file) to a "
                          "connection string such as postgresql://user:password@host:5432/dbname");
  else check_upstream("upstream.url", config.upstream);
  for (const auto& [name, database] : config.databases)
    if (!(database.upstream.url == config.upstream.url)) check_upstream("databases." + name + ".upstream", database.upstream);
  if (const auto any = config.users.find("*"); any != config.users.end()) {
    if (config.auth.method == AuthMethod::ScramSha256 || config.auth.method == AuthMethod::Md5)
      mistakes.emplace_back("users.*: needs auth.method password (each user's password is passed on to the server), cert or trust: by " +
                            std::string(config.auth.method == AuthMethod::Md5 ? "md5" : "scram-sha-256") + " no password reaches pgsidecar");
    if (any->second.password) mistakes.emplace_back("users.*.password: users that aren't named have passwords of their own");
  }
  for (const auto& [name, user] : config.users) {
    if (!user.password) continue;
    try {
      expand(*user.password, env);
    } catch (const ConfigError& e) {
      mistakes.push_back("users." + name + ".password: " + e.what());
    }
  }
  const auto check_pool = [&](const std::string& path, const PoolSettings& pool) {
    if (pool.min > pool.max)
      mistakes.push_back(path + ".min: " + std::to_string(pool.min) + " is more than " + path + ".max (" + std::to_string(pool.max) + ")");
  };
  check_pool("pool", config.pool);
  for (const auto& [name, database] : config.databases) check_pool("databases." + name + ".pool", database.pool);
  if (config.tls.mode != TlsMode::Disable && (config.tls.certificate.empty() || config.tls.key.empty()))
    mistakes.emplace_back("tls: mode is not disable, which needs tls.certificate and tls.key");
  if (config.auth.method == AuthMethod::Cert && config.tls.ca.empty())
    mistakes.emplace_back("auth.method: cert needs tls.ca, the CA of the clients' certificates");
}

}  // namespace

ConfigError::ConfigError(std::vector<std::string> mistakes) : std::runtime_error(joined(mistakes)), mistakes_(std::move(mistakes)) {}

std::string expand(std::string_view text, const Environment& env) {
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
      std::ifstream in(path, std::ios::binary);
      std::ostringstream content;
      if (!in || !(content << in.rdbuf())) {
        if (!in || !in.eof()) throw ConfigError("cannot read file \"" + path + "\" named by ${file:}");
      }
      std::string value = content.str();
      if (value.size() > kMaxFile) throw ConfigError("file \"" + path + "\" named by ${file:} is larger than 1 MiB");
      if (!value.empty() && value.back() == '\n') value.pop_back();
      if (!value.empty() && value.back() == '\r') value.pop_back();
      out += value;
      continue;
    }
    const auto colon = inside.find(":-");
    const std::string name(inside.substr(0, colon));
    if (const auto value = env(name); value && !(colon != std::string_view::npos && value->empty())) out += *value;
    else if (colon != std::string_view::npos) out += inside.substr(colon + 2);
    else throw ConfigError("environment variable " + name + " is not set (${" + name + ":-default} gives a default)");
  }
  return out;
}

ConnectParams resolve_upstream(const Upstream& upstream, const Environment& env) {
  std::map<std::string, std::string> keys;
  for (const auto& [name, value] : upstream.keys) keys[name] = expand(value, env);
  return parse_connection_string(expand(upstream.url, env), keys, env);
}

Config load_text(std::string_view yaml, std::string_view name, const Environment& env) {
  Config config;
  std::vector<std::string> mistakes;
  try {
    Reader(name, env, config, mistakes).read(YAML::Load(std::string(yaml)));
  } catch (const YAML::Exception& e) {
    mistakes.push_back(std::string(name) + ":" + std::to_string(e.mark.line + 1) + ": not valid YAML: " + e.msg);
  }
  overlay_environment(config, env, mistakes);
  if (mistakes.empty()) validate(config, env, mistakes);
  if (!mistakes.empty()) throw ConfigError(std::move(mistakes));
  return config;
}

Config load(const std::string& path, const Environment& env) {
  if (path.empty()) return load_text("", "", env);
  std::ifstream in(path, std::ios::binary);
  if (!in) throw ConfigError("cannot read the configuration file \"" + path + "\"");
  std::ostringstream content;
  content << in.rdbuf();
  if (content.str().size() > kMaxFile) throw ConfigError("the configuration file \"" + path + "\" is larger than 1 MiB");
  return load_text(content.str(), path, env);
}

std::string to_redacted_yaml(const Config& config) {
  YAML::Emitter out;
  const auto pool = [&](const PoolSettings& settings) {
    out << YAML::BeginMap;
    for (const auto& key : pool_keys()) out << YAML::Key << std::string(key.path) << YAML::Value << key.get(settings);
    out << YAML::EndMap;
  };
  const auto upstream = [&](const Upstream& up) {
    // A URL may hold a password anywhere; only what is a reference is shown.
    const bool reference = up.url.starts_with("${") && up.url.find('}') == up.url.size() - 1;
    out << YAML::BeginMap << YAML::Key << "url" << YAML::Value << (up.url.empty() || reference ? up.url : "***");
    for (const auto& [name, value] : up.keys) {
      const bool secret = name.find("password") != std::string::npos || name.find("secret") != std::string::npos;
      out << YAML::Key << name << YAML::Value << (secret ? "***" : value);
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
      if (user.pool) {
        out << YAML::Key << "pool" << YAML::Value;
        pool(*user.pool);
      }
      out << YAML::EndMap;
    }
    out << YAML::EndMap;
  }
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

Changes compare(const Config& before, const Config& after) {
  Changes changes;
  for (const auto& key : config_keys())
    if (key.get(before) != key.get(after)) (key.needs_restart ? changes.needRestart : changes.applied).emplace_back(key.path);
  if (before.upstream != after.upstream) changes.applied.emplace_back("upstream");
  if (before.databases != after.databases) changes.applied.emplace_back("databases");
  if (before.users != after.users) changes.applied.emplace_back("users");
  return changes;
}

}  // namespace pgsidecar::conf
