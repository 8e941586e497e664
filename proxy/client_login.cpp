// How a client begins: TLS, cancel, login, and what it is told at its end. Part of ClientSession.
#include <openssl/rand.h>
#include <strings.h>

#include <boost/asio/post.hpp>
#include <utility>

#include "proxy/client_console.hpp"
#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/tls.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Bytes;
using protocol::kHeaderSize;

namespace {

constexpr std::size_t kMaxStartup = 10 * 1024;
constexpr std::size_t kMaxPassword = 8 * 1024;

/// As the server's parse_bool: a beginning of a word of the value, in any case, that is one of no other.
bool is_bool(std::string_view text, bool value) {
  const auto begins = [&](std::string_view word, std::size_t least) {
    return text.size() >= least && text.size() <= word.size() && ::strncasecmp(text.data(), word.data(), text.size()) == 0;
  };
  return value ? begins("true", 1) || begins("yes", 1) || begins("on", 2) || text == "1"
               : begins("false", 1) || begins("no", 1) || begins("off", 2) || text == "0";
}

}  // namespace

/// What only a login needs.
struct ClientSession::Login {
  std::optional<protocol::ClientLogin> exchange;
  protocol::Startup startup;
  std::string user, database, peer;
  StartupSettings asked;
  bool console = false, own_user = false;
  bool greeted = false;  // it had a server connection once, which was lost
};

ClientSession::ClientSession(Worker& worker, Socket socket, std::uint32_t id, std::string peer)
    : worker_(worker),
      id_(id),
      key_pid_(id),
      connected_at_(worker.now()),
      channel_(std::move(socket), worker.meter),
      login_(std::make_unique<Login>()) {
  login_->peer = std::move(peer);
  login_deadline = worker.now() + std::chrono::milliseconds(worker.config().limits.loginTimeoutMillis);
}

ClientSession::~ClientSession() = default;

std::size_t ClientSession::on_startup(Bytes in) {
  if (in.size() < 4) return 0;
  const std::uint32_t length = protocol::load_u32(in.data());
  if (length < 8 || length > kMaxStartup) {
    fatal("08P01", "invalid length of startup packet");
    return 0;
  }
  if (in.size() < length) return 0;
  const Bytes body = in.subspan(4, length - 4);
  const std::uint32_t code = protocol::load_u32(body.data());
  const auto answer = [&](char c) { worker_.to_client.own([c](std::string& out) { out.push_back(c); }); };
  const bool encrypted = channel_.transport.is_tls();  // then a request for it is no known protocol, as with the server
  if (code == protocol::kSslRequest && !encrypted) {
    const bool tls = worker_.client_tls() != nullptr;
    if (tls && in.size() > length) {
      fatal("08P01", "received unencrypted data after SSL request");  // injected before the handshake
      return 0;
    }
    answer(tls ? 'S' : 'N');
    send(worker_.to_client);
    if (tls) {
      channel_.transport.start_tls(worker_.client_tls(), true);
      transition(State::Tls);
      wait_readable();
    }
    return length;
  }
  if (code == protocol::kGssEncRequest && !encrypted) {
    answer('N');
    send(worker_.to_client);
    return length;
  }
  if (code == protocol::kCancelRequest) {
    protocol::Reader r(body.subspan(4));
    const std::uint32_t pid = r.u32();
    const Bytes key = r.rest();
    // It is closed when the server has heard of it, as on a direct connection, so that no later statement is hit.
    transition(State::Closing);
    std::shared_ptr<void> done(nullptr,
                               [self = shared_from_this()](void*) { boost::asio::post(self->worker_.loop(), [self] { self->close(); }); });
    if (r.ok()) worker_.cancel(pid, {reinterpret_cast<const char*>(key.data()), key.size()}, std::move(done));
    return length;
  }
  if (code >> 16 != 3) {
    worker_.reject(pool::RejectReason::Unsupported);
    fatal("0A000", "unsupported frontend protocol " + std::to_string(code >> 16) + "." + std::to_string(code & 0xffff) +
                       ": server supports 3.0 to 3.2");
    return 0;
  }
  auto startup = protocol::parse_startup(body);
  if (!startup) {
    fatal("08P01", "invalid startup packet layout: expected terminator as last byte");
    return 0;
  }
  begin_login(std::move(*startup));
  return length;
}

