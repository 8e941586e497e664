// One connection to a PostgreSQL server: connecting and logging in (a coroutine), then the relay's server side. Knows
// what the server is known to hold (settings, prepared statements) and which replies it owes. Its permit counts until the
// server has closed its end, so that `max` holds as the server counts. Owned by its PoolEntry.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "pool/pool.hpp"
#include "pool/statement_stats.hpp"
#include "protocol/messages.hpp"
#include "protocol/notifications.hpp"
#include "protocol/pipeline.hpp"
#include "protocol/statements.hpp"
#include "proxy/catalog.hpp"
#include "proxy/channel.hpp"
#include "proxy/control.hpp"
#include "proxy/log.hpp"
#include "proxy/residue.hpp"
#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

class ClientSession;
class TimeLimit;
class Worker;
struct PoolEntry;

/// Notes of replies owed that aren't a statement's id. Of a client's Close: it is about a statement.
constexpr std::uint64_t kOfStatement = 1;
/// Of an error that the proxy has the server raise for the client.
constexpr std::uint64_t kRaised = ~std::uint64_t{0};
/// Of the proxy's own queries.
constexpr std::uint64_t kApply = 1, kResidue = 2, kReset = 3, kRestore = 4, kLearn = 5, kSurvey = 6, kListening = 7, kCapacity = 8,
                        kAdopt = 9, kTemporarySchema = 10;

class ServerConnection : public pool::Slot, public std::enable_shared_from_this<ServerConnection> {
 public:
  enum class State { Connecting, Idle, Leased, Resetting, Closing, Closed };

  ServerConnection(Worker& worker, PoolEntry& entry, std::uint64_t id);

  /// What a client's login makes a connection for, since only the server's own login tells: whether the password that it passes on is
  /// right, and what its DateStyle means.
  struct Login {
    std::weak_ptr<ClientSession> client;
    std::string password;                  ///< empty: the pool's own
    std::vector<std::string> date_styles;  ///< empty: nothing to ask
    pool::Time since{};
  };

  /// What it executes for its client, for the statistics.
  struct Running {
    pool::Time since{};  ///< from when on the next answer is waited for
    std::uint64_t rows = 0, bytes = 0;
    std::string sqlstate, tags;
    pool::StatementHandle first = 0, last = 0;                           ///< of the transaction
    bool first_may_begin = false;                                        ///< `first` may be the BEGIN itself
    pool::StatementHandle named = 0;                                     ///< what the last Parse or Bind was about
    pool::StatementHandle portal = 0;                                    ///< the unnamed portal's
    std::vector<std::pair<std::string, pool::StatementHandle>> portals;  ///< the named ones', at most kMostPortals
    std::uint64_t untold = 0;      ///< the statement of the last Bind, if the client doesn't know yet what it looks like
    protocol::StatementRef reset;  ///< the unnamed portal's, if it resets settings
    /// Of kTransaction and kCommit, and of named portals kReset, what counts when a portal is executed: the unnamed one, named ones.
    std::uint32_t effects = 0, named_effects = 0;
    bool leaking = false;  ///< told of, since it was last answered
    bool overdue = false;  ///< cancelled by pool.queryTimeoutMillis
  };
  static constexpr std::size_t kMostPortals = 64;

  /// What its being opened waits for, as clients are told that wait for it.
  struct Attempt {
    std::string what;
    pool::Time since{};
  };
  Attempt attempt;

  void connect(std::optional<Login> login = {});  ///< starts; ends in Worker::on_connected or on_connect_failed
  State state() const { return state_; }
  std::uint64_t id() const { return id_; }
  std::uint32_t pid() const { return pid_; }
  PoolEntry& entry() const { return entry_; }
  const Upstream* upstream() const { return upstream_.get(); }  ///< as it was looked up for this; null: it isn't yet
  const Target& target() const { return target_; }
  bool has_unread() { return channel_->transport.has_unread(); }  ///< the server has said something, or closed its end
  ClientSession* client() const { return client_; }
  const std::map<std::string, std::string>& parameters() const { return parameters_; }
  std::uint32_t told() { return fingerprint_ ? fingerprint_ : fingerprint_ = fingerprint_of(parameters_); }  ///< of its parameters
  log::About about(std::string_view sqlstate = {}) const;                                                    ///< for the log
  std::size_t queued() const { return channel_ ? channel_->queued() : 0; }
  /// Its catalogs are being surveyed, and not for long yet: a waiter is better off with it than with a new connection.
  bool returns_soon(pool::Time now) const;
  bool stuck() const { return permit_.stuck(); }
  bool alive() const { return state_ == State::Idle || state_ == State::Leased || state_ == State::Resetting; }

