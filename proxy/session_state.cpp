// What a client's statements leave in the session: which texts need a look, what the server then says, what is carried and what
// pins. Part of ClientSession.
#include <algorithm>

#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"
#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using pool::PinReason;
using protocol::kPassive;

namespace {

constexpr std::size_t kMostSuspect = 1000, kMostWords = 10000;

/// What a text alone says: nothing that the server could be asked for.
constexpr struct {
  std::uint32_t residue;
  PinReason reason;
} kByText[] = {{protocol::kBackendPid, PinReason::BackendPid}, {protocol::kSeed, PinReason::RandomSeed},
               {protocol::kLibrary, PinReason::Library},       {protocol::kCustomSetting, PinReason::CustomSetting},
               {protocol::kUnreadable, PinReason::Unreadable}, {protocol::kPrivateStatement, PinReason::Meaning}};

constexpr std::uint32_t text_bits() {
  std::uint32_t bits = 0;
  for (const auto& row : kByText) bits |= row.residue;
  return bits;
}

std::uint32_t reasons_of(std::uint32_t residue) {
  std::uint32_t reasons = 0;
  for (const auto& row : kByText)
    if (residue & row.residue) reasons |= pool::bit(row.reason);
  return reasons;
}

/// How what a text needs is refused.
constexpr struct {
  std::uint32_t residue;
  const char *what, *hint;
} kRefusals[] = {{protocol::kTemporary, "temporary objects", "Use a table, or a CTE."},
                 {protocol::kAdvisoryLock, "session advisory locks", "pg_advisory_xact_lock ends with its transaction."},
                 {protocol::kPrepared, "PREPARE and EXECUTE", "The protocol's prepared statements, which drivers use, work."},
                 {protocol::kCursor, "cursors WITH HOLD", "A cursor without hold works within its transaction."},
                 {protocol::kSequenceRead, "currval and lastval", "INSERT ... RETURNING and nextval tell the value."},
                 {protocol::kBackendPid, "calls of pg_backend_pid()", "In transaction mode it differs from one transaction to the next."},
                 {protocol::kSeed, "calls of setseed", "Seed and use random() within one statement's source instead."},
                 {protocol::kLibrary, "LOAD and dblink_connect", "session_preload_libraries on the server loads a library for all."}};

/// Nothing resets these but the connection's end.
constexpr std::uint32_t kIndelible = protocol::kSeed | protocol::kLibrary;

}  // namespace

std::uint32_t ClientSession::note_residue(const protocol::Statement& statement) {
  if (!entry_->catalog.quiet()) note_names(statement.sql, entry_->catalog.residue_of_names(statement));
  const std::uint32_t residue = server_->conforming_strings() ? statement.residue : protocol::scan_sql(statement.sql, false);
  return note_residue(statement.sql, residue & ~protocol::kReset);  // which counts when it is bound
}

/// What hangs on what a text names: triggers, defaults, rules...
void ClientSession::note_names(std::string_view sql, std::uint32_t residue) {
  if (residue == 0) return;
  residue_ |= residue;
  server_->condemned |= (residue & kIndelible) != 0;
  server_->changed().meaning |= (residue & protocol::kMeaning) != 0;
  server_->changed().path |= (residue & protocol::kPath) != 0;
  server_->plans_stale |= (residue & protocol::kTemporary) != 0;
  server_->functions_stale |= residue & protocol::kTemporary && server_->hides_temporary();
  server_->suspect = sql.substr(0, kMostSuspect);
  if (entry_->catalog.surveyed()) return;
  auto& words = server_->unknown_names;
  protocol::for_each_word(sql, [&](protocol::Word word) {
    if (words.size() < kMostWords) words.push_back(word);
  });
}

