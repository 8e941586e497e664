// From a `listen` key to sockets, and the sockets that were there before this process: systemd's, or those of the pgsidecar whose
// place this one takes. Used by the clients' port and by the admin port.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "conf/config.hpp"

namespace pgsidecar::conf {

/// A socket that listens, non-blocking; its owner closes it.
struct Listening {
  int fd = -1;
  int family = 0;       ///< AF_INET, AF_INET6 or AF_UNIX
  std::string address;  ///< as printed: address:port, [address]:port or a path
  bool passed = false;  ///< by systemd: whatever `listen` says, it is listened on, and its path isn't ours to unlink
  bool admin = false;   ///< of the admin port
};

/// The sockets that this process was started with and that nobody has taken yet; what is left is closed at its end.
class PassedSockets {
 public:
  PassedSockets() = default;
  PassedSockets(PassedSockets&& from) noexcept;
  PassedSockets& operator=(PassedSockets&&) = delete;
  ~PassedSockets();

  /// What LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES say (sd_listen_fds(3)), which leave the environment. Throws std::runtime_error if
  /// one of them isn't a stream socket that listens.
  static PassedSockets from_environment();
  /// What from_environment() is to see in a process that takes this one's place: sockets on the descriptors from 3 on, in this order,
  /// then the link between the two.
  static std::vector<std::string> environment_for(const std::vector<Listening>& sockets);

  /// The link to the pgsidecar whose place this one takes; -1: there is none. The caller closes it.
  int take_link();
  /// systemd's: those named "admin", or all others.
  std::vector<Listening> take_passed(bool admin);
  /// What the earlier pgsidecar had opened for this address itself.
  std::optional<Listening> take_own(bool admin, int family, const std::string& address);
  /// Something that was taken listens on this address already.
  bool covers(int family, const std::string& address) const;

 private:
  std::vector<Listening> sockets_;
  std::vector<Listening> taken_;  // not their owner
  int link_ = -1;
};

/// Opens all addresses of a TCP `listen`: every one that its name has, and for "*" all of IPv4's and IPv6's, as PostgreSQL's
/// listen_addresses means them. Those that were passed on aren't opened again. One that this machine doesn't have is left out if there
/// is another. Port 0 takes a free one, the same for all. May return none if what systemd passed covers all. Throws std::system_error,
/// or std::runtime_error if the name can't be resolved.
std::vector<Listening> open_listeners(const Listen& listen, int backlog, PassedSockets& passed, bool admin);

}  // namespace pgsidecar::conf
