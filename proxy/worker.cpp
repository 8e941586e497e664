#include "proxy/worker.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <bit>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/post.hpp>
#include <utility>

#include "conf/load.hpp"
#include "proxy/log.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using std::chrono::milliseconds;

namespace {

/// How long a pool keeps connections that nobody uses: they are gone somewhat before the server would end them.
milliseconds rest_after(const conf::Upstream& upstream) {
  return milliseconds(std::uint64_t{900} * upstream.suspendAfterSeconds);
}

/// So long those who wait bear that the only place is taken by the connection that listens.
constexpr std::chrono::seconds kWithoutPlace{1};

constexpr std::size_t kToBeRefused = 8;  // clients for whom there is no room are taken in to be told so

/// Its connections were made with these.
bool same_connections(const conf::PoolSettings& a, const conf::PoolSettings& b) {
  return a.mode == b.mode && a.keepAlive == b.keepAlive && a.keepAliveInitialDelayMillis == b.keepAliveInitialDelayMillis &&
         a.maxUses == b.maxUses && a.maxLifetimeSeconds == b.maxLifetimeSeconds;
}

/// The server has refused the last login, or there is no password to try another one with.
bool is_hopeless(const PoolEntry& entry, pool::Time now) {
  return is_refused(entry, now) || (entry.lacks_password() && entry.connecting == 0 && entry.logins.empty() && stands_alone(entry));
}

}  // namespace

/// A failure that more tries won't mend: wrong credentials, no such database, one that takes no connections, a value that it doesn't take.
bool is_permanent(std::string_view sqlstate) {
  constexpr std::array<std::string_view, 5> kClasses{"22", "28", "3D", "42", "55"};
  return std::find(kClasses.begin(), kClasses.end(), sqlstate.substr(0, 2)) != kClasses.end();
}

/// No connection of the pool is open: what the next connect hears counts for all who wait.
bool stands_alone(const PoolEntry& entry) {
  return entry.pool.staying() <= entry.connecting;
}

/// The server has refused the last login, and it is too early to try again.
bool is_refused(const PoolEntry& entry, pool::Time now) {
  return is_permanent(entry.last_failure.sqlstate) && !entry.backoff.may_try(now, true) && stands_alone(entry);
}

Prepared::Prepared(std::shared_ptr<const conf::Config> from, const conf::Environment& env)
    : config(std::move(from)), upstream(conf::resolve_upstream(config->upstream, env)) {
  if (config->tls.mode != conf::TlsMode::Disable) client_tls = make_server_context(config->tls);
}

Worker::Worker(asio::io_context& data, Control& control, Prepared prepared)
    : data_(data),
      control_(control),
      timer_(data),
      ports_(data, [this](Socket socket, std::string peer) { return add_client(std::move(socket), std::move(peer)); }),
      started_at_(pool::Clock::now()),
      averages_(started_at_) {
  use_config(std::move(prepared));
}

Worker::~Worker() {
  // Their pending operations keep them until the loop is gone, which is later than the pools.
  for (const auto& [key, entry] : pools_)
    for (const auto& [id, server] : std::exchange(entry->servers, {})) server->abandon();
}

void Worker::use_config(Prepared prepared) {
  config_ = std::move(prepared.config);
  client_tls_ = std::move(prepared.client_tls);
  certificates_.erase("tls.certificate");
  if (client_tls_) saw_certificate("tls.certificate", SSL_CTX_get0_certificate(client_tls_.get()));
  upstream_ = std::move(prepared.upstream);
  ports_.keep_alive = config_->pool.keepAlive ? std::optional(keep_alive_of(config_->pool)) : std::nullopt;
  for (const std::string& warning : conf::upstream_warnings(*config_, control_.environment()))
    log::warn("upstream_warning", {}, "{}", warning);
  if (config_->databases.empty()) databases_[upstream_.dbname] = describe(upstream_.dbname);
  for (const auto& [name, database] : config_->databases)
    if (name != "*") databases_[name] = describe(name);
}

