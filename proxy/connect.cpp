// The making of a server connection: addresses in turn, TLS as sslmode says, login. A coroutine, since it is cold.
// gcc 12: no aggregate temporary and no capturing lambda inside a co_await expression.
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <limits>

#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/tls.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using asio::awaitable;
using asio::use_awaitable;

/// Ends the waits of one attempt when its time is up: a part of it until the host has answered, then all of it.
class TimeLimit {
 public:
  TimeLimit(Worker& worker, std::uint32_t until_answered, std::uint32_t millis)
      : timer_(worker.loop()), begun_(asio::steady_timer::clock_type::now()), all_(millis), state_(std::make_shared<State>()) {
    arm(until_answered);
  }
  ~TimeLimit() { state_->over = true; }
  void watch(Socket& socket) { state_->socket = &socket; }
  void answered() {
    answered_ = true;
    if (millis_ != all_) arm(all_);
  }
  bool has_answered() const { return answered_; }
  bool expired() const { return state_->expired; }
  std::uint32_t millis() const { return millis_; }

 private:
  struct State {
    Socket* socket = nullptr;
    bool expired = false, over = false;
  };

  void arm(std::uint32_t millis) {
    millis_ = millis;
    wait_until(begun_ + std::chrono::milliseconds(millis));
  }

  void wait_until(asio::steady_timer::time_point at) {
    timer_.expires_at(at);
    timer_.async_wait([this, state = state_](const boost::system::error_code& stopped) {
      if (stopped || state->over) return;
      state->expired = true;
      boost::system::error_code ignored;
      if (state->socket) state->socket->cancel(ignored);
      wait_until(asio::steady_timer::clock_type::now() + std::chrono::milliseconds(100));  // so that no later wait is forever
    });
  }

  asio::steady_timer timer_;
  const asio::steady_timer::time_point begun_;
  const std::uint32_t all_;
  std::uint32_t millis_ = 0;
  bool answered_ = false;
  std::shared_ptr<State> state_;
};

namespace {

void set_socket_options(Socket& socket, const conf::ConnectParams& params, const conf::PoolSettings& pool, bool tcp) {
  if (!tcp) return;
  const int fd = socket.native_handle();
  const auto set = [fd](int level, int option, int value) { ::setsockopt(fd, level, option, &value, sizeof value); };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  if (params.tcpUserTimeoutMillis) set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(*params.tcpUserTimeoutMillis));
  if (!params.keepalives.value_or(pool.keepAlive)) return;
  KeepAlive times = keep_alive_of(pool);
  times.idle = std::min(KeepAlive::kMostIdle, params.keepalivesIdleSeconds.value_or(times.idle));
  times.interval = params.keepalivesIntervalSeconds.value_or(times.interval);
  times.count = params.keepalivesCount.value_or(times.count);
  set_keep_alive(fd, times);
  if (params.tcpUserTimeoutMillis) return;
  const std::int64_t millis = (times.idle + std::int64_t{times.interval} * times.count) * 1000;
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(std::min<std::int64_t>(millis, std::numeric_limits<int>::max())));
}

/// What a session is that isn't as wanted, as libpq says it.
std::string misfit(conf::TargetSessionAttrs wanted) {
  switch (wanted) {
    case conf::TargetSessionAttrs::ReadWrite: return "session is read-only";
    case conf::TargetSessionAttrs::ReadOnly: return "session is not read-only";
    case conf::TargetSessionAttrs::Primary: return "server is in hot standby mode";
    default: return "server is not in hot standby mode";
  }
}

std::string printed(const Target& target) {
  return "server at \"" + target.host.name + "\", port " + std::to_string(target.host.port);
}

/// What a connect may take, in milliseconds.
std::uint32_t time_for(const conf::ConnectParams& params, const conf::PoolSettings& pool) {
  const std::uint32_t millis = params.connectTimeoutMillis ? params.connectTimeoutMillis : pool.connectionTimeoutMillis;
  return millis == 0 ? 30000 : millis;
}

/// Of several addresses one that is silent, since its machine is gone, leaves time for the others.
std::uint32_t share_of(const Upstream& upstream, std::uint32_t millis) {
  if (upstream.params.connectTimeoutMillis) return millis;
  return std::min(millis, std::max<std::uint32_t>(1500, millis / static_cast<std::uint32_t>(upstream.targets.size())));
}

