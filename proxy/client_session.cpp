// A client between its login and its end: reading and writing, leases, the loss of its server. Part of ClientSession.
#include "proxy/client_session.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <cassert>
#include <new>

#include "protocol/sql_scan.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Bytes;
using protocol::kHeaderSize;
using protocol::Owed;
using protocol::Request;
using protocol::Verdict;

namespace {

constexpr std::size_t kMaxUnread = 64 * 1024;  // of a client that waits
constexpr std::chrono::milliseconds kSilence{500};
constexpr std::string_view kTerminate("X\0\0\0\4", 5);
constexpr std::string_view kUserRequest = "canceling statement due to user request";

bool is_extended(char type) {
  return type == 'P' || type == 'B' || type == 'D' || type == 'E' || type == 'C' || type == 'H';
}

}  // namespace

void ClientSession::start() {
  wait_readable();
}

bool ClientSession::is_silent(pool::Time now) const {
  return !began_ && now - connected_at_ >= kSilence;
}

void ClientSession::transition(State next) {
  if (state_ == State::Waiting && next != State::Waiting) {  // in vain or not
    wait_micros_ = pool::micros(worker_.now() - request_since);
    entry_->pool.counters().wait.record(wait_micros_);
  }
  if (state_ == State::Ready) worker_.long_texts.let_go(statements);
  if (next == State::Ready) worker_.long_texts.keep(statements);
  state_ = next;
}

const std::string& ClientSession::application() const {
  static const std::string none;
  if (!settings) return none;
  const auto it = settings->values.find("application_name");
  return it == settings->values.end() ? none : it->second;
}

// --- reading and writing

void ClientSession::wait_readable() {
  if (state_ == State::Closed) return;
  if (channel_.transport.pending()) return read_soon();
  if (readiness_.pending()) return;
  channel_.transport.wait_readable(state_ == State::Closing, readiness_);
  if (channel_.transport.may_miss()) worker_.arm_tick(kLook);
}

void ClientSession::on_readiness(const boost::system::error_code& ec) {
  if (!ec) worker_.step(*this, [this] { on_readable(); });
}

void ClientSession::on_readable() {
  if (state_ == State::Closed) return;
  if (state_ == State::Tls) return handle_tls();
  if (!began_) {
    // Direct TLS begins with a handshake record, which OpenSSL must read itself.
    std::uint8_t first = 0;
    if (::recv(channel_.transport.socket().native_handle(), &first, 1, MSG_PEEK | MSG_DONTWAIT) == 1) {
      began_ = true;
      if (first == 0x16) {
        if (!worker_.client_tls()) {
          worker_.reject(pool::RejectReason::Tls);
          return close();
        }
        channel_.transport.start_tls(worker_.client_tls(), true);
        direct_tls_ = true;
        transition(State::Tls);
        return handle_tls();
      }
    }
  }
  for (int round = 0; round < 4; ++round) {
    if (server_ && server_->queued() > kHighMark) return;                                     // resumed when the server has taken it
    if (channel_.queued() > kHighMark) return;                                                // resumed when the client has read
    if ((state_ == State::Console || held()) && channel_.unread.size() > kMaxUnread) return;  // resumed by go_on(), resume_console()
    const IoResult got = channel_.transport.read(worker_.scratch());
    if (got.status == IoStatus::WouldBlock) break;
    if (got.status != IoStatus::Ok && is_leaving()) return;
    if (got.status != IoStatus::Ok) return close();
    if (state_ == State::Closing) continue;
    const Bytes fresh(worker_.scratch().data(), got.bytes);
    if (entry_) entry_->pool.counters().clientBytesReceived += got.bytes;
    if (channel_.unread.empty()) {
      channel_.keep(fresh, process(fresh));
    } else {
      channel_.unread.append(reinterpret_cast<const char*>(fresh.data()), fresh.size());
      read_on();
    }
    if (state_ == State::Closed || state_ == State::Tls) return;
    if (got.bytes < worker_.scratch().size() && !channel_.transport.pending()) break;
  }
  wait_readable();
}

void ClientSession::read_soon() {
  boost::asio::post(worker_.loop(), [self = shared_from_this()] { self->worker_.step(*self, [&self] { self->on_readable(); }); });
}

bool ClientSession::look() {
  if (channel_.transport.has_missed()) read_soon();
  return channel_.transport.may_miss();
}

void ClientSession::read_on() {
  if (channel_.unread.empty() || state_ == State::Closed) return;
  const Bytes all(reinterpret_cast<const std::uint8_t*>(channel_.unread.data()), channel_.unread.size());
  const std::size_t consumed = process(all);
  if (state_ != State::Closed) channel_.keep(all, consumed);
}

