#include "proxy/worker.hpp"

#include <algorithm>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/post.hpp>
#include <utility>

#include "conf/load.hpp"
#include "proxy/log.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using std::chrono::milliseconds;

namespace {

std::uint64_t micros(pool::Clock::duration d) {
  return static_cast<std::uint64_t>(std::max<std::int64_t>(0, std::chrono::duration_cast<std::chrono::microseconds>(d).count()));
}

/// A failure that more tries won't mend: wrong credentials, no such database.
bool is_permanent(std::string_view sqlstate) {
  return sqlstate.starts_with("28") || sqlstate.starts_with("3D") || sqlstate.starts_with("42");
}

/// Of a failed connect: the server has answered, so that it is up.
bool is_answer(std::string_view sqlstate) {
  return !sqlstate.starts_with("08") && !sqlstate.starts_with("57P");
}

}  // namespace

Worker::Worker(asio::io_context& data, Control& control, std::shared_ptr<const conf::Config> config)
    : data_(data), control_(control), config_(std::move(config)), timer_(data), started_at_(pool::Clock::now()), averages_(started_at_) {
  use_config();
}

Worker::~Worker() {
  // Their pending operations keep them until the loop is gone, which is later than the pools.
  for (const auto& [key, entry] : pools_)
    for (const auto& [id, server] : entry->servers) server->abandon();
}

void Worker::use_config() {
  client_tls_ = config_->tls.mode == conf::TlsMode::Disable ? SslContext() : make_server_context(config_->tls);
  certificates_.clear();
  if (client_tls_) saw_certificate("tls.certificate", SSL_CTX_get0_certificate(client_tls_.get()));
  upstream_ = conf::resolve_upstream(config_->upstream, control_.environment());
  for (const std::string& warning : upstream_.warnings) log::warn("upstream_warning", {}, "upstream: {}", warning);
  if (config_->databases.empty()) databases_[upstream_.dbname] = describe(upstream_.dbname);
  for (const auto& [name, database] : config_->databases)
    if (name != "*") databases_[name] = describe(name);
}

void Worker::reload(std::shared_ptr<const conf::Config> config) {
  config_ = std::move(config);
  auto before = std::exchange(databases_, {});
  use_config();
  // A pool that the configuration doesn't name any more keeps its settings until its clients have left.
  for (auto& [key, entry] : pools_) {
    for (auto& [id, server] : entry->servers) server->condemned = true;
    entry->settings.forget_welcomes();
    entry->catalog.forget();
    entry->retry_at = {};
    std::string sqlstate, error;
    auto plan = plan_pool(entry->database, entry->user, sqlstate, error);
    if (!databases_.contains(entry->database))
      databases_[entry->database] = plan ? describe(entry->database) : std::move(before[entry->database]);
    if (plan) {
      entry->pool.set_settings(plan->settings);
      entry->upstream = std::move(plan->upstream);
    }
  }
  std::erase_if(upstreams_, [this](const auto& upstream) {
    return std::none_of(databases_.begin(), databases_.end(), [&](const auto& one) { return one.second.upstream == upstream.first; });
  });
  kick();
}

// --- logins and leases

std::optional<std::string> Worker::secret_of(const std::string& user) {
  const auto it = config_->users.find(user);
  if (it != config_->users.end() && it->second.password) {
    try {
      return conf::expand(*it->second.password, control_.environment());
    } catch (const conf::ConfigError& e) {
      log::error("password_unreadable", {.user = user}, "password of user \"{}\": {}", user, e.what());
      return std::nullopt;
    }
  }
  if (user == upstream_.user) return upstream_.password;
  return std::nullopt;
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
  if (user != upstream_.user) {
    if (named == config_->users.end() && !config_->users.contains("*")) {
      sqlstate = "28000";
      error = "role \"" + user + "\" does not exist";
      return std::nullopt;
    }
    plan->upstream.keys["user"] = user;
    plan->upstream.keys["password"] = named != config_->users.end() && named->second.password ? *named->second.password : "";
  }
  if (named != config_->users.end()) plan->settings = conf::overlay(std::move(plan->settings), named->second.pool);
  return plan;
}