void Worker::reload(Prepared prepared) {
  const Turn turn(*this);
  auto before = std::exchange(databases_, {});
  use_config(std::move(prepared));
  control_.forget_passwords();
  // A pool that the configuration doesn't name any more keeps its settings until its clients have left.
  for (auto& [key, entry] : pools_) {
    entry->settings.forget_welcomes();
    entry->catalog.forget();
    entry->backoff.hurry();
    entry->passes_password_on = passes_password_on(entry->user);
    if (!entry->passes_password_on) entry->given_password.reset();
    std::string sqlstate, error;
    auto plan = plan_pool(entry->database, entry->user, sqlstate, error);
    if (!databases_.contains(entry->database))
      databases_[entry->database] = plan ? describe(entry->database) : std::move(before[entry->database]);
    const bool same = plan && plan->upstream == entry->upstream && same_connections(plan->settings, entry->pool.settings());
    if (plan) {
      entry->pool.set_settings(plan->settings);
      entry->upstream = std::move(plan->upstream);
      entry->pool.set_rest(rest_after(entry->upstream));
    }
    if (same)
      recheck(*entry);
    else
      outdate_servers(*entry, [](const ServerConnection&) { return true; });
  }
  weighed_.clear();
  outweighed_.clear();
  const auto is_unused = [this](const auto& upstream) {
    return std::none_of(databases_.begin(), databases_.end(), [&](const auto& one) { return one.second.upstream == upstream.first; });
  };
  std::erase_if(upstreams_, is_unused);
  std::erase_if(upstream_times_, is_unused);
  std::erase_if(certificates_, [this](const auto& seen) {
    return seen.first != "tls.certificate" && std::none_of(databases_.begin(), databases_.end(), [&](const auto& one) {
             return one.second.upstream.find(seen.first) != std::string::npos;
           });
  });
  kick();
}

// --- logins and leases

std::optional<std::string> Worker::secret_of(const std::string& user, const std::string& database) {
  const auto it = config_->users.find(user);
  if (it != config_->users.end() && it->second.password) {
    try {
      return conf::expand(*it->second.password, control_.environment());
    } catch (const conf::ConfigError& e) {
      log::error("password_unreadable", {.user = user}, "password of user \"{}\": {}", user, e.what());
      return std::nullopt;
    }
  }
  if (user == upstream_.user) return upstream_.users_password();
  return password_of_own_user(database, user);
}

std::optional<std::string> Worker::password_of_own_user(const std::string& database, const std::string& user) const {
  const auto it = databases_.find(database);
  const DatabaseEntry entry = it != databases_.end() ? it->second : describe(database);
  return entry.shown.forceUser == user && !user.empty() ? std::optional(entry.password) : std::nullopt;
}

std::optional<Worker::PoolPlan> Worker::plan_database(const std::string& database) const {
  if (const auto it = config_->databases.find(database); it != config_->databases.end())
    return PoolPlan{it->second.pool, it->second.upstream};
  if (const auto any = config_->databases.find("*"); any != config_->databases.end()) {
    PoolPlan plan{any->second.pool, any->second.upstream};
    plan.upstream.keys["dbname"] = database;
    return plan;
  }
  if (database == upstream_.dbname) return PoolPlan{config_->pool, config_->upstream};
  return std::nullopt;
}

std::optional<Worker::PoolPlan> Worker::plan_pool(const std::string& database, const std::string& user, std::string& sqlstate,
                                                  std::string& error) const {
  auto plan = plan_database(database);
  if (!plan) {
    sqlstate = "3D000";
    error = "database \"" + database + "\" does not exist";
    return std::nullopt;
  }
  const auto named = config_->users.find(user);
  const bool has_password = named != config_->users.end() && named->second.password;
  if (user != upstream_.user && (has_password || !password_of_own_user(database, user))) {
    if (named == config_->users.end() && !config_->users.contains("*")) {
      sqlstate = "28000";
      error = "role \"" + user + "\" does not exist";
      return std::nullopt;
    }
    plan->upstream.keys["user"] = user;
    plan->upstream.keys["password"] = has_password ? *named->second.password : "";
  }
  if (passes_password_on(user)) plan->upstream.passwordCommand.clear();
  if (named != config_->users.end()) plan->settings = conf::overlay(plan->settings, named->second.pool);
  return plan;
}

PoolEntry* Worker::find_pool(const std::string& database, const std::string& user, std::string& sqlstate, std::string& error) {
  auto plan = plan_pool(database, user, sqlstate, error);
  if (!plan) return nullptr;
  auto key = std::make_pair(database, user);
  if (const auto it = pools_.find(key); it != pools_.end()) return it->second.get();
  auto entry = std::make_shared<PoolEntry>(database, user, plan->settings, std::move(plan->upstream));
  entry->passes_password_on = passes_password_on(user);
  entry->paused = is_paused(database);
  entry->pool.set_rest(rest_after(entry->upstream));
  entry->number = ++last_pool_;
  entry->left_at = now();
  if (succession_) succession_->join(*entry);
  if (!databases_.contains(database)) databases_[database] = describe(database);
  PoolEntry* added = pools_.emplace(std::move(key), std::move(entry)).first->second.get();
  weigh_capacity(upstream_of(database));
  return added;
}

