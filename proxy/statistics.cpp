// What statements cost, noted on their way: which execution an answer belongs to, and for whom its time was spent. Part of
// ClientSession and ServerConnection; nothing here allocates for a statement that is known.
#include <algorithm>

#include "protocol/normalize.hpp"
#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using pool::micros;
using protocol::Bytes;
using protocol::kHeaderSize;
using protocol::Request;

namespace {

/// The number at the end of a command tag: INSERT 0 5, SELECT 3. PostgreSQL documentation, section 55.7, CommandComplete.
std::uint64_t rows_of(std::string_view tag) {
  std::uint64_t rows = 0, unit = 1;
  for (; !tag.empty() && tag.back() >= '0' && tag.back() <= '9'; tag.remove_suffix(1), unit *= 10)
    rows += static_cast<std::uint64_t>(tag.back() - '0') * unit;
  return tag.ends_with(' ') ? rows : 0;
}

bool begins_transaction(std::string_view normalised) {
  const auto is = [&](std::string_view word) {
    return normalised.size() >= word.size() &&
           std::equal(word.begin(), word.end(), normalised.begin(), [](char a, char b) { return a == (b & ~32); });
  };
  return is("BEGIN") || is("START");
}

}  // namespace

// --- the client's requests

void ClientSession::begin_request() {
  if (std::exchange(in_request_, true)) return;
  request_ = worker_.next_request();
  request_since = worker_.now();
}

// Nothing was under way on the server connection, and something is about to be.
void ClientSession::begin_execution() {
  const pool::Time now = worker_.now();
  begin_request();
  if (server_->pipeline.unsynced()) request_since = now;  // what came before is answered
  sent_at_ = server_->running.since = now;
  if (server_->pipeline.status() == protocol::TxStatus::Idle) transaction_since = now;
}

void ClientSession::on_flushed() {
  sent_at_ = worker_.now();
}

pool::StatementHandle ClientSession::note_statement(std::uint64_t fingerprint, std::string_view sql, std::string_view tags) {
  auto& stats = worker_.statement_stats;
  auto& running = server_->running;
  const auto handle = stats.find(entry_->number, fingerprint, sql, worker_.now());
  if (running.first == pool::kNoStatement || running.first_may_begin) {
    running.first = handle;
    running.first_may_begin = begins_transaction(stats.text(handle));
  }
  running.last = handle;
  if (running.tags != tags) running.tags = tags.substr(0, pool::StatementStats::kMostTags);
  return handle;
}

pool::StatementHandle ClientSession::note_statement(const protocol::Statement& statement) {
  if (statement.fingerprint == 0) statement.fingerprint = protocol::fingerprint_sql(statement.sql);
  return note_statement(statement.fingerprint, statement.sql, statement.tags);
}

void ClientSession::note_bind(std::string_view portal, const protocol::StatementRef& statement) {
  auto& running = server_->running;
  running.named = statement ? note_statement(*statement) : pool::kNoStatement;
  if (portal.empty()) {
    running.portal = running.named;
    return;
  }
  auto& portals = running.portals;
  const auto it = std::find_if(portals.begin(), portals.end(), [&](const auto& one) { return one.first == portal; });
  if (it != portals.end())
    it->second = running.named;
  else if (portals.size() < ServerConnection::kMostPortals)
    portals.emplace_back(portal, running.named);
}

pool::StatementHandle ClientSession::statement_of(Bytes execute) const {
  protocol::Reader reader(execute.subspan(kHeaderSize));
  const std::string_view portal = reader.cstring();
  const auto& running = server_->running;
  if (!reader.ok()) return pool::kNoStatement;
  if (portal.empty()) return running.portal;
  const auto it = std::find_if(running.portals.begin(), running.portals.end(), [&](const auto& one) { return one.first == portal; });
  return it == running.portals.end() ? pool::kNoStatement : it->second;
}

void ClientSession::on_taken() {
  if (unread_since_ == pool::Time{}) return;
  const std::uint64_t waited = micros(worker_.now() - std::exchange(unread_since_, {}));
  if (server_ && !server_->pipeline.empty())
    reading_micros_ += waited;
  else
    worker_.statement_stats.add_client_time(executed_, waited);
}

std::pair<std::uint64_t, std::uint64_t> ClientSession::take_delays(pool::Time now, pool::StatementHandle statement) {
  if (unread_since_ != pool::Time{}) {
    reading_micros_ += micros(now - unread_since_);
    unread_since_ = now;
  }
  executed_ = statement;
  return {std::exchange(wait_micros_, 0), std::exchange(reading_micros_, 0)};
}

// --- the server's answers

/// Of a command. A portal that is suspended has none of its tag yet.
void ServerConnection::note_end(const protocol::Owed& owed, std::string_view tag) {
  running.rows += rows_of(tag);
  if (owed.request == Request::Execute) finish_execution(owed.note);  // a Query ends with ReadyForQuery
}

void ServerConnection::note_error(const protocol::Owed& owed, Bytes available, std::size_t total) {
  if (const auto error = protocol::parse_error(available.subspan(kHeaderSize)); error && available.size() == total)
    running.sqlstate = error->sqlstate;
  if (owed.request == Request::Execute)
    finish_execution(owed.note == kRaised ? pool::kNoStatement : owed.note);
  else if (owed.request != Request::Query && owed.request != Request::Sync)
    finish_execution(running.named);
}

void ServerConnection::finish_execution(pool::StatementHandle statement) {
  const pool::Time now = worker_.now();
  const auto [wait, reading] = client_->take_delays(now, statement);
  const std::uint64_t elapsed = micros(now - running.since);
  pool::Execution e;
  e.wait = wait;
  e.client = std::min(reading, elapsed);
  e.server = elapsed - e.client;
  e.rows = running.rows;
  e.bytes = running.bytes;
  e.sqlstate = running.sqlstate;
  e.tags = running.tags;
  worker_.statement_stats.record(statement, e, now);
  const std::uint32_t slow = worker_.config().log.slowQueryMillis;
  if (slow != 0 && e.total() >= std::uint64_t{slow} * 1000 && statement != pool::kNoStatement) {
    const auto ms = [](std::uint64_t us) { return static_cast<double>(us) / 1000; };
    log::warn("slow_statement", about(e.sqlstate),
              "slow statement: client {} ({}@{}, application \"{}\") request {}: {:.1f} ms (waiting {:.1f}, server {:.1f}, client "
              "reading {:.1f}), {} rows, {} bytes{}{}: {}{}{}{}",
              client_->id(), entry_.user, entry_.database, client_->application(), client_->request(), ms(e.total()), ms(e.wait),
              ms(e.server), ms(e.client), e.rows, e.bytes, e.sqlstate.empty() ? "" : ", error ", e.sqlstate,
              worker_.statement_stats.text(statement), e.tags.empty() ? "" : " /*", e.tags, e.tags.empty() ? "" : "*/");
  }
  running.since = now;
  running.rows = running.bytes = 0;
  running.sqlstate.clear();
}

}  // namespace pgsidecar::proxy
