// The proxy's own part in a server connection's session: what it puts ahead of the client's statements, and what it asks the
// server for. Part of ServerConnection.
#include <algorithm>
#include <boost/asio/post.hpp>
#include <charconv>

#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Backend;
using protocol::Bytes;
using protocol::kHeaderSize;
using protocol::Request;
using protocol::Verdict;

namespace {

constexpr std::string_view kPlanChanged = "cached plan must not change result type";

/// What the server allows, keeps for itself (two settings, the second new in PostgreSQL 16) and has: four numbers.
constexpr std::string_view kCapacityQuestion =
    "SELECT pg_catalog.current_setting('max_connections'), pg_catalog.current_setting('superuser_reserved_connections'),"
    " COALESCE(pg_catalog.current_setting('reserved_connections', true), '0'),"
    " (SELECT pg_catalog.sum(numbackends) FROM pg_catalog.pg_stat_database)";

/// The columns of a DataRow in text; NULL is empty. False: it isn't one of so many.
template <std::size_t N>
bool read_row(Bytes whole, std::string (&field)[N]) {
  protocol::Reader reader(whole.subspan(kHeaderSize));
  if (reader.u16() != N) return false;
  for (std::string& one : field) {
    const std::uint32_t size = reader.u32();
    if (size == 0xffffffff) continue;
    const Bytes value = reader.bytes(size);
    one.assign(reinterpret_cast<const char*>(value.data()), value.size());
  }
  return reader.done();
}

auto of_name(auto& pairs, std::string_view name) {
  return std::find_if(pairs.begin(), pairs.end(), [&](const auto& one) { return one.first == name; });
}

}  // namespace

// --- ahead of the client's statements

bool ServerConnection::needs_settings() const {
  return leased_anew_ || functions_stale || settings != client_->settings;
}

void ServerConnection::apply_settings() {
  if (settings != client_->settings && settings) bring_settings();
  if (leased_anew_ && planned_under_others()) functions_stale = true;
  if (functions_stale) renew_plans();
  if (!leased_anew_) return;
  leased_anew_ = false;
  if (sequences_dirty && entry_.sequences_matter) forget_sequences();
}

void ServerConnection::bring_settings() {
  const auto statements_needed = settings_statements(settings->values, client_->settings->values);
  settings = client_->settings;
  reset_unread_ = false;
  run_ahead(statements_needed);
}

/// What functions have planned was read under the settings of who ran them first. What its client itself changes afterwards, it keeps.
bool ServerConnection::planned_under_others() {
  const bool otherwise = std::exchange(planned_otherwise_, false);
  if (planned_ == client_->settings->meaning) return otherwise;
  const auto before = std::exchange(planned_, client_->settings->meaning);
  return otherwise || (before && before != planned_ && !plans_alike(before->values, planned_->values));
}

void ServerConnection::renew_plans() {
  if (client_->mode() == conf::PoolMode::Session) return;  // it is nobody else's
  if (!entry_.catalog.keeps_plans() || !client_->answered() || pipeline.unsynced() || pipeline.status() == protocol::TxStatus::Failed)
    return;
  discard_plans();
  on_plans_discarded();
}

void ServerConnection::discard_plans() {
  if (pipeline.status() == protocol::TxStatus::Failed || pipeline.failed()) return;
  functions_stale = false;
  const bool in_segment = pipeline.unsynced();
  if (pipeline.status() == protocol::TxStatus::Idle && !in_segment) return run_ahead({"DISCARD PLANS"});
  run_within({"DISCARD PLANS"});  // a portal of the client's lives on
  if (!in_segment) sync(Verdict::Skip, protocol::kProxy, kApply);
}

/// The server reads the constants of what is prepared anew, under whatever settings there are then.
void ServerConnection::on_plans_discarded() {
  statements.erase_if([&](const auto& held) { return held.statement->has_constants && unclosed_.insert(held.statement->id).second; });
}

void ServerConnection::run_ahead(const std::vector<std::string>& sqls) {
  if (sqls.empty()) return;
  if (pipeline.unsynced()) return run_within(sqls);  // a simple query would end the client's implicit transaction
  std::string all;
  for (const std::string& sql : sqls) all += (all.empty() ? "" : ";") + sql;
  ask(kApply, all);
}