pool::Time Worker::forget_at(const PoolEntry& entry) const {
  if (entry.clients > 0 || !entry.servers.empty() || !entry.logins.empty() || succession_) return pool::Time::max();
  const auto& [databases, users] = std::tie(config_->databases, config_->users);
  const bool database = databases.contains(entry.database) || entry.database == upstream_.dbname;
  const bool user = users.contains(entry.user) || entry.user == upstream_.user;
  if (database && user) return pool::Time::max();
  return entry.left_at + (entry.used ? std::chrono::seconds(std::chrono::hours(1)) : std::chrono::seconds(1));
}

bool Worker::passes_password_on(const std::string& user) const {
  return config_->auth.method == conf::AuthMethod::Password && config_->users.contains("*") && !config_->users.contains(user) &&
         user != upstream_.user;
}

void Worker::listen(conf::PassedSockets& passed) {
  ports_.open(config_->listen, passed);
}

void Worker::begin() {
  started_ = true;
  ports_.accept();
  if (quits_at() != pool::Time::max()) kick();
}

bool Worker::add_client(Socket socket, std::string peer) {
  std::uint32_t id = 0;
  do id = static_cast<std::uint32_t>(random_()) & 0x7fffffff;
  while (id <= kMaxPid || clients_.contains(id));
  auto client = std::make_shared<ClientSession>(*this, std::move(socket), id, std::move(peer));
  clients_.emplace(id, client);
  client->start();
  kick();
  ++logging_in_;
  return may_accept();
}

bool Worker::may_accept() const {
  return logging_in_ < config_->limits.maxLoginClients && clients_.size() - consoles_ < room_ + kToBeRefused;
}

void Worker::accept_more() {
  if (may_accept()) ports_.more();
}

void Worker::set_room(std::size_t clients) {
  room_ = clients;
  accept_more();
}

void Worker::login_over() {
  --logging_in_;
  accept_more();
}

void Worker::on_login() {
  login_over();
  ++logged_in_;
  idle_since_ = pool::Time::max();
}

void Worker::want_server(ClientSession& client) {
  PoolEntry& entry = *client.entry();
  if (!entry.paused && !entry.listener.wants() && !entry.pool.any_waiting())
    if (ServerConnection* server = take_idle(entry)) return server->lease(client);
  entry.pool.wait(client, now());
  kick();
  if (is_hopeless(entry, now())) {  // the client is in the middle of a request
    asio::post(data_, [this, keeps = entry.shared_from_this(), &entry] {
      const Turn turn(*this);
      if (is_hopeless(entry, now())) refuse_waiters(entry);
    });
    return;
  }
  serve(entry);
}

void Worker::run_later(ClientSession& client) {
  runnable_.push_back(client.shared_from_this());
  if (turns_ == 0) asio::post(data_, [this] { const Turn turn(*this); });
}

void Worker::run_runnable() {
  while (!runnable_.empty()) {
    ++turns_;
    std::swap(runnable_, running_);
    for (const auto& client : running_) step(*client, [&client] { client->go_on(); });
    running_.clear();
    --turns_;
  }
}

void Worker::serve(PoolEntry& entry) {
  if (!entry.content()) serve_from(entry);
  if (succession_) succession_->balance(entry);
}

bool Worker::wants_listener(const PoolEntry& entry) const {
  return entry.listener.wants_server(now()) && entry.clients > 0 && (!draining_ || waits_for_clients_);
}