PoolEntry* Worker::find_pool(const std::string& database, const std::string& user, std::string& sqlstate, std::string& error) {
  auto plan = plan_pool(database, user, sqlstate, error);
  if (!plan) return nullptr;
  auto key = std::make_pair(database, user);
  if (const auto it = pools_.find(key); it != pools_.end()) return it->second.get();
  auto entry = std::make_unique<PoolEntry>(database, user, plan->settings, std::move(plan->upstream));
  entry->passes_password_on = passes_password_on(user);
  entry->paused = is_paused(database);
  entry->number = static_cast<std::uint32_t>(pools_.size()) + 1;
  if (succession_) succession_->join(*entry);
  if (!databases_.contains(database)) databases_[database] = describe(database);
  return pools_.emplace(std::move(key), std::move(entry)).first->second.get();
}

bool Worker::passes_password_on(const std::string& user) const {
  return config_->auth.method == conf::AuthMethod::Password && config_->users.contains("*") && !config_->users.contains(user) &&
         user != upstream_.user;
}

void Worker::verify(ClientSession& client, std::string password) {
  PoolEntry& entry = *client.entry();
  if (entry.given_password == password) return client.verified();
  entry.logins.push_back({client.weak_from_this(), std::move(password)});
  serve(entry);
}

void Worker::login_over() {
  --logging_in_;
  for (const auto& resume : std::exchange(paused_, {})) resume();
}

void Worker::on_login() {
  login_over();
  ++logged_in_;
  had_client_ = true;
  idle_since_ = pool::Time::max();
}

void Worker::want_server(ClientSession& client) {
  PoolEntry& entry = *client.entry();
  if (!entry.paused && !entry.listener.wants())
    if (pool::Slot* slot = entry.pool.take(now())) return static_cast<ServerConnection*>(slot)->lease(client);
  entry.pool.wait(client, now());
  kick();
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
    for (const auto& client : running_) client->go_on();
    running_.clear();
    --turns_;
  }
}

void Worker::serve(PoolEntry& entry) {
  serve_from(entry);
  if (succession_) succession_->balance(entry);
}

bool Worker::wants_listener(const PoolEntry& entry) const {
  return entry.listener.wants_server(now()) && entry.clients > 0 && (!draining_ || waits_for_clients_);
}

void Worker::serve_from(PoolEntry& entry) {
  if (entry.paused) return;
  const bool listens = wants_listener(entry);
  if (listens && entry.pool.any_idle()) {
    auto* idle = static_cast<ServerConnection*>(entry.pool.any_idle());
    idle->unlink();
    entry.listener.adopt(*idle);
  }
  while (entry.pool.waiting_count() > 0 && entry.pool.any_idle()) {
    auto* server = static_cast<ServerConnection*>(entry.pool.any_idle());
    server->unlink();
    server->lease(*static_cast<ClientSession*>(entry.pool.next_waiter()));
  }
  while (!entry.logins.empty()) {
    if (entry.logins.front().client.expired()) {
      entry.logins.pop_front();
      continue;
    }
    if (entry.pool.open() >= entry.pool.capacity()) {
      if (pool::Slot* idle = entry.pool.take(now())) static_cast<ServerConnection*>(idle)->close(pool::CloseReason::Idle);
      break;
    }
    open_server(entry, std::move(entry.logins.front()));
    entry.logins.pop_front();
  }
  if (now() < entry.retry_at || (entry.passes_password_on && !entry.given_password)) return;
  const std::uint32_t capacity = entry.pool.capacity();
  std::uint32_t open = entry.pool.wanted(entry.connecting);
  const bool wanted = entry.clients > 0 && !draining_;
  if (entry.replacements > 0) {
    const std::uint32_t places = capacity - std::min(capacity, entry.pool.open());
    const std::uint32_t now_possible = std::min(places, entry.replacements);
    open = std::max(open, wanted ? now_possible : 0);
    entry.replacements = wanted ? entry.replacements - now_possible : 0;
  }
  if (open == 0 && wanted && entry.pool.staying() < entry.pool.settings().min && entry.pool.open() < capacity) open = 1;
  if (open == 0 && listens && !entry.listener.has_server() && entry.connecting == 0 && entry.pool.open() < capacity) open = 1;
  if (entry.failures > 0) open = std::min(open, entry.connecting == 0 ? 1u : 0u);  // one probes for all
  for (; open > 0; --open) open_server(entry, {});
}