void ServerConnection::run_within(const std::vector<std::string>& sqls, std::uint64_t note, protocol::OwnerId owner) {
  constexpr std::string_view kName = "pgsidecar_ahead";
  for (const std::string& sql : sqls) {
    worker_.to_server.own([&](std::string& out) {
      protocol::Writer w(out);
      w.begin(protocol::Frontend::Close).u8('S').cstring(kName).end();  // of one that has failed
      w.begin(protocol::Frontend::Parse).cstring(kName).cstring(sql).u16(0).end();
      w.begin(protocol::Frontend::Bind).cstring(kName).cstring(kName).u16(0).u16(0).u16(0).end();
      w.begin(protocol::Frontend::Execute).cstring(kName).u32(0).end();
      w.begin(protocol::Frontend::Close).u8('P').cstring(kName).end();
      w.begin(protocol::Frontend::Close).u8('S').cstring(kName).end();
    });
    for (const Request request : {Request::Close, Request::Parse, Request::Bind, Request::Execute, Request::Close, Request::Close})
      pipeline.push({request, Verdict::Skip, owner, note});
  }
}

void ServerConnection::raise(bool simple, const std::string& message, const std::string& hint, std::string_view sqlstate) {
  const std::string sql = "DO $pgsidecar$BEGIN RAISE EXCEPTION USING ERRCODE=" + literal(sqlstate) + ", MESSAGE=" + literal(message) +
                          ", HINT=" + literal(hint) + "; END$pgsidecar$";
  statements.unnamed.reset();
  if (simple) {
    pipeline.push({Request::Query, Verdict::Forward, client_->id(), kRaised});
    return worker_.to_server.own([&](std::string& out) { protocol::write_query(out, sql); });
  }
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer w(out);
    w.begin(protocol::Frontend::Parse).cstring("").cstring(sql).u16(0).end();
    w.begin(protocol::Frontend::Bind).cstring("").cstring("").u16(0).u16(0).u16(0).end();
    w.begin(protocol::Frontend::Execute).cstring("").u32(0).end();
  });
  for (const Request request : {Request::Parse, Request::Bind}) pipeline.push({request, Verdict::Skip, client_->id()});
  pipeline.push({Request::Execute, Verdict::Skip, client_->id(), kRaised});
}

void ServerConnection::raise_plan_changed() {
  raise(false, std::string(kPlanChanged), "");
}

// Without the context of the statement that raised it.
void ServerConnection::tell_raised(Bytes whole) {
  auto error = protocol::parse_error(whole.subspan(kHeaderSize));
  if (!error) return;
  error->routine = error->message == kPlanChanged ? "RevalidateCachedQuery" : "";  // drivers know it by that, and prepare anew
  count_told(whole);
  client_->complain(error->sqlstate, error->message);
  worker_.to_client.own([&](std::string& out) { protocol::write_error(out, protocol::Severity::Error, *error); });
}

void ServerConnection::forget_sequences() {
  if (!sequences_dirty || sequences_touched) return;
  sequences_dirty = false;
  run_ahead({"DISCARD SEQUENCES"});
}

bool ServerConnection::adopts(std::string_view name, const protocol::StatementRef& statement) const {
  const auto known = of_name(adopted_, name);
  return known != adopted_.end() && known->second == statement && !adoption_skipped_;
}

void ServerConnection::adopt(const std::string& name, const protocol::StatementRef& statement, Verdict verdict) {
  if (verdict == Verdict::Skip && adopts(name, statement)) return;
  const auto known = of_name(adopted_, name);
  if (known != adopted_.end() && verdict == Verdict::Skip) {
    worker_.to_server.own([&](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(name).end(); });
    pipeline.push({Request::Close, Verdict::Skip, client_->id()});
  }
  worker_.to_server.own(
      [&](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Parse).cstring(name).bytes(statement->body).end(); });
  if (adopts_apart) {
    pipeline.push({Request::Parse, Verdict::Skip, protocol::kProxy, kAdopt});
  } else {
    pipeline.push({Request::Parse, verdict, client_->id()});
  }
  if (known == adopted_.end())
    adopted_.emplace_back(name, statement);
  else
    known->second = statement;
}

