#include "proxy/ports.hpp"

#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>
#include <cerrno>
#include <utility>

#include "proxy/log.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using std::chrono::milliseconds;

namespace {

using Tcp = asio::basic_socket_acceptor<asio::ip::tcp, asio::io_context::executor_type>;
using Local = asio::basic_socket_acceptor<asio::local::stream_protocol, asio::io_context::executor_type>;

constexpr int kBacklog = 1024;

/// A socket that a crash has left, and nobody listens on any more, is removed. Throws if there is anything else.
void clear_place(asio::io_context& loop, const std::string& path) {
  struct stat found {};
  if (::lstat(path.c_str(), &found) != 0) return;
  if (!S_ISSOCK(found.st_mode)) throw std::runtime_error(path + " is there and is no socket");
  const asio::local::stream_protocol::endpoint place(path);
  asio::local::stream_protocol::socket other(loop, place.protocol());
  other.non_blocking(true);  // a process that has been stopped takes nobody in
  if (::connect(other.native_handle(), place.data(), static_cast<socklen_t>(place.size())) == 0 || errno == EAGAIN)
    throw boost::system::system_error(asio::error::address_in_use);
  if (errno == ECONNREFUSED) ::unlink(path.c_str());
}

}  // namespace

Ports::Ports(asio::io_context& loop, std::function<bool(Socket socket, std::string peer)> accepted)
    : loop_(loop), accepted_(std::move(accepted)) {}

template <class Acceptor>
void Ports::accept(std::shared_ptr<Acceptor> acceptor) {
  if (!accepting_) return;
  acceptor->async_accept(
      [this, acceptor](const boost::system::error_code& ec,
                       typename Acceptor::protocol_type::socket::template rebind_executor<asio::io_context::executor_type>::other socket) {
        if (ec == asio::error::operation_aborted || (ec && !acceptor->is_open())) return;
        if (ec) {
          log::error("accept_failed", {}, "accept: {}", ec.message());
          auto timer = std::make_shared<asio::steady_timer>(loop_, milliseconds(100));
          timer->async_wait([this, acceptor, timer](const boost::system::error_code&) { accept(acceptor); });
          return;
        }
        std::string peer = "unix socket";
        if constexpr (std::is_same_v<typename Acceptor::protocol_type, asio::ip::tcp>) {
          boost::system::error_code ignored;
          const auto remote = socket.remote_endpoint(ignored);
          peer = conf::print_address(remote.address().to_string(), remote.port());
          const int one = 1;
          ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
          ::setsockopt(socket.native_handle(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
          // No TCP_USER_TIMEOUT: a client may let its answer wait for as long as it likes, as from the server.
          if (keep_alive && !remote.address().is_loopback()) set_keep_alive(socket.native_handle(), *keep_alive);
        }
        if (accepted_(Socket(std::move(socket)), std::move(peer)))
          accept(acceptor);
        else
          enough_.emplace_back([this, acceptor] { accept(acceptor); });
      });
}

template <class Acceptor>
void Ports::add(const conf::Listening& socket, const typename Acceptor::protocol_type& protocol) {
  auto acceptor = std::make_shared<Acceptor>(loop_.get_executor());
  acceptor->assign(protocol, socket.fd);
  Port port{socket, {}, {}, {}};
  port.accept = [this, acceptor] { accept(acceptor); };
  port.cancel = [acceptor] {
    boost::system::error_code ignored;
    acceptor->cancel(ignored);
  };
  port.close = [acceptor] {
    boost::system::error_code ignored;
    acceptor->close(ignored);
  };
  ports_.push_back(std::move(port));
}

void Ports::add(const conf::Listening& socket) {
  log::info("listening", {}, "listening on {}{}", socket.address, socket.passed ? ", a socket that was passed on (LISTEN_FDS)" : "");
  if (socket.family == AF_UNIX) return add<Local>(socket, asio::local::stream_protocol());
  add<Tcp>(socket, socket.family == AF_INET6 ? asio::ip::tcp::v6() : asio::ip::tcp::v4());
}

conf::Listening Ports::open_unix(const conf::Listen& where, conf::PassedSockets& passed) {
  const std::string path = where.directory + "/.s.PGSQL." + std::to_string(where.port);
  if (auto own = passed.take_own(false, AF_UNIX, path)) return *own;
  if (passed.covers(AF_UNIX, path)) return {};
  clear_place(loop_, path);
  Local acceptor(loop_.get_executor(), asio::local::stream_protocol::endpoint(path));
  ::chmod(path.c_str(), 0777);
  return {acceptor.release(), AF_UNIX, path, false, false};
}

void Ports::open(const std::vector<conf::Listen>& listen, conf::PassedSockets& passed) {
  for (const conf::Listening& one : passed.take_passed(false)) add(one);
  for (const conf::Listen& where : listen) {
    const auto fail = [&](const std::string& why) {
      throw std::runtime_error("cannot listen on " +
                               (where.kind == conf::Listen::Kind::Unix ? "unix:" + where.directory + ":" + std::to_string(where.port)
                                                                       : conf::print_address(where.host, where.port)) +
                               ": " + why + " (change `listen` or PGSIDECAR_LISTEN)");
    };
    try {
      if (where.kind == conf::Listen::Kind::Unix) {
        if (const conf::Listening one = open_unix(where, passed); one.fd >= 0) add(one);
        continue;
      }
      for (const conf::Listening& one : conf::open_listeners(where, kBacklog, passed, false)) add(one);
    } catch (const std::system_error& e) {
      fail(e.code().message());
    } catch (const boost::system::system_error& e) {
      fail(e.code().message());
    } catch (const std::runtime_error& e) {
      fail(e.what());
    }
  }
}

std::vector<conf::Listening> Ports::sockets() const {
  std::vector<conf::Listening> all;
  for (const Port& port : ports_) all.push_back(port.socket);
  return all;
}

void Ports::accept() {
  if (std::exchange(accepting_, true)) return;
  for (const Port& port : ports_) port.accept();
}

void Ports::suspend() {
  accepting_ = false;
  enough_.clear();
  for (const Port& port : ports_) port.cancel();
}

void Ports::more() {
  for (const auto& accept : std::exchange(enough_, {})) accept();
}

void Ports::close(bool unlink) {
  accepting_ = false;
  for (const Port& port : ports_) {
    port.close();
    if (unlink && port.socket.family == AF_UNIX && !port.socket.passed) ::unlink(port.socket.address.c_str());
  }
  ports_.clear();
}

bool Ports::somebody_knocks() const {
  return std::any_of(ports_.begin(), ports_.end(), [](const Port& port) {
    pollfd listener{port.socket.fd, POLLIN, 0};
    return ::poll(&listener, 1, 0) == 1;
  });
}

}  // namespace pgsidecar::proxy