void Worker::open_server(PoolEntry& entry, std::optional<ServerConnection::Login> login) {
  auto server = std::make_shared<ServerConnection>(*this, entry, next_server_++);
  entry.servers.emplace(server->id(), server);
  ++entry.connecting;
  server->connect(std::move(login));
}

void Worker::on_connected(ServerConnection& server) {
  PoolEntry& entry = server.entry();
  --entry.connecting;
  entry.failures = 0;
  entry.retry_at = {};
  entry.last_failure = {};
  database_seen(upstream_of(entry.database), true);
  if (server.login()) {
    entry.given_password = server.login()->password;
    if (const auto client = server.login()->client.lock()) client->verified();
  }
  if (const auto it = server.parameters().find("server_version"); it != server.parameters().end()) database_version_ = it->second;
  log::info("server_connected", server.about(), "server {} ({}@{}, pid {}): connected", server.id(), entry.user, entry.database,
            server.pid());
  kick();
}

void Worker::on_connect_failed(ServerConnection& server, const protocol::ErrorFields& error) {
  PoolEntry& entry = server.entry();
  --entry.connecting;
  if (server.login()) {
    if (const auto client = server.login()->client.lock()) client->refused(error);
    entry.servers.erase(server.id());
    check_operations();
    serve(entry);
    return check_stopped();
  }
  if (error.sqlstate.starts_with("28")) entry.given_password.reset();  // changed on the server: the next client brings the new one
  entry.last_failure = error;
  ++entry.pool.counters().connectFailures;
  ++entry.failures;
  const double seconds = std::min(5.0, 0.05 * static_cast<double>(1u << std::min(entry.failures, 8u))) * (0.75 + 0.5 * random());
  entry.retry_at = now() + milliseconds(static_cast<int>(seconds * 1000));
  log::warn("connect_failed", server.about(error.sqlstate), "{}@{}: cannot connect: {} {}", entry.user, entry.database, error.sqlstate,
            error.message);
  if (is_answer(error.sqlstate))
    database_seen(upstream_of(entry.database), true);
  else
    database_seen(upstream_of(entry.database), false, error.message);
  entry.servers.erase(server.id());
  check_operations();
  if (is_permanent(error.sqlstate)) {
    while (pool::Waiter* waiter = entry.pool.next_waiter()) static_cast<ClientSession*>(waiter)->on_wait_failed(error, true);
  }
  kick();
  check_stopped();
}

void Worker::on_server_closed(ServerConnection& server) {
  PoolEntry& entry = server.entry();
  // The connection may be in the middle of a turn of its own.
  asio::post(data_, [this, &entry, id = server.id()] {
    entry.servers.erase(id);
    check_operations();
    serve(entry);
    check_stopped();
  });
}

void Worker::on_client_closed(ClientSession& client) {
  if (client.entry())
    --client.entry()->clients, --logged_in_;
  else if (client.is_console())
    --consoles_;
  else
    login_over();
  asio::post(data_, [this, id = client.id(), console = client.is_console()] {
    clients_.erase(id);
    if (console) abandon_operation(id);
    if (clients_.size() == consoles_ && !console) {
      idle_since_ = now();
      kick();
    }
    check_stopped();
  });
}

// --- cancel

