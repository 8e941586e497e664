// How long a client may take: for a request, in a transaction, idle in one, idle outside. Part of ClientSession; looked at by the
// Worker's tick, never on a query's way. Each error names the key that it comes from.
#include <algorithm>

#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using pool::micros;
using std::chrono::milliseconds;

namespace {

constexpr std::uint32_t kCancelMillis = 5000;  // in which the server must have heeded a cancel request
constexpr std::string_view kQueryTimeout = "canceling statement due to query timeout";

}  // namespace

void ClientSession::tell_query_timeout() {
  complain("57014", kQueryTimeout);
  worker_.count_error("57014");
  worker_.to_client.own([this](std::string& out) {
    protocol::write_error(out, protocol::Severity::Error, "57014", kQueryTimeout,
                          "pool.queryTimeoutMillis is " + std::to_string(entry_->pool.settings().queryTimeoutMillis) + " ms.");
  });
}

pool::Time ClientSession::check_limits(pool::Time now) {
  if (!entry_ || state_ == State::Greeting || state_ == State::Closing || state_ == State::Closed) return pool::Time::max();
  const conf::PoolSettings& limits = entry_->pool.settings();
  pool::Time next = pool::Time::max();
  // True: the limit is reached. Else it is one to come.
  const auto over = [&](pool::Time from, std::uint32_t limit) {
    if (limit == 0) return false;
    const pool::Time at = from + milliseconds(limit);
    if (now >= at) return true;
    next = std::min(next, at);
    return false;
  };
  if (state_ == State::Ready) {
    if (over(std::max(sent_at_, connected_at_), limits.clientIdleTimeoutMillis))
      end_by_limit("57P05", "terminating connection due to idle-session timeout", "pool.clientIdleTimeoutMillis",
                   limits.clientIdleTimeoutMillis);
    return next;
  }
  // What it holds may become idle before the next look.
  next = now + entry_->pool.limit_check();
  const bool waited_for = in_request_ && (!server_ || !server_->pipeline.empty() || !server_->pipeline.unsynced() || held());
  if (waited_for && over(request_since, limits.queryTimeoutMillis)) {
    if (waiting() || keeps_request()) {
      ++entry_->pool.counters().limitsReached;
      unlink();
      on_wait_failed({"ERROR",
                      "57014",
                      "canceling statement due to query timeout while waiting for a server connection",
                      "pool.queryTimeoutMillis is " + std::to_string(limits.queryTimeoutMillis) + " ms, the wait included.",
                      {}});
      return next;
    }
    if (server_ && !std::exchange(server_->running.overdue, true)) {
      ++entry_->pool.counters().limitsReached;
      server_->cancel();
    }
    if (over(request_since, limits.queryTimeoutMillis + kCancelMillis)) {
      end_by_limit("57014", kQueryTimeout, "pool.queryTimeoutMillis", limits.queryTimeoutMillis);
      return next;
    }
  }
  if (!server_) return next;
  const auto& pipeline = server_->pipeline;
  if (pipeline.status() == protocol::TxStatus::Idle && !pipeline.unsynced()) {
    if (pipeline.empty() && !in_request_ && over(std::max(sent_at_, connected_at_), limits.clientIdleTimeoutMillis))
      end_by_limit("57P05", "terminating connection due to idle-session timeout", "pool.clientIdleTimeoutMillis",
                   limits.clientIdleTimeoutMillis);
    return next;
  }
  if (pipeline.status() != protocol::TxStatus::Idle && over(transaction_since, limits.maxTransactionMillis)) {
    end_by_limit("25P04", "terminating connection due to transaction timeout", "pool.maxTransactionMillis", limits.maxTransactionMillis);
    return next;
  }
  if (waited_for || !pipeline.empty()) return next;
  if (over(sent_at_, limits.idleInTransactionTimeoutMillis)) {
    end_by_limit("25P03", "terminating connection due to idle-in-transaction timeout", "pool.idleInTransactionTimeoutMillis",
                 limits.idleInTransactionTimeoutMillis);
    return next;
  }
  if (!server_->running.leaking && over(sent_at_, limits.idleInTransactionWarnMillis)) tell_leak();
  return next;
}

void ClientSession::end_by_limit(std::string_view sqlstate, std::string_view message, std::string_view key, std::uint32_t millis) {
  ++entry_->pool.counters().limitsReached;
  fatal(sqlstate, message, {}, std::string(key) + " is " + std::to_string(millis) + " ms.");
}

void ClientSession::tell_leak() {
  auto& running = server_->running;
  running.leaking = true;
  ++entry_->pool.counters().leaks;
  worker_.statement_stats.add_left_idle(running.first);
  const auto found = leak();
  const auto seconds = [](std::uint64_t us) { return static_cast<double>(us) / 1e6; };
  log::warn("leak", about(),
            "leak: client {} ({}@{}, application \"{}\", {}) is idle in a transaction for {:.1f} s; open for {:.1f} s on server "
            "pid {}; first statement: {}; last: {}",
            id_, entry_->user, entry_->database, application(), found->peer, seconds(found->idleMicros), seconds(found->ageMicros),
            server_->pid(), found->firstStatement, found->lastStatement);
  if (!entry_->pool.settings().noticeLeaks) return;
  Gather notice;
  notice.own([&](std::string& out) {
    protocol::write_notice(out, "01000",
                           "this transaction has been idle for " + std::to_string(found->idleMicros / 1000) +
                               " ms and holds a server connection (pool.idleInTransactionWarnMillis)");
  });
  send(notice);
}

std::optional<pool::LeakRow> ClientSession::leak() const {
  if (!server_ || !server_->running.leaking) return std::nullopt;
  const pool::Time now = worker_.now();
  pool::LeakRow row;
  row.client = id_;
  row.serverPid = server_->pid();
  row.database = entry_->database;
  row.user = entry_->user;
  row.application = application();
  row.peer = const_cast<ClientSession*>(this)->peer();
  row.request = request_;
  row.ageMicros = micros(now - transaction_since);
  row.idleMicros = micros(now - sent_at_);
  row.firstStatement = worker_.statement_stats.text(server_->running.first);
  row.lastStatement = worker_.statement_stats.text(server_->running.last);
  return row;
}

}  // namespace pgsidecar::proxy
