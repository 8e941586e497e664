// The relay's client side: what each request means for the lease, the statements and the pipeline, and what goes on to the
// server. The hot path: nothing here allocates for a statement that is known.
#include <strings.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"
#include "proxy/client_session.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Bytes;
using protocol::kHeaderSize;
using protocol::Request;
using protocol::Verdict;

namespace {

constexpr std::size_t kMaxNames = 8 * 1024;    // of a message whose names are read
constexpr std::uint32_t kMostOwed = 8 * 1024;  // replies to a client that isn't read from any more

bool has_several_statements(std::string_view sql) {
  return sql.find(';') < sql.find_last_not_of("; \t\r\n") + 1;
}

/// pg_catalog's functions for large objects, which libpq and its like call by their numbers.
bool is_large_object(std::uint32_t oid) {
  switch (oid) {
    case 715:   // lo_create
    case 764:   // lo_import
    case 765:   // lo_export
    case 767:   // lo_import with a number
    case 952:   // lo_open
    case 953:   // lo_close
    case 954:   // loread
    case 955:   // lowrite
    case 956:   // lo_lseek
    case 957:   // lo_creat
    case 958:   // lo_tell
    case 964:   // lo_unlink
    case 1004:  // lo_truncate
    case 3170:  // lo_lseek64
    case 3171:  // lo_tell64
    case 3172:  // lo_truncate64
      return true;
    default: return false;
  }
}

constexpr bool is_known(char type) {
  switch (type) {
    case 'Q':
    case 'P':
    case 'B':
    case 'D':
    case 'E':
    case 'C':
    case 'S':
    case 'H':
    case 'F':
    case 'd':
    case 'c':
    case 'f': return true;
    default: return false;
  }
}

}  // namespace

/// Terminate, an unknown message, or one of a client whose transaction or request is over already.
std::size_t ClientSession::on_unrelayed(char type, Bytes available, std::size_t total) {
  if (type == 'X') {
    said_goodbye_ = true;
    close();
    return 0;
  }
  if (discarding_) {
    if (type == 'S') discarding_ = false, tell_ready(lost_ ? protocol::TxStatus::Failed : protocol::TxStatus::Idle);
    return swallow(available, total);
  }
  if (is_known(type)) return answer_lost(type, available, total);
  fatal("08P01", "invalid frontend message type " + std::to_string(static_cast<unsigned char>(type)));
  return 0;
}

std::size_t ClientSession::on_request(char type, Bytes available, std::size_t total) {
  if (!is_known(type) || discarding_ || lost_) [[unlikely]]
    return on_unrelayed(type, available, total);
  if (!server_) {
    if (type == 'd' || type == 'c' || type == 'f' || type == 'H') return swallow(available, total);  // the rest of a COPY that failed
    if (type == 'S') {
      tell_ready(protocol::TxStatus::Idle);
      return swallow(available, total);
    }
    // Who is still sending it needs no server connection yet.
    const bool read_whole = (type == 'Q' || type == 'P') && rewrites() && total <= worker_.config().limits.maxParseBytes;
    if (available.size() < total && (read_whole || total < kMaxNames)) return 0;
    if (available.size() == total && type == 'C' && close_unserved(available)) return total;
    if (available.size() == total && type == 'P' && !entry_->pool.any_idle() && parse_unserved(available)) return total;
    if (!acquire()) return 0;
  }
  const auto& pipeline = server_->pipeline;
  if (pipeline.awaits_copy_data() && std::string_view("dcfHS").find(type) == std::string_view::npos) [[unlikely]] {
    end_interrupted_copy();
    return 0;
  }
  if (pipeline.owed_to_clients() >= kMostOwed && !pipeline.awaits_copy_data()) [[unlikely]]
    return wait_for_answers(kMostOwed / 2);
  // What is behind a BEGIN that is refused isn't executed.
  if (mode() == conf::PoolMode::Statement && server_->changed().block != 0 && !pipeline.awaits_copy_data() && !pipeline.unsynced() &&
      !answered()) [[unlikely]]
    return wait_for_answers();
  if (pipeline.empty()) begin_execution();
  if (server_->needs_settings()) server_->apply_settings();
  switch (type) {
    case 'Q': return on_query(available, total);
    case 'P': return on_parse(available, total);
    case 'B': return on_bind(available, total);
    case 'D': return on_describe(available, total);
    case 'C': return on_close(available, total);
    case 'E': return on_execute(available, total);
    case 'F':
      if (available.size() < std::min(total, kHeaderSize + 4)) return 0;
      if (!is_large_object(protocol::Reader(available.subspan(kHeaderSize)).u32())) {
        if (listen_ahead(protocol::kUnreadable, false) == Subscriber::Verdict::Wait) return 0;
        residue_ |= protocol::kUnreadable;
      }
      server_->pipeline.push({Request::FunctionCall, Verdict::Forward, id_});
      break;
    case 'd': server_->pipeline.note_copy_data(); break;
    case 'c':
    case 'f': server_->pipeline.push({Request::CopyEnd, Verdict::Forward, id_}); break;
    case 'S':
      // Whether the server ignores it, as it does in COPY mode, isn't known before that has begun, or failed to.
      if (residue_ & protocol::kCopy && answered()) residue_ &= ~protocol::kCopy;
      if (residue_ & protocol::kCopy && !server_->pipeline.awaits_copy_data()) return wait_for_answers();
      if (!server_->pipeline.push({Request::Sync, Verdict::Forward, id_})) return swallow(available, total);  // held during COPY
      end_segment();
      relay(available, total);
      restore_after_reset();
      return available.size();
    default: break;
  }
  relay(available, total);
  return available.size();
}