void ClientSession::handle_tls() {
  const IoResult result = channel_.transport.handshake();
  if (result.status == IoStatus::WouldBlock) {
    if (channel_.transport.wants_write())
      wait_writable();
    else
      wait_readable();
    return;
  }
  if (result.status != IoStatus::Ok) {
    worker_.reject(pool::RejectReason::Tls);
    log::warn("client_tls_failed", about(), "client {} from {}: TLS handshake failed: {}", id_, login_->peer,
              channel_.transport.tls_error());
    return close();
  }
  if (direct_tls_ && !negotiated_alpn(channel_.transport.ssl())) {
    worker_.reject(pool::RejectReason::Tls);
    complain("08P01", "received direct SSL connection request without ALPN protocol negotiation extension");
    return close();
  }
  transition(State::Startup);
  on_readable();
}

void ClientSession::begin_login(protocol::Startup startup) {
  Login& login = *login_;
  login.startup = std::move(startup);
  constexpr std::size_t kLongestName = 63;
  login.user = login.startup.get("user").substr(0, kLongestName);
  login.database = login.startup.get("database").substr(0, kLongestName);
  if (login.user.empty()) {
    worker_.reject(pool::RejectReason::Auth);
    return fatal("28000", "no PostgreSQL user name specified in startup packet");
  }
  if (login.database.empty()) login.database = login.user;
  const conf::Config& config = worker_.config();
  login.console = worker_.is_console(login.database);
  login.own_user = login.console && is_own_user();
  if (worker_.refuses_clients() && !login.console) {
    worker_.reject(pool::RejectReason::Draining);
    return fatal("57P03", "the database system is shutting down");
  }
  if ((worker_.full() || worker_.crowded()) && !login.console) return refuse_full();
  const bool tls = channel_.transport.is_tls();
  if (!tls && !is_on_unix_socket() && (config.tls.mode == conf::TlsMode::Require || config.tls.mode == conf::TlsMode::VerifyFull)) {
    worker_.reject(pool::RejectReason::Tls);
    return fatal("28000", "no pg_hba.conf entry for this connection: pgsidecar requires SSL encryption (tls.mode)");
  }
  for (const auto& [name, value] : login.startup.parameters) {
    if (name != "replication" || is_bool(value, false)) continue;
    worker_.reject(pool::RejectReason::Unsupported);
    if (value != "database" && !is_bool(value, true))
      return fatal("22023", "invalid value for parameter \"replication\": \"" + value + "\"",
                   "Valid values are: \"false\", 0, \"true\", 1, \"database\".");
    return fatal("0A000", "replication connections are not supported through pgsidecar", "Connect to the server directly.");
  }

  std::vector<std::string> unknown;
  for (const auto& [name, value] : login.startup.parameters)
    if (name.starts_with("_pq_.")) unknown.push_back(name);
  const std::uint32_t version = std::min<std::uint32_t>(login.startup.version, protocol::kProtocol32);
  if (login.startup.version > protocol::kProtocol32 || !unknown.empty() ||
      (login.startup.version > protocol::kProtocol30 && login.startup.version < protocol::kProtocol32)) {
    const std::uint32_t served = version == protocol::kProtocol32 ? version : std::uint32_t{protocol::kProtocol30};
    worker_.to_client.own([&](std::string& out) { protocol::write_negotiate_protocol_version(out, served, unknown); });
  }

  using Method = conf::AuthMethod;
  protocol::ClientAuth method = protocol::ClientAuth::Trust;
  switch (login.own_user ? Method::Trust : config.auth.method) {
    case Method::ScramSha256: method = protocol::ClientAuth::Scram; break;
    case Method::Md5: method = protocol::ClientAuth::Md5; break;
    case Method::Password: method = protocol::ClientAuth::Password; break;
    case Method::Trust: break;
    case Method::Cert:
      if (!tls || peer_common_name(channel_.transport.ssl()) != login.user) {
        worker_.reject(pool::RejectReason::Auth);
        return fatal("28000", "certificate authentication failed for user \"" + login.user + "\"");
      }
      break;
  }
  login.exchange.emplace(
      method, login.user,
      protocol::ClientSecret{worker_.secret_of(login.user, login.database), !login.console && worker_.passes_password_on(login.user)},
      tls ? channel_binding(channel_.transport.ssl(), true) : std::string(), &worker_.scram_keys);
  transition(State::Authenticating);
  protocol::ClientLogin::Step step{};
  worker_.to_client.own([&](std::string& out) { step = login.exchange->begin(out); });
  if (step == protocol::ClientLogin::Step::Accepted) accepted();
}

