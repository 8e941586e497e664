#include "conf/http_url.hpp"

#include <algorithm>
#include <charconv>
#include <stdexcept>

namespace pgsidecar::conf {

HttpUrl parse_http_url(std::string_view url) {
  HttpUrl out;
  out.tls = url.starts_with("https://");
  if (!out.tls && !url.starts_with("http://")) throw std::invalid_argument("begins with neither http:// nor https://");
  if (std::any_of(url.begin(), url.end(), [](char c) { return static_cast<unsigned char>(c) <= 0x20 || c == 0x7f; }))
    throw std::invalid_argument("a URL has no spaces or control characters");
  out.port = out.tls ? 443 : 80;
  std::string_view rest = url.substr(out.tls ? 8 : 7);
  rest = rest.substr(0, rest.find('#'));
  const std::size_t end = std::min(rest.find_first_of("/?"), rest.size());
  const std::string_view authority = rest.substr(0, end);
  out.target = rest.substr(end);
  if (!out.target.starts_with('/')) out.target.insert(0, 1, '/');
  if (authority.find('@') != authority.npos) throw std::invalid_argument("has a user or password: give them as authorization");
  out.authority = authority;
  const auto bracket = authority.rfind(']');
  const auto colon = authority.rfind(':');
  const bool has_port = colon != authority.npos && (bracket == authority.npos || colon > bracket);
  std::string_view host = authority.substr(0, has_port ? colon : authority.npos);
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  if (host.empty()) throw std::invalid_argument("names no host");
  out.host = host;
  if (!has_port) return out;
  const std::string_view port = authority.substr(colon + 1);
  const auto [stop, ec] = std::from_chars(port.data(), port.data() + port.size(), out.port);
  if (ec != std::errc() || stop != port.data() + port.size() || out.port == 0) throw std::invalid_argument("has a port that is none");
  return out;
}

}  // namespace pgsidecar::conf
