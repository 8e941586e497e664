#include "conf/listen.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string_view>
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

constexpr int kFirstPassed = 3;  // SD_LISTEN_FDS_START
constexpr const char* kTakesOver = "PGSIDECAR_TAKES_OVER";

// What the descriptors are called from one pgsidecar to the next.
constexpr std::string_view kAdmin = "admin", kOwn = "own", kOwnAdmin = "own-admin", kLink = "link";

std::string printed(const sockaddr_storage& address, socklen_t size) {
  if (address.ss_family == AF_UNIX) {
    const auto& path = reinterpret_cast<const sockaddr_un&>(address).sun_path;
    const std::size_t length = size - std::min<std::size_t>(size, offsetof(sockaddr_un, sun_path));
    return path[0] == '\0' && length > 1 ? "@" + std::string(path + 1, length - 1) : std::string(path, ::strnlen(path, length));
  }
  std::array<char, NI_MAXHOST> text{};
  ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, text.data(), text.size(), nullptr, 0, NI_NUMERICHOST);
  return print_address(text.data(), port_of(address));
}

/// A descriptor that was passed on, looked at.
Listening inspect(int fd, std::string_view name) {
  int listens = 0, type = 0;
  socklen_t size = sizeof listens;
  if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 || ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0 ||
      !listens || type != SOCK_STREAM)
    throw std::runtime_error("LISTEN_FDS: descriptor " + std::to_string(fd) + " (\"" + std::string(name) +
                             "\") is no stream socket that listens: the .socket unit takes ListenStream= and Accept=no");
  sockaddr_storage address{};
  size = sizeof address;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  ::fcntl(fd, F_SETFD, FD_CLOEXEC);
  ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  return {fd, address.ss_family, printed(address, size), false, false};
}

/// Takes a variable out of the environment.
std::optional<std::string> take_variable(const char* name) {
  const char* value = std::getenv(name);
  std::optional<std::string> taken;
  if (value) taken = value;
  ::unsetenv(name);
  return taken;
}

std::string_view host_of(std::string_view address) {
  return address.substr(0, address.rfind(':'));
}

/// On port 0 any port.
bool same_address(const std::string& wanted, const std::string& there) {
  return wanted == there || (wanted.ends_with(":0") && host_of(wanted) == host_of(there));
}

}  // namespace

PassedSockets::PassedSockets(PassedSockets&& from) noexcept
    : sockets_(std::exchange(from.sockets_, {})), taken_(std::exchange(from.taken_, {})), link_(std::exchange(from.link_, -1)) {}

PassedSockets::~PassedSockets() {
  for (const Listening& one : sockets_) ::close(one.fd);
  if (link_ >= 0) ::close(link_);
}

PassedSockets PassedSockets::from_environment() {
  PassedSockets passed;
  const auto count = take_variable("LISTEN_FDS"), pid = take_variable("LISTEN_PID"), all_names = take_variable("LISTEN_FDNAMES");
  take_variable("LISTEN_PIDFDID");
  const bool takes_over = take_variable(kTakesOver).has_value();
  if (!count || (!takes_over && pid != std::to_string(::getpid()))) return passed;
  std::string_view names = all_names ? std::string_view(*all_names) : std::string_view();
  const int end = kFirstPassed + std::atoi(count->c_str());
  for (int fd = kFirstPassed; fd < end; ++fd) {
    const std::string_view name = names.substr(0, names.find(':'));
    names.remove_prefix(std::min(name.size() + 1, names.size()));
    if (takes_over && name == kLink) {
      passed.link_ = fd;
      ::fcntl(fd, F_SETFD, FD_CLOEXEC);
      continue;
    }
    Listening one = inspect(fd, name);
    one.passed = !takes_over || (name != kOwn && name != kOwnAdmin);
    one.admin = name == kAdmin || (takes_over && name == kOwnAdmin);
    passed.sockets_.push_back(std::move(one));
  }
  return passed;
}

std::vector<std::string> PassedSockets::environment_for(const std::vector<Listening>& sockets) {
  std::string names;
  for (const Listening& one : sockets)
    names += std::string(one.passed ? one.admin ? kAdmin : "clients" : one.admin ? kOwnAdmin : kOwn) + ":";
  return {"LISTEN_FDS=" + std::to_string(sockets.size() + 1), "LISTEN_FDNAMES=" + names + std::string(kLink),
          std::string(kTakesOver) + "=1"};
}

int PassedSockets::take_link() {
  return std::exchange(link_, -1);
}

std::vector<Listening> PassedSockets::take_passed(bool admin) {
  const auto first =
      std::stable_partition(sockets_.begin(), sockets_.end(), [admin](const Listening& one) { return !one.passed || one.admin != admin; });
  std::vector<Listening> found(first, sockets_.end());
  sockets_.erase(first, sockets_.end());
  taken_.insert(taken_.end(), found.begin(), found.end());
  return found;
}

std::optional<Listening> PassedSockets::take_own(bool admin, int family, const std::string& address) {
  const auto it = std::find_if(sockets_.begin(), sockets_.end(), [&](const Listening& one) {
    return !one.passed && one.admin == admin && one.family == family && same_address(address, one.address);
  });
  if (it == sockets_.end()) return std::nullopt;
  Listening found = std::move(*it);
  sockets_.erase(it);
  return found;
}

bool PassedSockets::covers(int family, const std::string& address) const {
  const auto port = [](std::string_view text) { return text.substr(text.rfind(':') + 1); };
  return std::any_of(taken_.begin(), taken_.end(), [&](const Listening& one) {
    if (one.address == address) return true;
    if (one.family == AF_UNIX || family == AF_UNIX || port(one.address) != port(address)) return false;
    int only = 0;
    socklen_t size = sizeof only;
    if (one.family == AF_INET6) ::getsockopt(one.fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &size);
    return (host_of(one.address) == "[::]" && (family == AF_INET6 || !only)) || (host_of(one.address) == "0.0.0.0" && family == AF_INET);
  });
}

std::vector<Listening> open_listeners(const Listen& listen, int backlog, PassedSockets& passed, bool admin) {
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
  bool covered = false;
  for (; found; found = found->ai_next) {
    sockaddr_storage address{};
    socklen_t size = found->ai_addrlen;
    std::copy_n(reinterpret_cast<const char*>(found->ai_addr), size, reinterpret_cast<char*>(&address));
    set_port(address, port);
    const std::string wanted = printed(address, size);
    if (auto own = passed.take_own(admin, found->ai_family, wanted)) {
      opened.sockets.push_back(std::move(*own));
      ::getsockname(opened.sockets.back().fd, reinterpret_cast<sockaddr*>(&address), &size);
      port = port_of(address);
      continue;
    }
    if (passed.covers(found->ai_family, wanted)) {
      covered = true;
      continue;
    }
    const int fd = ::socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const int error = fd < 0 ? errno : listen_on(fd, address, size, backlog);
    if (error != 0) {
      if (fd >= 0) ::close(fd);
      if (error != EAFNOSUPPORT && error != EADDRNOTAVAIL) throw std::system_error(error, std::system_category());
      missing = error;
      continue;
    }
    ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
    port = port_of(address);
    opened.sockets.push_back({fd, found->ai_family, printed(address, size), false, admin});
  }
  if (opened.sockets.empty() && !covered) throw std::system_error(missing, std::system_category());
  return std::exchange(opened.sockets, {});
}

}  // namespace pgsidecar::conf