void ClientSession::refuse_full() {
  worker_.reject(pool::RejectReason::MaxClients);
  const std::uint32_t most = worker_.most_clients();
  const std::string_view by = most < worker_.config().limits.maxClients ? "the limit of open files" : "limits.maxClients";
  fatal("53300", "sorry, too many clients already", fmt::format("pgsidecar serves at most {} clients ({}).", most, by));
}

std::size_t ClientSession::on_password(Bytes in) {
  if (in.size() < kHeaderSize) return 0;
  const std::uint32_t length = protocol::load_u32(in.data() + 1);
  if (length < 4 || length > kMaxPassword) {
    fatal("08P01", "invalid password packet size");
    return 0;
  }
  const std::size_t total = std::size_t{length} + 1;
  if (in.size() < total) return 0;
  protocol::ClientLogin::Step step{};
  worker_.to_client.own([&](std::string& out) {
    step = login_->exchange->on_frame(static_cast<char>(in[0]), in.subspan(kHeaderSize, total - kHeaderSize), out);
  });
  if (step == protocol::ClientLogin::Step::Accepted || step == protocol::ClientLogin::Step::Given) accepted();
  if (step == protocol::ClientLogin::Step::Rejected) {
    worker_.reject(pool::RejectReason::Auth);
    worker_.count_error("28P01");
    complain("28P01", "password authentication failed");
    send(worker_.to_client);
    transition(State::Closing);
    if (channel_.queued() == 0) close();
  }
  return total;
}

void ClientSession::accepted() {
  if (login_->console)
    return begin_console(login_->user, login_->database, login_->own_user, login_->startup.version >= protocol::kProtocol32);
  if (worker_.disabled(login_->database)) {
    worker_.reject(pool::RejectReason::Disabled);
    return fatal("55000", "database does not allow connections: " + login_->database, "An operator has disabled it; ENABLE ends that.");
  }
  std::string sqlstate, error;
  PoolEntry* entry = worker_.find_pool(login_->database, login_->user, sqlstate, error);
  if (!entry) {
    worker_.reject(sqlstate.starts_with("28") ? pool::RejectReason::Auth : pool::RejectReason::UnknownDatabase);
    return fatal(sqlstate, error);
  }
  if (worker_.full()) return refuse_full();  // others have come in while this one was asked for its password
  auto asked = settings_of(login_->startup, sqlstate, error);
  if (!asked) {
    worker_.reject(pool::RejectReason::Unsupported);
    return fatal(sqlstate, error);
  }
  // Neon's proxy forwards no client_encoding of the connection string's at the server's login.
  if (const std::string& encoding = worker_.encoding_of(entry->database); !encoding.empty())
    asked->values.try_emplace("client_encoding", encoding);
  entry_ = entry;
  ++entry->clients;
  for (const auto& [name, value] : asked->values)
    if (name.find('.') != std::string::npos) entry->settings.learn({name});
  login_->asked = std::move(*asked);
  transition(State::Greeting);
  worker_.on_login();
  worker_.verify(*this, login_->exchange->given_password(), login_->asked.date_styles);
}

