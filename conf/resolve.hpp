// From what is written to what is connected to: files, expansion, and what an upstream's URL and keys say together. Used by load.cpp.
#pragma once

#include <string>
#include <string_view>

#include "conf/config.hpp"
#include "conf/url.hpp"

namespace pgsidecar::conf {

constexpr const char* kDefaultUrl = "${DATABASE_URL}";

/// `what` is how it is called in an error. Throws ConfigError.
std::string read_file(const std::string& path, const std::string& what);

bool is_blank(std::string_view text);
bool has_database_url(const Environment& env);  ///< set to blanks is as good as not set

/// What an upstream leads to as far as it can be read, with all that is wrong.
ConnectParams resolve_upstream(const Upstream& upstream, const Environment& env, Findings& findings);

/// No password is known that a client must prove.
bool nobody_can_log_in(const Config& config, const Environment& env);

}  // namespace pgsidecar::conf