void Worker::cancel(std::uint32_t pid, std::string_view key) {
  const auto it = std::find_if(clients_.begin(), clients_.end(), [&](const auto& one) {
    const std::string& own = one.second->cancel_key();
    return one.second->key_pid() == pid && own.size() == key.size() && !own.empty() &&
           CRYPTO_memcmp(own.data(), key.data(), own.size()) == 0;
  });
  if (it != clients_.end()) return it->second->on_cancel();
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

void Worker::arm_tick(milliseconds after) {
  const pool::Time at = now() + after;
  if (stopped_ || at >= tick_at_) return;
  tick_at_ = at;
  timer_.expires_at(at);
  timer_.async_wait(asio::bind_allocator(TickAllocator<char>(tick_memory_), [this](const boost::system::error_code& ec) {
    if (!ec) tick();
  }));
}

void Worker::tick() {
  tick_at_ = pool::Time::max();
  stir();
  const pool::Time t = now();
  if (averages_.due(t)) averages_.take(sums(), t);
  bool busy = draining_;
  milliseconds idle_check = std::chrono::hours(1);
  for (auto& [key, entry] : pools_) {
    while (pool::Waiter* waiter = entry->pool.expired(t)) {
      auto& client = *static_cast<ClientSession*>(waiter);
      ++entry->pool.counters().waitTimeouts;
      if (entry->paused) {
        client.on_wait_failed({"ERROR",
                               "53300",
                               "timed out after " + std::to_string(entry->pool.settings().connectionTimeoutMillis) +
                                   " ms waiting for a server connection: database \"" + entry->database + "\" is paused",
                               {},
                               {}},
                              false);
        continue;
      }
      if (entry->failures > 0 && !entry->last_failure.message.empty()) {
        client.on_wait_failed(entry->last_failure, false);
        continue;
      }
      const conf::PoolSettings& settings = entry->pool.settings();
      std::string message = "timed out after " + std::to_string(settings.connectionTimeoutMillis) +
                            " ms waiting for a server connection: " + std::to_string(entry->pool.open() + entry->pool.lent()) + " of " +
                            std::to_string(settings.max) + " in use";
      if (entry->pool.lent() > 0) message += ", " + std::to_string(entry->pool.lent()) + " by the other process of an online restart";
      ClientSession* longest = nullptr;
      for (auto& [id, server] : entry->servers)
        if (server->client() && (!longest || server->client()->transaction_since < longest->transaction_since)) longest = server->client();
      if (longest) {
        const auto held = std::chrono::duration<double>(t - longest->transaction_since).count();
        const auto status = longest->server()->pipeline.status();
        message += "; longest held " + fmt::format("{:.1f}", held) + " s by client " + std::to_string(longest->id()) + " (application \"" +
                   longest->application() + "\")" +
                   (longest->server()->pipeline.empty() && status != protocol::TxStatus::Idle ? ", idle in transaction" : "");
      }
      client.on_wait_failed({"ERROR", "53300", std::move(message), {}, {}}, false);
    }
    pool::CloseReason reason{};
    while (pool::Slot* slot = entry->pool.outdated(t, reason)) static_cast<ServerConnection*>(slot)->close(reason);
    std::vector<std::shared_ptr<ServerConnection>> due;
    for (auto& [id, server] : entry->servers) {
      busy |= !server->alive() || server->state() == ServerConnection::State::Resetting;
      if (t >= server->deadline) due.push_back(server);
    }
    for (const auto& server : due) server->on_deadline(t);
    entry->listener.recycle();
    serve(*entry);
    busy |= entry->listener.wants();
    busy |= entry->pool.waiting_count() > 0 || entry->connecting > 0;
    busy |= entry->clients > 0 && entry->pool.staying() < entry->pool.settings().min && !draining_ && !entry->paused;
    if (entry->pool.any_idle()) idle_check = std::min(idle_check, entry->pool.idle_check());
  }
  std::vector<std::shared_ptr<ClientSession>> due;
  for (auto& [id, client] : clients_) {
    if (const pool::Time at = client->check_limits(t); at != pool::Time::max())
      idle_check = std::min(idle_check, std::chrono::ceil<milliseconds>(at - t));
    if (client->login_deadline != pool::Time::max()) {
      busy = true;
      if (t >= client->login_deadline) due.push_back(client);
    }
  }
  for (const auto& client : due) client->on_deadline(t);
  if (retired_ && waits_for_clients_ && t >= drain_until_) drain();
  if (draining_ && !waits_for_clients_ && t >= drain_until_ && exit_code_ == 0) {
    exit_code_ = 3;
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
  const bool exit_on_idle = config_->pool.allowExitOnIdle && had_client_ && clients_.size() == consoles_;
  if (exit_on_idle && !draining_ && !succession_ && t - idle_since_ >= milliseconds(config_->pool.idleTimeoutMillis)) {
    log::info("exit_on_idle", {}, "no clients for {} ms: exiting (pool.allowExitOnIdle)", config_->pool.idleTimeoutMillis);
    drain();
  }
  if (busy)
    arm_tick(milliseconds(100));
  else
    arm_tick(exit_on_idle ? milliseconds(100) : idle_check);
  check_stopped();
}

// --- the end

void Worker::drain() {
  if (draining_ && !waits_for_clients_) return;
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
  if (!draining_ || stopped_ || is_handing_over() || clients_.size() > consoles_) return;
  if (!clients_.empty()) {
    std::vector<std::shared_ptr<ClientSession>> consoles;
    for (auto& [id, client] : clients_) consoles.push_back(client);
    for (const auto& console : consoles) console->fatal("57P01", "terminating connection due to administrator command");
    return;
  }
  close_ports(true);
  bool left = false;
  for (auto& [key, entry] : pools_) {
    std::vector<std::shared_ptr<ServerConnection>> all;
    for (auto& [id, server] : entry->servers) all.push_back(server);
    for (const auto& server : all) {
      if (server->state() == ServerConnection::State::Connecting) continue;
      server->close(pool::CloseReason::Drain);
    }
    left |= !all.empty();
  }
  // The servers' own farewell isn't waited for longer than this.
  if (left && !farewell_over()) return;
  stopped_ = true;
  timer_.cancel();
  if (on_stopped) on_stopped(exit_code_);
}

bool Worker::farewell_over() {
  if (farewell_at_ == pool::Time{}) farewell_at_ = now() + milliseconds(exit_code_ == 0 ? 50 : 1000);
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

void Worker::database_seen(const std::string& upstream, bool up, std::string error) {
  database_ = upstreams_[upstream].state = up ? pool::Snapshot::Database::Up : pool::Snapshot::Database::Down;
  database_error_ = std::move(error);
  if (up) database_seen_ = now();
  stir();
}

void Worker::saw_capacity(const std::string& upstream, std::uint32_t max, std::uint32_t reserved, std::uint32_t used) {
  auto& seen = upstreams_[upstream];
  seen.maxConnections = max;
  seen.reserved = reserved;
  seen.used = used;
  capacity_asked_[upstream] = now();
}

void Worker::saw_certificate(const std::string& whose, const X509* certificate) {
  if (const auto expires = expiry(certificate)) certificates_[whose] = *expires;
}

bool Worker::is_connected(const std::string& upstream) {
  return std::any_of(pools_.begin(), pools_.end(), [&](const auto& one) {
    const PoolEntry& entry = *one.second;
    return upstream_of(entry.database) == upstream && std::any_of(entry.servers.begin(), entry.servers.end(), [](const auto& server) {
             return server.second->state() != ServerConnection::State::Connecting;
           });
  });
}

void Worker::database_took(const std::string& upstream, pool::Clock::duration time, bool probed) {
  auto& seen = upstreams_[upstream];
  database_latency_ = seen.latencyMicros = std::max<std::uint64_t>(1, micros(time));
  if (!probed && time >= pool::Snapshot::kColdStart && !is_connected(upstream)) ++seen.coldStarts;
  database_probed_ = probed;
}

void Worker::probe(std::function<void()> done) {
  // A connect is the probe: it needs no client, no query, and says what a client would hear.
  control_.resolve(config_->upstream, [this, done = std::move(done)](const std::shared_ptr<const Upstream>& found) {
    if (!found->error.empty() || found->targets.empty()) {
      database_seen(name_of(upstream_), false, found->error);
      return done();
    }
    probe_from(found, 0, done);
  });
}

/// The first of the targets, from this one on, that answers.
void Worker::probe_from(std::shared_ptr<const Upstream> found, std::size_t target, std::function<void()> done) {
  auto socket = std::make_shared<Socket>(data_.get_executor());
  auto timer = std::make_shared<asio::steady_timer>(data_, milliseconds(900));
  timer->async_wait([socket, timer](const boost::system::error_code& ec) {
    boost::system::error_code ignored;
    if (!ec) socket->cancel(ignored);
  });
  const pool::Time begun = now();
  const auto& endpoint = found->targets[target].endpoint;
  socket->async_connect(endpoint, [this, found, target, socket, timer, begun, done](const boost::system::error_code& ec) {
    timer->cancel();
    if (ec && target + 1 < found->targets.size()) return probe_from(found, target + 1, done);
    database_seen(name_of(upstream_), !ec, ec ? ec.message() : std::string());
    if (!ec) database_took(name_of(upstream_), now() - begun, true);
    done();
  });
}

}  // namespace pgsidecar::proxy