void Worker::serve_from(PoolEntry& entry) {
  if (entry.serving) return;  // whoever has let go of a server connection at once; it goes on
  const struct Serving {
    bool& on;
    ~Serving() { on = false; }
  } serving{entry.serving = true};
  count_stuck(entry);
  if (entry.paused) return;
  const bool listens = wants_listener(entry);
  if (listens && entry.pool.any_idle()) {
    auto* idle = static_cast<ServerConnection*>(entry.pool.any_idle());
    idle->unlink();
    entry.listener.adopt(*idle);
  }
  if (!entry.logins.empty()) serve_logins(entry);
  while (entry.pool.any_waiting()) {
    ServerConnection* server = take_idle(entry);
    if (!server) break;
    server->lease(*static_cast<ClientSession*>(entry.pool.next_waiter()));
  }
  if (!entry.backoff.may_try(now(), entry.pool.any_waiting()) || entry.lacks_password()) return;
  const conf::PoolSettings& settings = entry.pool.settings();
  const std::uint32_t connecting = connecting_for_all(entry);
  std::uint32_t open = entry.pool.wanted(connecting);
  if (open > 0) open = entry.pool.wanted(connecting + returning_soon(entry));
  const bool wanted = entry.clients > 0 && !draining_;
  if (entry.replacements > 0) {
    const std::uint32_t now_possible = std::min(entry.pool.room(), entry.replacements);
    open = std::max(open, wanted ? now_possible : 0);
    entry.replacements = wanted ? entry.replacements - now_possible : 0;
  }
  if (open == 0 && wanted && !entry.pool.resting() && entry.pool.staying() < settings.min && entry.pool.room() > 0) open = 1;
  if (open == 0 && listens && !entry.listener.has_server() && connecting == 0 && entry.pool.room() > 0) open = 1;
  if (entry.backoff.failures() > 0) open = std::min(open, connecting == 0 ? 1u : 0u);  // one probes for all
  for (; open > 0; --open) open_server(entry, {});
}

std::uint32_t Worker::returning_soon(const PoolEntry& entry) const {
  std::uint32_t count = 0;
  for (const auto& [id, server] : entry.servers) count += server->returns_soon(now());
  return count;
}

void Worker::open_server(PoolEntry& entry, std::optional<ServerConnection::Login> login) {
  auto server = std::make_shared<ServerConnection>(*this, entry, next_server_++);
  entry.servers.emplace(server->id(), server);
  ++entry.connecting;
  server->connect(std::move(login));
}

void Worker::see_off(PoolEntry& entry, Channel channel, const Target& target, bool answered) {
  auto server = std::make_shared<ServerConnection>(*this, entry, next_server_++);
  entry.servers.emplace(server->id(), server);
  server->see_off(std::move(channel), target, answered);
}

void Worker::on_connected(ServerConnection& server) {
  PoolEntry& entry = server.entry();
  --entry.connecting;
  database_seen(upstream_of(entry.database), true);
  if (server.login()) {
    if (!server.login()->password.empty()) {
      entry.given_password = server.login()->password;
      entry.given_at = now();
    }
    if (const auto client = server.take_login_client()) client->verified();
  }
  if (const auto it = server.parameters().find("server_version");
      it != server.parameters().end() && upstream_of(entry.database) == name_of(upstream_))
    database_version_ = it->second;
  log::info("server_connected", server.about(), "server {} ({}@{}, pid {}): connected", server.id(), entry.user, entry.database,
            server.pid());
  outdate_servers(entry, [this](const ServerConnection& one) { return is_gone(one); });
  // With no other connection there, nothing says that this is the database of before: another one may have its name.
  const auto is_there = [&](const auto& one) {
    const ServerConnection& other = *one.second;
    return &other != &server && other.alive() && !other.condemned && address_of(other.target()) == address_of(server.target());
  };
  if (std::none_of(entry.servers.begin(), entry.servers.end(), is_there)) {
    entry.catalog.forget();
    statements.forget_told_types();
  }
  connect_over(entry);
  if (tried_) std::exchange(tried_, nullptr)({});
  kick();
}