void ClientSession::send(Gather& gather) {
  if (gather.empty()) return;
  if (state_ == State::Closed) return gather.clear();
  if (entry_) entry_->pool.counters().clientBytesSent += gather.size();
  if (!channel_.send(gather, worker_.tls_scratch())) {
    boost::asio::post(worker_.loop(), [self = shared_from_this()] {
      if (!self->is_leaving()) self->close();
    });
    return;
  }
  if (channel_.queued() > 0) {
    if (unread_since_ == pool::Time{}) unread_since_ = worker_.now();
    wait_writable();
  }
}

void ClientSession::wait_writable() {
  if (channel_.writing || state_ == State::Closed) return;
  channel_.writing = true;
  channel_.transport.wait_writable([self = shared_from_this()](const boost::system::error_code& ec) {
    self->channel_.writing = false;
    if (!ec) self->worker_.step(*self, [&self] { self->on_writable(); });
  });
}

void ClientSession::on_writable() {
  if (state_ == State::Closed) return;
  if (state_ == State::Tls) return handle_tls();
  if (!channel_.flush(worker_.tls_scratch())) return close();
  if (channel_.queued() > 0) return wait_writable();
  on_taken();
  if (state_ == State::Closing) return close();
  if (server_) server_->resume_reading();
  if (state_ == State::Console) return resume_console();
  on_readable();
}

std::size_t ClientSession::process(Bytes in) {
  const Worker::Visit visit(worker_, this);
  assert(worker_.to_server.empty() && worker_.to_client.empty());
  std::size_t at = 0;
  auto& to_server = worker_.to_server;
  while (at < in.size() && state_ != State::Closed && state_ != State::Closing && state_ != State::Tls) {
    if (ready_due_ && !is_sending()) [[unlikely]]
      break;  // first that
    const Bytes left = in.subspan(at);
    if (pass_left_ > 0) [[unlikely]] {
      const std::size_t n = std::min(pass_left_, left.size());
      const bool to_its_server = pass_to_server_ && server_;
      if (to_its_server) to_server.add(left.data(), n);
      pass_left_ -= n;
      at += n;
      if (to_its_server && pass_left_ == 0) message_sent();
      continue;
    }
    std::size_t used = 0;
    if (state_ < State::Greeting) [[unlikely]]
      used = state_ == State::Startup ? on_startup(left) : state_ == State::Console ? on_console(left) : on_password(left);
    else if ((held() || (restore_due_ && waits_for_restore(static_cast<char>(left[0])))) && !discarding_)
      break;
    else {
      if (left.size() < kHeaderSize) break;
      const std::uint32_t length = protocol::load_u32(left.data() + 1);
      if (length < 4 || length > protocol::kMaxMessageSize) {
        fatal("08P01", "invalid message length");
        break;
      }
      const std::size_t total = std::size_t{length} + 1;
      used = on_request(static_cast<char>(left[0]), left.first(std::min(total, left.size())), total);
    }
    if (used == 0) break;
    at += used;
  }
  if (server_) {
    if (server_->pipeline.injects()) [[unlikely]]
      server_->inject();
    if (waits_for_answers_) [[unlikely]]
      on_maybe_answered();
    server_->send(to_server);
  } else {
    to_server.clear();
  }
  send(worker_.to_client);
  if (ready_due_ && !is_sending()) [[unlikely]] {
    ready_due_ = false;
    if (server_) server_->on_ready();
    worker_.run_later(*this);
  }
  if (subscriber_) [[unlikely]]
    subscriber_->deliver_if_idle();
  return at;
}

// --- leases

void ClientSession::on_answered(bool told) {
  const pool::Time now = worker_.now();
  const auto micros_since = [now](pool::Time begun) { return pool::micros(now - begun); };
  auto& counters = entry_->pool.counters();
  counters.query.record(micros_since(sent_at_));
  sent_at_ = now;
  if (told) [[likely]] {
    in_request_ = false;
    if (!answered() || server_->pipeline.unsynced()) [[unlikely]]
      begin_request();  // what it has sent behind
    ++readies_told_;
    if (unanswered_)
      for (auto& gone = unanswered_->deallocations; !gone.empty() && gone.front().ready <= readies_told_;) undo(gone);
  }
  if (restore_due_ && answered() && !is_sending()) {
    restore_due_ = false;
    server_->restore_settings_now(*login_settings_);
    worker_.run_later(*this);
  }
  server_->running.leaking = server_->running.overdue = false;
  if (server_->pipeline.status() == protocol::TxStatus::Idle) [[likely]] {
    ++counters.transactions;
    counters.transaction.record(micros_since(transaction_since));
    transaction_since = now;  // what is in the pipeline behind it is another one
    server_->running.first = 0;
    if (answered()) server_->running.effects = server_->running.named_effects = 0;
  }
  examined_ = false;
  told_residue_ |= residue_;
}