/// What an attempt to open a connection is made of; `channel` is what it makes.
struct Opening {
  Worker& worker;
  const Upstream& upstream;
  const Target& target;
  const conf::PoolSettings& settings;
  std::optional<Channel>& channel;
  TimeLimit& limit;
  bool tls;  ///< asked for, then what it is
  pool::Histogram* handshakes = nullptr;
  bool handshake_failed = false;
};

/// Whether the server speaks TLS, which it says before anybody logs in: `o.tls`. Empty, or why there is no answer.
awaitable<std::string> ask_for_tls(Opening& o) {
  Transport& transport = o.channel->transport;
  Gather request;
  request.own([](std::string& out) { protocol::Writer(out).begin_untyped().u32(protocol::kSslRequest).end(); });
  if (!o.channel->send(request, o.worker.tls_scratch())) co_return std::string("connection broken");
  std::uint8_t answer = 0;
  for (;;) {
    const IoResult got = transport.read(std::span(&answer, 1));  // one byte only: nothing unencrypted may follow
    if (got.status == IoStatus::Ok) break;
    if (got.status != IoStatus::WouldBlock) co_return std::string("server closed the connection unexpectedly");
    co_await transport.socket().async_wait(Socket::wait_read, use_awaitable);
  }
  o.limit.answered();
  if (answer != 'S' && answer != 'N') co_return std::string("received invalid response to SSL negotiation");
  o.tls = answer == 'S';
  co_return std::string();
}

/// TCP or unix, then TLS if asked for. Empty: open; else why not.
awaitable<std::string> open_channel(Opening& o) {
  boost::system::error_code ec;
  const conf::ConnectParams& params = o.upstream.params;
  Socket socket(o.worker.loop().get_executor());
  socket.open(o.target.endpoint.protocol(), ec);
  if (ec) co_return ec.message();
  set_socket_options(socket, params, o.settings, o.target.endpoint.protocol().family() != AF_UNIX);
  o.limit.watch(socket);
  co_await socket.async_connect(o.target.endpoint, asio::redirect_error(use_awaitable, ec));
  if (ec) co_return ec.message();
  o.channel.emplace(std::move(socket), o.worker.meter);
  Transport& transport = o.channel->transport;
  o.limit.watch(transport.socket());
  if (!o.tls) co_return std::string();
  if (params.sslnegotiation == conf::SslNegotiation::Postgres) {
    std::string failure = co_await ask_for_tls(o);
    if (!failure.empty()) co_return failure;
    if (!o.tls) {
      if (params.sslmode == conf::SslMode::Prefer || params.sslmode == conf::SslMode::Allow) co_return std::string();
      co_return std::string("server does not support SSL, but SSL was required (sslmode)");
    }
  }
  transport.start_tls(o.upstream.tls.get(), false);
  prepare_client(transport.ssl(), params, o.target.host);
  const pool::Time begun = pool::Clock::now();
  for (;;) {
    const IoResult shaken = transport.handshake();
    if (shaken.status == IoStatus::Ok) {
      o.limit.answered();
      if (o.handshakes) o.handshakes->record(pool::micros(pool::Clock::now() - begun));
      o.worker.saw_certificate(conf::print_address(o.target.host.name, o.target.host.port), SSL_get0_peer_certificate(transport.ssl()));
      co_return std::string();
    }
    if (shaken.status != IoStatus::WouldBlock) {
      o.handshake_failed = true;
      co_return "SSL error: " + transport.tls_error();
    }
    co_await transport.socket().async_wait(transport.wants_write() ? Socket::wait_write : Socket::wait_read, use_awaitable);
  }
}

/// Until the server has closed its end. TLS has things to say of its own meanwhile, such as session tickets.
awaitable<void> read_to_end(Worker& worker, Transport& transport) {
  IoResult got{IoStatus::WouldBlock};
  while (got.status == IoStatus::Ok || got.status == IoStatus::WouldBlock) {
    if (!transport.pending()) co_await transport.socket().async_wait(Socket::wait_read, use_awaitable);
    got = transport.read(worker.scratch());
  }
}

/// Without what a refusal by pg_hba.conf ends with.
std::string_view but_for_tls(std::string_view error) {
  for (const std::string_view end : {", SSL encryption", ", no encryption", ", SSL on", ", SSL off"})
    if (error.ends_with(end)) return error.substr(0, error.size() - end.size());
  return error;
}

