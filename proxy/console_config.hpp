// The configuration at the SQL console: SHOW CONFIG's rows and SET. PgBouncer's names for what both have, in its units, besides our
// own. Pure.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "conf/config.hpp"

namespace pgsidecar::proxy {

struct ConfigRow {
  std::string key, value, standard;  ///< `standard`: the default
  bool changeable = false;           ///< by SET
};
/// By name.
std::vector<ConfigRow> config_rows(const conf::Config& config);

/// The value of a key by its path; empty if there is none.
std::string setting_text(const conf::Config& config, std::string_view path);

/// Sets a key by its path or PgBouncer's name for it. What a database has of its own stays. Returns empty, or why not; then
/// `config` is as it was.
std::string apply_setting(conf::Config& config, std::string_view name, std::string_view value);

}  // namespace pgsidecar::proxy