std::size_t ClientSession::swallow(Bytes available, std::size_t total) {
  pass_left_ = total - available.size();
  pass_to_server_ = false;
  return available.size();
}

void ClientSession::tell_ready(protocol::TxStatus status) {
  worker_.to_client.own([status](std::string& out) { protocol::write_ready_for_query(out, status); });
}

std::size_t ClientSession::answer_lost(char type, Bytes available, std::size_t total) {
  if (available.size() < total && total < kMaxNames) return 0;
  bool ended = false;
  worker_.to_client.own([&](std::string& out) {
    ended = lost_->answer(type, available.subspan(kHeaderSize), statements, worker_.statements, settings->meaning, out);
  });
  if (ended) lost_.reset();
  if (ended && draining_) fatal("57P01", "terminating connection due to administrator command");
  return swallow(available, total);
}

std::size_t ClientSession::on_execute(Bytes available, std::size_t total) {
  const auto& running = server_->running;
  const bool has_effects = running.reset || (running.effects | running.named_effects) != 0;
  if (has_effects && available.size() < total && total < kMaxNames) return 0;
  server_->pipeline.push({Request::Execute, Verdict::Forward, id_, statement_of(available)});
  relay(available, total);
  if (!has_effects || pass_left_ > 0) return available.size();
  const bool named = !protocol::Reader(available.subspan(kHeaderSize)).cstring().empty();
  const std::uint32_t effects = named ? running.named_effects : running.effects;
  residue_ |= effects & protocol::kReset;
  note_transaction(effects);
  if (!named && running.reset) restore_behind_execute();
  return available.size();
}

// As the server would, which may not get to see the message.
void ClientSession::end_interrupted_copy() {
  fatal("08P01", "another message than CopyData, CopyDone, CopyFail, Flush or Sync during COPY from stdin");
}

void ClientSession::relay(Bytes available, std::size_t total) {
  worker_.to_server.add(available.data(), available.size());
  pass_left_ = total - available.size();
  pass_to_server_ = true;
}

/// Prepares what a text names. True: the text belongs behind that, and isn't executed if it fails.
bool ClientSession::adopt_ahead(std::string_view sql) {
  // What goes ahead of what it names is executed, and maybe committed, whatever becomes of that.
  const auto& pipeline = server_->pipeline;
  server_->adopts_apart =
      has_several_statements(sql) && answered() && !pipeline.unsynced() && pipeline.status() == protocol::TxStatus::Idle;
  const std::size_t owed = pipeline.size();
  adopt_named(sql);
  const bool apart = std::exchange(server_->adopts_apart, false);
  return pipeline.size() > owed && !apart;
}

