// The SQL console's part of ClientSession: who may use it, its bytes, and what it has the Worker do.
#include "proxy/client_console.hpp"

#include <openssl/rand.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <boost/asio/post.hpp>

#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Bytes;
using protocol::kHeaderSize;

Table ClientConsole::table(Show what) {
  const pool::Snapshot snapshot = worker_.snapshot(Worker::Detail::Rows);
  ShowInput input{snapshot, worker_.config(), worker_.averages(), worker_.now(), std::chrono::system_clock::now()};
  input.client_size = sizeof(ClientSession);
  input.server_size = sizeof(ServerConnection);
  input.pool_size = sizeof(PoolEntry);
  return console_table(what, input);
}

void ClientConsole::perform(const ConsoleCommand& command, std::function<void(std::string error)> done) {
  using Kind = ConsoleCommand::Kind;
  // It may be done when this session is gone.
  std::function<void(std::string)> tell = [weak = client_.weak_from_this(), done = std::move(done)](std::string error) {
    const auto client = weak.lock();
    if (!client || client->state() != ClientSession::State::Console) return;
    done(std::move(error));
    client->resume_console();
  };
  // In a turn of its own, since it reaches other clients.
  const auto operate = [&](pool::Command::Kind kind) {
    boost::asio::post(worker_.loop(),
                      [&worker = worker_, weak = client_.weak_from_this(), kind, command, tell = std::move(tell)]() mutable {
                        const Worker::Turn turn(worker);
                        const auto client = weak.lock();
                        if (!client || client->state() != ClientSession::State::Console) return;
                        if (kind != pool::Command::Kind::CloseClient)
                          return worker.operate({kind, command.id, command.name}, std::move(tell), client->id());
                        tell(worker.execute({kind, command.id, {}}).empty() ? std::string() : std::string("client not found"));
                      });
  };
  switch (command.kind) {
    case Kind::Pause: return operate(pool::Command::Kind::Pause);
    case Kind::Resume: return operate(pool::Command::Kind::Resume);
    case Kind::Reconnect: return operate(pool::Command::Kind::Reconnect);
    case Kind::Disable: return operate(pool::Command::Kind::Disable);
    case Kind::Enable: return operate(pool::Command::Kind::Enable);
    case Kind::Kill: return operate(pool::Command::Kind::Kill);
    case Kind::WaitClose: return operate(pool::Command::Kind::WaitClose);
    case Kind::KillClient: return operate(pool::Command::Kind::CloseClient);
    default:
      log::info("console_command", client_.about(), "console of {}: {}", session.user(), command.tag);
      if (!worker_.on_request) return tell("not available");
      return worker_.on_request(command, std::move(tell));
  }
}

bool ClientSession::is_on_unix_socket() {
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  const int fd = channel_.transport.socket().native_handle();
  return ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0 && address.ss_family == AF_UNIX;
}

bool ClientSession::is_own_user() {
  const int fd = channel_.transport.socket().native_handle();
  ucred peer{};
  socklen_t size = sizeof peer;
  return is_on_unix_socket() && ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0 && (peer.uid == ::geteuid() || peer.uid == 0);
}

void ClientSession::begin_console(const std::string& user, const std::string& database, bool own_user, bool long_key) {
  const conf::Admin& admin = worker_.config().admin;
  const auto names = [&](const std::vector<std::string>& users) { return std::find(users.begin(), users.end(), user) != users.end(); };
  const bool is_admin = own_user || names(admin.users);
  if (!is_admin && !names(admin.statsUsers)) {
    worker_.reject(pool::RejectReason::Auth);
    return fatal("28000", "user \"" + user + "\" is not allowed to use the console",
                 "admin.users (all commands) or admin.statsUsers (SHOW) must name the user.");
  }
  if (!worker_.admit_console()) {
    worker_.reject(pool::RejectReason::MaxClients);
    return fatal("53300", "sorry, too many sessions of the console already");
  }
  console_ = std::make_unique<ClientConsole>(worker_, *this, is_admin ? ConsoleRole::Admin : ConsoleRole::Stats, user, database);
  login_deadline = pool::Time::max();
  cancel_key_.resize(long_key ? 32 : 4);
  RAND_bytes(reinterpret_cast<unsigned char*>(cancel_key_.data()), static_cast<int>(cancel_key_.size()));
  transition(State::Console);
  worker_.to_client.own([&](std::string& out) {
    console_->session.greet(out);
    protocol::write_backend_key_data(out, key_pid_, cancel_key_);
    protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  });
  log::info("console_login", about(), "client {}: user {} on the console, {}", id_, user, is_admin ? "all commands" : "SHOW only");
  send(worker_.to_client);
}

std::size_t ClientSession::on_console(Bytes in) {
  if (in[0] == 'X') {  // also in the middle of what it waits for
    close();
    return 0;
  }
  if (!console_->session.idle() || channel_.queued() > kHighMark) return 0;
  if (in.size() < kHeaderSize) return 0;
  const std::uint32_t length = protocol::load_u32(in.data() + 1);
  if (length < 4 || length > Console::kMaxMessage) {
    fatal("08P01", "invalid message length");
    return 0;
  }
  const std::size_t total = std::size_t{length} + 1;
  if (in.size() < total) return 0;
  const char type = static_cast<char>(in[0]);
  static constexpr std::string_view kKnown = "QPBDECSHFdcf";
  if (kKnown.find(type) == std::string_view::npos) {
    fatal("08P01", "invalid frontend message type " + std::to_string(static_cast<unsigned char>(type)));
    return 0;
  }
  request_ = worker_.next_request();
  sent_at_ = request_since = worker_.now();
  worker_.to_client.own([&](std::string& out) { console_->session.receive(type, in.subspan(kHeaderSize, total - kHeaderSize), out); });
  answer_console();
  return total;
}

void ClientSession::answer_console() {
  while (state_ == State::Console && console_->session.has_work() && channel_.queued() <= kHighMark) {
    worker_.to_client.own([&](std::string& out) { console_->session.advance(out); });
    if (worker_.to_client.size() > kHighMark) send(worker_.to_client);
  }
}

void ClientSession::resume_console() {
  // What is done may be done in the middle of a turn, of this session's too.
  boost::asio::post(worker_.loop(), [self = shared_from_this()] {
    if (self->state_ != State::Console) return;
    const Worker::Turn turn(self->worker_);
    self->answer_console();
    self->send(self->worker_.to_client);
    self->read_on();
    if (self->state_ != State::Closed) self->wait_readable();
  });
}

void ClientSession::cancel_console() {
  if (!worker_.abandon_operation(id_)) return;  // a reload, say, is over in a moment
  console_->session.finish("canceling statement due to user request", "57014");
  resume_console();
}

}  // namespace pgsidecar::proxy