/// The server has answered, and another host isn't asked (libpq does the same) unless this one can't serve at the moment.
bool is_final(const std::string& sqlstate) {
  return !sqlstate.starts_with("08") && sqlstate != "57P03";
}

/// A program gave this password for an earlier connect.
bool is_old(const std::optional<pool::Time>& password_since) {
  return password_since && pool::Clock::now() - *password_since > std::chrono::seconds(1);
}

/// Of the message at the front; 0: its header isn't complete.
std::size_t frame_size(const std::string& in) {
  if (in.size() < protocol::kHeaderSize) return 0;
  return std::size_t{protocol::load_u32(reinterpret_cast<const std::uint8_t*>(in.data()) + 1)} + 1;
}

protocol::Bytes frame_body(const std::string& in, std::size_t total) {
  return {reinterpret_cast<const std::uint8_t*>(in.data()) + protocol::kHeaderSize, total - protocol::kHeaderSize};
}

}  // namespace

bool ServerConnection::SessionState::fits(conf::TargetSessionAttrs wanted) const {
  switch (wanted) {
    case conf::TargetSessionAttrs::ReadWrite: return !standby && !read_only;
    case conf::TargetSessionAttrs::ReadOnly: return standby || read_only;
    case conf::TargetSessionAttrs::Primary: return !standby;
    case conf::TargetSessionAttrs::Standby: return standby;
    default: return true;
  }
}

void ServerConnection::connect(std::optional<Login> login) {
  login_ = std::move(login);
  // The coroutine holds the connection while it runs.
  asio::co_spawn(worker_.loop(), run_connect(shared_from_this()), asio::detached);
}

awaitable<std::shared_ptr<const Upstream>> ServerConnection::look_up() {
  attempt = {entry_.upstream.passwordCommand.empty() ? "looking up the server's address" : "asking upstream.passwordCommand",
             worker_.now()};
  asio::steady_timer answer(worker_.loop(), asio::steady_timer::time_point::max());
  std::shared_ptr<const Upstream> upstream;
  Control::Done done = [&upstream, &answer](std::shared_ptr<const Upstream> found) {
    upstream = std::move(found);
    answer.cancel();
  };
  worker_.control().resolve(entry_.upstream, std::move(done));
  boost::system::error_code ec;
  co_await answer.async_wait(asio::redirect_error(use_awaitable, ec));
  co_return upstream;
}

awaitable<std::string> ServerConnection::try_hosts() {
  login_error_ = {};
  login_error_.sqlstate = "08006";
  const std::shared_ptr<const Upstream> upstream = co_await look_up();
  if (!upstream) co_return std::string("stopped");
  if (!upstream->error.empty()) co_return upstream->error;
  upstream_ = upstream;
  worker_.saw_addresses(entry_, upstream);
  worker_.connect_begins(worker_.upstream_of(entry_.database));
  std::string error, failures;  // of the last attempt; of all hosts
  const bool prefer_standby = upstream->params.targetSessionAttrs == conf::TargetSessionAttrs::PreferStandby;
  const std::vector<Target> targets = worker_.targets_of(entry_, *upstream);
  for (int round = 0; round < (prefer_standby ? 2 : 1); ++round) {
    for (const Target& target : targets) {
      const bool local = target.host.is_unix();
      const conf::SslMode mode = local ? conf::SslMode::Disable : upstream->params.sslmode;
      bool tls = mode != conf::SslMode::Disable && mode != conf::SslMode::Allow;
      const auto wanted = prefer_standby && round == 0 ? conf::TargetSessionAttrs::Standby
                          : prefer_standby             ? conf::TargetSessionAttrs::Any
                                                       : upstream->params.targetSessionAttrs;
      if (!take_place()) co_return failures;
      if (worker_.is_full(entry_, target)) {
        failures += (failures.empty() ? "" : "\n") +
                    ("connection to " + printed(target) + " not tried: processes that don't end have the pool's places there");
        continue;
      }
      error = co_await log_in(upstream, target, tls, wanted);
      // prefer: a refusal with TLS is tried without; allow: the other way round.
      const bool other = (mode == conf::SslMode::Prefer && tls) || (mode == conf::SslMode::Allow && !tls);
      if (!error.empty() && state_ != State::Closed && other && retry_other_tls_ && take_place()) {
        const protocol::ErrorFields first = login_error_;
        const std::string first_error = std::move(error);
        error = co_await log_in(upstream, target, !tls, wanted);
        if (!error.empty() && is_final(first.sqlstate)) login_error_ = first;
        if (!error.empty()) error = but_for_tls(error) == but_for_tls(first_error) ? first_error : first_error + "\n" + error;
      }
      if (error.empty()) entry_.addresses.worked(address_of(target));
      if (error.empty() || is_final(login_error_.sqlstate)) {
        if (login_error_.sqlstate.starts_with("28") && is_old(target.password_since)) stale_password_ = target.host.password;
        co_return error;
      }
      if (!unfit_ || !prefer_standby) entry_.addresses.failed(address_of(target), worker_.now());
      // Since PostgreSQL 14 a server tells the connections that there are what it has become.
      if (unfit_ && !prefer_standby && !parameters_.contains("in_hot_standby")) worker_.outdate_address(entry_, address_of(target));
      failures += (failures.empty() ? "" : "\n") + error;
    }
  }
  co_return failures;
}

