// Loading the configuration: environment over YAML file over defaults; `${VAR}` and `${file:/path}` expand in any value.
// All mistakes are collected and reported together, each with file and line. Called at start, by `check` and on reload.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "conf/config.hpp"
#include "conf/url.hpp"

namespace pgsidecar::conf {

/// One or more mistakes in what the operator wrote. what() holds them all, a line each, without any secret.
class ConfigError : public std::runtime_error {
 public:
  explicit ConfigError(std::vector<std::string> mistakes);
  explicit ConfigError(std::string mistake) : ConfigError(std::vector<std::string>{std::move(mistake)}) {}
  const std::vector<std::string>& mistakes() const { return mistakes_; }

 private:
  std::vector<std::string> mistakes_;
};

/// Whether what certificates, keys, CAs and CRLs hold can be used, which isn't judged here. Each throws std::exception: of `tls` beginning
/// with the key, of an upstream quoting the file.
struct FileChecks {
  std::function<void(const Tls&)> tls;
  std::function<void(const ConnectParams&)> upstream;
};

/// Loads `path` (empty: no file) under the environment. Every key of the file is also PGSIDECAR_ and its path in
/// upper snake case. Checks that every upstream and secret can be resolved now. Throws ConfigError.
Config load(const std::string& path, const Environment& env, const FileChecks& checks = {});

/// The files that a configuration from `path` is made of: its own, those of `${file:}`, certificates, keys and CAs.
std::set<std::string> files_of(const Config& config, const std::string& path, const Environment& env);

/// The `admin` section alone, for the commands that talk to a running pgsidecar: the rest may name what can't be read now.
Admin load_admin(const std::string& path, const Environment& env);

/// The same from YAML text; `name` stands for the file in messages.
Config load_text(std::string_view yaml, std::string_view name, const Environment& env, const FileChecks& checks = {});

/// Expands `${VAR}`, `${VAR:-default}` and `${file:/path}` (one trailing newline removed); `$$` is a dollar sign.
/// Throws ConfigError.
std::string expand(std::string_view text, const Environment& env);

std::vector<std::string> expand_arguments(std::vector<std::string> arguments, const Environment& env);  ///< the same of each

/// What to connect to, with secrets expanded now. `user` and `password`, if given, and `database`, if the section is
/// "*", replace the string's. Throws ConfigError.
ConnectParams resolve_upstream(const Upstream& upstream, const Environment& env);

/// What works and is likely not meant, of all upstreams and of who may log in, a line each. Never a secret.
std::vector<std::string> upstream_warnings(const Config& config, const Environment& env);

/// `env`, which notes in `asked` what it is asked for. `asked` must outlive it.
Environment noting(const Environment& env, std::set<std::string, std::less<>>& asked);

/// What of the environment (`variables`: as environ) is named like a key and wasn't asked for by load(), be it as a key or by
/// `${VAR}`; a line each. What Kubernetes sets for a Service of that name isn't meant.
std::vector<std::string> unused_variables(const std::set<std::string, std::less<>>& asked, const char* const* variables);

/// A database's settings with a user's keys over them.
PoolSettings overlay(PoolSettings settings, const std::map<std::string, std::string>& keys);

/// The effective configuration as YAML with every secret replaced by "***" (for `check` and the API). A comment at each upstream
/// says where it leads, if that can be read now.
std::string to_redacted_yaml(const Config& config, const Environment& env);

/// What changed between two configurations: keys by their path; which of them need a restart (listen, admin.listen,
/// and so on).
struct Changes {
  std::vector<std::string> applied;
  std::vector<std::string> needRestart;
};
Changes compare(const Config& before, const Config& after);
/// What needs a restart stays as it is in use.
void keep_until_restart(Config& loaded, const Config& in_use);

}  // namespace pgsidecar::conf
