// Where a webhook is: an http or https URL (RFC 3986) without userinfo, taken apart.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace pgsidecar::conf {

struct HttpUrl {
  bool tls = false;
  std::string host;  ///< an IPv6 address without brackets
  std::uint16_t port = 80;
  std::string authority;  ///< for the Host header
  std::string target;     ///< path and query; begins with a slash
};

/// Throws std::invalid_argument, which doesn't repeat the URL: it may be a secret.
HttpUrl parse_http_url(std::string_view url);

}  // namespace pgsidecar::conf