  protocol::Pipeline pipeline;
  protocol::ServerStatements statements;
  Running running;
  SettingsRef settings;  ///< what its session has; null: unknown, reset before use
  std::uint32_t cancels_pending = 0;
  Catalog::Names unknown_calls;               ///< functions that were called in this lease before it was known what they leave
  std::vector<protocol::Word> unknown_names;  ///< words of its texts from before a survey
  std::string suspect;                        ///< the last text of this lease that may have left something in the session
  bool sequences_touched = false;             ///< in this lease
  bool sends_temporary = false;               ///< a CREATE TEMP, and nothing has failed or been rolled back since
  bool sequences_dirty = false;               ///< the session may have values of sequences that another client took
  bool adopts_apart = false;                  ///< what can't be adopted doesn't have the server skip what follows
  bool plans_stale = false;                   ///< what is prepared there may mean something else: temporary objects have come, or gone
  bool functions_stale = false;               ///< so may what its functions have planned, of temporary objects that have come
  bool conforming_strings() const { return conforming_strings_; }  ///< standard_conforming_strings

  void lease(ClientSession& client);
  /// Gives the session the client's settings, ahead of what the client sends next.
  void apply_settings();
  bool needs_settings() const;  ///< else that has nothing to do
  /// Puts statements of the proxy's own ahead of what the client sends next, whose failure ends the client.
  void run_ahead(const std::vector<std::string>& sqls);
  void on_plans_discarded();
  /// The same as part of the client's transaction: undone if that fails. `owner`: of the error, if there is one.
  void run_within(const std::vector<std::string>& sqls, std::uint64_t note = kApply, protocol::OwnerId owner = protocol::kProxy);
  /// Has the server itself fail in place of the client's message, so that the client's transaction does.
  void raise(bool simple, const std::string& message, const std::string& hint, std::string_view sqlstate = "0A000");
  void raise_plan_changed();  ///< as the server does of a prepared statement that looks otherwise now
  /// A text is about to depend on the values of sequences that the client took in this session.
  void forget_sequences();
  /// Parse and Close of a statement under the proxy's name for it.
  void parse(std::uint64_t id, std::string_view body, protocol::Verdict verdict);
  void close_statement(std::uint64_t id);
  void drop_statement(std::uint64_t id);  ///< is closed before anything is parsed
  /// What may have been set, by what has been sent in this lease and the server wasn't asked about yet.
  struct Changed {
    bool meaning = false;  ///< how constants are read
    bool path = false;     ///< where names are looked up
    bool code = false;     ///< anything, or made or dropped: code has run
    bool defined = false;  ///< a function has made or altered something
    /// How many ReadyForQuery the client has been told when it is known whether there is a transaction block, and whether what a
    /// transaction has done was committed; 0: it is known.
    std::uint64_t block = 0, commit = 0;
    bool any() const { return meaning || path || code; }
    bool operator==(const Changed&) const = default;
  };
  Changed& changed() { return changed_; }
  const Changed& changed() const { return changed_; }
  void forget_changed() {  ///< it is gone with its transaction, or known
    if (changed_ != Changed{}) forget_what_changed();
  }
  /// It is in a transaction block whatever comes of what isn't answered yet, unless it fails.
  bool in_block() const { return pipeline.status() == protocol::TxStatus::InTransaction && !changed_.block; }
  bool in_failed_block() const { return pipeline.status() == protocol::TxStatus::Failed && !changed_.block; }  ///< likewise
  /// What is planned doesn't notice its client's first temporary object: others' have been in the same schema.
  bool hides_temporary() const { return may_hide_temporary() && !own_open_temporary_; }
  bool may_hide_temporary() const { return others_had_temporary_ && !own_temporary_; }  ///< should its transaction be rolled back
  void discard_plans();                                                                 ///< of a client that waits for nothing
  bool listens() const { return listener_; }
  /// Prepares a statement of the client's under the client's own name for it, for SQL that names it.
  void adopt(const std::string& name, const protocol::StatementRef& statement, protocol::Verdict verdict = protocol::Verdict::Skip);
  bool adopts(std::string_view name, const protocol::StatementRef& statement) const;  ///< it has been, and not skipped
  /// Has the server describe it, for `look_up(id)->shape`, and the client's.
  void describe(std::uint64_t id);
  /// Has the server describe what was just prepared, since the client was told what it looks like, and waits until then. `first`:
  /// it has sent nothing since its last Sync.
  void ask_shape(const protocol::Statement& statement, bool first);
  bool awaiting_shape() const { return awaiting_shape_; }
  bool sent_nothing() const { return awaiting_shape_ && shape_first_; }  ///< of the request that waits for it
  /// It is the one that was asked for, and that is answered.
  bool take_asked(const protocol::Statement& statement) { return asked_ == statement.id && std::exchange(asked_, 0) != 0; }
  bool has_adopted(std::string_view name) const;
  protocol::StatementRef forget_adopted(std::string_view name);                         ///< null: the server doesn't know the name
  void keep_adopted(const std::string& name, const protocol::StatementRef& statement);  ///< null: it doesn't know it
  void forget_statements();                                                             ///< DISCARD ALL, DEALLOCATE ALL
  /// Leaves no prepared statement but those of the client's, under its names for them. `keep_own`: and those that are the client's alone,
  /// which were parsed in its session as it is.
  void close_shared_statements(bool keep_own);
  /// After a RESET of the client's: what it brought at its login comes back, as on a connection of its own. No reset: it isn't known which.
  void restore_settings(const Settings& login, const std::optional<protocol::Reset>& reset = {});
  void restore_within(const Settings& login, const std::optional<protocol::Reset>& reset);  ///< as part of the client's request
  void restore_settings_now(const Settings& login);
  bool holds_ready() const { return restoring_ || in_refused_block_; }  ///< the client isn't told of a ReadyForQuery yet
  /// Sends what the worker has gathered for this connection. A failure is dealt with in the next turn.
  void send(Gather& gather);
  /// Takes the client away. `dirty`: what the session holds is unknown, or a transaction is open: rolled back and reset first.
  /// `finish`: what is running then is waited for, however long it takes, and not cancelled.
  void detach(bool dirty, bool finish = false);
  /// Sends Terminate and waits for the server to close its end.
  void close(pool::CloseReason reason);
  void failed(const std::exception& why);  ///< a step of its
  void close_unknown();                    ///< in whatever state it is
  void close_by_operator();                ///< whatever it is doing; its client gets 57P01; one that the server doesn't end counts no more
  /// Begins as what is left of a login that was given up, and lasts until the server has noticed.
  /// Where nobody has answered there may be no server at all.
  void see_off(Channel channel, Target target, bool answered);
  void abandon();  ///< lets go of what belongs to the pool and the worker, at their end
  void inject();   ///< replies of the proxy's own whose turn has come
  void resume_reading();
  /// Asks what the session holds, after what functions may leave in it if that isn't known.
  void ask_residue();
  /// What the functions that weren't known when they were called leave behind, as far as that is known by now.
  std::uint32_t residue_of_unknown();
  void on_catalog_changed();  ///< by a transaction that is committed
  bool asking_residue() const { return asking_residue_; }
  /// From now on it is the pool's listener. Returns SQL that takes away what its session has.
  std::string listen_for_pool();
  void stop_listening();
  void ask_listening(std::string_view sql);   ///< ahead of what the client sends next
  void tell_listening(std::string_view sql);  ///< at once
  void ask_extended(const std::string& sql);  ///< within the client's extended query; its error is the client's
  /// Returns to the pool, or closes, if it is clean and nothing is pending.
  void settle();
  void on_ready();  ///< ReadyForQuery has come
  void sync(protocol::Verdict verdict, protocol::OwnerId owner, std::uint64_t note = 0);
  void flush();                                                        ///< has it answer what isn't synced yet
  void send_held_sync(protocol::OwnerId owner);                        ///< if one was kept back in a COPY that has failed
  bool is_telling() const { return pass_left_ > 0 && pass_forward_; }  ///< its client has half a message
  /// Cancels what the client has asked for, as soon as the server is sure to be at it.
  void cancel(std::shared_ptr<void> done = {});
  /// Asks the server to cancel what it is doing for this connection, which isn't leased again before it has answered. `done` is let go
  /// of then.
  void send_cancel(std::shared_ptr<void> done = {});
  const std::optional<Login>& login() const { return login_; }
  /// Null: nobody waits for this login, any more.
  std::shared_ptr<ClientSession> take_login_client() { return std::exchange(login_->client, {}).lock(); }
  pool::ServerRow row();
  std::size_t footprint() const;  ///< of the heap, TLS left out
  void on_deadline(pool::Time now);
  bool look();  ///< for what a wait doesn't tell of; true: look again
  pool::Time deadline = pool::Time::max();