void Worker::on_connect_failed(ServerConnection& server, const protocol::ErrorFields& error) {
  PoolEntry& entry = server.entry();
  --entry.connecting;
  const bool is_logins = server.login() && login_failed(entry, *server.login(), error);
  const bool is_outdated = server.condemned && is_permanent(error.sqlstate);  // the configuration has changed meanwhile
  if (is_logins || is_outdated) {
    entry.servers.erase(server.id());
    connect_over(entry);
    check_operations();
    serve(entry);
    return check_stopped();
  }
  if (error.sqlstate == "28P01") entry.given_password.reset();  // changed on the server: the next client brings the new one
  const bool is_news = error.message != entry.last_failure.message;
  entry.last_failure = error;
  ++entry.pool.counters().connectFailures;
  entry.backoff.failed(now(), random(), is_permanent(error.sqlstate));
  const bool wakes = entry.upstream.suspendAfterSeconds > 0 && may_be_waking(upstream_of(entry.database));
  if (is_news || std::has_single_bit(entry.backoff.failures())) {
    const std::string failure = fmt::format("{}@{}: cannot connect ({} in a row): {} {}", entry.user, entry.database,
                                            entry.backoff.failures(), error.sqlstate, error.message);
    if (wakes)
      log::info("connect_failed", server.about(error.sqlstate), "{} (it may be waking up)", failure);
    else
      log::warn("connect_failed", server.about(error.sqlstate), "{}", failure);
  }
  // It isn't asleep. Other answers may be of who stands in front of one that is.
  if (is_permanent(error.sqlstate) || error.sqlstate == "53300") upstream_times_[upstream_of(entry.database)].connect_begun = {};
  if (is_answer(error.sqlstate))
    database_seen(upstream_of(entry.database), true);
  else if (!wakes)
    database_seen(upstream_of(entry.database), false, error.message);
  entry.servers.erase(server.id());
  check_operations();
  if (is_permanent(error.sqlstate) && stands_alone(entry)) refuse_waiters(entry);
  connect_over(entry);
  const bool serves = is_answer(error.sqlstate) && !is_permanent(error.sqlstate);  // others, as it seems
  if (tried_) std::exchange(tried_, nullptr)(serves ? std::string() : error.message);
  kick();
  check_stopped();
}

void Worker::connects_last(PoolEntry& entry) {
  entry.backoff.succeeded();
  entry.last_failure = {};
}

// A pooler in front of a server that is down accepts logins and then ends them.
void Worker::lost_unused(const ServerConnection& server, const protocol::ErrorFields& why) {
  PoolEntry& entry = server.entry();
  entry.backoff.failed(now(), random(), false);
  entry.last_failure = why;
  kick();
}

void Worker::refuse_waiters(PoolEntry& entry) {
  while (auto* client = static_cast<ClientSession*>(entry.pool.next_waiter())) {
    if (entry.lacks_password())
      client->fatal("28P01", "the password of user \"" + entry.user + "\" is not known any more",
                    "Connect again: the password that is given at the login is passed on to the server.", entry.last_failure.message);
    else
      client->on_wait_failed(entry.last_failure);
  }
}

void Worker::on_server_closed(ServerConnection& server) {
  PoolEntry& entry = server.entry();
  // The connection may be in the middle of a turn of its own.
  asio::post(data_, [this, keeps = entry.shared_from_this(), &entry, id = server.id()] {
    entry.servers.erase(id);
    check_operations();
    serve(entry);
    check_stopped();
  });
}

void Worker::on_client_closed(ClientSession& client) {
  if (PoolEntry* entry = client.entry())
    --entry->clients, --logged_in_, entry->left_at = now();
  else if (client.is_console())
    --consoles_;
  else
    login_over();
  asio::post(data_, [this, id = client.id(), console = client.is_console()] {
    clients_.erase(id);
    accept_more();
    if (console) abandon_operation(id);
    if (logged_in_ == 0) {
      if (idle_since_ == pool::Time::max()) idle_since_ = now();  // who hasn't logged in, as a port probe, was no client
      kick();
    }
    check_stopped();
  });
}

// --- cancel

void Worker::cancel(std::uint32_t pid, std::string_view key, std::shared_ptr<void> done) {
  const auto it = std::find_if(clients_.begin(), clients_.end(), [&](const auto& one) {
    const std::string& own = one.second->cancel_key();
    return one.second->key_pid() == pid && own.size() == key.size() && !own.empty() &&
           CRYPTO_memcmp(own.data(), key.data(), own.size()) == 0;
  });
  if (it != clients_.end()) return it->second->on_cancel(std::move(done));
  if (succession_) succession_->cancel(pid, key);
}

std::string Worker::execute(const pool::Command& command) {
  using Kind = pool::Command::Kind;
  if (command.kind == Kind::ResetStatements) return statement_stats.reset(now()), std::string();
  if (command.kind == Kind::CloseServer) {
    for (auto& [key, entry] : pools_)
      if (const auto it = entry->servers.find(command.id); it != entry->servers.end()) {
        const auto server = it->second;
        log::info("operator", server->about(), "server {} (pid {}): closed by an operator", server->id(), server->pid());
        server->close_by_operator();
        return {};
      }
    return "no server connection has the id " + std::to_string(command.id);
  }
  const auto it = clients_.find(static_cast<std::uint32_t>(command.id));
  if (it == clients_.end() || it->first != command.id) return "no client has the id " + std::to_string(command.id);
  const auto client = it->second;
  log::info("operator", client->about(), "client {}: {} by an operator", client->id(),
            command.kind == Kind::CancelClient ? "cancelled" : "closed");
  if (command.kind == Kind::CancelClient)
    client->on_cancel();
  else
    client->fatal("57P01", "terminating connection due to administrator command");
  return {};
}