// Returns what the text and what it calls may leave.
std::uint32_t ClientSession::note_residue(std::string_view sql, std::uint32_t known) {
  if (settings->temporary) residue_ |= protocol::kTemporary;
  if (known == 0) return 0;
  server_->sends_temporary |= (known & protocol::kMakesTemporary) != 0;
  if (known & protocol::kDiscard) names_open_ |= kNames;
  if (known & protocol::kDatabase) worker_.leave_database(sql);
  std::uint32_t residue = known;
  if (residue & protocol::kFunction)
    residue = (residue & ~protocol::kFunction) |
              entry_->catalog.residue_of_calls(protocol::called_functions(sql), worker_.now(), server_->unknown_calls);
  if (residue & protocol::kFunction) {  // it may run what it is given
    const protocol::BodyScan given = protocol::scan_body(sql);
    residue |= given.residue & (protocol::kDefinition | protocol::kTemporary | protocol::kMeaning | protocol::kPath);
    if (given.residue & protocol::kCustomSetting || !entry_->settings.learn(given.custom_settings)) residue |= protocol::kCustomSetting;
  }
  if (known & protocol::kCustomSetting) {
    std::vector<std::string> names;
    if (protocol::custom_setting_names(sql, names, server_->conforming_strings()) && entry_->settings.learn(names))
      residue = (residue & ~protocol::kCustomSetting) | protocol::kSettings;
  }
  residue_ |= residue;
  server_->condemned |= (residue & kIndelible) != 0;
  if (residue & protocol::kSequenceRead && rewrites()) use_sequences();
  if (residue & protocol::kSequenceWrite) {
    server_->sequences_touched = true;
    server_->sequences_dirty |= entry_->sequences_matter;
  }
  // What is sent behind it is prepared when it is done.
  constexpr std::uint32_t kMakes = protocol::kDefinition | protocol::kFunction | protocol::kCode;
  server_->plans_stale |= (residue & (protocol::kTemporary | (settings->temporary ? kMakes : 0))) != 0;
  server_->functions_stale |= residue & protocol::kTemporary && server_->hides_temporary();
  auto& changed = server_->changed();
  changed.meaning |= (residue & protocol::kMeaning) != 0;
  changed.path |= (residue & protocol::kPath) != 0;
  changed.code |= (residue & kMakes) != 0;
  changed.defined |= (residue & ~known & protocol::kDefinition) != 0;
  note_transaction(known);
  const bool takes_value = entry_->sequences_matter && residue & protocol::kSequenceWrite;
  if (residue & ~kPassive || takes_value) server_->suspect = sql.substr(0, kMostSuspect);
  return residue;
}

Subscriber::Verdict ClientSession::listen_ahead(std::uint32_t residue, bool simple) {
  if (!subscriber_ || entry_->pool.settings().residueCheck == conf::ResidueCheck::Never) return Subscriber::Verdict::Go;
  return subscriber_->ahead(residue, simple);
}

// What only the server finds out afterwards, in a function, is pinned all the same.
bool ClientSession::refuse(std::string_view sql, std::uint32_t residue, bool simple) {
  if (!rewrites()) return false;
  if (residue & protocol::kPrepared && refuse_names(sql, simple)) return true;
  if ((residue & protocol::kNewChannel) && entry_->listener.crowded()) {
    server_->raise(
        simple, "LISTEN needs a second server connection, which isn't to be had (pool.max)",
        "The other process of an online restart has it, or the server doesn't end it. Try again later, or set pool.max to 3 or more.");
    return true;
  }
  const bool fits = (residue & ~kPassive) == 0 || entry_->pool.settings().onUnsupported != conf::OnUnsupported::Error;
  return !fits && refuse_unsupported(sql, simple);
}

