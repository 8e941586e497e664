// What an operator has done to databases: pause and resume, reconnect, kill, disable and enable, and the waits for server
// connections to be closed. Part of Worker. A paused pool gives nobody a server connection; what it has is closed when it is
// released.
#include <algorithm>
#include <boost/asio/post.hpp>

#include "proxy/client_console.hpp"
#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using Kind = pool::Command::Kind;

namespace {

constexpr std::size_t kMostOperated = 1000;  // databases paused or disabled by name; "*" makes any name one

const char* word_of(Kind kind) {
  switch (kind) {
    case Kind::Pause: return "pause";
    case Kind::Resume: return "resume";
    case Kind::Reconnect: return "reconnect";
    case Kind::Kill: return "kill";
    case Kind::Disable: return "disable";
    case Kind::Enable: return "enable";
    case Kind::WaitClose: return "wait_close";
    default: return "";
  }
}

bool all(const ServerConnection&) {
  return true;
}

bool matches(const PoolEntry& entry, const std::string& database) {
  return database.empty() || entry.database == database;
}

}  // namespace

bool Worker::is_paused(const std::string& database) const {
  return all_paused_ || paused_databases_.contains(database);
}

bool Worker::is_console(const std::string& database) const {
  if (database != "pgbouncer" && database != "pgsidecar") return false;
  return !config_->databases.contains(database) && database != upstream_.dbname;
}

void Worker::set_paused() {
  for (auto& [key, entry] : pools_) {
    const bool paused = is_paused(entry->database);
    if (paused == std::exchange(entry->paused, paused)) continue;
    entry->replacements = 0;
    if (paused)
      outdate_servers(*entry, all);
    else
      serve(*entry);
  }
  kick();
}

void Worker::kill(const std::string& database) {
  std::vector<std::shared_ptr<ClientSession>> clients;
  for (auto& [id, client] : clients_)
    if (client->entry() && matches(*client->entry(), database)) clients.push_back(client);
  for (const auto& client : clients) client->fatal("57P01", "terminating connection due to administrator command");
  std::vector<std::shared_ptr<ServerConnection>> servers;
  for (auto& [key, entry] : pools_)
    if (matches(*entry, database))
      for (auto& [id, server] : entry->servers) servers.push_back(server);
  for (const auto& server : servers) server->close_by_operator();
}

std::string Worker::change(const pool::Command& command) {
  const std::string& database = command.database;
  if (!database.empty() && is_console(database)) return std::string("cannot ") + word_of(command.kind) + " the console's database";
  if (!database.empty() && !plan_database(database)) return "no such database: " + database;
  if (paused_databases_.size() + disabled_databases_.size() >= kMostOperated && !database.empty() &&
      (command.kind == Kind::Pause || command.kind == Kind::Disable || command.kind == Kind::Kill))
    return "too many databases are paused or disabled";
  const auto pause = [&] {
    if (database.empty())
      all_paused_ = true;
    else
      paused_databases_.insert(database);
    set_paused();
  };
  switch (command.kind) {
    case Kind::Pause:
      if (database.empty() ? all_paused_ : is_paused(database)) return "already suspended/paused";
      pause();
      break;
    case Kind::Resume:
      if (draining_) return "pooler is shutting down";
      if (database.empty()) {
        if (!all_paused_ && paused_databases_.empty()) return "pooler is not paused/suspended";
        all_paused_ = false;
        paused_databases_.clear();
      } else if (paused_databases_.erase(database) == 0) {
        return all_paused_ ? "all databases are paused: use RESUME without a database" : "database " + database + " is not paused";
      }
      set_paused();
      break;
    case Kind::Reconnect:
      for (auto& [key, entry] : pools_)
        if (matches(*entry, database)) outdate_servers(*entry, all);
      kick();
      break;
    case Kind::Kill:
      pause();
      kill(database);
      break;
    case Kind::Disable: disabled_databases_.insert(database); break;
    case Kind::Enable: disabled_databases_.erase(database); break;
    default: break;
  }
  log::info("operator", {.database = database}, "{} {} by an operator", word_of(command.kind),
            database.empty() ? "all databases" : "database \"" + database + "\"");
  return {};
}