bool ClientSession::rewrites() const {
  return mode_ != conf::PoolMode::Session;
}

bool ClientSession::acquire() {
  begin_request();
  request_since = worker_.now();
  transition(State::Waiting);
  acquiring_ = true;
  worker_.want_server(*this);  // may lease at once
  acquiring_ = false;
  return server_ != nullptr;
}

void ClientSession::on_lease(ServerConnection& server) {
  server_ = &server;
  transaction_since = worker_.now();
  if (state_ == State::Greeting) {
    const Worker::Turn turn(worker_);
    server.apply_settings();
    server.send(worker_.to_server);
    if (server.pipeline.empty() && settings->welcome.empty()) {
      // The server had these settings already: what it told counts.
      settings->welcome = server.parameters();
    }
    if (!settings->welcome.empty() && server.pipeline.empty()) on_server_ready();
    return;
  }
  transition(State::Active);
  tell_due_ = server.settings != settings;
  if (!tell_due_ && told_ != server.told()) {
    Gather told;
    tell_parameters(told);
    send(told);
  }
  if (!acquiring_) worker_.run_later(*this);
}

void ClientSession::on_settings_applied() {
  if (state_ == State::Greeting)
    settings->welcome = server_->parameters();
  else if (tell_due_)
    tell_parameters(worker_.to_client);
}

void ClientSession::tell_parameters(Gather& out) {
  tell_due_ = false;
  if (told_ == server_->told()) return;
  told_ = server_->told();
  out.own([this](std::string& text) {
    for (const auto& [name, value] : server_->parameters())
      if (is_sessions(name)) protocol::write_parameter_status(text, name, value);
  });
}

// What it sends is kept until it has a server connection whose session is known.
bool ClientSession::held() const {
  if (state_ == State::Greeting || state_ == State::Waiting || (subscriber_ && subscriber_->busy())) return true;
  return waits_for_answers_ || (server_ && (server_->asking_residue() || server_->awaiting_shape()));
}

// Who has said goodbye has what is kept of it executed first, as on the server itself, whether it reads the answers or is gone: go_on()
// reads its end again.
bool ClientSession::is_leaving() const {
  return held() && channel_.unread.ends_with(kTerminate);
}

void ClientSession::go_on() {
  if (state_ == State::Closed) return;
  read_on();
  wait_readable();
}

void ClientSession::on_server_ready() {
  if (state_ == State::Greeting) {
    greet();
    ServerConnection* server = std::exchange(server_, nullptr);
    transition(State::Ready);
    if (!rewrites()) {
      server_ = server;
      transition(State::Active);
    } else {
      server->detach(false);
    }
    worker_.run_later(*this);
    return;
  }
  if (!server_ || server_->asking_residue()) return;
  if (!rewrites()) {
    note_effects();
    if (draining_) fatal("57P01", "terminating connection due to administrator command");
    return;
  }
  if (subscriber_ && subscriber_->on_answered()) [[unlikely]]
    return;
  if (subscriber_ && subscriber_->in_turn()) [[unlikely]]
    return subscriber_->advance();
  if (residue_ != 0) judge_residue();
  if (must_ask()) {
    forget_residue();
    return server_->ask_residue();
  }
  forget_residue();
  server_->forget_changed();
  if (subscriber_) [[unlikely]] {
    if (subscriber_->begin()) return;
    if (subscriber_->over()) subscriber_.reset();
  }
  if (draining_ && pass_left_ == 0) [[unlikely]]
    return fatal("57P01", "terminating connection due to administrator command");
  if (pin_ || (pass_left_ > 0 && pass_to_server_)) return;
  release();
}

void ClientSession::release() {
  surrender()->detach(false);
  if (subscriber_) subscriber_->deliver_if_idle();
}

ServerConnection* ClientSession::surrender() {
  ServerConnection* server = std::exchange(server_, nullptr);
  if (!tell_due_) told_ = server->told();
  server->statements.drop_long_unnamed();
  if (server->queued() > 0) resume_reading();  // it may have waited for that
  ready_due_ = false;
  forget_residue();
  transition(State::Ready);
  server->condemned |= entry_->pool.settings().mode == conf::PoolMode::Session;  // by now; sessions have no statements of others
  return server;
}

