// What the data loop tells of itself: the snapshot that the control loop renders. Part of Worker, ClientSession and ServerConnection.
#include <algorithm>
#include <boost/asio/ip/tcp.hpp>
#include <cstring>
#include <set>

#include "proxy/client_console.hpp"
#include "proxy/client_session.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using pool::micros;

namespace {

const char* mode_name(conf::PoolMode mode) {
  switch (mode) {
    case conf::PoolMode::Session: return "session";
    case conf::PoolMode::Statement: return "statement";
    default: return "transaction";
  }
}

template <class Endpoint>
std::string shown(const Endpoint& endpoint) {
  if (endpoint.protocol().family() == AF_UNIX) return "unix socket";
  boost::asio::ip::tcp::endpoint tcp;
  if (endpoint.size() > tcp.capacity()) return {};
  std::memcpy(tcp.data(), endpoint.data(), endpoint.size());
  return conf::print_address(tcp.address().to_string(), tcp.port());
}

const char* state_of(const protocol::Pipeline& pipeline, const char* idle) {
  if (!pipeline.empty()) return "active";
  return pipeline.status() == protocol::TxStatus::Idle ? idle : "idle in transaction";
}

std::string cipher_of(const Transport& transport) {
  if (!transport.is_tls()) return {};
  const char* cipher = SSL_get_cipher_name(transport.ssl());
  return std::string(SSL_get_version(transport.ssl())) + "/" + (cipher ? cipher : "");
}

std::string local_of(Transport& transport) {
  boost::system::error_code ec;
  const auto endpoint = transport.socket().local_endpoint(ec);
  return ec ? std::string() : shown(endpoint);
}

template <class Shown>
std::string join_hosts(const conf::ConnectParams& params, Shown shown_as) {
  std::string out;
  for (const conf::Host& host : params.hosts) out += (out.empty() ? "" : ",") + shown_as(host);
  return out;
}

}  // namespace

std::string ClientSession::peer() {
  boost::system::error_code ec;
  const auto endpoint = channel_.transport.socket().remote_endpoint(ec);
  return ec ? std::string() : shown(endpoint);
}

pool::ClientRow ClientSession::row() {
  const pool::Time now = worker_.now();
  pool::ClientRow row;
  row.id = id_;
  row.peer = peer();
  row.tls = channel_.transport.is_tls();
  row.connectedMicros = micros(now - connected_at_);
  row.request = request_;
  row.local = local_of(channel_.transport);
  row.cipher = cipher_of(channel_.transport);
  row.fd = channel_.transport.socket().native_handle();
  if (request_since != pool::Time{}) row.requestMicros = micros(now - request_since);
  pool::Time begun = std::max(sent_at_, connected_at_);
  switch (state_) {
    case State::Console:
    case State::Ready: row.state = "idle"; break;
    case State::Waiting:
      row.state = "waiting";
      begun = request_since;
      break;
    case State::Active: row.state = state_of(server_->pipeline, "idle"); break;
    case State::Closing:
    case State::Closed: row.state = "closing"; break;
    default: row.state = "login";
  }
  row.stateMicros = micros(now - begun);
  if (console_) row.database = console_->database, row.user = console_->session.user();
  if (!entry_) return row;
  row.database = entry_->database;
  row.user = entry_->user;
  row.application = application();
  row.preparedStatements = statements.size();
  if (pin_) row.pinReasons = pin_->reasons;
  if (!server_) return row;
  row.server = server_->id();
  row.serverPid = server_->pid();
  row.statement = worker_.statement_stats.text(server_->running.last);
  if (server_->pipeline.status() != protocol::TxStatus::Idle || in_request_) row.transactionMicros = micros(now - transaction_since);
  return row;
}

pool::ServerRow ServerConnection::row() {
  const pool::Time now = worker_.now();
  pool::ServerRow row;
  row.id = id_;
  row.pid = pid_;
  row.database = entry_.database;
  row.user = entry_.user;
  row.uses = uses;
  row.useLimit = use_limit;
  row.condemned = condemned;
  if (running.since != pool::Time{}) row.requestMicros = micros(now - running.since);
  row.preparedStatements = statements.size();
  row.connectedMicros = connected == pool::Time{} ? 0 : micros(now - connected);
  if (channel_ && state_ != State::Connecting) {
    row.address = target_.host.is_unix() ? target_.host.name : conf::print_address(target_.host.name, target_.host.port);
    row.tls = channel_->transport.is_tls();
    row.local = local_of(channel_->transport);
    row.cipher = cipher_of(channel_->transport);
    row.fd = channel_->transport.socket().native_handle();
  }
  pool::Time begun = std::max(idle_since, connected);
  switch (state_) {
    case State::Connecting: row.state = "login"; break;
    case State::Idle: row.state = "idle"; break;
    case State::Leased:
      row.state = listener_ ? "listening" : state_of(pipeline, client_ ? "idle" : "active");
      begun = std::max(begun, running.since);
      break;
    case State::Resetting: row.state = "reset"; break;
    default: row.state = "closing";
  }
  row.stateMicros = begun == pool::Time{} ? 0 : micros(now - begun);
  if (client_) {
    row.client = client_->id();
    row.application = client_->application();
    row.statement = worker_.statement_stats.text(running.last);
  }
  return row;
}