/// A Query has dropped the unnamed statement, whatever becomes of those parsed before it.
void ClientSession::end_unnamed() {
  statements.clear_unnamed();
  server_->statements.unnamed.reset();
  if (!unanswered_) return;
  auto& [pending, deallocations, ended] = *unanswered_;
  for (std::size_t at = std::max(ended, pending.begin()); at != pending.end(); ++at)
    if (pending[at].name.empty()) pending[at].before = {}, pending[at].adopted.reset();
  ended = pending.end();
}

std::size_t ClientSession::on_query(Bytes available, std::size_t total) {
  const bool too_large = total > worker_.config().limits.maxParseBytes;
  if (available.size() < total && !too_large) return 0;
  pool::StatementHandle statement = pool::kNoStatement;
  bool adopts = false;
  const bool due = (residue_ & protocol::kReset) != 0;
  std::optional<protocol::Reset> reset;
  server_->running.reset.reset();
  if (available.size() == total && !too_large) {
    protocol::Reader reader(available.subspan(kHeaderSize));
    const std::string_view sql = reader.cstring();
    if (!characters_known(sql)) return 0;
    const auto [residue, fingerprint] = worker_.sql_memory.read(sql, server_->conforming_strings());
    if (residue & protocol::kPrepared && !names_settled(kNames)) return 0;
    // A Sync of the proxy's follows it, which must not end what the server skips for the client.
    const bool synced = residue & protocol::kPrepared || (residue & protocol::kReset && !login_settings_->values.empty());
    if (synced && server_->pipeline.unsynced() && !answered()) return wait_for_answers();
    if (!plans_see_temporary(residue)) return 0;
    if (residue & protocol::kReset && !due) reset = protocol::reset_of(sql, server_->conforming_strings());
    statement = note_statement(fingerprint, sql, protocol::comment_tags(sql));
    if (residue != 0 && refuse(sql, residue, true)) return total;
    const auto before = server_->changed();
    switch (listen_ahead(note_residue(sql, residue), true)) {
      case Subscriber::Verdict::Wait:
        if (server_) server_->changed() = before;  // else its connection is gone
        return 0;
      case Subscriber::Verdict::Refused: return total;
      case Subscriber::Verdict::Go: break;
    }
    if (!entry_->catalog.quiet()) note_names(sql, entry_->catalog.residue_of_names(sql));
    if (residue & protocol::kPrepared) {
      const auto behind = std::exchange(server_->changed(), before);  // what it names is parsed ahead of it
      adopts = adopt_ahead(sql);
      server_->changed() = behind;
      note_executed(sql);
      note_deallocations(sql);
    }
  } else if (rewrites()) {
    residue_ |= protocol::kUnreadable;
  }
  end_unnamed();
  ++entry_->pool.counters().queries;
  server_->pipeline.push({Request::Query, Verdict::Forward, id_, statement, adopts});
  end_segment();
  relay(available, total);
  if (adopts) server_->sync(Verdict::Forward, id_);  // if preparing what it names fails, the server skips it
  restore_after_reset(reset);
  return available.size();
}

/// Too long to be kept: prepared on this connection under the client's own name, which pins the client to it.
std::size_t ClientSession::on_long_parse(Bytes available, std::size_t total) {
  protocol::Reader reader(available.subspan(kHeaderSize));
  const std::string_view name = reader.cstring();
  if (!reader.ok() && available.size() < kMaxNames) return 0;
  auto& pipeline = server_->pipeline;
  if (!pipeline.failed()) {
    if (!name.empty() && !names_settled(kNames)) return 0;
    residue_ |= protocol::kUnreadable;
    if (name.empty()) {
      names_change_ |= kUnnamed;
      unnamed_here_ = true;
      unanswered().pending.push_back({Pending::kParse, {}, statements.look_up({}), server_->statements.unnamed});
      server_->statements.unnamed = worker_.statements.make({}, settings->meaning);  // stands for it
      statements.set({}, server_->statements.unnamed);
    } else {
      if (const auto existing = statements.find(name)) server_->adopt(std::string(name), existing);
      unanswered().pending.push_back({Pending::kUnkept, std::string(name)});
    }
  }
  pipeline.push({Request::Parse, Verdict::Forward, id_});
  relay(available, total);
  return available.size();
}