awaitable<void> ServerConnection::run_connect(std::shared_ptr<ServerConnection> /*keeps this alive*/) {
  const pool::Time begun = worker_.now();
  std::string error = co_await try_hosts();
  if (!stale_password_.empty()) {  // the program may have another one by now
    worker_.control().forget_password(std::exchange(stale_password_, {}));
    error = co_await try_hosts();
  }
  if (!error.empty()) {
    login_error_.message = std::move(error);
    fail_connect(login_error_);
    co_return;
  }
  const pool::Clock::duration took = worker_.now() - begun - upstream_->passwords_took;
  entry_.pool.counters().connect.record(pool::micros(took));
  worker_.database_took(worker_.upstream_of(entry_.database), took);
  ++entry_.pool.counters().connects;
  attempt = {};
  const Worker::Turn turn(worker_);  // the client whose login this is goes on in it
  conforming_strings_ = parameters_["standard_conforming_strings"] != "off";
  state_ = State::Leased;  // until settle() puts it on the idle list
  entry_.pool.admit(*this, worker_.now(), worker_.random());
  if (login_ && !login_->date_styles.empty()) {  // its defaults aren't everybody's
    entry_.settings.learn_date_style(login_->date_styles, parameters_["DateStyle"]);
    worker_.on_connected(*this);
    wait_readable();
    co_return close(pool::CloseReason::Login);
  }
  settings = entry_.settings.intern({});
  entry_.settings.saw_parameters({}, parameters_);
  settings->welcome = parameters_;
  worker_.on_connected(*this);
  if (const std::string more = std::exchange(channel_->unread, {}); !more.empty()) {  // what came together with the login's end
    const protocol::Bytes bytes(reinterpret_cast<const std::uint8_t*>(more.data()), more.size());
    channel_->keep(bytes, process(bytes));
  }
  wait_readable();
  settle();
}

// What is left of a login that was given up has kept its place.
bool ServerConnection::take_place() {
  if (!permit_.held() && entry_.pool.room() == 0) return false;
  permit_.take();
  return true;
}

void ServerConnection::fail_connect(const protocol::ErrorFields& error) {
  if (channel_) channel_->transport.close();
  state_ = State::Closed;
  permit_.release();
  worker_.on_connect_failed(*this, error);
}