void ServerConnection::parse(std::uint64_t id, std::string_view body, Verdict verdict) {
  ++entry_.pool.counters().serverParses;
  if (!pipeline.failed()) close_dropped();
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer(out).begin(protocol::Frontend::Parse).cstring(protocol::server_name(id)).bytes(body).end();
  });
  pipeline.push({Request::Parse, verdict, client_->id(), id});
}

void ServerConnection::close_statement(std::uint64_t id) {
  worker_.to_server.own(
      [&](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(protocol::server_name(id)).end(); });
  pipeline.push({Request::Close, Verdict::Skip, client_->id(), id});
}

void ServerConnection::drop_statement(std::uint64_t id) {
  statements.erase(id);
  unclosed_.insert(id);
}

void ServerConnection::forget_what_changed() {
  planned_otherwise_ |= changed_.meaning;
  if (changed_.any()) statements.erase_if([&](const auto& held) { return held.doubtful && unclosed_.insert(held.statement->id).second; });
  changed_ = {};
}

void ServerConnection::close_shared_statements(bool keep_own) {
  statements.erase_if([&](const protocol::ServerStatements::Held& held) {
    if (keep_own && (held.statement->own_path || held.statement->own_reading)) return false;
    close_statement(held.statement->id);
    return true;
  });
  close_dropped();
}

void ServerConnection::close_dropped() {
  for (const std::uint64_t id : std::exchange(unclosed_, {})) close_statement(id);
}

bool ServerConnection::has_adopted(std::string_view name) const {
  return of_name(adopted_, name) != adopted_.end();
}

protocol::StatementRef ServerConnection::forget_adopted(std::string_view name) {
  const auto known = of_name(adopted_, name);
  if (known == adopted_.end()) return nullptr;
  protocol::StatementRef statement = std::move(known->second);
  adopted_.erase(known);
  return statement;
}

void ServerConnection::keep_adopted(const std::string& name, const protocol::StatementRef& statement) {
  forget_adopted(name);
  if (statement) adopted_.emplace_back(name, statement);
}

void ServerConnection::forget_statements() {
  statements.clear();
  unclosed_.clear();
  adopted_.clear();
}

void ServerConnection::close_adopted() {
  if (adopted_.empty()) return;
  worker_.to_server.own([&](std::string& out) {
    for (const auto& [name, statement] : adopted_) protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(name).end();
  });
  for (std::size_t i = 0; i < adopted_.size(); ++i) pipeline.push({Request::Close, Verdict::Skip, protocol::kProxy, kReset});
  sync(Verdict::Skip, protocol::kProxy, kReset);
  adopted_.clear();
}

void ServerConnection::restore_within(const Settings& login, const std::optional<protocol::Reset>& reset) {
  reset_unread_ |= !reset;
  const bool in_transaction = pipeline.status() != protocol::TxStatus::Idle || pipeline.readies_owed() > 1;  // may be by then
  run_within(restore_statements(login.values, reset, in_transaction), kRestore);
}

// Not as a simple query, which would end the client's unnamed statement.
void ServerConnection::restore_settings(const Settings& login, const std::optional<protocol::Reset>& reset) {
  restore_within(login, reset);
  if (pipeline.unsynced()) sync(Verdict::Skip, protocol::kProxy, kRestore);  // else there is nothing to restore
}

void ServerConnection::restore_settings_now(const Settings& login) {
  const Worker::Aside aside(worker_, *this);
  restore_settings(login);
}

// --- questions

void ServerConnection::ask(std::uint64_t note, std::string_view sql) {
  pipeline.push({Request::Query, Verdict::Skip, protocol::kProxy, note});
  statements.unnamed.reset();
  worker_.to_server.own([&](std::string& out) { protocol::write_query(out, sql); });
}