std::size_t ClientSession::on_parse(Bytes available, std::size_t total) {
  const bool too_large = total > worker_.config().limits.maxParseBytes;
  if (available.size() < total && !too_large) return 0;
  if (too_large && rewrites()) [[unlikely]]
    return on_long_parse(available, total);
  auto& pipeline = server_->pipeline;
  protocol::Reader reader(available.subspan(kHeaderSize));
  const std::string_view name = reader.cstring();
  const Bytes rest = reader.rest();
  const std::string_view body(reinterpret_cast<const char*>(rest.data()), rest.size());
  if (!rewrites()) [[unlikely]] {
    if (!too_large && reader.ok()) note_parse(name, body);
    pipeline.push({Request::Parse, Verdict::Forward, id_});
    relay(available, total);
    return available.size();
  }
  if (!reader.ok() || pipeline.failed()) [[unlikely]]
    return parse_refused(name, available, total);
  // Only its transaction may have it read so.
  const auto& changed_so_far = server_->changed();
  const std::string_view sql = body.substr(0, body.find('\0'));
  if (!characters_known(sql)) return 0;
  const bool own_path = (changed_so_far.path || changed_so_far.code) && protocol::is_analysed(sql);
  const bool own_reading = changed_so_far.meaning && protocol::has_constants(sql);
  if (own_reading && !answered()) return wait_for_answers();
  protocol::StatementRef statement = own_path || own_reading ? worker_.statements.make(body, settings->meaning, own_path, own_reading)
                                                             : worker_.statements.intern(body, settings->meaning);
  if ((!name.empty() || statement->residue & protocol::kPrepared) && !names_settled(kNames)) return 0;
  server_->running.named = note_statement(*statement);
  if (!name.empty() && statements.find(name)) return parse_again(name, statement, total);
  names_change_ |= name.empty() ? kUnnamed : kNames;
  unnamed_here_ |= name.empty();
  if (statement->residue != 0 && refuse(statement->sql, statement->residue, false)) return total;
  if (!name.empty() && statements.size() >= worker_.config().limits.maxPreparedStatementsPerClient) {
    server_->raise(false, "too many prepared statements", "limits.maxPreparedStatementsPerClient bounds them for each client.", "53000");
    return total;
  }
  const auto changed = server_->changed();
  if (listen_ahead(note_residue(*statement), false) == Subscriber::Verdict::Wait) return 0;
  server_->changed() = changed;  // by what is bound only
  if (statement->residue & protocol::kPrepared) adopt_named(statement->sql);
  if (!name.empty()) return parse_named(name, std::move(statement), available, total);
  pipeline.push({Request::Parse, Verdict::Forward, id_});
  Pending& pending = unanswered().pending.add();
  pending.before = statements.exchange_unnamed({statement, worker_.statements.generation()});
  pending.adopted = std::exchange(server_->statements.unnamed, std::move(statement));
  relay(available, total);
  return total;
}

std::size_t ClientSession::parse_named(std::string_view name, protocol::StatementRef statement, Bytes available, std::size_t total) {
  const std::uint32_t generation = worker_.statements.generation();
  if (statement->own_reading) residue_ |= protocol::kPrivateStatement;
  if (sql_prepared() || statement->own_reading) {
    unanswered().pending.push_back({Pending::kParse, std::string(name), {}, server_->forget_adopted(name)});
    server_->adopt(std::string(name), statement, Verdict::Forward);
    const auto* const known = server_->statements.touch(statement);
    if (known && known->generation != generation) server_->drop_statement(statement->id);
    hold(statement);  // by which a Bind finds it
    statements.set(name, std::move(statement), generation);
    return total;
  }
  const auto is_empty = [&] { return protocol::normalize_sql(statement->sql).find_first_not_of("; ") == std::string::npos; };
  if (server_->pipeline.empty() && server_->in_failed_block() && !(statement->residue & protocol::kTransaction) && !is_empty())
    return parse_refused(name, available, total);
  parse_shared(statement);
  unanswered().pending.push_back({Pending::kParse, std::string(name)});
  statements.set(name, std::move(statement), generation);
  return total;
}

/// Of a name that the client has: what the server itself finds wrong with it, "already exists" at the latest, with the client's name put
/// back in.
std::size_t ClientSession::parse_again(std::string_view name, const protocol::StatementRef& statement, std::size_t total) {
  hold(statement);
  names_change_ |= kNames;
  server_->parse(statement->id, statement->body, Verdict::Forward);
  unanswered().pending.push_back({Pending::kUnkept, std::string(name)});
  return total;
}

