// The sockets that clients connect to: opened, or passed on by systemd or by the process whose place this one takes, and passed on to
// the next. Part of Worker.
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using std::chrono::milliseconds;

namespace {

using Tcp = asio::basic_socket_acceptor<asio::ip::tcp, asio::io_context::executor_type>;
using Local = asio::basic_socket_acceptor<asio::local::stream_protocol, asio::io_context::executor_type>;

constexpr int kBacklog = 1024;

}  // namespace

template <class Acceptor>
void Worker::accept(std::shared_ptr<Acceptor> acceptor) {
  if (!accepting_) return;
  acceptor->async_accept(
      [this, acceptor](const boost::system::error_code& ec,
                       typename Acceptor::protocol_type::socket::template rebind_executor<asio::io_context::executor_type>::other socket) {
        if (ec == asio::error::operation_aborted || !acceptor->is_open()) return;
        if (ec) {
          log::error("accept_failed", {}, "accept: {}", ec.message());
          auto timer = std::make_shared<asio::steady_timer>(data_, milliseconds(100));
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
        }
        std::uint32_t id = 0;
        do id = static_cast<std::uint32_t>(random_()) & 0x7fffffff;
        while (id <= kMaxPid || clients_.contains(id));
        auto client = std::make_shared<ClientSession>(*this, Socket(std::move(socket)), id, std::move(peer));
        clients_.emplace(id, client);
        client->start();
        kick();
        if (++logging_in_ >= config_->limits.maxLoginClients)
          paused_.emplace_back([this, acceptor] { accept(acceptor); });
        else
          accept(acceptor);
      });
}