void ServerConnection::on_proxy_reply(Backend type, std::uint64_t note, Bytes whole) {
  if (note == kResidue) {
    if (type == Backend::DataRow) {
      ResidueRow row;
      if (read_row(whole, row))
        residue_.add(row, login_user_);
      else
        residue_.failed = true;
    } else if (type == Backend::CommandComplete) {
      residue_.complete = true;
    } else if (type == Backend::ErrorResponse) {
      const auto error = protocol::parse_error(whole.subspan(kHeaderSize));
      // lastval() says 55000 if there is none, and 42501 if there is one that may not be seen.
      if (error && residue_.complete && error->sqlstate == "42501")
        residue_.reasons |= pool::bit(pool::PinReason::Sequence);
      else if (!error || !residue_.complete || error->sqlstate != "55000")
        residue_.failed = true;
    } else if (type == Backend::ReadyForQuery) {
      finish_residue();
    }
    return;
  }
  if (note == kCapacity) {
    std::string field[4];
    if (type == Backend::DataRow && read_row(whole, field)) {
      std::uint32_t n[4]{};
      for (int i = 0; i < 4; ++i) std::from_chars(field[i].data(), field[i].data() + field[i].size(), n[i]);
      worker_.saw_capacity(worker_.upstream_of(entry_.database), n[0], n[1] + n[2], n[3]);
    }
    return;
  }
  if (note == kLearn || note == kSurvey) {
    std::string field[4];
    if (type == Backend::DataRow && read_row(whole, field)) {
      if (note == kSurvey)
        survey_->answer(field);
      else
        entry_.catalog.answer(inquiry_, field[0], field[1], field[2] == "t", field[3]);
    } else if (type == Backend::DataRow || type == Backend::ErrorResponse) {
      residue_failed_ = true;
    } else if (type == Backend::ReadyForQuery) {
      finish_learning();
    }
    return;
  }
  if (note == kTemporarySchema && type == Backend::DataRow) {
    // That schema stays, and what the next session plans wouldn't notice its first object there.
    std::string field[1];
    condemned |= !read_row(whole, field) || field[0] != "0";
    return;
  }
  if (note == kAdopt) {
    if (type != Backend::ErrorResponse) return;
    adoption_skipped_ = true;
    if (unadopted_.empty()) unadopted_.assign(reinterpret_cast<const char*>(whole.data()), whole.size());
    return;
  }
  if (type == Backend::ErrorResponse && note == kRestore && client_) return restore_failed(whole);
  if (type == Backend::ErrorResponse) {
    const auto error = protocol::parse_error(whole.subspan(kHeaderSize));
    own_query_failed_ = true;
    if (note == kReset || !client_) {  // what its session holds is not known
      condemned = true;
      settings.reset();
    }
    if (note == kApply && client_ && error) {
      apply_failed(*error);
    }
    return;
  }
  if (type != Backend::ReadyForQuery) return;
  if (note == kListening && listener_)
    entry_.listener.on_answer(!own_query_failed_);
  else if (note == kListening && client_ && client_->subscriber())
    client_->subscriber()->on_told(!own_query_failed_);
  if (note == kRestore && std::exchange(restoring_, false) && client_) {
    const protocol::TxStatus status = pipeline.status();
    if (!in_refused_block_ && (status != protocol::TxStatus::Idle || !client_->keeps_ready_back()))
      worker_.to_client.own([&](std::string& out) { protocol::write_ready_for_query(out, status); });
  }
  if (note == kApply && client_ && !own_query_failed_) client_->on_settings_applied();
  own_query_failed_ = false;
}

// The client is told if it costs it its transaction.
void ServerConnection::restore_failed(Bytes error) {
  const protocol::Owed* end = pipeline.front();
  const bool in_its_request = !end || end->owner != protocol::kProxy;
  if (in_its_request || pipeline.status() == protocol::TxStatus::InTransaction) {
    count_told(error);
    return worker_.to_client.add(error.data(), error.size());
  }
  if (pipeline.status() != protocol::TxStatus::Idle) return;
  const auto why = protocol::parse_error(error.subspan(kHeaderSize));
  const conf::PoolSettings& policy = entry_.pool.settings();
  const bool is_looked_at = client_->mode() != conf::PoolMode::Session && policy.residueCheck != conf::ResidueCheck::Never;
  if (why && is_looked_at)
    unrestored_ = why;
  else if (why)
    apply_failed(*why);
}

