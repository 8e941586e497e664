// The names of a client's prepared statements: what they stand for, what is prepared for them on its server connection, and what is
// undone if the server skips it. Part of ClientSession.
#include <algorithm>

#include "protocol/sql_scan.hpp"
#include "proxy/client_session.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Request;
using protocol::Verdict;

namespace {

bool only_deallocates(const protocol::PreparedNames& named, const std::string& name) {
  const auto in = [&](const std::vector<std::string>& names) { return std::count(names.begin(), names.end(), name); };
  return in(named.deallocated) == in(named.names);
}

}  // namespace

// SQL that names prepared statements (EXECUTE, DEALLOCATE, PREPARE, or lists them) finds those of the client's under the client's
// own names. Which of them are left is asked when the transaction is over.
void ClientSession::adopt_named(std::string_view sql, int depth) {
  constexpr int kDeepest = 4;  // a text that executes one that executes...
  auto& pipeline = server_->pipeline;
  if (!rewrites() || pipeline.failed() || server_->in_failed_block()) return;
  const protocol::PreparedNames named = protocol::prepared_names(sql);
  names_change_ |= kNames;
  if (named.all) {
    statements.for_each_named([&](const std::string& name, const protocol::StatementRef& s) { adopt_as_meant(name, s); });
    server_->close_shared_statements(false);
  }
  for (const std::string& name : named.names) {
    const auto statement = statements.find(name);
    if (!statement) continue;
    // For DEALLOCATE alone any text does: the client's may not be valid any more.
    if (only_deallocates(named, name)) {
      server_->adopt(name, worker_.nothing);
      continue;
    }
    adopt_as_meant(name, statement);
    if (statement->residue & protocol::kPrepared && depth < kDeepest) adopt_named(statement->sql, depth + 1);
  }
}

/// Of SQL that is about to be executed.
void ClientSession::note_deallocations(std::string_view sql) {
  auto& pipeline = server_->pipeline;
  if (!rewrites() || pipeline.failed() || server_->in_failed_block()) return;
  const protocol::PreparedNames named = protocol::prepared_names(sql);
  if (named.closes_all) names_open_ |= kNames;
  const std::uint64_t ready = readies_told_ + pipeline.readies_owed() + 1;
  for (const std::string& name : named.deallocated) {
    unanswered().deallocations.push_back(
        {Pending::kDeallocate, name, statements.look_up(name), server_->forget_adopted(name), ready, unanswered().pending.end()});
    statements.erase(name);
  }
}

/// What it executes may set what decides how others are read.
void ClientSession::note_executed(std::string_view sql) {
  const protocol::PreparedNames named = protocol::prepared_names(sql);
  for (const std::string& name : named.names) {
    if (only_deallocates(named, name)) continue;
    const auto statement = statements.find(name);
    const bool known = statement && !(statement->residue & (protocol::kFunction | protocol::kPrepared));
    auto& changed = server_->changed();
    changed.meaning |= !known || statement->residue & protocol::kMeaning;
    changed.path |= !known || statement->residue & protocol::kPath;
    changed.code |= !known || statement->residue & protocol::kDefinition;
  }
}

/// Ahead of a Bind or a Describe of such a statement, which is among what it may list. False: it has to wait.
bool ClientSession::adopt(std::string_view name, const protocol::StatementRef& statement) {
  if (!names_settled(kNames)) return false;
  note_residue(*statement);
  adopt_named(statement->sql);
  note_executed(statement->sql);
  if (name.empty())
    prepare_unnamed(statement);
  else
    adopt_as_meant(std::string(name), statement);
  return true;
}

void ClientSession::adopt_as_meant(const std::string& name, const protocol::StatementRef& statement) {
  if (server_->adopts(name, statement)) return;
  if (server_->adopts_apart && statement->own_reading) return;  // it can't be
  parse_as_meant(*statement, [&] { server_->adopt(name, statement); });
  if (server_->adopts_apart) server_->sync(Verdict::Skip, protocol::kProxy, kAdopt);
}

