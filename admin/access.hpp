// Who may change something, or see clients and statements, through the admin port, and which format a scraper gets. Pure decisions on
// headers and addresses, called by server.cpp.
#pragma once

#include <boost/asio/ip/address.hpp>
#include <string>
#include <string_view>

#include "conf/config.hpp"

namespace pgsidecar::admin {

/// Who asks, as far as the decision needs it. Headers that weren't sent are empty.
struct Caller {
  boost::asio::ip::address peer, local;  ///< both ends of the connection
  std::string_view host, origin, fetchSite, authorization;
};

struct Refusal {
  unsigned status = 0;  ///< 0: not refused
  std::string error, hint;
};

/// Whether a change, or a look at clients and statements, is refused: the peer must be on loopback or send the token; Host must be
/// localhost, a loopback address, the address connected to, or one of admin.listen's and admin.hosts' names (DNS rebinding); a browser's
/// request from another site is refused.
Refusal refusal_of(const conf::Admin& settings, const Caller& caller);

/// The weight that an Accept or Accept-Encoding header gives to a name in lower case; 0 if it doesn't have it.
double quality(std::string_view list, std::string_view name);

/// Whether an Accept header prefers OpenMetrics to the plain text format.
bool prefers_open_metrics(std::string_view accept);

}  // namespace pgsidecar::admin