void ServerConnection::apply_failed(const protocol::ErrorFields& error) {
  condemned = true;  // what its session holds is not known
  settings.reset();
  if (client_->state() == ClientSession::State::Greeting) {
    let_go()->on_greeting_failed(error);
  } else {
    let_go()->on_apply_failed(error);
  }
  boost::asio::post(worker_.loop(), [self = shared_from_this()] {
    if (self->alive()) self->close(pool::CloseReason::Broken);
  });
}

void ServerConnection::ask_residue() {
  asking_residue_ = true;
  if (catalog_due() && ask_catalog()) return;
  residue_failed_ = false;
  inquiry_ = entry_.catalog.inquire(unknown_calls, worker_.now());
  if (!inquiry_.names.empty()) {
    ask(kLearn, Catalog::question(inquiry_));
    return send(worker_.to_server);
  }
  residue_ = {};
  ++entry_.pool.counters().residueChecks;
  ask(kResidue, residue_sql(entry_.settings.custom_names(), entry_.sequences_matter));
  send(worker_.to_server);
}

bool ServerConnection::surveys() const {
  return entry_.shared && entry_.pool.settings().residueCheck != conf::ResidueCheck::Never;
}

bool ServerConnection::catalog_due() const {
  return survey_ || !surveys() || entry_.catalog.due(worker_.now());
}

bool ServerConnection::ask_catalog() {
  const pool::Time now = worker_.now();
  const bool begins = !survey_;
  if (begins) {
    if (!surveys()) return !client_ && ask_capacity();
    survey_ = std::make_unique<Survey>(entry_.catalog, now);
  }
  const std::string question = survey_->next(now);
  if (entry_.catalog.take_rewritten()) worker_.statements.begin_generation();
  if (question.empty()) {
    unknown_residue_ |= survey_->residue_of(std::exchange(unknown_names, {}));
    survey_.reset();
    if (entry_.catalog.take_late()) {
      log::info("servers_replaced", entry_.about(),
                "{}@{}: functions leave something in sessions that didn't before: every server connection is replaced", entry_.user,
                entry_.database);
      for (const auto& [id, server] : entry_.servers) server->condemned |= !server->listener_;
      pool::CloseReason reason{};
      while (pool::Slot* idle = entry_.pool.outdated(now, reason)) static_cast<ServerConnection*>(idle)->close(reason);
    }
    return false;
  }
  residue_failed_ = false;
  const Worker::Aside aside(worker_, *this);
  if (begins) ask(kCapacity, kCapacityQuestion);
  ask(kSurvey, question);
  return true;
}

/// Where there are no surveys to ask with. False: it is known.
bool ServerConnection::ask_capacity() {
  if (!worker_.take_capacity_question(worker_.upstream_of(entry_.database))) return false;
  const Worker::Aside aside(worker_, *this);
  ask(kCapacity, kCapacityQuestion);
  return true;
}

void ServerConnection::finish_learning() {
  if (survey_)
    survey_->answered(worker_.now(), residue_failed_);
  else
    entry_.catalog.answered(inquiry_, worker_.now(), residue_failed_);
  asking_residue_ = client_ && survey_ && ask_catalog();
  if (client_ && !asking_residue_) client_->on_learned();
}

std::uint32_t ServerConnection::residue_of_unknown() {
  if (entry_.catalog.surveyed() && !unknown_names.empty())
    unknown_residue_ |= entry_.catalog.residue_of_names(std::exchange(unknown_names, {}));
  const Catalog::Names names = std::exchange(unknown_calls, {});
  return std::exchange(unknown_residue_, 0) | entry_.catalog.residue_of_calls(names, worker_.now(), unknown_calls);
}

void ServerConnection::note_temporary(std::string_view tag) {
  had_temporary_ |= client_->made_temporary();
  own_open_temporary_ |= sends_temporary && (tag.starts_with("CREATE ") || tag.starts_with("SELECT "));
  if (tag == "ROLLBACK") own_open_temporary_ = sends_temporary = false;
  if (tag == "COMMIT") own_temporary_ |= std::exchange(own_open_temporary_, false);
}

bool ServerConnection::changes_catalog(std::string_view tag) const {
  if (tag == "CREATE TABLE" || tag == "CREATE INDEX") return !client_->made_temporary();
  return tag.starts_with("CREATE ") || tag.starts_with("ALTER ") || tag == "DO" || tag == "IMPORT FOREIGN SCHEMA";
}