/// The server may know statements of the client's by any name: SQL, or what was too long to be looked at, has prepared them.
bool ClientSession::sql_prepared() const {
  constexpr std::uint32_t kReasons = pool::bit(pool::PinReason::PreparedStatement) | pool::bit(pool::PinReason::Unreadable);
  return (residue_ & (protocol::kPrepared | protocol::kUnreadable)) || (pin_ && pin_->reasons & kReasons);
}

// False: the request that needs it has to wait, and is then looked at anew.
bool ClientSession::prepare(const protocol::NamedStatement& named, bool to_describe) {
  const auto* const held = server_->statements.look_up(named.statement->id);
  const bool there = held && held->generation >= named.generation && !server_->plans_stale;
  if (!there && !meaning_known(*named.statement)) return false;
  const bool first = !server_->pipeline.unsynced();  // of what the client has sent since its last Sync
  const std::uint32_t here = prepare_here(named)->shape;
  note_residue(*named.statement);
  return to_describe || looks_as_told(named, here, first);
}

protocol::ServerStatements::Held* ClientSession::prepare_here(const protocol::NamedStatement& named) {
  const auto& statement = named.statement;
  auto& held = server_->statements;
  if (std::exchange(server_->plans_stale, false)) server_->close_shared_statements(true);
  auto* const known = held.touch(statement);
  if (known && known->generation < named.generation) {
    server_->drop_statement(statement->id);
  } else if (known) {
    ++entry_->pool.counters().preparedHits;
    known->doubtful |= plans_otherwise(*statement);
    return known;
  }
  ++entry_->pool.counters().preparedMisses;
  parse_as_meant(*statement, [&] { server_->parse(statement->id, statement->body, Verdict::Skip); });
  names_change_ |= kNames;
  auto& added = held.add(statement, worker_.statements.generation());
  const auto& changed = server_->changed();
  added.doubtful =
      plans_otherwise(*statement) || (!server_->in_block() && changed.any() && (statement->has_constants || statement->infers_types));
  evict();
  return &added;
}

/// It is read as it was when the client prepared it: its constants, its names, and what its parameters' types follow from. Where names
/// are looked up elsewhere now, the server itself looks them up anew. If preparing fails, the settings for it go with the transaction.
void ClientSession::parse_as_meant(const protocol::Statement& statement, const std::function<void()>& parse) {
  const auto* meaning = static_cast<const Meaning*>(statement.meaning.get());
  const bool depends = statement.has_constants || statement.infers_types;
  if (!depends || server_->in_failed_block()) return parse();
  if (statement.own_reading) {
    server_->raise(false, "a statement that was read under settings of its transaction can't be prepared again", "Prepare it anew.");
    return parse();  // is skipped
  }
  const auto& changed = server_->changed();
  const bool same = meaning == settings->meaning.get();
  const bool in_block = server_->in_block();
  if (same && !reads_otherwise(statement) && !changed.code) return parse();
  auto then = meaning->values, now = settings->meaning->values;
  if (changed.any() && !in_block) {
    // What it has set is not to be undone, nor known.
    if (statement.has_constants && (changed.meaning || !read_alike(then, now)))
      server_->raise(false, "a statement can't be prepared again behind a SET that isn't answered yet",
                     "Send Sync behind the SET, or prepare the statement anew.");
    return parse();  // is doubtful
  }
  const bool by_path = statement.infers_types && !statement.own_path;
  if (!by_path)  // the server itself looks up its names anew
    for (auto* values : {&then, &now})
      for (const char* name : {"search_path", "role", "session_authorization"}) values->erase(name);
  auto before = settings_statements(now, then), behind = settings_statements(then, now);
  if (changed.any()) {
    // It comes back with a savepoint, of a name that the client doesn't have; what is parsed meanwhile stays.
    before.insert(before.begin(), "SAVEPOINT \"pgsidecar's own\"");
    before.push_back(reading_statement(then, by_path));
    behind = {"ROLLBACK TO SAVEPOINT \"pgsidecar's own\"", "RELEASE SAVEPOINT \"pgsidecar's own\""};
  }
  const auto [note, owner] =
      server_->adopts_apart ? std::pair{kAdopt, protocol::kProxy} : std::pair{std::uint64_t{0}, protocol::OwnerId{id_}};
  server_->run_within(before, note, owner);
  parse();
  server_->run_within(behind, note, owner);
}