void Worker::operate(const pool::Command& command, std::function<void(std::string error)> done, std::uint32_t owner) {
  if (command.kind < Kind::Pause) return done(execute(command));
  const Turn turn(*this);
  if (std::string error = change(command); !error.empty()) return done(std::move(error));
  if (command.kind == Kind::Resume)
    end_waits([&](const Operation& o) { return o.kind == Kind::Pause && (command.database.empty() || o.database == command.database); },
              "the pause was ended by RESUME before all server connections were closed");
  if (command.kind != Kind::Pause && command.kind != Kind::WaitClose) return done({});
  operations_.push_back({command.kind, command.database, owner, std::move(done)});
  check_operations();
}

void Worker::end_waits(const std::function<bool(const Operation&)>& which, const std::string& error) {
  std::vector<Operation> over;
  for (auto it = operations_.begin(); it != operations_.end();) {
    if (!which(*it)) {
      ++it;
      continue;
    }
    over.push_back(std::move(*it));
    it = operations_.erase(it);
  }
  for (const Operation& one : over) one.done(error);
}

void Worker::check_operations() {
  if (operations_.empty()) return;
  end_waits(
      [this](const Operation& o) {
        return std::all_of(pools_.begin(), pools_.end(), [&](const auto& one) {
          const PoolEntry& entry = *one.second;
          return !matches(entry, o.database) || std::none_of(entry.servers.begin(), entry.servers.end(), [&](const auto& server) {
            return o.kind == Kind::Pause || server.second->condemned;
          });
        });
      },
      {});
}

bool Worker::abandon_operation(std::uint32_t owner) {
  const auto it = std::find_if(operations_.begin(), operations_.end(), [&](const Operation& o) { return o.owner == owner; });
  if (it == operations_.end()) return false;
  const Operation operation = std::move(*it);
  operations_.erase(it);
  // As PgBouncer: who interrupts a PAUSE takes it back.
  if (operation.kind == Kind::Pause) change({Kind::Resume, 0, operation.database});
  return true;
}

void Worker::stop(ConsoleCommand::Stop how) {
  if (how == ConsoleCommand::Stop::WaitForServers) return drain();
  if (how == ConsoleCommand::Stop::WaitForClients) {
    if (draining_) return;
    if (succession_) succession_->abandon("it is shutting down");
    draining_ = waits_for_clients_ = true;
    if (on_draining) on_draining();
    log::info("shutting_down", {}, "shutting down once its {} clients have left", clients_.size() - consoles_);
    kick();
    return check_stopped();
  }
  log::info("shutting_down", {}, "shutting down at once");
  if (succession_) succession_->abandon("it is shutting down");
  draining_ = true;
  if (on_draining) on_draining();
  waits_for_clients_ = keeps_places_ = false;
  std::vector<std::shared_ptr<ClientSession>> all;
  for (auto& [id, client] : clients_) all.push_back(client);
  for (const auto& client : all) {
    if (client->server() && !client->server()->pipeline.empty()) client->server()->send_cancel();
    client->fatal("57P01", "terminating connection due to administrator command");
    client->close();
  }
  check_stopped();
}

bool Worker::admit_console() {
  if (consoles_ >= kMostConsoles) return false;
  login_over();
  ++consoles_;
  return true;
}

void Worker::adjust(std::shared_ptr<const conf::Config> config) {
  config_ = std::move(config);
  for (auto& [name, entry] : databases_)
    if (const auto plan = plan_database(name)) show_settings(plan->settings, entry.shown);
  for (auto& [key, entry] : pools_) {
    std::string sqlstate, error;
    if (const auto plan = plan_pool(entry->database, entry->user, sqlstate, error)) {
      const bool same_mode = plan->settings.mode == entry->pool.settings().mode;
      entry->pool.set_settings(plan->settings);
      if (!same_mode) outdate_servers(*entry, [](const ServerConnection&) { return true; });
    }
    close_outdated(*entry);
    serve(*entry);
  }
  kick();
}

SumsByDatabase Worker::sums() const {
  SumsByDatabase sums;
  for (const auto& [key, entry] : pools_) sums[entry->database].add(entry->pool.counters());
  return sums;
}

}  // namespace pgsidecar::proxy