bool ClientSession::refuse_names(std::string_view sql, bool simple) {
  const auto is_ours = [](const std::string& name) { return name.starts_with(protocol::kServerNamePrefix); };
  const auto named = protocol::prepared_names(sql);
  if (std::ranges::any_of(named.names, is_ours)) {
    server_->raise(simple, "names of prepared statements that begin with \"pgsidecar_\" are reserved", "Choose another name.", "42939");
    return true;
  }
  if (named.escaped) {
    server_->raise(simple, "names of prepared statements that are written as U&\"\" can't be read", "Write the name without escapes.");
    return true;
  }
  if (named.all && server_->in_failed_block()) {
    // Ahead of its ROLLBACK neither can the client's be prepared, nor what others have be taken away. Fails with 25P02.
    server_->raise(simple, "a text that ends a failed transaction lists prepared statements", "Send ROLLBACK by itself.");
    return true;
  }
  return false;
}

bool ClientSession::refuse_unsupported(std::string_view sql, bool simple) {
  const std::uint32_t needed = protocol::needs_session(sql, server_->conforming_strings());
  const auto row = std::find_if(std::begin(kRefusals), std::end(kRefusals), [&](const auto& r) { return r.residue == needed; });
  if (row == std::end(kRefusals)) return false;
  server_->raise(simple,
                 std::string(row->what) + " need a server connection of their own, which this pool doesn't give (pool.onUnsupported)",
                 std::string(row->hint) + " Or set pool.onUnsupported to pin, or pool.mode to session.");
  return true;
}

// From the first use of currval or lastval on, whoever takes a sequence's value keeps the session in which it did. What others have
// left in this one is forgotten first, so that none gets a value that isn't its own.
void ClientSession::use_sequences() {
  if (!entry_->sequences_matter) {
    entry_->sequences_matter = true;
    // What the client's own transaction may have taken in a function is its own.
    for (auto& [id, server] : entry_->servers) server->sequences_dirty |= server.get() != server_ || !server_->changed().code;
    log::info("sequences_used", entry_->about(),
              "{}@{}: currval or lastval is used: clients that take a sequence's value are pinned from now on", entry_->user,
              entry_->database);
  }
  if (!server_->in_failed_block() && !server_->pipeline.failed()) server_->forget_sequences();
}

void ClientSession::note_portal(std::string_view portal, const protocol::StatementRef& statement) {
  const std::uint32_t residue = statement ? statement->residue : 0;
  const std::uint32_t effects = residue & (protocol::kTransaction | protocol::kCommit);
  auto& running = server_->running;
  if (!portal.empty()) {
    running.named_effects |= effects | (residue & protocol::kReset);
    return;
  }
  running.effects = effects;
  running.reset = residue & protocol::kReset ? statement : nullptr;
}

void ClientSession::note_transaction(std::uint32_t residue) {
  auto& changed = server_->changed();
  const std::uint64_t next_ready = readies_told_ + server_->pipeline.readies_owed() + 1;
  if (residue & protocol::kTransaction) changed.block = next_ready;
  const bool may_commit = residue & protocol::kCode && server_->pipeline.status() == protocol::TxStatus::Idle;
  if (residue & protocol::kCommit || may_commit) changed.commit = next_ready;
}

/// What is planned on its server connection is planned anew for the temporary objects that a text makes. False: for that, what was sent
/// before has to be answered.
bool ClientSession::plans_see_temporary(std::uint32_t residue) {
  const bool may_make =
      residue & protocol::kTemporary || (residue & protocol::kDefinition && (settings->temporary || server_->changed().path));
  if (!may_make || !rewrites() || !server_->may_hide_temporary()) return true;
  if (residue & protocol::kTransaction && server_->pipeline.status() != protocol::TxStatus::Idle) return true;  // it may be SET TRANSACTION
  if (!answered()) return wait_for_answers() != 0;
  if (server_->hides_temporary()) server_->discard_plans();
  return true;
}