 private:
  friend class Readiness<ServerConnection>;

  boost::asio::awaitable<void> run_connect(std::shared_ptr<ServerConnection> self);
  boost::asio::awaitable<std::shared_ptr<const Upstream>> look_up();
  /// Empty: logged in; else why not, with login_error_'s SQLSTATE, DETAIL and HINT.
  boost::asio::awaitable<std::string> try_hosts();
  /// Empty: logged in; else why not, with login_error_'s SQLSTATE, DETAIL and HINT.
  boost::asio::awaitable<std::string> log_in(std::shared_ptr<const Upstream> upstream, Target target, bool tls,
                                             conf::TargetSessionAttrs wanted);
  bool take_place();  ///< False: there is none
  boost::asio::awaitable<std::string> exchange_login(const conf::ConnectParams& params, const conf::Host& host, TimeLimit& limit);
  boost::asio::awaitable<std::string> receive_frame();
  boost::asio::awaitable<void> derive(protocol::ScramDerivation from);
  /// What target_session_attrs asks about.
  struct SessionState {
    bool standby = false, read_only = false;
    bool fits(conf::TargetSessionAttrs wanted) const;
  };
  boost::asio::awaitable<std::string> find_session(SessionState& session);
  boost::asio::awaitable<std::string> ask_session(std::string sql, bool& is_on);
  boost::asio::awaitable<void> run_cancel(std::shared_ptr<ServerConnection> self, std::shared_ptr<void> done);
  void fail_connect(const protocol::ErrorFields& error);