// --- time

void Worker::kick() {
  arm_tick(milliseconds(100));
}

void Worker::tick_at(pool::Time at) {
  tick_at_ = at;
  timer_.expires_at(at);
  timer_.async_wait(asio::bind_allocator(TickAllocator<char>(tick_memory_), [this](const boost::system::error_code& ec) {
    if (!ec) tick();
  }));
}

void Worker::close_outdated(PoolEntry& entry) {
  pool::CloseReason reason{};
  while (pool::Slot* slot = entry.pool.outdated(now(), reason)) static_cast<ServerConnection*>(slot)->close(reason);
}

std::string Worker::use_of(const PoolEntry& entry) const {
  const pool::Pool& pool = entry.pool;
  std::string text = fmt::format("{} of {} in use", pool.open_here() + pool.lent(), pool.settings().max);
  if (const auto stuck = pool.stuck_here(); stuck > 0) text += fmt::format(", of which {} {} end", stuck, stuck == 1 ? "doesn't" : "don't");
  return text;
}

protocol::ErrorFields Worker::wait_error(const PoolEntry& entry, bool stranger) const {
  const bool connects = entry.connecting > 0 || !entry.pool.hangs();
  if (!entry.paused && connects && entry.backoff.failures() > 0 && !entry.last_failure.message.empty()) return entry.last_failure;
  const auto seconds_since = [this](pool::Time then) { return std::chrono::duration<double>(now() - then).count(); };
  protocol::ErrorFields error{"ERROR", "53300", {}, {}, {}};
  std::string& text = error.message = fmt::format("timed out after {} ms waiting for a server connection: ", entry.pool.wait_limit());
  if (entry.paused) {
    text += "database \"" + entry.database + "\" is paused";
    return error;
  }
  text += use_of(entry);
  if (entry.connecting > 0) {
    text += fmt::format(", of which {} being opened", entry.connecting);
    const ServerConnection::Attempt* longest = nullptr;
    for (const auto& [id, server] : entry.servers)
      if (!server->attempt.what.empty() && (!longest || server->attempt.since < longest->since)) longest = &server->attempt;
    if (longest) text += fmt::format(": {} for {:.1f} s", longest->what, seconds_since(longest->since));
    if (entry.pool.open() == entry.connecting && entry.pool.lent() == 0) error.sqlstate = "08006";
  }
  if (entry.pool.lent() > 0) text += fmt::format(", {} by the other process of an online restart", entry.pool.lent());
  if (stranger) return error;
  ClientSession* longest = nullptr;
  for (const auto& [id, server] : entry.servers)
    if (server->client() && (!longest || server->client()->transaction_since < longest->transaction_since)) longest = server->client();
  if (longest) {
    const auto& pipeline = longest->server()->pipeline;
    text += fmt::format("; longest held {:.1f} s by client {} (application \"{}\"){}", seconds_since(longest->transaction_since),
                        longest->id(), longest->application(),
                        pipeline.empty() && pipeline.status() != protocol::TxStatus::Idle ? ", idle in transaction" : "");
  }
  return error;
}

void Worker::tick() {
  const pool::Time t = now();
  lag.record(std::exchange(tick_at_, pool::Time::max()), t);
  stir();
  if (averages_.due(t)) averages_.take(sums(), t);
  Look look{.busy = draining_};
  for (auto& [key, entry] : pools_) look_at(*entry, t, look);
  if (std::erase_if(pools_, [&](const auto& pool) { return t >= forget_at(*pool.second); }) > 0)
    std::erase_if(databases_, [this](const auto& database) {
      const std::string& name = database.first;
      return !config_->databases.contains(name) && name != upstream_.dbname &&
             std::none_of(pools_.begin(), pools_.end(), [&](const auto& pool) { return pool.first.first == name; });
    });
  look_at_clients(t, look);
  if (retired_ && waits_for_clients_ && t >= drain_until_ && !is_deserted()) {
    drain();
    keeps_places_ = true;  // nobody has told it to end
  }
  if (draining_ && !waits_for_clients_ && t >= drain_until_ && exit_code_ == 0 && !(keeps_places_ && is_deserted())) {
    exit_code_ = 3;
    cut_off_clients();
  }
  if (t >= quits_at()) {
    if (had_client_)
      log::info("exit_on_idle", {}, "no clients for {} ms: exiting (pool.allowExitOnIdle)", config_->pool.idleTimeoutMillis);
    else
      log::info("exit_if_unused", {}, "no client has logged in within {} ms: exiting (shutdown.exitIfUnusedMillis)",
                config_->shutdown.exitIfUnusedMillis);
    drain();
  }
  if (t >= drain_at_) drain();
  for (const pool::Time at : {quits_at(), drain_at_}) look.again_at(at, t);
  if (look.in_doubt) look.again_in(kLook);
  arm_tick(look.busy ? milliseconds(100) : look.next);
  check_stopped();
  ++meter.counters.ticks;
  meter.counters.tickNanos += static_cast<std::uint64_t>((pool::Clock::now() - t).count());
}