// The request that is next has to wait for what the proxy does, and the client waits for nothing else.
bool ClientSession::keeps_request() const {
  constexpr std::string_view kRequests = "QFPBDEC";
  if (!server_ || channel_.unread.size() < kHeaderSize || kRequests.find(channel_.unread[0]) == std::string_view::npos) return false;
  if (server_->asking_residue()) return !subscriber_ || !subscriber_->owes_ready();
  const auto& pipeline = server_->pipeline;
  return subscriber_ && subscriber_->waits_for_listener() && pipeline.releasable() && !subscriber_->owes_ready();
}

void ClientSession::on_cancel(std::shared_ptr<void> done) {
  if (state_ == State::Console) return cancel_console();
  if (waiting() || keeps_request()) {
    unlink();
    return on_wait_failed({"ERROR", "57014", std::string(kUserRequest), {}, {}});
  }
  if (server_) server_->cancel(std::move(done));
}

void ClientSession::on_wait_failed(const protocol::ErrorFields& error) {
  const Worker::Visit visit(worker_, this);
  if (state_ == State::Greeting) return on_greeting_failed(error);
  if (!server_) transition(State::Ready);
  in_request_ = false;
  worker_.count_error(error.sqlstate);
  if (error.message != kUserRequest) complain(error.sqlstate, error.message);
  // The request that waited is answered with an error; of an extended one, all up to Sync goes unanswered, as on a server.
  const char type = channel_.unread.empty() ? 'Q' : channel_.unread[0];
  worker_.to_client.own([&](std::string& out) { protocol::write_error(out, protocol::Severity::Error, error); });
  if (is_extended(type)) {
    discarding_ = true;
  } else {
    const std::size_t total = channel_.unread.size() < kHeaderSize
                                  ? 0
                                  : std::size_t{protocol::load_u32(reinterpret_cast<const std::uint8_t*>(channel_.unread.data()) + 1)} + 1;
    const std::size_t have = std::min(total, channel_.unread.size());
    channel_.unread.erase(0, have);
    pass_left_ = total - have;
    pass_to_server_ = false;
    tell_ready(protocol::TxStatus::Idle);
  }
  send(worker_.to_client);
  if (subscriber_) {
    subscriber_->deliver_if_idle();
    if (subscriber_->stop_waiting() && server_) on_server_ready();
  }
  read_on();
  if (state_ != State::Closed) wait_readable();
}

void ClientSession::on_server_lost(const std::string& sqlstate, const std::string& message, bool in_transaction) {
  if (!server_) return;
  const auto& pipeline = server_->pipeline;
  bool owed = pipeline.unsynced() || !answered();  // an answer to the client
  const std::size_t readies = pipeline.readies_owed();
  if (server_->sent_nothing() && !in_transaction && readies == 0) owed = false;
  // What it has sent behind them without waiting may belong to a transaction that is gone before it was one.
  boost::system::error_code ignored;
  const bool more = readies > 0 && !pipeline.copy_in() && pass_left_ == 0 &&
                    (!channel_.unread.empty() || channel_.transport.socket().available(ignored) > 0);
  const bool several = more || readies + pipeline.unsynced() > 1;
  // What it had just done to its session.
  const bool unknown =
      server_->asking_residue() || server_->holds_ready() || (subscriber_ && subscriber_->owes_ready()) || left_unknown(in_transaction);
  const bool committing = server_->changed().commit != 0;
  if (subscriber_) subscriber_->on_server_lost();
  if (!tell_due_ && told_ != server_->told()) told_ = 0;  // it was told what its transaction has set
  server_ = nullptr;
  if (state_ == State::Greeting) return greet_elsewhere({"FATAL", sqlstate, message, {}, {}});
  while (unanswered_ && !unanswered_->pending.empty()) on_name_done(false);
  while (unanswered_ && !unanswered_->deallocations.empty()) undo(unanswered_->deallocations);
  parse_error_.reset();
  forget_residue();
  in_request_ = waits_for_answers_ = restore_due_ = ready_due_ = unnamed_here_ = tell_due_ = false;
  names_open_ = names_change_ = kNoNames;
  // Who took it for failed would do it again.
  if (committing)
    return fatal("08007", "the server connection was lost before COMMIT was answered: whether the transaction is committed is unknown",
                 "Look whether it is before trying again.", sqlstate + " " + message);
  // A session that lived on that connection, or a transaction, can't go on elsewhere.
  if (pin_ || unknown || several || !rewrites())
    return fatal(sqlstate, message, "The server connection that held this client's transaction or session is gone.");
  pass_to_server_ = false;  // the rest of what it is sending
  transition(State::Ready);
  worker_.run_later(*this);
  const auto count = [&worker = worker_](std::string_view told) { worker.count_error(told); };
  if (in_transaction) lost_ = std::make_unique<LostTransaction>(sqlstate, message, owed, count);
  if (!owed) return;
  worker_.count_error(sqlstate);
  worker_.to_client.own([&](std::string& out) {
    protocol::write_error(out, protocol::Severity::Error, sqlstate, message);
    if (readies > 0) protocol::write_ready_for_query(out, in_transaction ? protocol::TxStatus::Failed : protocol::TxStatus::Idle);
  });
  discarding_ = readies == 0;
  send(worker_.to_client);
  if (draining_) return fatal("57P01", "terminating connection due to administrator command");
}

