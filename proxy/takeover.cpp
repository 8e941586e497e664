// What an online restart does to the Worker. Part of Worker; the exchange with the other process is Succession's.
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace asio = boost::asio;
using std::chrono::milliseconds;

namespace {

/// Until then the server has noticed that a process's connections are gone with it.
constexpr std::chrono::seconds kNoticed{1};

}  // namespace

std::vector<conf::Listening> Worker::listening() const {
  return ports_.sockets();
}

std::string Worker::why_no_successor() const {
  if (retired_) return "process " + std::to_string(succession_ ? succession_->peer() : 0) + " has taken over already";
  if (draining_ || drain_at_ != pool::Time::max()) return "it is shutting down";
  if (succession_ && !succession_->is_successor()) return "an upgrade is under way";
  if (succession_)
    return "process " + std::to_string(succession_->peer()) +
           ", from which this one took over, still has clients, or connections that the server doesn't end; try again when it has "
           "ended (SIGTERM makes it)";
  if (operated()) return "databases are paused or disabled, which the new process wouldn't know: RESUME or ENABLE them first";
  return {};
}

void Worker::succeed(int link, pid_t successor, std::function<void(std::string error)> done) {
  succession_ = std::make_shared<Succession>(*this, link, successor, std::move(done));
  succession_->start();
  if (draining_ || drain_at_ != pool::Time::max()) succession_->abandon("it is shutting down");
}

void Worker::take_place(int link, std::function<void(std::function<void()> then)> other_loop) {
  succession_ = std::make_shared<Succession>(*this, link);
  succession_->start();
  probe([this, other_loop = std::move(other_loop)] {
    other_loop([this] {
      const auto ready = [this](const std::string& error) {
        if (succession_) succession_->ready(error);
      };
      const pool::Snapshot::Upstream seen = main_upstream();
      if (seen.state == pool::Snapshot::Database::Down) return ready(seen.error.empty() ? "no answer" : seen.error);
      try_login(ready);
    });
  });
}

void Worker::try_login(std::function<void(std::string refusal)> done) {
  if (succession_)
    for (const auto& [database, user] : succession_->spared()) {
      std::string sqlstate, error;
      PoolEntry* entry = find_pool(database, user, sqlstate, error);
      if (!entry || entry->passes_password_on) continue;
      tried_ = std::move(done);
      return open_server(*entry, {});
    }
  done({});
}

void Worker::take_over(bool had_client, pid_t from) {
  had_client_ |= had_client;
  begin();
  log::info("took_over", {}, "process {} has taken over from process {}", ::getpid(), from);
  if (on_taken_over) on_taken_over();
}

void Worker::handed_over() {
  if (succession_) succession_->over();
  handing_over_ = false;
  check_stopped();
}

void Worker::retire(pid_t successor) {
  ports_.close(false);
  retired_ = handing_over_ = keeps_places_ = true;
  log::info("handed_over", {}, "process {} has taken over; this one, {}, serves its {} clients for {} ms at most, then it drains",
            successor, ::getpid(), clients_.size() - consoles_, config_->shutdown.timeoutMillis);
  if (!draining_) {
    draining_ = waits_for_clients_ = true;
    drain_until_ = now() + milliseconds(config_->shutdown.timeoutMillis);
  }
  kick();
}

void Worker::on_peer_ended(const Succession& which) {
  if (succession_.get() != &which) return;
  const auto ended = std::exchange(succession_, nullptr);
  if (!ended->is_successor() && !retired_) {  // one that has only tried, and was killed
    auto gone = std::make_shared<asio::steady_timer>(data_, kNoticed);
    gone->async_wait([this, gone](const boost::system::error_code& /*never stopped*/) { take_back_places(); });
    return;
  }
  take_back_places();
  if (retired_) log::warn("successor_ended", {}, "process {}, which took over, has ended", ended->peer());
  if (!ended->is_successor()) return;
  if (draining_ && !started_) return check_stopped();
  if (!started_) take_over(false, ended->peer());  // nobody else is there to listen
  log::info("predecessor_ended", {}, "process {}, from which this one took over, has ended", ended->peer());
  if (logged_in_ == 0) idle_since_ = now();
  kick();
  if (on_alone) on_alone();
}

void Worker::take_back_places() {
  if (succession_) return;
  const Turn turn(*this);
  for (auto& [key, entry] : pools_) {
    entry->pool.set_lent(0);
    serve(*entry);
  }
}

PoolEntry* Worker::pool_of(const std::string& database, const std::string& user) {
  const auto it = pools_.find({database, user});
  return it == pools_.end() ? nullptr : it->second.get();
}

void Worker::for_each_pool(const std::function<void(PoolEntry&)>& what) {
  for (auto& [key, entry] : pools_) what(*entry);
}

std::uint32_t Worker::missing(const PoolEntry& entry) const {
  const std::size_t wanted =
      entry.pool.waiting_count() + entry.logins.size() + (wants_listener(entry) && !entry.listener.has_server() ? 1 : 0);
  return static_cast<std::uint32_t>(wanted - std::min(wanted, entry.pool.idle_count() + entry.connecting));
}

}  // namespace pgsidecar::proxy