// In the client's own request, so that it comes back only if the reset succeeds, and what the request goes on with finds it.
void ClientSession::restore_behind_execute() {
  const auto reset = protocol::reset_of(server_->running.reset->sql, server_->conforming_strings());
  if (server_->pipeline.failed()) return;
  if (!reset || residue_ & (protocol::kCopy | protocol::kReset))
    residue_ |= protocol::kReset;
  else
    server_->restore_within(*login_settings_, reset);
  // An error behind it undoes that, and DISCARD ALL is committed.
  if (reset && reset->discard) residue_ |= protocol::kReset;
}

void ClientSession::restore_after_reset(const std::optional<protocol::Reset>& reset) {
  if (!(residue_ & protocol::kReset)) return;
  residue_ &= ~protocol::kReset;
  if (login_settings_->values.empty() || server_->pipeline.failed()) return;
  if (residue_ & protocol::kCopy)
    restore_due_ = true;
  else
    server_->restore_settings(*login_settings_, reset);
}

// What had to wait for it follows it.
void ClientSession::message_sent() {
  server_->send_held_sync(id_);
  if (!restore_due_ || !answered()) return;
  restore_due_ = false;
  server_->restore_settings(*login_settings_);
}

// The rest of the COPY goes on.
bool ClientSession::waits_for_restore(char type) const {
  return server_ && !server_->pipeline.awaits_copy_data() && std::string_view("dcfHSX").find(type) == std::string_view::npos;
}

/// Whether the server is to be asked before the lease may end.
bool ClientSession::must_ask() const {
  switch (entry_->pool.settings().residueCheck) {
    case conf::ResidueCheck::Always: return !examined_ || (residue_ & ~(kPassive | text_bits())) != 0;
    case conf::ResidueCheck::Never: return false;
    default: break;
  }
  std::uint32_t triggers = ~(kPassive | text_bits());
  if (entry_->sequences_matter) triggers |= protocol::kSequenceWrite;
  if (pin_) triggers |= protocol::kDrop;
  return (residue_ & triggers) != 0;
}

/// Of the connection's sudden end: whether the client was told of something that the session then had.
bool ClientSession::left_unknown(bool in_transaction) const {
  constexpr std::uint32_t kRolledBack =
      protocol::kSettings | protocol::kCustomSetting | protocol::kTemporary | protocol::kListen | protocol::kCursor;
  const std::uint32_t counts = ~kPassive | (entry_->sequences_matter ? std::uint32_t{protocol::kSequenceWrite} : 0);
  return (told_residue_ & counts & ~(in_transaction ? kRolledBack : 0)) != 0;
}

void ClientSession::on_residue(SettingsRef now, const Residue& found) {
  bool carried = false;
  if (now) {
    auto values = now->values;
    values.insert(login_settings_->values.begin(), login_settings_->values.end());  // reset out of sight, in a function
    if (values.size() != now->values.size()) now = entry_->settings.intern(std::move(values));
    carried = settings != now;
    settings = std::move(now);
  }
  examined_ = true;
  worker_.run_later(*this);
  std::uint32_t reasons = found.reasons | (found.failed ? pool::bit(PinReason::Unexamined) : 0);
  std::string detail = found.detail;
  if (!take_channels(found.failed ? std::nullopt : std::optional(found.channels))) {
    reasons |= pool::bit(PinReason::Listening);
    for (const std::string& channel : found.channels)
      if (channel != entry_->listener.marker_channel() && detail.size() < Residue::kMostDetail)
        detail += (detail.empty() ? "listening on " : ", listening on ") + channel;
  }
  if (pin_)
    pool::for_each_reason(pin_->reasons, [&](PinReason reason) {
      if (pool::lasts(reason)) reasons |= pool::bit(reason);
    });
  if (!server_->suspect.empty()) entry_->transparency.record(protocol::normalize_sql(server_->suspect), true, carried, reasons);
  pin(reasons, std::move(detail));
}