std::string Worker::name_of(const conf::ConnectParams& upstream) {
  return join_hosts(upstream, [](const conf::Host& host) { return conf::print_address(host.name, host.port); });
}

void Worker::show_settings(const conf::PoolSettings& settings, pool::DatabaseSnapshot& shown) {
  shown.mode = mode_name(settings.mode);
  shown.max = settings.max;
  shown.min = settings.min;
  shown.maxLifetimeSeconds = settings.maxLifetimeSeconds;
}

Worker::DatabaseEntry Worker::describe(const std::string& name) const {
  DatabaseEntry entry;
  entry.shown.name = name;
  const auto plan = plan_database(name);
  if (!plan) return entry;
  show_settings(plan->settings, entry.shown);
  try {
    const conf::ConnectParams params = conf::resolve_upstream(plan->upstream, control_.environment());
    entry.upstream = name_of(params);
    entry.shown.host = join_hosts(params, [](const conf::Host& host) { return host.name; });
    entry.shown.port = join_hosts(params, [](const conf::Host& host) { return std::to_string(host.port); });
    entry.shown.database = params.dbname;
    if (params.user != upstream_.user) entry.shown.forceUser = params.user, entry.password = params.users_password();
    for (const auto& [parameter, value] : params.startup)
      if (parameter == "client_encoding") entry.encoding = value;
    for (const conf::Host& host : params.hosts) entry.pooler |= !conf::instead_of_pooler(host).empty();
  } catch (const conf::ConfigError&) {
    // A secret can't be read now. Whoever connects is told so; what is shown here stays empty.
  }
  return entry;
}