  bool planned_under_others();  ///< its functions, before this lease
  void renew_plans();
  void forget_what_changed();

  void transition(State next);
  void wait_readable();
  void on_readiness(const boost::system::error_code& ec);
  void on_readable();
  void read_soon();  ///< in a turn of its own
  void wait_writable();
  void on_writable();
  std::size_t process(protocol::Bytes in);
  /// How far it is rows of the client's own answer, most of what servers send, and their description: they go on, and change nothing
  /// but the count.
  std::size_t pass_rows(protocol::Bytes in);
  bool looks_into() const;
  bool on_asynchronous(protocol::Backend type, protocol::Bytes available, std::size_t total);
  void pass(bool forward, protocol::Bytes available, std::size_t total);
  bool on_parameter(protocol::Bytes body);
  void on_notice(protocol::Bytes body);
  bool on_notification(protocol::Bytes body);
  bool on_reply(protocol::Backend type, protocol::Bytes available, std::size_t total);
  bool on_error(protocol::Bytes body);
  bool passes_error(const protocol::Owed& owed, protocol::Bytes available, bool whole);
  void bring_settings();
  bool on_ready_for_query(protocol::TxStatus before, const protocol::Owed& owed);
  void on_tag(std::string_view tag);
  void on_utility(std::string_view tag);
  void note_end(const protocol::Owed& owed, std::string_view tag);
  void note_error(const protocol::Owed& owed, protocol::Bytes available, std::size_t total);
  void finish_execution(pool::StatementHandle statement);
  void note_temporary(std::string_view tag);  ///< of a statement that may have made temporary objects, or undone that
  void on_dropped(const protocol::Owed& owed, bool skipped);
  void on_described(protocol::Backend type, const protocol::Owed& owed, protocol::Bytes available, std::size_t total);
  void on_proxy_reply(protocol::Backend type, std::uint64_t note, protocol::Bytes whole);
  void stop_awaiting_shape();
  void tell_raised(protocol::Bytes whole);
  void count_told(protocol::Bytes error);  ///< of the server's, to the client
  void rename_error(protocol::Bytes whole, const std::string& name);
  ClientSession* let_go();  ///< the client, which it hasn't any more
  void apply_failed(const protocol::ErrorFields& error);
  void ask(std::uint64_t note, std::string_view sql);
  void lost(const std::string& sqlstate, const std::string& reason, bool ended = false);  ///< ended: the server has closed its end
  void await_end();
  bool is_on(const char* parameter) const;
  void on_role_changed();   ///< a standby was promoted
  void on_write_refused();  ///< 25006
  void start_reset(bool finish, bool asks_temporary);
  bool changes_catalog(std::string_view tag) const;
  /// If catalog_due(): goes on with a survey of the catalogs, or begins one. False: there is nothing to ask.
  bool ask_catalog();
  bool catalog_due() const;  ///< ask_catalog may have something to ask
  bool surveys() const;      ///< the catalogs, for what clients leave
  bool ask_capacity();
  void finish_learning();
  void close_adopted();
  void close_dropped();
  void finish_residue();
  void restore_failed(protocol::Bytes error);
  void settle_after_cancel();
  void closed();