void ClientSession::judge_residue() {
  if (residue_ & protocol::kFunction) {
    const bool known = redefines();
    residue_ |= server_->residue_of_unknown();
    server_->changed().meaning |= (residue_ & protocol::kMeaning) != 0;
    if (!known && redefines()) {
      worker_.statements.begin_generation();
      server_->on_catalog_changed();
    }
  }
  if (residue_ & protocol::kReset) {  // a function has; before that is taken for what the client has set
    residue_ &= ~protocol::kReset;
    if (!login_settings_->values.empty()) server_->restore_settings_now(*login_settings_);
  }
  pin_by_text();
}

void ClientSession::pin_by_text() {
  const std::uint32_t reasons = reasons_of(residue_);
  if (reasons == 0) return;
  server_->condemned |= (residue_ & kIndelible) != 0;
  if (!pin_ || (pin_->reasons | reasons) != pin_->reasons)
    entry_->transparency.record(protocol::normalize_sql(server_->suspect), false, false, reasons);
  pin(reasons | (pin_ ? pin_->reasons : 0), pin_ ? pin_->detail : std::string());
}

// In session mode nothing is asked: what the texts say is counted, so that it can be told what transaction mode would do.
void ClientSession::note_effects() {
  const std::uint32_t residue = std::exchange(residue_, 0) & ~kPassive;
  if (residue == 0) return;
  std::uint32_t reasons = reasons_of(residue);
  for (const auto& [bits, reason] : {std::pair{protocol::kAdvisoryLock, PinReason::AdvisoryLock},
                                     {protocol::kTemporary, PinReason::TemporaryObject},
                                     {protocol::kPrepared, PinReason::PreparedStatement},
                                     {protocol::kCursor, PinReason::HeldCursor},
                                     {protocol::kListen, PinReason::Listening},
                                     {protocol::kSequenceRead, PinReason::Sequence}})
    if (residue & bits) reasons |= pool::bit(reason);
  entry_->transparency.record(protocol::normalize_sql(server_->suspect), reasons == 0, residue & protocol::kSettings, reasons);
}

void ClientSession::pin(std::uint32_t reasons, std::string detail) {
  if (reasons == 0) {
    if (pin_) log::info("unpinned", about(), "client {}: not pinned any more", id_);
    return pin_.reset();
  }
  const std::uint32_t fresh = reasons & ~(pin_ ? pin_->reasons : 0);
  if (!pin_) pin_ = std::make_unique<Pin>(Pin{0, {}, {}, worker_.now()});
  pin_->reasons = reasons;
  pin_->detail = std::move(detail);
  if (fresh == 0) return;
  pin_->statement = protocol::normalize_sql(server_->suspect);
  std::string names;
  pool::for_each_reason(fresh, [&](PinReason reason) {
    ++entry_->pool.counters().pins[static_cast<std::size_t>(reason)];
    names += (names.empty() ? "" : ", ") + std::string(pool::to_string(reason));
  });
  const std::string why = names + (pin_->detail.empty() ? "" : " (" + pin_->detail + ")");
  log::info("pinned", about(), "client {} ({}@{}, application \"{}\"): pinned to its server connection (pid {}): {}, after: {}", id_,
            entry_->user, entry_->database, application(), server_->pid(), why, pin_->statement);
  if (!entry_->pool.settings().noticePins) return;
  worker_.to_client.own([&](std::string& out) {
    protocol::write_notice(out, "00000", "pgsidecar: this session keeps its server connection from now on: " + why);
  });
  send(worker_.to_client);
}

std::optional<pool::PinSnapshot> ClientSession::pin_snapshot() const {
  if (!pin_ || !server_) return std::nullopt;
  pool::PinSnapshot s;
  s.client = id_;
  s.serverPid = server_->pid();
  s.database = entry_->database;
  s.user = entry_->user;
  s.application = application();
  s.reasons = pin_->reasons;
  s.detail = pin_->detail;
  s.statement = pin_->statement;
  s.micros = pool::micros(worker_.now() - pin_->since);
  return s;
}

}  // namespace pgsidecar::proxy
