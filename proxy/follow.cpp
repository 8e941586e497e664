// Following the server: whether it is away, which of its addresses to try, and which connections its addresses, its role or the
// configuration have left behind. Those are closed as they come back. Part of Worker.
#include <sys/socket.h>

#include <algorithm>
#include <map>
#include <set>

#include "protocol/sql_scan.hpp"
#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using std::chrono::seconds;

namespace {

constexpr seconds kAgain{1};  // after which a server that hangs may have got another address

std::string printed(const conf::Host& host) {
  return conf::print_address(host.name, host.port);
}

}  // namespace

std::string address_of(const Target& target) {
  return {reinterpret_cast<const char*>(target.endpoint.data()), target.endpoint.size()};
}

/// Of a failed connect: the server has answered, so that it is up.
bool is_answer(std::string_view sqlstate) {
  return !sqlstate.starts_with("08") && !sqlstate.starts_with("57P");
}

bool Worker::is_away(const PoolEntry& entry) const {
  if (entry.paused) return true;
  if (entry.backoff.failures() > 0) return !is_answer(entry.last_failure.sqlstate);
  return entry.connecting > 0 &&
         std::none_of(entry.servers.begin(), entry.servers.end(), [](const auto& one) { return one.second->alive(); });
}

// While connections are being lost, one that the server has closed already may not have been read yet.
ServerConnection* Worker::take_idle(PoolEntry& entry) {
  while (pool::Slot* slot = entry.pool.any_idle()) {
    auto* server = static_cast<ServerConnection*>(slot);
    server->unlink();
    if (now() >= entry.losing_until || !server->has_unread()) return server;
    server->close(pool::CloseReason::Error);
  }
  return nullptr;
}

std::vector<Target> Worker::targets_of(const PoolEntry& entry, const Upstream& upstream) {
  std::vector<Target> targets = upstream.targets;
  if (upstream.params.loadBalanceHosts) std::shuffle(targets.begin(), targets.end(), random_);
  std::stable_partition(targets.begin(), targets.end(),
                        [&](const Target& target) { return !entry.addresses.failed_lately(address_of(target), now()); });
  return targets;
}

void Worker::outdate_servers(PoolEntry& entry, const std::function<bool(const ServerConnection&)>& which) {
  std::vector<std::shared_ptr<ServerConnection>> idle;
  for (auto& [id, server] : entry.servers) {
    if (!which(*server)) continue;
    server->condemned = true;
    if (server->state() == ServerConnection::State::Idle) idle.push_back(server);
  }
  for (const auto& server : idle) server->close(pool::CloseReason::Reload);
  entry.listener.recycle();
}

void Worker::leave_database(std::string_view sql) {
  const std::string name = protocol::database_left(sql);
  if (name.empty()) return;
  for (const auto& [key, entry] : pools_)
    outdate_servers(*entry, [&](const ServerConnection& server) {
      return !server.client() && !server.listens() && server.upstream() && server.upstream()->params.dbname == name;
    });
}

void Worker::outdate_address(PoolEntry& entry, const std::string& address) {
  outdate_servers(entry, [&](const ServerConnection& server) { return server.upstream() && address_of(server.target()) == address; });
}

bool Worker::is_gone(const ServerConnection& server) const {
  if (!server.upstream() || !server.alive()) return false;
  return server.entry().addresses.gone(printed(server.target().host), address_of(server.target()), now());
}

void Worker::saw_addresses(PoolEntry& entry, std::shared_ptr<const Upstream> upstream) {
  std::map<std::string, std::set<std::string>> found;  // a host that isn't there couldn't be looked up
  for (const Target& target : upstream->targets) found[printed(target.host)].insert(address_of(target));
  for (const auto& [host, addresses] : found) entry.addresses.answered(host, addresses, now());
  entry.found = std::move(upstream);
  entry.looked_at = now();
  entry.leases_then = entry.pool.counters().leases;
}

/// Of those that the server doesn't end: the addresses that a name has are one server's.
std::uint32_t Worker::stuck_at(const PoolEntry& entry, const Target& target) const {
  const auto is_there = [&](const std::string& address) { return !entry.addresses.gone(printed(target.host), address, now()); };
  const std::uint32_t others = succession_ ? succession_->hung_at(entry, is_there) : 0;
  return others + static_cast<std::uint32_t>(std::ranges::count_if(stuck_addresses(entry), is_there));
}