void Worker::look_at(PoolEntry& entry, pool::Time t, Look& look) {
  entry.pool.set_away(is_away(entry), t);
  while (pool::Waiter* waiter = entry.pool.expired(t)) {
    ++entry.pool.counters().waitTimeouts;
    static_cast<ClientSession*>(waiter)->on_wait_failed(wait_error(entry));
  }
  while (!entry.logins.empty() && entry.pool.waited_out(entry.logins.front().since, t)) {
    const ServerConnection::Login& login = entry.logins.front();
    if (const auto client = login.client.lock()) client->refused(wait_error(entry, !login.password.empty()));
    entry.logins.pop_front();
  }
  close_outdated(entry);
  std::vector<std::shared_ptr<ServerConnection>> due;
  for (auto& [id, server] : entry.servers) {
    look.busy |= !server->alive() || server->deadline != pool::Time::max();
    look.in_doubt |= server->look();
    const auto& login = server->login();
    if (login && server->state() == ServerConnection::State::Connecting && entry.pool.waited_out(login->since, t))
      if (const auto client = server->take_login_client()) client->refused(wait_error(entry, !login->password.empty()));
    if (t >= server->deadline) due.push_back(server);
  }
  for (const auto& server : due) server->on_deadline(t);
  entry.listener.recycle();
  if (entry.listener.has_server() && entry.pool.capacity() <= entry.pool.stuck_here() + 1 && t - entry.oldest_wait() > kWithoutPlace)
    entry.listener.end();
  if (entry.pool.any_waiting() && is_hopeless(entry, t)) refuse_waiters(entry);
  serve(entry);
  auto& pool = entry.pool;
  look.busy |= entry.listener.wants() || pool.any_waiting() || entry.connecting > 0 || !entry.logins.empty();
  look.busy |= entry.clients > 0 && !pool.resting() && pool.staying() < pool.settings().min && !draining_ && !entry.paused;
  if (pool.any_idle()) look.again_in(pool.idle_check());
  if (must_look(entry, t)) look_again(entry);
  if (const auto every = pool.settings().dnsCheckSeconds; every != 0 && entry.clients > 0 && pool.open() > 0)
    look.again_in(std::chrono::seconds(every));
  look.again_at(forget_at(entry), t);
}

void Worker::look_at_clients(pool::Time t, Look& look) {
  std::vector<std::shared_ptr<ClientSession>> due;
  for (auto& [id, client] : clients_) {
    look.in_doubt |= client->look();
    look.again_at(client->check_limits(t), t);
    if (client->login_deadline == pool::Time::max()) continue;
    look.busy = true;
    if (t >= client->login_deadline) due.push_back(client);
  }
  for (const auto& client : due) client->on_deadline(t);
}

void Worker::cut_off_clients() {
  std::vector<std::shared_ptr<ClientSession>> left;
  for (auto& [id, client] : clients_) left.push_back(client);
  for (const auto& client : left) {
    log::warn("client_cut_off", client->about(), "drain: client {} (application \"{}\") is cut off after {} ms", client->id(),
              client->application(), config_->shutdown.timeoutMillis);
    if (client->server() && !client->server()->pipeline.empty()) client->server()->send_cancel();
    client->fatal("57P01", "terminating connection due to administrator command");
    client->close();
  }
}

// --- the end

/// Nobody is here but consoles, and those of whom nothing was heard yet.
bool Worker::is_deserted() const {
  if (logged_in_ > 0) return false;
  return std::all_of(clients_.begin(), clients_.end(),
                     [this](const auto& one) { return one.second->is_console() || one.second->is_silent(now()); });
}

