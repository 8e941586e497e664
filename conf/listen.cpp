#include "conf/listen.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <memory>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace pgsidecar::conf {

namespace {

/// Closes what was opened if not all could be.
struct Opened {
  std::vector<Listening> sockets;
  ~Opened() {
    for (const Listening& one : sockets) ::close(one.fd);
  }
};

std::uint16_t port_of(const sockaddr_storage& address) {
  return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                                             : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

void set_port(sockaddr_storage& address, std::uint16_t port) {
  (address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port : reinterpret_cast<sockaddr_in&>(address).sin_port) =
      htons(port);
}

/// The errno of what failed; 0: it listens.
int listen_on(int fd, const sockaddr_storage& address, socklen_t size, int backlog) {
  const int on = 1;
  ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (address.ss_family == AF_INET6) ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
  if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), size) != 0 || ::listen(fd, backlog) != 0) return errno;
  return 0;
}

}  // namespace

std::vector<Listening> open_listeners(const Listen& listen, int backlog) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const char* host = listen.host == "*" ? nullptr : listen.host.c_str();
  if (const int error = ::getaddrinfo(host, std::to_string(listen.port).c_str(), &hints, &found); error != 0)
    throw std::runtime_error(::gai_strerror(error));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner(found, &::freeaddrinfo);
  Opened opened;
  std::uint16_t port = listen.port;
  int missing = 0;
  for (; found; found = found->ai_next) {
    sockaddr_storage address{};
    socklen_t size = found->ai_addrlen;
    std::copy_n(reinterpret_cast<const char*>(found->ai_addr), size, reinterpret_cast<char*>(&address));
    set_port(address, port);
    const int fd = ::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const int error = fd < 0 ? errno : listen_on(fd, address, size, backlog);
    if (error != 0) {
      if (fd >= 0) ::close(fd);
      if (error != EAFNOSUPPORT && error != EADDRNOTAVAIL) throw std::system_error(error, std::system_category());
      missing = error;
      continue;
    }
    opened.sockets.push_back({fd, found->ai_family, {}});
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    port = port_of(address);
    std::array<char, NI_MAXHOST> text{};
    ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST);
    opened.sockets.back().address = print_address(text.data(), port);
  }
  if (opened.sockets.empty()) throw std::system_error(missing, std::system_category());
  return std::exchange(opened.sockets, {});
}

}  // namespace pgsidecar::conf