std::vector<std::string> Worker::stuck_addresses(const PoolEntry& entry) const {
  std::vector<std::string> addresses;
  for (const auto& [id, server] : entry.servers)
    if (server->stuck()) addresses.push_back(address_of(server->target()));
  return addresses;
}

bool Worker::is_full(const PoolEntry& entry, const Target& target) const {
  const std::uint32_t stuck = stuck_at(entry, target);
  return stuck > 0 && entry.pool.open_where(stuck) > entry.pool.capacity();
}

bool Worker::is_reachable(const PoolEntry& entry, const std::string& address) const {
  return !entry.addresses.failed_lately(address, now()) || std::ranges::any_of(entry.servers, [&](const auto& one) {
    return one.second->alive() && address_of(one.second->target()) == address;
  });
}

void Worker::count_stuck(PoolEntry& entry) {
  std::uint32_t least = entry.pool.stuck();
  if (least == 0) return;
  if (entry.found)
    for (const Target& target : entry.found->targets)
      if (stands_alone(entry) || is_reachable(entry, address_of(target))) least = std::min(least, stuck_at(entry, target));
  entry.pool.set_stuck_here(least);
}

bool Worker::must_look(PoolEntry& entry, pool::Time t) const {
  if (entry.pool.hangs() && (entry.pool.any_waiting() || !entry.logins.empty())) return t - entry.looked_at >= kAgain;  // no connect looks
  const std::uint32_t every = entry.pool.settings().dnsCheckSeconds;
  return every != 0 && entry.clients > 0 && !draining_ && entry.pool.counters().leases != entry.leases_then &&
         t - entry.looked_at >= seconds(every);
}

void Worker::look_again(PoolEntry& entry) {
  entry.looked_at = now();
  conf::Upstream upstream = entry.upstream;
  upstream.passwordCommand.clear();  // nobody logs in
  control_.resolve(std::move(upstream), [this, keeps = entry.shared_from_this(), &entry](const std::shared_ptr<const Upstream>& found) {
    if (!found->error.empty()) return;
    const Turn turn(*this);
    saw_addresses(entry, found);
    const auto gone = std::find_if(entry.servers.begin(), entry.servers.end(), [this](const auto& one) { return is_gone(*one.second); });
    if (gone == entry.servers.end()) return;
    log::info("address_changed", entry.about(), "{}@{}: \"{}\" has other addresses now: its connections move there", entry.user,
              entry.database, gone->second->target().host.name);
    // A first one; the others follow it if it can be made (on_connected).
    if (entry.pool.open() >= entry.pool.settings().max && entry.backoff.failures() == 0) {
      const auto first = gone->second;
      outdate_servers(entry, [&](const ServerConnection& server) { return &server == first.get(); });
    }
    ++entry.replacements;
    serve(entry);
  });
}

void Worker::recheck(PoolEntry& entry) {
  control_.resolve(entry.upstream, [this, keeps = entry.shared_from_this(), &entry](const std::shared_ptr<const Upstream>& found) {
    if (!found->error.empty()) return;
    const Turn turn(*this);
    outdate_servers(entry, [&](const ServerConnection& server) {
      const Upstream* with = server.upstream();  // none: it isn't known yet
      return !with || with->params != found->params || with->tls != found->tls;
    });
    kick();
  });
}

void Worker::on_write_refused(const ServerConnection& server) {
  PoolEntry& entry = server.entry();
  if (now() - entry.write_refused_at < seconds(10)) return;
  entry.write_refused_at = now();
  control_.resolve(entry.upstream, [this, keeps = entry.shared_from_this(), &entry,
                                    here = address_of(server.target())](const std::shared_ptr<const Upstream>& found) {
    const bool elsewhere =
        std::any_of(found->targets.begin(), found->targets.end(), [&](const Target& target) { return address_of(target) != here; });
    const Turn turn(*this);
    log::warn("write_refused", entry.about("25006"), "{}@{}: a standby has refused a write: {}", entry.user, entry.database,
              elsewhere ? "looking for the primary among the other addresses"
                        : "connecting anew, in case another server has this address by now");
    if (elsewhere) entry.addresses.failed(here, now());
    outdate_address(entry, here);
    kick();
  });
}

}  // namespace pgsidecar::proxy
