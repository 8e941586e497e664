// From a `listen` key to sockets. Used by the clients' port and by the admin port.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "conf/config.hpp"

namespace pgsidecar::conf {

/// A socket that listens, non-blocking; its owner closes it.
struct Listening {
  int fd = -1;
  int family = 0;       ///< AF_INET or AF_INET6
  std::string address;  ///< as printed: address:port or [address]:port
};

/// Opens all addresses of a TCP `listen`: every one that its name has, and for "*" all of IPv4's and IPv6's, as PostgreSQL's
/// listen_addresses means them. One that this machine doesn't have is left out if there is another. Port 0 takes a free one, the same
/// for all. Throws std::system_error, or std::runtime_error if the name can't be resolved.
std::vector<Listening> open_listeners(const Listen& listen, int backlog);

}  // namespace pgsidecar::conf