/// What the client was told of it holds on this connection too (`here`; 0: not known). False: the server is asked.
bool ClientSession::looks_as_told(const protocol::NamedStatement& named, std::uint32_t here, bool first) {
  if (named.shape == 0) return true;
  const protocol::Statement& statement = *named.statement;
  const bool asked = server_->take_asked(statement);
  if (here == named.shape || server_->in_failed_block()) return true;
  if (asked) {
    if (here == 0) return true;  // too long to be looked at
    // Parameters keep the types that the client was told.
    if (const auto typed = worker_.statements.with_told_types(statement, named.shape)) {
      statements.replace(statement.id, typed);
      return prepare({typed, named.generation, named.shape});
    }
    worker_.statements.retire(statement);
    server_->raise_plan_changed();
    return true;
  }
  if (here != 0) {  // of an earlier time, maybe
    server_->drop_statement(statement.id);
    prepare_here(named);
  }
  server_->ask_shape(statement, first);
  return false;
}

/// With a description of the portal the client learns what its last statement looks like, and may rely on it from then on.
void ClientSession::tell_shape() {
  const std::uint64_t id = std::exchange(server_->running.untold, 0);
  const auto* const held = id != 0 ? server_->statements.look_up(id) : nullptr;
  if (!held || server_->in_failed_block()) return;
  if (held->shape != 0)
    statements.set_shape(id, held->shape);
  else
    server_->describe(id);
}

void ClientSession::prepare_unnamed(const protocol::StatementRef& statement) {
  if (server_->statements.unnamed == statement) return;
  if (statement->body.empty())
    return server_->raise(false, "the text of the unnamed statement was too long to be kept", "Parse it anew, ahead of each Bind.");
  parse_as_meant(*statement, [&] {
    worker_.to_server.own(
        [&](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Parse).cstring("").bytes(statement->body).end(); });
    server_->pipeline.push({Request::Parse, Verdict::Skip, id_});
  });
  server_->statements.unnamed = statement;
  names_change_ |= kUnnamed;  // it may be skipped
}

/// The client has none: what the server holds is another's.
void ClientSession::close_unnamed() {
  worker_.to_server.own([](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring("").end(); });
  server_->pipeline.push({Request::Close, Verdict::Skip, id_});
  server_->statements.unnamed.reset();
}

void ClientSession::evict() {
  while (const auto old = server_->statements.evict(entry_->pool.settings().maxPreparedStatements)) {
    ++entry_->pool.counters().preparedEvictions;
    server_->close_statement(old->id);
  }
}

ClientSession::Unanswered& ClientSession::unanswered() {
  if (!unanswered_) unanswered_ = std::make_unique<Unanswered>();
  return *unanswered_;
}

bool ClientSession::pending_is_duplicate() {
  return unanswered_ && !unanswered_->pending.empty() && unanswered_->pending.front().kind == Pending::kUnkept;
}

void ClientSession::on_deallocated() {
  if (unanswered_ && !unanswered_->deallocations.empty()) unanswered_->deallocations.pop_front();
}