template <class Acceptor>
void Worker::add_acceptor(const conf::Listening& socket, const typename Acceptor::protocol_type& protocol) {
  auto acceptor = std::make_shared<Acceptor>(data_.get_executor());
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

void Worker::add_port(const conf::Listening& socket) {
  log::info("listening", {}, "listening on {}{}", socket.address, socket.passed ? ", a socket that was passed on (LISTEN_FDS)" : "");
  if (socket.family == AF_UNIX) return add_acceptor<Local>(socket, asio::local::stream_protocol());
  add_acceptor<Tcp>(socket, socket.family == AF_INET6 ? asio::ip::tcp::v6() : asio::ip::tcp::v4());
}

conf::Listening Worker::open_unix(const conf::Listen& where, conf::PassedSockets& passed) {
  const std::string path = where.directory + "/.s.PGSQL." + std::to_string(where.port);
  if (auto own = passed.take_own(false, AF_UNIX, path)) return *own;
  if (passed.covers(AF_UNIX, path)) return {};
  asio::local::stream_protocol::socket other(data_);
  boost::system::error_code nobody;
  other.connect(asio::local::stream_protocol::endpoint(path), nobody);
  if (!nobody) throw boost::system::system_error(asio::error::address_in_use);
  if (nobody == asio::error::connection_refused) ::unlink(path.c_str());  // what a crash has left
  Local acceptor(data_.get_executor(), asio::local::stream_protocol::endpoint(path));
  ::chmod(path.c_str(), 0777);
  return {acceptor.release(), AF_UNIX, path, false, false};
}

void Worker::listen(conf::PassedSockets& passed) {
  for (const conf::Listening& one : passed.take_passed(false)) add_port(one);
  for (const conf::Listen& where : config_->listen) {
    const std::string text =
        where.kind == conf::Listen::Kind::Unix ? "unix:" + where.directory : conf::print_address(where.host, where.port);
    try {
      if (where.kind == conf::Listen::Kind::Unix) {
        if (const conf::Listening one = open_unix(where, passed); one.fd >= 0) add_port(one);
        continue;
      }
      for (const conf::Listening& one : conf::open_listeners(where, kBacklog, passed, false)) add_port(one);
    } catch (const std::runtime_error& e) {
      const auto* system = dynamic_cast<const std::system_error*>(&e);
      throw std::runtime_error("cannot listen on " + text + ": " + (system ? system->code().message() : e.what()) +
                               " (change `listen` or PGSIDECAR_LISTEN)");
    }
  }
}

void Worker::begin() {
  started_ = true;
  resume_accepting();
  if (quits_at() != pool::Time::max()) kick();
}

void Worker::close_ports(bool unlink) {
  accepting_ = false;
  for (const Port& port : ports_) {
    port.close();
    if (unlink && port.socket.family == AF_UNIX && !port.socket.passed) ::unlink(port.socket.address.c_str());
  }
  ports_.clear();
}

// --- an online restart

std::vector<conf::Listening> Worker::listening() const {
  std::vector<conf::Listening> all;
  for (const Port& port : ports_) all.push_back(port.socket);
  return all;
}

void Worker::suspend_accepting() {
  accepting_ = false;
  paused_.clear();
  for (const Port& port : ports_) port.cancel();
}

void Worker::resume_accepting() {
  if (std::exchange(accepting_, true)) return;
  for (const Port& port : ports_) port.accept();
}

std::string Worker::why_no_successor() const {
  if (retired_) return "process " + std::to_string(succession_ ? succession_->peer() : 0) + " has taken over already";
  if (draining_ || drain_at_ != pool::Time::max()) return "it is shutting down";
  if (succession_ && !succession_->is_successor()) return "an upgrade is under way";
  if (succession_)
    return "process " + std::to_string(succession_->peer()) +
           ", from which this one took over, still has clients; try again when it has ended (SIGTERM makes them leave)";
  if (operated()) return "databases are paused or disabled, which the new process wouldn't know: RESUME or ENABLE them first";
  return {};
}

void Worker::succeed(int link, pid_t successor, std::function<void(std::string error)> done) {
  succession_ = std::make_shared<Succession>(*this, link, successor, std::move(done));
  succession_->start();
  if (draining_) succession_->abandon("it is shutting down");
}

void Worker::take_place(int link, std::function<void(std::function<void()> then)> other_loop) {
  succession_ = std::make_shared<Succession>(*this, link);
  succession_->start();
  probe([this, other_loop = std::move(other_loop)] {
    other_loop([this] {
      const bool down = database_ == pool::Snapshot::Database::Down;
      if (succession_) succession_->ready(!down ? "" : database_error_.empty() ? "no answer" : database_error_);
    });
  });
}

void Worker::take_over(bool had_client) {
  had_client_ |= had_client;
  begin();
  log::info("took_over", {}, "process {} has taken over from process {}", ::getpid(), succession_->peer());
  if (on_taken_over) on_taken_over();
}

void Worker::handed_over() {
  if (succession_) succession_->over();
  handing_over_ = false;
  check_stopped();
}

void Worker::retire(pid_t successor) {
  close_ports(false);
  retired_ = handing_over_ = true;
  log::info("handed_over", {}, "process {} has taken over; this one, {}, serves its {} clients for {} ms at most, then it drains",
            successor, ::getpid(), clients_.size() - consoles_, config_->shutdown.timeoutMillis);
  if (!draining_) {
    draining_ = waits_for_clients_ = true;
    drain_until_ = now() + milliseconds(config_->shutdown.timeoutMillis);
  }
  kick();
}

void Worker::on_peer_ended(const Succession& which) {
  if (succession_.get() != &which) return;
  const auto ended = std::exchange(succession_, nullptr);
  for (auto& [key, entry] : pools_) {
    entry->pool.set_lent(0);
    serve(*entry);
  }
  if (retired_) log::warn("successor_ended", {}, "process {}, which took over, has ended", ended->peer());
  if (!ended->is_successor()) return;
  if (!started_) {
    log::error("upgrade_failed", {}, "process {} has ended before this one, {}, could take over", ended->peer(), ::getpid());
    exit_code_ = 1;
    draining_ = true;
    return check_stopped();
  }
  log::info("predecessor_ended", {}, "process {}, from which this one took over, has ended", ended->peer());
  if (clients_.size() == consoles_) idle_since_ = now();
  kick();
  if (on_alone) on_alone();
}

PoolEntry* Worker::pool_of(const std::string& database, const std::string& user) {
  const auto it = pools_.find({database, user});
  return it == pools_.end() ? nullptr : it->second.get();
}

void Worker::for_each_pool(const std::function<void(PoolEntry&)>& what) {
  for (auto& [key, entry] : pools_) what(*entry);
}

std::uint32_t Worker::missing(const PoolEntry& entry) const {
  const std::size_t wanted =
      entry.pool.waiting_count() + entry.logins.size() + (wants_listener(entry) && !entry.listener.has_server() ? 1 : 0);
  return static_cast<std::uint32_t>(wanted - std::min(wanted, entry.pool.idle_count() + entry.connecting));
}

void Worker::close_surplus(PoolEntry& entry) {
  while (entry.pool.staying() > entry.pool.capacity() && entry.pool.any_idle())
    static_cast<ServerConnection*>(entry.pool.any_idle())->close(pool::CloseReason::Drain);
}

}  // namespace pgsidecar::proxy