// --- the end

void ClientSession::on_deadline(pool::Time now) {
  if (now < login_deadline || state_ == State::Closed) return;
  if (state_ == State::Closing || state_ == State::Tls) return close();
  login_deadline = now + std::chrono::seconds(1);
  worker_.reject(pool::RejectReason::Timeout);
  fatal("08006", "canceling authentication due to timeout");
}

void ClientSession::drain() {
  if (state_ == State::Console) return;  // it leaves last
  draining_ = true;
  if (state_ == State::Ready || counts_as_login() || state_ == State::Greeting || state_ == State::Waiting)
    return fatal("57P01", "terminating connection due to administrator command");
  if (server_ && server_->pipeline.releasable() && pass_left_ == 0 && !held())
    fatal("57P01", "terminating connection due to administrator command");
}

void ClientSession::fatal(std::string_view sqlstate, std::string_view message, std::string_view hint, std::string_view detail) {
  if (state_ == State::Closed || state_ == State::Closing) return;
  const Worker::Visit visit(worker_, this);
  if (!sqlstate.starts_with("57P")) complain(sqlstate, message);
  if (sqlstate == "08P01") worker_.reject(pool::RejectReason::Protocol);
  if (state_ == State::Tls) return close();              // it can't be told anything in its handshake
  if (server_ && server_->is_telling()) return close();  // it would be read as the rest of a message
  worker_.count_error(sqlstate);
  worker_.to_client.own([&](std::string& out) { protocol::write_error(out, protocol::Severity::Fatal, sqlstate, message, detail, hint); });
  unlink();
  transition(State::Closing);
  send(worker_.to_client);
  if (state_ == State::Closed) return;
  give_up_server();
  login_deadline = worker_.now() + std::chrono::seconds(5);
  worker_.kick();
  if (channel_.queued() > 0) return;
  channel_.transport.shutdown_send();
  close();
}

void ClientSession::failed(const std::exception& why) {
  if (state_ == State::Closed) return;
  const auto self = shared_from_this();
  const bool no_memory = dynamic_cast<const std::bad_alloc*>(&why) != nullptr;
  log::error("session_failed", about(), "client {} ({}): closed: {}", id_, entry_ ? entry_->user + "@" + entry_->database : "no login yet",
             why.what());
  // What was gathered for it is lost: was it the rest of a message, an error would be read as that.
  const bool torn = channel_.torn || !worker_.to_client.empty() || (server_ && server_->is_telling());
  worker_.to_client.clear();
  worker_.to_server.clear();
  std::string().swap(channel_.unread);
  if (ServerConnection* server = std::exchange(server_, nullptr)) server->close_unknown();
  if (torn || state_ == State::Console || state_ == State::Closing) return close();
  fatal(no_memory ? "53200" : "XX000", no_memory ? "out of memory" : why.what());
}

void ClientSession::give_up_server() {
  if (!server_) return;
  ServerConnection* server = std::exchange(server_, nullptr);
  server->send(worker_.to_server);  // what came before counts, as it would on a direct connection
  if (pass_left_ > 0 && pass_to_server_) return server->close(pool::CloseReason::Broken);  // half a message was sent
  server->detach(!server->pipeline.releasable() || pin_ || (residue_ & ~protocol::kPassive) != 0 || (subscriber_ && subscriber_->dirty()) ||
                     !rewrites(),
                 said_goodbye_);
}

void ClientSession::close() {
  if (state_ == State::Closed) return;
  const auto self = shared_from_this();
  unlink();
  transition(State::Closed);
  give_up_server();
  subscriber_.reset();
  channel_.transport.close();
  worker_.on_client_closed(*this);
}

}  // namespace pgsidecar::proxy