/// The server skips it, or says what is wrong with it.
std::size_t ClientSession::parse_refused(std::string_view name, Bytes available, std::size_t total) {
  relay(available, total);
  server_->pipeline.push({Request::Parse, Verdict::Forward, id_});
  if (!server_->pipeline.failed()) unanswered().pending.push_back({Pending::kUnkept, std::string(name)});
  return total;
}

/// In a mode where the server knows it by the client's own name: for the statistics, and for what it may leave behind.
void ClientSession::note_parse(std::string_view name, std::string_view body) {
  const auto statement = worker_.statements.intern(body, settings->meaning);
  if (name.empty() || statements.size() < worker_.config().limits.maxPreparedStatementsPerClient) statements.set(name, statement);
  server_->running.named = note_statement(*statement);
  const std::uint32_t residue = protocol::scan_sql(statement->sql, server_->conforming_strings());
  note_residue(statement->sql, residue & ~protocol::kReset);
}

/// Under the name that all clients share.
void ClientSession::hold(const protocol::StatementRef& statement) {
  auto* known = server_->statements.touch(statement);
  if (!known) {
    server_->parse(statement->id, statement->body, Verdict::Skip);
    known = &server_->statements.add(statement, worker_.statements.generation());
  }
  known->doubtful |= plans_otherwise(*statement);
  evict();
}

/// What a client parses, under the name that all clients share: its answer is the server's, or ours where the server has it.
void ClientSession::parse_shared(const protocol::StatementRef& statement) {
  auto& pipeline = server_->pipeline;
  auto& held = server_->statements;
  const std::uint32_t generation = worker_.statements.generation();
  auto& counters = entry_->pool.counters();
  ++counters.clientParses;
  auto* known = held.touch(statement);
  const bool behind = pipeline.readies_owed() > 0;  // segments that may fail, so that the server would refuse it
  if (known && (behind || known->generation != generation)) {
    ++counters.preparedHits;
    known->shape = 0;
    known->generation = generation;
    server_->close_statement(statement->id);
    server_->parse(statement->id, statement->body, Verdict::Forward);
  } else if (known) {
    ++counters.preparedHits;
    pipeline.push({Request::Parse, Verdict::Inject, id_});
  } else {
    ++counters.preparedMisses;
    server_->parse(statement->id, statement->body, Verdict::Forward);
    known = &held.add(statement, generation);
  }
  known->doubtful |= plans_otherwise(*statement);
  evict();
}

// Names are the client's own, so that closing one needs no server.
bool ClientSession::close_unserved(Bytes whole) {
  protocol::Reader reader(whole.subspan(kHeaderSize));
  const bool is_statement = reader.u8() == 'S';
  const std::string_view name = reader.cstring();
  if (!reader.done() || !is_statement || name.empty() || !rewrites()) return false;
  statements.erase(name);
  worker_.to_client.own([](std::string& out) { protocol::Writer(out).begin(protocol::Backend::CloseComplete).end(); });
  return true;
}

// A client that prepares what a server has accepted for the same session settings doesn't wait for a server of its own. It may be
// that those who hold the servers wait for this client: pgbench prepares blockingly while its other clients hold transactions.
bool ClientSession::parse_unserved(Bytes whole) {
  if (!rewrites() || entry_->pool.room() > 0) return false;
  protocol::Reader reader(whole.subspan(kHeaderSize));
  const std::string_view name = reader.cstring();
  const Bytes body = reader.rest();
  if (name.empty() || !reader.ok() || statements.size() >= worker_.config().limits.maxPreparedStatementsPerClient) return false;
  protocol::StatementRef statement =
      worker_.statements.intern({reinterpret_cast<const char*>(body.data()), body.size()}, settings->meaning);
  if (statement->proven_with != settings->number || statement->proven_in != worker_.statements.generation() || statements.find(name))
    return false;
  ++entry_->pool.counters().clientParses;
  statements.set(name, std::move(statement), worker_.statements.generation());
  worker_.to_client.own([](std::string& out) { protocol::Writer(out).begin(protocol::Backend::ParseComplete).end(); });
  return true;
}