pool::Snapshot Worker::snapshot(Detail detail) {
  const pool::Time t = now();
  pool::Snapshot s;
  s.takenAt = t;
  s.loop = meter.counters;
  s.dataLoop = {this_thread(), lag};
  if (detail == Detail::Memory) s.memory = memory();
  s.draining = draining_;
  s.leaving = drain_at_ != pool::Time::max();
  s.started = started_;
  s.uptimeMicros = micros(t - started_at_);
  s.maxClients = most_clients();
  s.rejected = rejected_;
  s.errorsByClass.insert(errors_.begin(), errors_.end());
  if (const PoolEntry* refused = refused_pool()) s.loginRefused = refused->last_failure.message;
  s.databaseVersion = database_version_;
  const pool::Snapshot::Upstream own = main_upstream();
  s.database = own.state;
  s.databaseError = own.error;
  s.databaseLatencyMicros = own.latencyMicros;
  s.paused = all_paused_;
  for (const auto& [name, entry] : databases_) {
    s.databases.push_back(entry.shown);
    s.databases.back().paused = is_paused(name);
    s.databases.back().disabled = disabled(name);
  }
  s.upstream = name_of(upstream_);
  if (const auto it = upstream_times_.find(s.upstream); it != upstream_times_.end()) {
    const UpstreamTimes& times = it->second;
    s.databaseProbed = times.probed != pool::Clock::duration::zero();
    if (s.databaseProbed) s.databaseLatencyMicros = std::max<std::uint64_t>(1, micros(times.probed));
    if (times.seen != pool::Time{}) s.databaseSeenMicrosAgo = micros(t - times.seen);
  }
  s.upstreams = upstreams_;
  for (auto& [name, upstream] : s.upstreams) {
    const auto it = upstream_times_.find(name);
    if (it == upstream_times_.end()) continue;
    upstream.askedMicrosAgo = micros(t - it->second.capacity_asked);
    upstream.coldStartMicrosAgo = micros(t - it->second.cold_start);
    if (it->second.suspended != pool::Time{}) upstream.suspendMicrosAgo = micros(t - it->second.suspended);
  }
  for (const auto& [name, database] : databases_)
    if (const auto it = s.upstreams.find(database.upstream); it != s.upstreams.end()) it->second.isPooler |= database.pooler;
  s.certificates = certificates_;
  s.poolMax = config_->pool.max;
  s.pgbouncerCompatible = config_->metrics.pgbouncerCompatible;
  std::set<std::string_view> users{upstream_.user};
  for (const auto& [name, user] : config_->users)
    if (name != "*") users.insert(name);
  std::map<const PoolEntry*, std::size_t> index;
  for (const auto& [key, entry] : pools_) {
    pool::PoolSnapshot p;
    const conf::PoolSettings& settings = entry->pool.settings();
    p.database = entry->database;
    p.user = entry->user;
    users.insert(entry->user);
    p.max = settings.max;
    p.min = settings.min;
    p.idleTimeoutMillis = settings.idleTimeoutMillis;
    p.connectionTimeoutMillis = settings.connectionTimeoutMillis;
    p.maxUses = settings.maxUses;
    p.mode = mode_name(settings.mode);
    p.paused = entry->paused;
    p.lastError = entry->last_failure.message;
    p.clientsWaiting = static_cast<std::uint32_t>(entry->pool.waiting_count() + entry->logins.size());
    if (p.clientsWaiting > 0) p.oldestWaitMicros = micros(t - entry->oldest_wait());
    if (const auto it = s.upstreams.find(upstream_of(entry->database)); it != s.upstreams.end()) {
      it->second.usedByUs += static_cast<std::uint32_t>(entry->servers.size());
      it->second.maxByUs += settings.max;
    }
    for (const auto& [id, server] : entry->servers) {
      p.preparedStatements += server->statements.size();
      p.cancelling += server->cancels_pending > 0;
      p.beingCancelled += server->cancels_pending > 0 && !server->client();
      if (const ClientSession* client = server->client(); client && server->running.leaking) {
        ++p.leaking;
        if (const auto since = micros(t - client->transaction_since); since >= p.oldestLeakMicros) {
          p.oldestLeakMicros = since;
          p.oldestLeaker = client->application();
        }
      }
      if (detail == Detail::Rows) s.serverRows.push_back(server->row());
      switch (server->state()) {
        case ServerConnection::State::Connecting: ++p.serversLogin; break;
        case ServerConnection::State::Idle: ++p.serversIdle; break;
        case ServerConnection::State::Leased: ++p.serversActive; break;
        case ServerConnection::State::Resetting: ++p.serversReset; break;
        case ServerConnection::State::Closing: ++p.serversClosing; break;
        case ServerConnection::State::Closed: break;
      }
    }
    p.listeningClients = static_cast<std::uint32_t>(entry->listener.clients());
    p.listeningChannels = static_cast<std::uint32_t>(entry->listener.channels());
    p.counters = entry->pool.counters();
    p.effects = entry->transparency.rows();
    p.effectsDropped = entry->transparency.dropped();
    p.functions = entry->catalog.effects();
    if (settings.mode != conf::PoolMode::Session) p.everyText = protocol::residue_names(entry->catalog.everywhere());
    index[entry.get()] = s.pools.size();
    s.pools.push_back(std::move(p));
  }
  for (const auto& [id, client] : clients_) {
    if (detail == Detail::Rows) {
      s.clientRows.push_back(client->row());
      if (auto leak = client->leak()) s.leaks.push_back(std::move(*leak));
    }
    if (client->is_console()) {
      ++s.consoles;
      continue;
    }
    if (!client->entry()) {
      ++s.clientsLogin;
      continue;
    }
    ++s.clients;
    pool::PoolSnapshot& p = s.pools[index[client->entry()]];
    if (client->state() == ClientSession::State::Active)
      ++p.clientsActive;
    else if (client->state() == ClientSession::State::Ready)
      ++p.clientsIdle;
    if (auto pin = client->pin_snapshot()) {
      ++p.pinned;
      pool::for_each_reason(pin->reasons, [&](pool::PinReason reason) { ++p.pinnedBy[static_cast<std::size_t>(reason)]; });
      s.pins.push_back(std::move(*pin));
    }
  }
  s.users = static_cast<std::uint32_t>(users.size());
  if (detail == Detail::Rows) s.userNames.assign(users.begin(), users.end());
  std::sort(s.pins.begin(), s.pins.end(), [](const auto& a, const auto& b) { return a.micros > b.micros; });
  std::sort(s.clientRows.begin(), s.clientRows.end(), [](const auto& a, const auto& b) { return a.connectedMicros > b.connectedMicros; });
  std::sort(s.serverRows.begin(), s.serverRows.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  std::sort(s.leaks.begin(), s.leaks.end(), [](const auto& a, const auto& b) { return a.ageMicros > b.ageMicros; });
  if (detail == Detail::Statements) {
    auto report = statement_stats.report();
    s.statementsEvicted = report.evicted;
    s.statementsMicros = micros(t - report.since);
    std::map<std::uint32_t, const PoolEntry*> by_number;
    for (const auto& [key, entry] : pools_) by_number[entry->number] = entry.get();
    for (auto& [number, row] : report.rows) {
      const auto it = by_number.find(number);
      if (it == by_number.end()) continue;  // its pool is forgotten
      row.database = it->second->database, row.user = it->second->user;
      row.firstMicrosAgo = micros(t - row.first);
      row.lastMicrosAgo = micros(t - row.last);
      s.statements.push_back(std::move(row));
    }
  }
  return s;
}

}  // namespace pgsidecar::proxy