void ServerConnection::on_catalog_changed() {
  entry_.catalog.forget();
  for (const auto& [id, server] : entry_.servers)
    if (server->client_) server->client_->on_learned();  // it may be using what was made already
}

void ServerConnection::finish_residue() {
  asking_residue_ = false;
  const auto unrestored = std::exchange(unrestored_, std::nullopt);
  if (!client_) return;
  if (residue_.failed) {
    settings.reset();
    if (unrestored) return apply_failed(*unrestored);
    return client_->on_residue(nullptr, residue_);
  }
  forget_changed();
  if (residue_.reasons & pool::bit(pool::PinReason::TemporaryObject)) {
    plans_stale |= !had_temporary_;
    functions_stale |= !had_temporary_ && hides_temporary();
    had_temporary_ = own_temporary_ = true;
  }
  const bool skipped = std::exchange(adoption_skipped_, false);
  std::erase_if(adopted_, [&](const auto& one) {
    const bool there = std::find(residue_.prepared.begin(), residue_.prepared.end(), one.first) != residue_.prepared.end();
    if (there && one.second == worker_.nothing) return false;
    const bool same = client_->statements.find(one.first) == one.second;
    if (there && !same)
      client_->statements.set(one.first, one.second);
    else if (!there && !skipped && (same || one.second == worker_.nothing))
      client_->statements.erase(one.first);
    return !there;
  });
  // A reset behind which SET LOCAL came: its value counts as the session's own from the transaction's end on, and isn't the client's.
  const bool reset = reset_unread_;
  for (const auto& [name, value] : client_->login_settings().values)
    if (reset && residue_.as_reset.contains(name)) residue_.settings.erase(name);
  // What is as by default counts against what the client brought; what isn't asked for by name is as it was brought.
  for (const auto& [name, value] : client_->login_settings().values) {
    const auto it = residue_.defaults.find(name);
    if (it != residue_.defaults.end() && !unrestored && !reset) residue_.settings.insert(*it);
    if (it == residue_.defaults.end() && name.find('.') != std::string::npos) residue_.settings.emplace(name, value);
  }
  // From that user the server hides what only superusers may see.
  condemned |= residue_.settings.contains("session_authorization");
  settings = entry_.settings.intern(std::move(residue_.settings));
  if (settings->welcome.empty()) settings->welcome = parameters_;
  planned_otherwise_ |= settings->meaning != client_->settings->meaning;
  client_->on_residue(settings, residue_);
  reset_unread_ &= settings != client_->settings;  // until it has them, the next look finds the same
}

// --- listening

std::string ServerConnection::listen_for_pool() {
  let_go();
  listener_ = true;
  transition(State::Leased);
  std::string sql;
  for (const std::string& statement : settings_statements(settings->values, {})) sql += statement + ";";
  settings = entry_.settings.intern({});
  return sql;
}

void ServerConnection::stop_listening() {
  listener_ = false;
  detach(true);
}

void ServerConnection::ask_listening(std::string_view sql) {
  ask(kListening, sql);
}

void ServerConnection::tell_listening(std::string_view sql) {
  const Worker::Aside aside(worker_, *this);
  ask(kListening, sql);
}

void ServerConnection::ask_extended(const std::string& sql) {
  statements.unnamed.reset();
  worker_.to_server.own([&](std::string& out) {
    using protocol::Frontend;
    protocol::Writer writer(out);
    const std::string_view portal = "pgsidecar_listener";
    writer.begin(Frontend::Parse).cstring("").cstring(sql).u16(0).end();
    writer.begin(Frontend::Bind).cstring(portal).cstring("").u16(0).u16(0).u16(0).end();
    writer.begin(Frontend::Execute).cstring(portal).u32(0).end();
    writer.begin(Frontend::Close).u8('P').cstring(portal).end();
  });
  for (const Request request : {Request::Parse, Request::Bind, Request::Execute, Request::Close})
    pipeline.push({request, Verdict::Skip, client_->id()});
}

}  // namespace pgsidecar::proxy