  Worker& worker_;
  PoolEntry& entry_;
  const std::shared_ptr<PoolEntry> keeps_entry_;
  const std::uint64_t id_;
  pool::Permit permit_;
  State state_ = State::Connecting;
  pool::Time surveyed_since_{};
  std::optional<Channel> channel_;
  Readiness<ServerConnection> readiness_{*this};
  Target target_;
  std::shared_ptr<const Upstream> upstream_;  // as it was when this was connected
  std::optional<Login> login_;
  std::uint32_t pid_ = 0;
  std::string cancel_key_;
  std::map<std::string, std::string> parameters_;
  ClientSession* client_ = nullptr;
  std::size_t pass_left_ = 0;      // of a message that is passing through
  bool answered_ = false;          // ReadyForQuery is the last that was read
  bool told_ = false;              // parameters_ have changed since they were looked at
  std::uint32_t fingerprint_ = 0;  // of them; 0: not made yet
  bool pass_forward_ = false;
  bool paused_ = false;    // not read, since its client doesn't take what is there
  bool awaited_ = true;    // its end, if need be for kLastWait
  bool cut_off_ = false;   // half a message of its client's was sent, and the rest won't be
  bool listener_ = false;  // the pool's
  Changed changed_;
  std::shared_ptr<const Meaning> planned_;  // under which its functions have planned
  bool planned_otherwise_ = false;          // or under what a client had set since
  bool asking_residue_ = false, residue_failed_ = false, own_query_failed_ = false;
  bool leased_anew_ = false, cancel_due_ = false, awaiting_shape_ = false, shape_first_ = false, restoring_ = false;
  std::uint32_t shape_ = 0;           // as described so far
  std::vector<std::uint32_t> types_;  // of the parameters
  std::uint64_t asked_ = 0;           // the statement that ask_shape was about
  std::set<std::uint64_t> unclosed_;  // statements that are forgotten and may still be prepared
  bool conforming_strings_ = true;
  bool retry_other_tls_ = false;  // sslmode prefer and allow
  bool unfit_ = false;            // not as target_session_attrs asks
  int overdue_ = 0;               // cancel requests since it should have come back
  Residue residue_;
  std::optional<protocol::ErrorFields> unrestored_;  // what the client brought isn't back; the next look at the session puts that right
  std::string login_user_;
  std::vector<std::pair<std::string, protocol::StatementRef>> adopted_;
  bool adoption_skipped_ = false;      // the server may not have all of adopted_
  std::string unadopted_;              // the error of the first that couldn't be adopted for the text that is executed
  bool open_definition_ = false;       // its transaction has made or altered something
  bool open_change_ = false;           // or dropped: texts may mean something else when it is committed
  bool in_refused_block_ = false;      // of a client in statement mode
  bool had_temporary_ = false;         // since it was leased, maybe
  bool own_temporary_ = false;         // for certain
  bool own_open_temporary_ = false;    // likewise, unless its transaction is rolled back
  bool others_had_temporary_ = false;  // before that
  bool reset_unread_ = false;          // it isn't known what was reset since it had its client's settings
  std::uint32_t unknown_residue_ = 0;  // of unknown_names, as a survey found
  Catalog::Inquiry inquiry_;
  std::unique_ptr<Survey> survey_;
  protocol::ErrorFields login_error_;
  std::string stale_password_;                     // that the server has refused, of upstream.passwordCommand
  std::optional<protocol::ErrorFields> farewell_;  // why it is about to close, as a notice has said
};

}  // namespace pgsidecar::proxy
