// The making of a server connection: addresses in turn, TLS as sslmode says, login. A coroutine, since it is cold.
// gcc 12: no aggregate temporary and no capturing lambda inside a co_await expression.
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>

#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using asio::awaitable;
using asio::use_awaitable;

namespace {

void set_socket_options(Socket& socket, const conf::ConnectParams& params, const conf::PoolSettings& pool, bool tcp) {
  if (!tcp) return;
  const int fd = socket.native_handle();
  const auto set = [fd](int level, int option, int value) { ::setsockopt(fd, level, option, &value, sizeof value); };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  if (!params.keepalives.value_or(pool.keepAlive)) return;
  const int idle = static_cast<int>(params.keepalivesIdleSeconds.value_or(pool.keepAliveInitialDelayMillis / 1000));
  const int interval = static_cast<int>(params.keepalivesIntervalSeconds.value_or(1));
  const int count = static_cast<int>(params.keepalivesCount.value_or(10));
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  if (idle > 0) set(IPPROTO_TCP, TCP_KEEPIDLE, idle);
  set(IPPROTO_TCP, TCP_KEEPINTVL, interval);
  set(IPPROTO_TCP, TCP_KEEPCNT, count);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(params.tcpUserTimeoutMillis.value_or((idle + interval * count) * 1000)));
}

bool session_fits(const std::map<std::string, std::string>& parameters, conf::TargetSessionAttrs wanted) {
  const auto is_on = [&](const char* name) {
    const auto it = parameters.find(name);
    return it != parameters.end() && it->second == "on";
  };
  const bool standby = is_on("in_hot_standby");
  const bool read_only = standby || is_on("default_transaction_read_only");
  switch (wanted) {
    case conf::TargetSessionAttrs::ReadWrite: return !read_only;
    case conf::TargetSessionAttrs::ReadOnly: return read_only;
    case conf::TargetSessionAttrs::Primary: return !standby;
    case conf::TargetSessionAttrs::Standby: return standby;
    default: return true;
  }
}

}  // namespace

void ServerConnection::connect() {
  // The coroutine holds the connection while it runs.
  asio::co_spawn(worker_.loop(), run_connect(shared_from_this()), asio::detached);
}

awaitable<void> ServerConnection::run_connect(std::shared_ptr<ServerConnection> /*keeps this alive*/) {
  const pool::Time begun = worker_.now();
  asio::steady_timer answer(worker_.loop(), asio::steady_timer::time_point::max());
  std::shared_ptr<const Upstream> upstream;
  Control::Done done = [&upstream, &answer](std::shared_ptr<const Upstream> found) {
    upstream = std::move(found);
    answer.cancel();
  };
  worker_.control().resolve(entry_.upstream, std::move(done));
  boost::system::error_code ec;
  co_await answer.async_wait(asio::redirect_error(use_awaitable, ec));
  if (!upstream || !upstream->error.empty()) {
    const std::string error = upstream ? upstream->error : std::string("stopped");
    fail_connect("08006", error);
    co_return;
  }
  std::string error;
  login_sqlstate_ = "08006";
  const bool prefer_standby = upstream->params.targetSessionAttrs == conf::TargetSessionAttrs::PreferStandby;
  for (int round = 0; round < (prefer_standby ? 2 : 1); ++round) {
    for (const Target& target : upstream->targets) {
      const bool local = target.host.is_unix();
      const conf::SslMode mode = local ? conf::SslMode::Disable : upstream->params.sslmode;
      bool tls = mode != conf::SslMode::Disable && mode != conf::SslMode::Allow;
      const auto wanted = prefer_standby && round == 0 ? conf::TargetSessionAttrs::Standby
                          : prefer_standby             ? conf::TargetSessionAttrs::Any
                                                       : upstream->params.targetSessionAttrs;
      for (int attempt = 0; attempt < 2; ++attempt) {
        error = co_await log_in(upstream, target, tls, wanted);
        if (error.empty() || state_ == State::Closed) break;
        // prefer: a refusal with TLS is tried without; allow: the other way round.
        const bool other = (mode == conf::SslMode::Prefer && tls) || (mode == conf::SslMode::Allow && !tls);
        if (attempt != 0 || !other || !retry_other_tls_) break;
        tls = !tls;
      }
      if (error.empty()) break;
    }
    if (error.empty()) break;
  }
  if (!error.empty()) {
    fail_connect(login_sqlstate_, error);
    co_return;
  }
  const auto micros = std::chrono::duration_cast<std::chrono::microseconds>(worker_.now() - begun).count();
  entry_.pool.counters().connect.record(static_cast<std::uint64_t>(micros));
  ++entry_.pool.counters().connects;
  settings = entry_.settings.intern({});
  if (settings->welcome.empty()) settings->welcome = parameters_;
  state_ = State::Leased;  // until settle() puts it on the idle list
  entry_.pool.admit(*this, worker_.now(), worker_.random());
  worker_.on_connected(*this);
  wait_readable();
  settle();
}

