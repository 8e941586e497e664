#include "admin/access.hpp"

#include <openssl/crypto.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <fstream>

namespace pgsidecar::admin {

namespace asio = boost::asio;
using boost::system::error_code;

namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return out;
}

// The name in a Host header: without port, brackets and case.
std::string host_name(std::string_view host) {
  if (host.starts_with('[')) {
    const auto end = host.find(']');
    return end == std::string_view::npos ? std::string() : lower(host.substr(1, end - 1));
  }
  return lower(host.substr(0, host.find(':')));
}

asio::ip::address plain(const asio::ip::address& address) {
  if (address.is_v6() && address.to_v6().is_v4_mapped()) return asio::ip::make_address_v4(asio::ip::v4_mapped, address.to_v6());
  return address;
}

bool host_allowed(const conf::Admin& settings, const Caller& caller) {
  const std::string name = host_name(caller.host);
  if (name.empty()) return false;
  error_code ec;
  const auto address = asio::ip::make_address(name, ec);
  if (!ec) return address.is_loopback() || plain(address) == plain(caller.local);
  if (name == "localhost" || name == lower(settings.listen.host)) return true;
  return std::any_of(settings.hosts.begin(), settings.hosts.end(), [&](const std::string& allowed) { return host_name(allowed) == name; });
}

std::string_view trim(std::string_view text) {
  const auto from = text.find_first_not_of(" \t\r\n");
  if (from == std::string_view::npos) return {};
  return text.substr(from, text.find_last_not_of(" \t\r\n") - from + 1);
}

}  // namespace

Refusal refusal_of(const conf::Admin& settings, const Caller& caller) {
  Refusal refusal;
  const auto refuse = [&](unsigned status, const char* error, const char* hint) {
    refusal.status = status;
    refusal.error = error;
    refusal.hint = hint;
    return refusal;
  };
  if (!host_allowed(settings, caller)) return refuse(403, "this Host header is not allowed here", "name the host in admin.hosts");
  if (!caller.fetchSite.empty() && caller.fetchSite != "same-origin" && caller.fetchSite != "none")
    return refuse(403, "requests from other sites are refused", "");
  if (!caller.origin.empty()) {
    const auto scheme = caller.origin.find("://");
    if (scheme == std::string_view::npos || lower(caller.origin.substr(scheme + 3)) != lower(caller.host))
      return refuse(403, "requests from other sites are refused", "");
  }
  if (plain(caller.peer).is_loopback()) return refusal;
  if (settings.tokenFile.empty())
    return refuse(403, "only callers on loopback may ask for this", "admin.tokenFile admits others by a bearer token");

  // Read anew each time, so that a rotated token counts at once.
  std::array<char, 4096> text{};
  std::ifstream file(settings.tokenFile, std::ios::binary);
  file.read(text.data(), text.size());
  const std::string_view token = trim({text.data(), static_cast<std::size_t>(file.gcount())});
  if (token.empty()) return refuse(403, "the token can't be checked", "the file of admin.tokenFile is empty or can't be read");
  std::string_view given = caller.authorization;
  if (lower(given.substr(0, 7)) != "bearer ")
    given = {};
  else
    given = trim(given.substr(7));
  const bool same = given.size() == token.size() && CRYPTO_memcmp(given.data(), token.data(), token.size()) == 0;
  if (!same) return refuse(401, "a valid bearer token is needed", "send Authorization: Bearer with admin.tokenFile's content");
  return refusal;
}

double quality(std::string_view list, std::string_view name) {
  double best = 0;
  while (!list.empty()) {
    const auto end = std::min(list.find(','), list.size());
    const std::string part = lower(list.substr(0, end));
    list.remove_prefix(std::min(end + 1, list.size()));
    if (trim(std::string_view(part).substr(0, part.find(';'))) != name) continue;
    double q = 1;
    if (const auto at = part.find("q="); at != std::string::npos && at > 0 && (part[at - 1] == ';' || part[at - 1] == ' ')) {
      if (std::from_chars(part.data() + at + 2, part.data() + part.size(), q).ec != std::errc()) q = 0;
    }
    best = std::max(best, q);
  }
  return best;
}

bool prefers_open_metrics(std::string_view accept) {
  const double open = quality(accept, "application/openmetrics-text");
  return open > 0 && open >= quality(accept, "text/plain");
}

}  // namespace pgsidecar::admin