/// How the server would read it now isn't what the client's settings say.
bool ClientSession::reads_otherwise(const protocol::Statement& statement) const {
  const auto& changed = server_->changed();
  return (changed.meaning && statement.has_constants) || (changed.path && statement.infers_types && !statement.own_path);
}

/// Its plan may have constants in it, be they those of functions, as only what the transaction has set has them read.
bool ClientSession::plans_otherwise(const protocol::Statement& statement) const {
  return server_->changed().meaning && (statement.has_constants || entry_->catalog.inlines());
}

/// The server knows it by the client's own name, and can't be told it again.
bool ClientSession::is_private(std::string_view name, const protocol::StatementRef& statement) const {
  return statement && statement->own_reading && server_->adopts(name, statement);
}

/// False: what a backslash means is seen when what was sent before is answered.
bool ClientSession::characters_known(std::string_view sql) {
  return !server_->changed().meaning || sql.find('\\') == std::string_view::npos || answered() || wait_for_answers() != 0;
}

/// False: whether there is a transaction block, and what has been set, is seen when what was sent before is answered.
bool ClientSession::meaning_known(const protocol::Statement& statement) {
  const bool depends = statement.has_constants || statement.infers_types;
  if (!depends || !server_->changed().any() || server_->in_block()) return true;
  return settled() || wait_for_answers() != 0;
}

std::size_t ClientSession::on_bind(Bytes available, std::size_t total) {
  auto& pipeline = server_->pipeline;
  protocol::Reader reader(available.subspan(kHeaderSize));
  const std::string_view portal = reader.cstring();
  const std::string_view name = reader.cstring();
  if (!rewrites() || pipeline.failed()) [[unlikely]] {
    const auto statement = reader.ok() ? statements.find(name) : nullptr;
    if (reader.ok()) note_bind(portal, statement);
    if (!rewrites()) note_portal(portal, statement);
    if (statement && !rewrites()) residue_ |= statement->residue & protocol::kCopy;
    pipeline.push({Request::Bind, Verdict::Forward, id_});
    relay(available, total);
    return available.size();
  }
  if (!reader.ok()) {
    if (available.size() < total && available.size() < kMaxNames) return 0;
    pipeline.push({Request::Bind, Verdict::Forward, id_});
    relay(available, total);
    return available.size();
  }
  if (!names_settled(name)) return 0;
  const protocol::NamedStatement named = statements.look_up(name);
  const protocol::StatementRef& statement = named.statement;
  if (statement && !plans_see_temporary(statement->residue)) return 0;
  if (statement && subscriber_ && listen_ahead(note_residue(*statement), false) == Subscriber::Verdict::Wait) return 0;
  const bool names_others = statement && statement->residue & protocol::kPrepared;
  if (names_others) {
    if (!adopt(name, statement)) return 0;
    note_deallocations(statement->sql);
  }
  note_bind(portal, statement);
  note_portal(portal, statement);
  server_->running.untold = 0;
  auto& queries = entry_->pool.counters().queries;
  // The unnamed one is prepared by a name where the client knows what it looks like, so that it is held against that.
  const bool by_name = name.empty() ? named.shape != 0 && !statement->body.empty() && server_->statements.unnamed != statement
                                    : !is_private(name, statement);
  if (!statement || !by_name || names_others) {
    ++queries;
    if (!statement && name.empty()) close_unnamed();
    if (statement && name.empty() && !names_others) {
      if (server_->statements.unnamed != statement && !meaning_known(*statement)) return 0;
      prepare_unnamed(statement);
    }
    if (statement && !names_others) note_residue(*statement);
    pipeline.push({Request::Bind, Verdict::Forward, id_});
    relay(available, total);
    return available.size();
  }
  if (!prepare(named)) return 0;
  if (named.shape == 0) server_->running.untold = statement->id;
  ++queries;
  ++entry_->pool.counters().binds;
  const protocol::ServerName own_name = protocol::server_name(statement->id);
  const std::size_t consumed = kHeaderSize + portal.size() + 1 + name.size() + 1;
  worker_.to_server.own([&](std::string& out) {
    out.push_back('B');
    out.append(4, '\0');
    protocol::store_u32(reinterpret_cast<std::uint8_t*>(out.data() + out.size() - 4),
                        static_cast<std::uint32_t>(total - 1 - name.size() + own_name.size()));
    protocol::Writer(out).cstring(portal).cstring(own_name);
  });
  pipeline.push({Request::Bind, Verdict::Forward, id_, statement->id});
  worker_.to_server.add(available.data() + consumed, available.size() - consumed);
  pass_left_ = total - available.size();
  pass_to_server_ = true;
  return available.size();
}