void ClientSession::verified() {
  if (state_ != State::Greeting) return;
  const std::string* date_style = entry_->settings.date_style(login_->asked.date_styles);
  if (!login_->asked.date_styles.empty() && !date_style)  // forgotten in the meantime
    return worker_.verify(*this, login_->exchange->given_password(), login_->asked.date_styles);
  const bool passed_on = !login_->exchange->given_password().empty();
  if (passed_on) worker_.to_client.own([](std::string& out) { protocol::ClientLogin::confirm(out); });
  if (date_style) login_->asked.values.emplace("datestyle", *date_style);
  settings = login_settings_ = entry_->settings.intern(std::move(login_->asked.values));
  begin_session();
  if (passed_on) send(worker_.to_client);
}

void ClientSession::refused(const protocol::ErrorFields& error) {
  worker_.reject(error.sqlstate.starts_with("28") ? pool::RejectReason::Auth : pool::RejectReason::Server);
  fatal(error.sqlstate, error.message, error.hint, error.detail);
}

void ClientSession::begin_session() {
  login_deadline = pool::Time::max();
  mode_ = entry_->pool.settings().mode;
  entry_->shared |= rewrites();
  entry_->settings.derive_welcome(*settings);
  if (!settings->welcome.empty() && rewrites()) return greet();
  worker_.want_server(*this);  // in session mode it is told the server's own pid
}

void ClientSession::greet() {
  const bool long_key = login_->startup.version >= protocol::kProtocol32;
  cancel_key_.resize(long_key ? 32 : 4);
  RAND_bytes(reinterpret_cast<unsigned char*>(cancel_key_.data()), static_cast<int>(cancel_key_.size()));
  if (!rewrites() && server_) key_pid_ = server_->pid();
  const auto& parameters = server_ ? server_->parameters() : settings->welcome;
  worker_.to_client.own([&](std::string& out) {
    for (const auto& [name, value] : parameters) protocol::write_parameter_status(out, name, value);
    protocol::write_backend_key_data(out, key_pid_, cancel_key_);
    protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  });
  log::debug("client_login", about(), "client {}: user {} database {} from {} logged in", id_, login_->user, login_->database,
             login_->peer);
  login_.reset();
  entry_->used = true;
  told_ = fingerprint_of(parameters);
  worker_.on_greeted();
  transition(server_ ? State::Active : State::Ready);
  send(worker_.to_client);
}

// Nothing of its own was sent yet: it waits for another server connection, once.
void ClientSession::greet_elsewhere(const protocol::ErrorFields& error) {
  if (std::exchange(login_->greeted, true)) return on_greeting_failed(error);
  boost::asio::post(worker_.loop(), [self = shared_from_this()] {
    const Worker::Turn turn(self->worker_);
    if (self->state_ == State::Greeting && !self->server_ && !self->waiting()) self->worker_.want_server(*self);
  });
}

void ClientSession::on_greeting_failed(const protocol::ErrorFields& error) {
  worker_.reject(pool::RejectReason::Server);
  fatal(error.sqlstate, error.message, error.hint, error.detail);
}

log::About ClientSession::about() const {
  log::About about;
  about.client = id_;
  about.request = request_;
  if (login_) {
    about.database = login_->database;
    about.user = login_->user;
  }
  if (!entry_) return about;
  about.database = entry_->database;
  about.user = entry_->user;
  about.application = application();
  if (server_) {
    about.server = server_->id();
    about.pid = server_->pid();
  }
  return about;
}

void ClientSession::complain(std::string_view sqlstate, std::string_view message) {
  log::About where = about();
  where.sqlstate = sqlstate;
  if (login_)
    log::warn("client_refused", where, "client {} ({}@{} from {}): {} {}", id_, login_->user, login_->database, login_->peer, sqlstate,
              message);
  else
    log::warn("client_error", where, "client {} ({}@{}): {} {}", id_, entry_->user, entry_->database, sqlstate, message);
}

}  // namespace pgsidecar::proxy