void ServerConnection::fail_connect(const std::string& sqlstate, const std::string& error) {
  if (channel_) channel_->transport.close();
  state_ = State::Closed;
  permit_.release();
  worker_.on_connect_failed(*this, sqlstate, error);
}

awaitable<std::string> ServerConnection::log_in(std::shared_ptr<const Upstream> upstream, Target target, bool tls,
                                                conf::TargetSessionAttrs wanted) {
  const conf::ConnectParams& params = upstream->params;
  retry_other_tls_ = false;
  login_sqlstate_ = "08006";
  const bool tcp = target.endpoint.protocol().family() != AF_UNIX;
  const std::string where = "connection to server at \"" + target.host.name + "\", port " + std::to_string(target.host.port) + " failed: ";
  boost::system::error_code ec;
  if (channel_) channel_->transport.close();
  channel_.reset();
  Socket socket(worker_.loop().get_executor());
  socket.open(target.endpoint.protocol(), ec);
  if (ec) co_return where + ec.message();
  set_socket_options(socket, params, entry_.pool.settings(), tcp);

  std::uint32_t limit = params.connectTimeoutMillis ? params.connectTimeoutMillis : entry_.pool.settings().connectionTimeoutMillis;
  if (limit == 0) limit = 30000;
  asio::steady_timer timer(worker_.loop(), std::chrono::milliseconds(limit));
  bool timed_out = false;
  std::weak_ptr<ServerConnection> weak = shared_from_this();
  Socket* raw = &socket;
  timer.async_wait([this, weak, raw, &timed_out](const boost::system::error_code& stopped) {
    if (stopped || weak.expired()) return;
    timed_out = true;
    boost::system::error_code ignored;
    if (channel_) channel_->transport.socket().cancel(ignored);
    else raw->cancel(ignored);
  });
  const std::string timeout_text = where + "timeout expired after " + std::to_string(limit) + " ms";

  co_await socket.async_connect(target.endpoint, asio::redirect_error(use_awaitable, ec));
  if (timed_out) co_return timeout_text;
  if (ec) {
    timer.cancel();
    co_return where + ec.message();
  }
  channel_.emplace(std::move(socket));
  Transport& transport = channel_->transport;
  const auto wait = [&transport](bool write) {
    return transport.socket().async_wait(write ? Socket::wait_write : Socket::wait_read, use_awaitable);
  };
  std::string out;
  const auto write_all = [&]() -> bool {
    Gather gather;
    gather.own([&](std::string& o) { o = out; });
    out.clear();
    return channel_->send(gather, worker_.tls_scratch());
  };
  std::string failure;
  try {
    if (tls) {
      if (params.sslnegotiation == conf::SslNegotiation::Postgres) {
        protocol::Writer(out).begin_untyped().u32(protocol::kSslRequest).end();
        write_all();
        std::uint8_t answer = 0;
        for (;;) {
          const IoResult got = transport.read(std::span(&answer, 1));  // one byte only: nothing unencrypted may follow
          if (got.status == IoStatus::Ok) break;
          if (got.status != IoStatus::WouldBlock) co_return where + "server closed the connection unexpectedly";
          co_await wait(false);
        }
        if (answer == 'N') {
          if (params.sslmode == conf::SslMode::Prefer || params.sslmode == conf::SslMode::Allow) tls = false;
          else co_return where + "server does not support SSL, but SSL was required (sslmode)";
        } else if (answer != 'S') {
          co_return where + "received invalid response to SSL negotiation";
        }
      }
      if (tls) {
        transport.start_tls(upstream->tls.get(), false);
        prepare_client(transport.ssl(), params, target.host);
        for (;;) {
          const IoResult shaken = transport.handshake();
          if (shaken.status == IoStatus::Ok) break;
          if (shaken.status != IoStatus::WouldBlock) {
            retry_other_tls_ = true;
            co_return where + "SSL error: " + transport.tls_error();
          }
          co_await wait(transport.wants_write());
        }
      }
    }
    protocol::ServerCredentials credentials;
    credentials.user = params.user;
    credentials.password = params.password;
    credentials.encrypted = tls;
    credentials.require_auth = params.requireAuth;
    if (tls) credentials.channel_binding = channel_binding(transport.ssl(), false);
    using Binding = protocol::ServerCredentials::Binding;
    credentials.binding = params.channelBinding == conf::ChannelBinding::Disable ? Binding::Disable
                          : params.channelBinding == conf::ChannelBinding::Require ? Binding::Require
                                                                                   : Binding::Prefer;
    protocol::Startup startup;
    startup.parameters.emplace_back("user", params.user);
    startup.parameters.emplace_back("database", params.dbname);
    for (const auto& parameter : params.startup) startup.parameters.push_back(parameter);
    protocol::ServerLogin login(std::move(credentials), std::move(startup), &worker_.scram_keys);
    login.begin(out);
    write_all();
    auto step = protocol::ServerLogin::Step::NeedFrame;
    std::string in;
    while (step == protocol::ServerLogin::Step::NeedFrame) {
      if (in.size() >= protocol::kHeaderSize) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(in.data());
        const std::size_t total = std::size_t{protocol::load_u32(bytes + 1)} + 1;
        if (total > 64 * 1024 || total < protocol::kHeaderSize) {
          login_sqlstate_ = "08P01";
          co_return where + "received an invalid message during login";
        }
        if (in.size() >= total) {
          const protocol::Bytes body(bytes + protocol::kHeaderSize, total - protocol::kHeaderSize);
          step = login.on_frame(in[0], body, out);
          in.erase(0, total);
          if (!out.empty()) write_all();
          continue;
        }
      }
      if (!channel_->flush(worker_.tls_scratch())) co_return where + "connection broken";
      const IoResult got = transport.read(worker_.scratch());
      if (got.status == IoStatus::WouldBlock) {
        co_await wait(channel_->queued() > 0 || transport.wants_write());
        continue;
      }
      if (got.status != IoStatus::Ok) co_return where + "server closed the connection unexpectedly";
      in.append(reinterpret_cast<const char*>(worker_.scratch().data()), got.bytes);
    }
    if (step == protocol::ServerLogin::Step::Failed) {
      const protocol::ErrorFields& error = login.error();
      login_sqlstate_ = error.sqlstate;
      retry_other_tls_ = error.sqlstate.starts_with("28");
      co_return error.message;
    }
    channel_->unread = std::move(in);
    pid_ = login.pid();
    cancel_key_ = login.key();
    parameters_ = login.parameters();
    target_ = target;
    if (!session_fits(parameters_, wanted)) {
      login_sqlstate_ = "08006";
      co_return where + "session is not as target_session_attrs asks";
    }
  } catch (const boost::system::system_error& e) {
    failure = timed_out ? timeout_text : where + e.code().message();
  }
  co_return failure;
}

}  // namespace pgsidecar::proxy