awaitable<std::string> ServerConnection::log_in(std::shared_ptr<const Upstream> upstream, Target target, bool tls,
                                                conf::TargetSessionAttrs wanted) {
  const conf::ConnectParams& params = upstream->params;
  retry_other_tls_ = unfit_ = false;
  login_error_ = {};
  login_error_.sqlstate = "08006";
  if (channel_) channel_->transport.close();
  channel_.reset();
  const std::uint32_t millis = time_for(params, entry_.pool.settings());
  attempt = {"connecting to " + printed(target), worker_.now()};
  TimeLimit limit(worker_, share_of(*upstream, millis), millis);
  std::string failure;
  bool counts = false;  // at the server: from the startup packet on
  try {
    pool::Pool& pool = entry_.pool;
    Opening opening{worker_, *upstream, target, pool.settings(), channel_, limit, tls, &pool.counters().tlsHandshake};
    failure = co_await open_channel(opening);
    retry_other_tls_ = opening.handshake_failed;
    if (failure.empty()) {
      counts = true;
      failure = co_await exchange_login(params, target.host, limit);
      if (login_error_.sqlstate != "08006") co_return failure;  // the server's own words
    }
    if (failure.empty() && wanted != conf::TargetSessionAttrs::Any) {
      SessionState session;
      failure = co_await find_session(session);
      unfit_ = failure.empty() && !session.fits(wanted);
      if (unfit_) failure = misfit(wanted) + " (target_session_attrs=" + std::string(conf::name_of(params.targetSessionAttrs)) + ")";
      if (!failure.empty()) {  // the next attempt has its place
        Gather terminate;
        terminate.own(protocol::write_terminate);
        channel_->send(terminate, worker_.tls_scratch());
        channel_->transport.shutdown_send();
        co_await read_to_end(worker_, channel_->transport);
      }
    }
  } catch (const boost::system::system_error& e) {
    if (!unfit_) failure = e.code().message();
  }
  if (limit.expired() && !unfit_) failure = "timeout expired after " + std::to_string(limit.millis()) + " ms";
  // The server goes on until it notices. Of other failures it knows itself.
  if (counts && limit.expired()) {
    worker_.see_off(entry_, std::move(*channel_), target, limit.has_answered());
    channel_.reset();
    permit_.release();
  }
  if (failure.empty()) {
    upstream_ = std::move(upstream);
    target_ = std::move(target);
    co_return failure;
  }
  co_return "connection to " + printed(target) + " failed: " + failure;
}

/// Reads until channel_->unread holds a whole message. Empty, or why there is none.
awaitable<std::string> ServerConnection::receive_frame() {
  Transport& transport = channel_->transport;
  std::string& in = channel_->unread;
  for (;;) {
    if (const std::size_t total = frame_size(in)) {
      if (total > 64 * 1024 || total < protocol::kHeaderSize) {
        login_error_.sqlstate = "08P01";
        // An error from before there were lengths, as of a server that can't start a process: text up to a zero byte.
        if (in[0] == 'E' && in.find('\0') != std::string::npos) {
          login_error_.sqlstate = "08006";
          co_return in.substr(1, in.find_first_of(std::string_view("\n\0", 2)) - 1);
        }
        co_return std::string("received an invalid message from the server during login");
      }
      if (in.size() >= total) co_return std::string();
    }
    if (!channel_->flush(worker_.tls_scratch())) co_return std::string("connection broken");
    const IoResult got = transport.read(worker_.scratch());
    if (got.status == IoStatus::WouldBlock) {
      co_await transport.socket().async_wait(channel_->queued() > 0 || transport.wants_write() ? Socket::wait_write : Socket::wait_read,
                                             use_awaitable);
      continue;
    }
    if (got.status != IoStatus::Ok) co_return std::string("server closed the connection unexpectedly");
    in.append(reinterpret_cast<const char*>(worker_.scratch().data()), got.bytes);
  }
}

/// Whether the session is on a standby and whether it may only read: reported at the login since PostgreSQL 14, before it has to be
/// asked for (libpq does the same). Empty, or why it isn't known.
awaitable<std::string> ServerConnection::ask_session(std::string sql, bool& is_on) {
  Gather gather;
  gather.own([&](std::string& out) { protocol::write_query(out, sql); });
  if (!channel_->send(gather, worker_.tls_scratch())) co_return std::string("connection broken");
  std::string error;
  for (std::string& in = channel_->unread;;) {
    std::string failure = co_await receive_frame();
    if (!failure.empty()) co_return failure;
    const std::size_t total = frame_size(in);
    const auto type = static_cast<protocol::Backend>(in[0]);
    const std::string_view value(in.data() + protocol::kHeaderSize, total - protocol::kHeaderSize);
    if (type == protocol::Backend::DataRow) is_on = value.ends_with("on") || value.ends_with("t");
    if (type == protocol::Backend::ErrorResponse) error = "cannot ask the server for its state: \"" + sql + "\" failed";
    in.erase(0, total);
    if (type == protocol::Backend::ReadyForQuery) co_return error;
  }
}

awaitable<std::string> ServerConnection::find_session(SessionState& session) {
  const auto reported = [this](const char* name, bool& is_on) {
    is_on = this->is_on(name);
    return parameters_.contains(name);
  };
  std::string failure;
  if (!reported("in_hot_standby", session.standby))
    failure = co_await ask_session("SELECT pg_catalog.pg_is_in_recovery()", session.standby);
  if (failure.empty() && !reported("default_transaction_read_only", session.read_only))
    failure = co_await ask_session("SHOW transaction_read_only", session.read_only);
  co_return failure;
}