pool::Time Worker::quits_at() const {
  if (draining_ || succession_ || !is_deserted()) return pool::Time::max();
  if (had_client_) return config_->pool.allowExitOnIdle ? idle_since_ + milliseconds(config_->pool.idleTimeoutMillis) : pool::Time::max();
  const std::uint32_t unused = config_->shutdown.exitIfUnusedMillis;
  return unused > 0 ? started_at_ + milliseconds(unused) : pool::Time::max();
}

void Worker::shut_down() {
  const std::uint32_t delay = config_->shutdown.delayMillis;
  if (delay == 0 || draining_) return drain();
  if (succession_) succession_->abandon("it is shutting down");
  drain_at_ = now() + milliseconds(delay);
  log::info("leaving", {}, "the drain begins in {} ms (shutdown.delayMillis); until then everything is served", delay);
  stir();
  kick();
}

void Worker::drain() {
  drain_at_ = pool::Time::max();
  keeps_places_ = false;
  if (draining_ && !waits_for_clients_) return check_stopped();
  if (succession_) succession_->abandon("it is shutting down");
  draining_ = true;
  waits_for_clients_ = false;
  if (on_draining) on_draining();
  drain_until_ = now() + milliseconds(config_->shutdown.timeoutMillis);
  log::info("draining", {}, "draining: {} clients, at most {} ms", clients_.size() - consoles_, config_->shutdown.timeoutMillis);
  if (!config_->shutdown.acceptWhileDraining || retired_) {
    // New ones are accepted and told so, until nothing is left.
    std::vector<std::shared_ptr<ClientSession>> all;
    for (auto& [id, client] : clients_) all.push_back(client);
    for (const auto& client : all) client->drain();
  }
  kick();
  check_stopped();
}

void Worker::check_stopped() {
  if (!draining_ || stopped_ || is_handing_over() || !is_deserted()) return;
  if (!clients_.empty()) {
    std::vector<std::shared_ptr<ClientSession>> left;
    for (auto& [id, client] : clients_) left.push_back(client);
    for (const auto& client : left) client->fatal("57P01", "terminating connection due to administrator command");
    return;
  }
  if (started_ && ports_.somebody_knocks() && now() < drain_until_) return;
  ports_.close(started_);  // else they are the other process's
  bool left = false, counts = false;
  for (auto& [key, entry] : pools_) {
    std::vector<std::shared_ptr<ServerConnection>> all;
    for (auto& [id, server] : entry->servers) all.push_back(server);
    for (const auto& server : all) {
      if (server->state() == ServerConnection::State::Connecting) continue;
      if (const auto* running = server->alive() ? server->pipeline.front() : nullptr; running && running->owner != protocol::kProxy) {
        server->send_cancel();  // its client has died: the server would go on without anybody
        cut_short_ = true;
      }
      server->close(pool::CloseReason::Drain);
    }
    left |= !all.empty();
    counts |= entry->pool.open() > 0;
  }
  // The servers' own farewell isn't waited for for long, unless their places would be the other process's.
  if (left && ((keeps_places_ && succession_ && counts) || !farewell_over())) return;
  stopped_ = true;
  timer_.cancel();
  if (on_stopped) on_stopped(exit_code_);
}

bool Worker::farewell_over() {
  if (farewell_at_ == pool::Time{}) farewell_at_ = now() + milliseconds(exit_code_ == 0 && !cut_short_ ? 50 : 1000);
  return now() >= farewell_at_;
}

// --- what is told

void Worker::count_error(std::string_view sqlstate) {
  const std::string_view klass = sqlstate.substr(0, 2);
  if (const auto it = errors_.find(klass); it != errors_.end())
    ++it->second;
  else if (errors_.size() < 64)
    errors_.emplace(klass, 1);
}

void Worker::saw_certificate(const std::string& whose, const X509* certificate) {
  if (const auto expires = expiry(certificate)) certificates_[whose] = *expires;
}

bool Worker::is_connected(const std::string& upstream) {
  return std::any_of(pools_.begin(), pools_.end(), [&](const auto& one) {
    const PoolEntry& entry = *one.second;
    return upstream_of(entry.database) == upstream && std::any_of(entry.servers.begin(), entry.servers.end(), [](const auto& server) {
             return server.second->connected != pool::Time{};
           });
  });
}

}  // namespace pgsidecar::proxy