std::size_t ClientSession::on_describe(Bytes available, std::size_t total) {
  if (available.size() < total && total < kMaxNames) return 0;
  auto& pipeline = server_->pipeline;
  protocol::Reader reader(available.subspan(kHeaderSize));
  const char kind = static_cast<char>(reader.u8());
  const std::string_view name = reader.cstring();
  if (kind == 'P') {
    if (!pipeline.failed() && server_->running.untold != 0) tell_shape();
    pipeline.push({Request::Describe, Verdict::Forward, id_});
    relay(available, total);
    return available.size();
  }
  if (kind == 'S' && !pipeline.failed() && !names_settled(name)) return 0;
  const auto statement = kind == 'S' && reader.ok() && rewrites() && !pipeline.failed() ? statements.find(name) : nullptr;
  std::uint64_t note = 0;
  if (statement && statement->residue & protocol::kPrepared) {
    if (!adopt(name, statement)) return 0;
    relay(available, total);
  } else if (is_private(name, statement)) {
    relay(available, total);
  } else if (statement && !name.empty()) {
    if (!prepare(statements.look_up(name), true)) return 0;
    note = statement->id;
    pass_left_ = total - available.size();  // junk behind the name
    pass_to_server_ = false;
    worker_.to_server.own([&](std::string& out) {
      protocol::Writer(out).begin(protocol::Frontend::Describe).u8('S').cstring(protocol::server_name(statement->id)).end();
    });
  } else {
    if (statement && server_->statements.unnamed != statement && !meaning_known(*statement)) return 0;
    if (statement) {
      prepare_unnamed(statement);
      note = statement->id;
    }
    if (kind == 'S' && name.empty() && !statement && rewrites() && !pipeline.failed()) close_unnamed();
    relay(available, total);
  }
  pipeline.push({Request::Describe, Verdict::Forward, id_, note});
  return available.size();
}

std::size_t ClientSession::on_close(Bytes available, std::size_t total) {
  if (available.size() < total && total < kMaxNames) return 0;
  auto& pipeline = server_->pipeline;
  protocol::Reader reader(available.subspan(kHeaderSize));
  const char kind = static_cast<char>(reader.u8());
  const std::string_view name = reader.cstring();
  if (rewrites() && kind == 'S' && reader.ok() && !pipeline.failed()) {
    // Where SQL has prepared, or names statements, the server may know the name itself.
    if (!name.empty() && !names_settled(kNames)) return 0;
    names_change_ |= name.empty() ? kUnnamed : kNames;
    const bool shared = !name.empty() && available.size() == total && !sql_prepared() && !server_->has_adopted(name);
    auto known = name.empty() ? std::exchange(server_->statements.unnamed, {}) : shared ? nullptr : server_->forget_adopted(name);
    unanswered().pending.push_back({Pending::kClose, std::string(name), statements.look_up(name), std::move(known)});
    statements.erase(name);
    pipeline.push({Request::Close, shared ? Verdict::Inject : Verdict::Forward, id_, kOfStatement});
    if (shared) return total;
  } else {
    if (!rewrites() && kind == 'S' && reader.ok()) statements.erase(name);
    pipeline.push({Request::Close, Verdict::Forward, id_});
  }
  relay(available, total);
  return available.size();
}

void ClientSession::resume_reading() {
  boost::asio::post(worker_.loop(), [self = shared_from_this()] {
    if (self->state_ != State::Closed && !self->readiness_.pending()) self->worker_.step(*self, [&self] { self->on_readable(); });
  });
}

void ClientSession::on_apply_failed(const protocol::ErrorFields& error) {
  server_ = nullptr;
  fatal(error.sqlstate, "could not carry this session's settings to another server connection: " + error.message);
}

}  // namespace pgsidecar::proxy