bool ServerConnection::is_on(const char* parameter) const {
  const auto it = parameters_.find(parameter);
  return it != parameters_.end() && it->second == "on";
}

void ServerConnection::on_role_changed() {
  const SessionState session{is_on("in_hot_standby"), is_on("default_transaction_read_only")};
  if (condemned || !alive() || session.fits(upstream_->params.targetSessionAttrs)) return;
  log::info("server_role_changed", about(), "server {} (pid {}): no longer as target_session_attrs asks: replaced", id_, pid_);
  condemned = true;
  worker_.kick();
}

// A client's own read-only transaction refuses writes too. Since PostgreSQL 14 a server says itself that it is no standby.
void ServerConnection::on_write_refused() {
  const conf::TargetSessionAttrs wanted = upstream_->params.targetSessionAttrs;
  const bool may_be_standby = !parameters_.contains("in_hot_standby") || is_on("in_hot_standby");
  if (may_be_standby && wanted <= conf::TargetSessionAttrs::Primary && wanted != conf::TargetSessionAttrs::ReadOnly)
    worker_.on_write_refused(*this);
}

/// The data loop goes on meanwhile.
awaitable<void> ServerConnection::derive(protocol::ScramDerivation from) {
  asio::steady_timer derived(worker_.loop(), asio::steady_timer::time_point::max());
  std::function<void(const protocol::ScramKeys&)> done = [this, &from, &derived](const protocol::ScramKeys& keys) {
    worker_.scram_keys.add(from, keys);
    derived.cancel();
  };
  worker_.control().derive(from, std::move(done));
  boost::system::error_code ec;
  co_await derived.async_wait(asio::redirect_error(use_awaitable, ec));
}

awaitable<std::string> ServerConnection::exchange_login(const conf::ConnectParams& params, const conf::Host& host, TimeLimit& limit) {
  Transport& transport = channel_->transport;
  if (params.sslcertRequired && !(transport.is_tls() && asked_for_certificate(transport.ssl())))
    co_return std::string("server did not request an SSL certificate (sslcertmode=require)");
  protocol::ServerCredentials credentials;
  credentials.user = params.user;
  credentials.password = login_ && !login_->password.empty()
                             ? login_->password
                             : entry_.given_password.value_or(host.password.empty() ? params.password : host.password);
  credentials.private_way = transport.is_tls() || host.is_unix();
  credentials.require_auth = params.requireAuth;
  if (transport.is_tls()) credentials.channel_binding = channel_binding(transport.ssl(), false);
  using Binding = protocol::ServerCredentials::Binding;
  credentials.binding = params.channelBinding == conf::ChannelBinding::Disable   ? Binding::Disable
                        : params.channelBinding == conf::ChannelBinding::Require ? Binding::Require
                                                                                 : Binding::Prefer;
  protocol::Startup startup;
  startup.parameters.emplace_back("user", params.user);
  startup.parameters.emplace_back("database", params.dbname);
  for (const auto& parameter : params.startup) startup.parameters.push_back(parameter);
  if (login_)
    for (const std::string& asked : login_->date_styles) startup.parameters.emplace_back("DateStyle", asked);
  protocol::ServerLogin login(std::move(credentials), std::move(startup), &worker_.scram_keys);
  Gather gather;
  gather.own([&](std::string& out) { login.begin(out); });
  if (!channel_->send(gather, worker_.tls_scratch())) co_return std::string("connection broken");
  using Step = protocol::ServerLogin::Step;
  Step step = Step::NeedFrame;
  std::string& in = channel_->unread;
  while (step == Step::NeedFrame) {
    std::string failure = co_await receive_frame();
    if (!failure.empty()) co_return failure;
    limit.answered();
    const std::size_t total = frame_size(in);
    if (const auto from = login.derivation(in[0], frame_body(in, total))) co_await derive(*from);
    gather.own([&](std::string& out) { step = login.on_frame(in[0], frame_body(in, total), out); });
    in.erase(0, total);
    if (!gather.empty() && !channel_->send(gather, worker_.tls_scratch())) co_return std::string("connection broken");
  }
  if (step == Step::Failed) {
    login_error_ = login.error();
    retry_other_tls_ = login_error_.sqlstate.starts_with("28");
    if (login_error_.message.empty()) login_error_.message = "the server refused the login and didn't say why";
    co_return login_error_.message;
  }
  pid_ = login.pid();
  cancel_key_ = login.key();
  parameters_ = login.parameters();
  login_user_ = params.user;
  co_return std::string();
}