/// What is the next to change the name, behind what was sent ahead of this position in Unanswered::pending. Null: nothing.
ClientSession::Pending* ClientSession::next_change(std::string_view name, std::size_t place) {
  auto& pending = unanswered_->pending;
  auto& deallocations = unanswered_->deallocations;
  std::size_t at = std::max(place, pending.begin());
  while (at != pending.end() && (pending[at].kind == Pending::kUnkept || pending[at].name != name)) ++at;
  for (std::size_t i = deallocations.begin(); i != deallocations.end() && deallocations[i].place <= at; ++i)
    if (deallocations[i].place >= place && deallocations[i].name == name) return &deallocations[i];
  return at == pending.end() ? nullptr : &pending[at];
}

/// Of the front of one of Unanswered's, which has failed or was skipped.
void ClientSession::undo(protocol::Ring<Pending>& queue) {
  const std::size_t behind = queue.begin() + 1;
  Pending done = queue.pop_front();
  if (Pending* const later = next_change(done.name, &queue == &unanswered_->pending ? behind : done.place)) {
    later->before = std::move(done.before);
    later->adopted = std::move(done.adopted);
    return;
  }
  statements.erase(done.name);
  if (done.before.statement) statements.set(done.name, std::move(done.before));
  if (server_ && done.name.empty())
    server_->statements.unnamed = std::move(done.adopted);
  else if (server_)
    server_->keep_adopted(done.name, done.adopted);
}

void ClientSession::on_name_done(bool ok, bool skipped) {
  if (!unanswered_ || unanswered_->pending.empty()) return;
  Pending& next = unanswered_->pending.front();
  if (!ok && next.kind != Pending::kUnkept) {
    if (next.kind == Pending::kParse && next.name.empty() && !skipped) next.before = {}, next.adopted.reset();  // it has ended that
    return undo(unanswered_->pending);
  }
  if (!ok && !skipped) parse_error_ = std::make_unique<std::string>(std::move(next.name));
  unanswered_->pending.drop_front();
}

const std::string* ClientSession::name_of(std::uint64_t id) const {
  static const std::string kUnnamedOne;
  const std::string* found = nullptr;
  if (const auto unnamed = statements.find({}); unnamed && unnamed->id == id) found = &kUnnamedOne;
  statements.for_each_named([&](const std::string& name, const protocol::StatementRef& s) {
    if (s->id == id) found = &name;
  });
  return found;
}

void ClientSession::end_segment() {
  names_open_ |= std::exchange(names_change_, kNoNames);
  unnamed_here_ = false;
}

bool ClientSession::answered() const {
  return server_->pipeline.owed_to_clients() == 0;
}

bool ClientSession::settled() const {
  return answered() && (server_->pipeline.empty() || server_->pipeline.unsynced());
}

// False: the request has to wait, and is then looked at anew.
bool ClientSession::names_settled(Names which) {
  if (!rewrites()) return true;
  const bool may_recover = server_->pipeline.status() == protocol::TxStatus::Failed;  // by what isn't answered yet
  if (!(names_open_ & which) && !may_recover) return true;
  if (!answered()) return wait_for_answers() != 0;
  names_open_ = kNoNames;
  return true;
}

/// The request is looked at anew when of what was sent before no more than `most` isn't answered (0: all is settled), or a COPY's
/// data is waited for. The server is asked for what it keeps back until a Sync, so that it comes. Returns 0.
std::size_t ClientSession::wait_for_answers(std::uint32_t most) {
  waits_for_answers_ = true;
  waited_for_to_ = most;
  if (server_->pipeline.unsynced()) server_->flush();
  return 0;
}

bool ClientSession::names_settled(std::string_view name) {
  return name.empty() ? unnamed_here_ || names_settled(kUnnamed) : names_settled(kNames);
}

void ClientSession::on_maybe_answered() {
  const bool enough = waited_for_to_ > 0 ? server_->pipeline.owed_to_clients() <= waited_for_to_ : settled();
  if (!enough && !server_->pipeline.awaits_copy_data()) return;
  waits_for_answers_ = false;
  worker_.run_later(*this);
}

void ClientSession::on_statements_gone() {
  statements.clear_named();
  server_->forget_statements();
}

}  // namespace pgsidecar::proxy