// --- probe

namespace {

/// Goes as far as a login does before it says whose it is. Who takes connections need not be a server, nor one that can be used.
/// Empty, or why it failed.
awaitable<std::string> knock(Worker& worker, const Upstream& upstream, const Target& target) {
  const conf::SslMode mode = target.host.is_unix() ? conf::SslMode::Disable : upstream.params.sslmode;
  const conf::PoolSettings settings = worker.config().pool;  // a reload replaces them
  const std::uint32_t millis = std::min(time_for(upstream.params, settings), Worker::kProbeMillis);
  TimeLimit limit(worker, share_of(upstream, millis), millis);
  std::optional<Channel> channel;
  std::string failure;
  try {
    Opening opening{worker, upstream, target, settings, channel, limit, mode != conf::SslMode::Disable};
    failure = co_await open_channel(opening);
    if (opening.handshake_failed && mode < conf::SslMode::Require) failure.clear();  // a login would be tried without
    if (failure.empty() && mode == conf::SslMode::Disable) failure = co_await ask_for_tls(opening);
  } catch (const boost::system::system_error& e) {
    failure = e.code().message();
  }
  if (limit.expired()) failure = "timeout expired after " + std::to_string(limit.millis()) + " ms";
  if (channel) channel->transport.close();
  if (failure.empty()) co_return failure;
  co_return "connection to " + printed(target) + " failed: " + failure;
}

}  // namespace

awaitable<void> Worker::run_probe(std::shared_ptr<const Upstream> upstream, std::function<void()> done) {
  std::string failures = upstream->error;
  bool up = false;
  for (const Target& target : upstream->targets) {
    const pool::Time begun = now();
    const std::string failure = co_await knock(*this, *upstream, target);
    up = failure.empty();
    if (up) upstream_times_[name_of(upstream_)].probed = now() - begun;
    if (up) break;
    failures += (failures.empty() ? "" : "\n") + failure;
  }
  if (!up || !shut_out()) database_seen(name_of(upstream_), up, up ? std::string() : failures);  // a login may have failed meanwhile
  done();
}

// --- cancel

void ServerConnection::send_cancel(std::shared_ptr<void> done) {
  constexpr std::uint32_t kMost = 4;  // one is enough, unless it comes before what it is about
  if (cancels_pending >= kMost) return;
  ++entry_.pool.counters().cancels;
  ++cancels_pending;
  asio::co_spawn(worker_.loop(), run_cancel(shared_from_this(), std::move(done)), asio::detached);
}

// On a connection of its own, encrypted as the one that it is about; over when the server has closed it.
awaitable<void> ServerConnection::run_cancel(std::shared_ptr<ServerConnection> /*keeps this alive*/, std::shared_ptr<void> /*done*/) {
  std::optional<Channel> channel;
  TimeLimit limit(worker_, 5000, 5000);
  bool reached = false;
  bool ended = false;
  std::string failure;
  try {
    pool::Pool& pool = entry_.pool;
    Opening opening{
        worker_, *upstream_, target_, pool.settings(), channel, limit, channel_->transport.is_tls(), &pool.counters().tlsHandshake};
    failure = co_await open_channel(opening);
    if (failure.empty()) {
      Gather request;
      request.own([this](std::string& out) { protocol::write_cancel_request(out, pid_, cancel_key_); });
      channel->send(request, worker_.tls_scratch());
      reached = true;
      co_await read_to_end(worker_, channel->transport);
      ended = !limit.expired();
    }
  } catch (const boost::system::system_error& e) {
    failure = e.code().message();
  }
  if (!failure.empty()) {
    if (limit.expired()) failure = "timeout expired after " + std::to_string(limit.millis()) + " ms";
    log::warn("cancel_failed", about(), "server {} (pid {}): cannot send a cancel request: {}", id_, pid_, failure);
  }
  --cancels_pending;
  condemned |= reached && !ended;  // it may come yet, and would hit who has the connection then
  settle_after_cancel();
}

}  // namespace pgsidecar::proxy
