// One client: how it begins (TLS, cancel, login), then the relay's client side. Reads requests, keeps the names of its
// prepared statements and its settings, waits for a server connection and gives it back. Owned by the Worker.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "pool/activity.hpp"
#include "pool/pool.hpp"
#include "pool/statement_stats.hpp"
#include "protocol/login.hpp"
#include "protocol/pipeline.hpp"
#include "protocol/sql_scan.hpp"
#include "protocol/statements.hpp"
#include "proxy/channel.hpp"
#include "proxy/listener.hpp"
#include "proxy/log.hpp"
#include "proxy/lost_transaction.hpp"
#include "proxy/residue.hpp"
#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

class ClientConsole;
class ServerConnection;
class Worker;
struct PoolEntry;

class ClientSession : public pool::Waiter, public std::enable_shared_from_this<ClientSession> {
 public:
  /// Startup: untyped packets. Tls: handshake. Authenticating. Console: a session of the SQL console, to its end. Greeting: logged in, the
  /// server's parameters not known yet. Ready: holds no server connection. Waiting: in the pool's queue. Active: holds one. Closing: closes
  /// once sent.
  enum class State { Startup, Tls, Authenticating, Console, Greeting, Ready, Waiting, Active, Closing, Closed };

  ClientSession(Worker& worker, Socket socket, std::uint32_t id, std::string peer);
  ~ClientSession();
  void start();

  State state() const { return state_; }
  conf::PoolMode mode() const { return mode_; }  ///< the pool's when it logged in
  std::uint32_t id() const { return id_; }
  std::uint32_t key_pid() const { return key_pid_; }
  const std::string& cancel_key() const { return cancel_key_; }
  ServerConnection* server() { return server_; }
  PoolEntry* entry() { return entry_; }
  const std::string& application() const;
  log::About about() const;  ///< for the log
  bool counts_as_login() const { return state_ < State::Console; }
  bool is_console() const { return console_ != nullptr; }
  bool is_silent(pool::Time now) const;  ///< has connected a while ago and said nothing yet
  void resume_console();                 ///< what it waited for is done

  /// The server has said what there was to ask at its login.
  void verified();
  void refused(const protocol::ErrorFields& error);
  /// A server connection is leased to it now: what waited goes on.
  void on_lease(ServerConnection& server);
  /// No server connection came in time, or the pool has none to give.
  void on_wait_failed(const protocol::ErrorFields& error);
  /// A CancelRequest with its key has come.
  void on_cancel(std::shared_ptr<void> done = {});  ///< `done` is let go of when the server has heard of it
  /// The server connection died under it.
  void on_server_lost(const std::string& sqlstate, const std::string& message, bool in_transaction);
  /// The server owes nothing and is outside a transaction. Decides whether the lease ends.
  void on_server_ready();
  void on_settings_applied();  ///< its server has them
  /// A message of its own is on its way to its server: nothing may come in between.
  bool is_sending() const { return pass_left_ > 0 && pass_to_server_; }
  void ready_later() { ready_due_ = true; }  ///< ServerConnection::on_ready waits until it is sent
  void on_greeting_failed(const protocol::ErrorFields& error);
  void complain(std::string_view sqlstate, std::string_view message);  ///< in the log
  void on_residue(SettingsRef settings, const Residue& found);         ///< no settings: they aren't known
  void on_learned() { residue_ |= protocol::kFunction; }  ///< its transaction may have left something: the session is to be looked at
  bool made_temporary() const { return (residue_ & protocol::kTemporary) != 0; }  ///< its transaction may have
  /// Its transaction may have made, altered or dropped what others see too.
  bool redefines() const { return (residue_ & (protocol::kDefinition | protocol::kTemporary)) == protocol::kDefinition; }
  void on_name_done(bool ok, bool skipped = false);  ///< a Parse, or a Close of a statement; skipped: behind one that failed
  void on_deallocated();                             ///< by SQL
  void on_answered(bool told);                       ///< ReadyForQuery; told: it goes to the client
  void on_flushed();                                 ///< all that it has sent is answered, and its Sync not sent
  void on_statements_gone();                         ///< DISCARD ALL, DEALLOCATE ALL
  bool answered() const;                             ///< whatever it has sent
  bool settled() const;                              ///< and what the proxy has put behind that
  std::uint64_t readies_told() const { return readies_told_; }
  bool waits_for_answers() const { return waits_for_answers_; }
  void on_maybe_answered();     ///< maybe: something that was waited for is answered
  void end_interrupted_copy();  ///< it has sent something else than the COPY's data
  void on_apply_failed(const protocol::ErrorFields& error);
  const Settings& login_settings() const { return *login_settings_; }
  /// The Parse that is next to be answered names a statement that exists already.
  bool pending_is_duplicate();
  /// Its name for a statement with this id; null: none.
  const std::string* name_of(std::uint64_t id) const;
  /// The client's name in the error of such a Parse.
  const std::string* pending_parse_error() const { return parse_error_.get(); }
  void forget_pending_parse_error() { parse_error_.reset(); }
  void on_notification(const protocol::Notification& notification);  ///< from the leased connection
  /// Its ReadyForQuery is here, outside a transaction. True: it goes to the client later, behind the notifications before it.
  bool keeps_ready_back() { return (subscriber_ || (residue_ & protocol::kListen)) && keeps_ready(); }
  Subscriber* subscriber() { return subscriber_.get(); }
  void resume_reading();
  void go_on();  ///< works off what was kept while it waited, and reads again
  bool pinned() const { return pin_ != nullptr; }
  std::optional<pool::PinSnapshot> pin_snapshot() const;

  void send(Gather& gather);
  std::size_t queued() const { return channel_.queued(); }
  void on_deadline(pool::Time now);
  bool look();  ///< for what a wait doesn't tell of; true: look again
  pool::Time login_deadline = pool::Time::max();
  pool::Time request_since{}, transaction_since{};

  /// Enforces the pool's limits on it. Returns when to look again.
  pool::Time check_limits(pool::Time now);
  void tell_query_timeout();  ///< in place of the server's answer to the cancel request
  std::optional<pool::LeakRow> leak() const;
  pool::ClientRow row();
  std::size_t footprint() const;                      ///< of the heap, TLS left out
  std::uint64_t request() const { return request_; }  ///< the id of its last; 0: none yet
  /// How long the execution that is over waited for a server connection, and for the client to read. In microseconds.
  std::pair<std::uint64_t, std::uint64_t> take_delays(pool::Time now, pool::StatementHandle statement);
  std::string peer();

  void drain();  ///< leaves at the next transaction boundary, at once if there is none open
  void fatal(std::string_view sqlstate, std::string_view message, std::string_view hint = {}, std::string_view detail = {});
  void failed(const std::exception& why);  ///< a step of its, or of its server connection's, which is closed too
  void close();

  SettingsRef settings;
  protocol::ClientStatements statements;

 private:
  friend class Subscriber;
  friend class Readiness<ClientSession>;

  /// Why it keeps its server connection beyond its transactions.
  struct Pin {
    std::uint32_t reasons = 0;  ///< bits of pool::PinReason
    std::string detail, statement;
    pool::Time since;
  };

  /// What isn't answered yet and has changed what a name stands for; if it fails or is skipped, the name stands for what it did.
  struct Pending {
    /// Unkept: a Parse that changes no name here, since the server refuses it, or its text is too long.
    enum Kind : std::uint8_t { kParse, kUnkept, kClose, kDeallocate };
    Kind kind = kParse;
    std::string name;
    protocol::NamedStatement before{};  ///< for the client
    protocol::StatementRef adopted{};   ///< what the server knew by the name itself
    std::uint64_t ready = 0;            ///< of DEALLOCATE: it is answered by then, as readies_told_ counts
    std::size_t place = 0;              ///< of DEALLOCATE: ahead of this position in Unanswered::pending
  };

  void transition(State next);
  void begin_request();
  void begin_execution();
  pool::StatementHandle note_statement(std::uint64_t fingerprint, std::string_view sql, std::string_view tags);
  pool::StatementHandle note_statement(const protocol::Statement& statement);
  void note_bind(std::string_view portal, const protocol::StatementRef& statement);
  pool::StatementHandle statement_of(protocol::Bytes execute) const;
  void end_by_limit(std::string_view sqlstate, std::string_view message, std::string_view key, std::uint32_t millis);
  void tell_leak();
  void wait_readable();
  void on_readiness(const boost::system::error_code& ec);
  void on_readable();
  void read_soon();  ///< in a turn of its own
  void wait_writable();
  void on_writable();
  void on_taken();  ///< the client has read all that was there for it
  void read_on();   ///< works off what is unread
  std::size_t process(protocol::Bytes in);
  std::size_t on_startup(protocol::Bytes in);
  void begin_login(protocol::Startup startup);
  std::size_t on_password(protocol::Bytes in);
  void refuse_full();
  void accepted();
  void begin_session();
  bool is_on_unix_socket();
  bool is_own_user();  ///< of the unix socket: the process's own, or root
  void begin_console(const std::string& user, const std::string& database, bool own_user, bool long_key);
  std::size_t on_console(protocol::Bytes in);
  void answer_console();
  void cancel_console();
  void greet();
  void greet_elsewhere(const protocol::ErrorFields& error);
  std::size_t on_unrelayed(char type, protocol::Bytes available, std::size_t total);
  std::size_t on_request(char type, protocol::Bytes available, std::size_t total);
  std::size_t swallow(protocol::Bytes available, std::size_t total);
  void tell_ready(protocol::TxStatus status);
  std::size_t answer_lost(char type, protocol::Bytes available, std::size_t total);
  bool acquire();
  bool held() const;
  bool is_leaving() const;
  bool keeps_request() const;
  void handle_tls();
  void release();
  void tell_parameters(Gather& out);  ///< what its server reports otherwise than it was told
  ServerConnection* surrender();      ///< the lease is over
  bool keeps_ready();
  bool take_channels(std::optional<protocol::Channels> channels);  ///< that it listens to on its server connection. False: they pin
  bool can_share(const protocol::Channels& channels) const;
  void give_up_server();
  void relay(protocol::Bytes available, std::size_t total);

  std::size_t on_query(protocol::Bytes available, std::size_t total);
  std::size_t on_parse(protocol::Bytes available, std::size_t total);
  std::size_t on_long_parse(protocol::Bytes available, std::size_t total);
  std::size_t parse_named(std::string_view name, protocol::StatementRef statement, protocol::Bytes available, std::size_t total);
  std::size_t parse_again(std::string_view name, const protocol::StatementRef& statement, std::size_t total);
  std::size_t parse_refused(std::string_view name, protocol::Bytes available, std::size_t total);
  void note_parse(std::string_view name, std::string_view body);
  void hold(const protocol::StatementRef& statement);
  void parse_shared(const protocol::StatementRef& statement);
  std::size_t on_bind(protocol::Bytes available, std::size_t total);
  std::size_t on_describe(protocol::Bytes available, std::size_t total);
  std::size_t on_close(protocol::Bytes available, std::size_t total);
  std::size_t on_execute(protocol::Bytes available, std::size_t total);
  bool close_unserved(protocol::Bytes whole);
  bool parse_unserved(protocol::Bytes whole);
  void evict();
  std::uint32_t note_residue(std::string_view sql, std::uint32_t known);
  std::uint32_t note_residue(const protocol::Statement& statement);
  Subscriber::Verdict listen_ahead(std::uint32_t residue, bool simple);
  bool refuse(std::string_view sql, std::uint32_t residue, bool simple);
  bool refuse_names(std::string_view sql, bool simple);
  bool refuse_unsupported(std::string_view sql, bool simple);
  void note_names(std::string_view sql, std::uint32_t residue);
  void use_sequences();
  void restore_after_reset(const std::optional<protocol::Reset>& reset = {});
  void note_portal(std::string_view portal, const protocol::StatementRef& statement);
  void note_transaction(std::uint32_t residue);
  bool plans_see_temporary(std::uint32_t residue);
  void restore_behind_execute();
  void message_sent();
  bool must_ask() const;
  bool left_unknown(bool in_transaction) const;
  void forget_residue() { residue_ = told_residue_ = 0; }
  void note_effects();
  void judge_residue();  ///< of a transaction that is over
  void pin_by_text();
  void pin(std::uint32_t reasons, std::string detail);
  void adopt_named(std::string_view sql, int depth = 0);
  bool adopt_ahead(std::string_view sql);
  void end_unnamed();
  void note_deallocations(std::string_view sql);
  void note_executed(std::string_view sql);
  bool adopt(std::string_view name, const protocol::StatementRef& statement);
  void adopt_as_meant(const std::string& name, const protocol::StatementRef& statement);
  Pending* next_change(std::string_view name, std::size_t place);
  void undo(protocol::Ring<Pending>& queue);
  enum Names : std::uint8_t { kNoNames = 0, kNames = 1, kUnnamed = 2 };
  bool names_settled(Names which);
  bool names_settled(std::string_view name);
  std::size_t wait_for_answers(std::uint32_t most = 0);
  bool reads_otherwise(const protocol::Statement& statement) const;
  bool plans_otherwise(const protocol::Statement& statement) const;
  bool is_private(std::string_view name, const protocol::StatementRef& statement) const;
  bool meaning_known(const protocol::Statement& statement);
  bool characters_known(std::string_view sql);
  void end_segment();
  void close_unnamed();
  bool waits_for_restore(char type) const;
  bool sql_prepared() const;
  bool prepare(const protocol::NamedStatement& named, bool to_describe = false);
  protocol::ServerStatements::Held* prepare_here(const protocol::NamedStatement& named);
  bool looks_as_told(const protocol::NamedStatement& named, std::uint32_t here, bool first);
  void tell_shape();
  void prepare_unnamed(const protocol::StatementRef& statement);
  void parse_as_meant(const protocol::Statement& statement, const std::function<void()>& parse);
  bool rewrites() const;

  Worker& worker_;
  const std::uint32_t id_;
  std::uint32_t key_pid_;  // as BackendKeyData says
  State state_ = State::Startup;
  conf::PoolMode mode_ = conf::PoolMode::Transaction;
  bool draining_ = false, discarding_ = false, began_ = false, acquiring_ = false;
  bool examined_ = false;  // its session, since it was last answered
  bool pass_to_server_ = false;
  bool said_goodbye_ = false;  // by Terminate
  bool direct_tls_ = false;    // TLS without an SSLRequest
  bool in_request_ = false;
  // What the client's names stand for depends on what isn't answered yet: on DISCARD, DEALLOCATE ALL or an earlier segment, which may
  // fail; on the segment that is being sent, for those behind it. A request waits for that.
  std::uint8_t names_open_ = kNoNames, names_change_ = kNoNames;  // Names
  bool waits_for_answers_ = false;
  bool unnamed_here_ = false;        // the unnamed statement was parsed in the segment that is being sent
  bool ready_due_ = false;           // ServerConnection::on_ready, when its message is sent
  bool restore_due_ = false;         // after a RESET, when the COPY beside it is over
  bool tell_due_ = false;            // its server's parameters, when the server has its settings
  std::uint32_t told_ = 0;           // ServerConnection::told()
  std::uint32_t waited_for_to_ = 0;  // so many may be left unanswered
  pool::Time connected_at_, sent_at_{};
  pool::Time unread_since_{};  // the client doesn't take what is there for it
  std::uint64_t request_ = 0;
  std::uint64_t wait_micros_ = 0, reading_micros_ = 0;  // of the execution that is running
  pool::StatementHandle executed_ = 0;                  // the last that is over
  std::uint32_t residue_ = 0;                           // of its texts, since its session was last known
  std::uint32_t told_residue_ = 0;                      // of those that were answered
  std::size_t pass_left_ = 0;
  ServerConnection* server_ = nullptr;
  PoolEntry* entry_ = nullptr;
  Channel channel_;
  Readiness<ClientSession> readiness_{*this};
  std::string cancel_key_;
  SettingsRef login_settings_;  // brought at its login
  std::unique_ptr<Pin> pin_;
  /// Each is answered in its own order: Parse and Close, and what SQL deallocates.
  struct Unanswered {
    protocol::Ring<Pending> pending, deallocations;
    std::size_t unnamed_ended = 0;  ///< the position in pending ahead of which nothing brings an unnamed statement back
  };
  Unanswered& unanswered();
  std::unique_ptr<Unanswered> unanswered_;    // of who has prepared anything
  std::uint64_t readies_told_ = 0;            // ReadyForQuery
  std::unique_ptr<std::string> parse_error_;  // the statement's name as the client has it
  std::unique_ptr<LostTransaction> lost_;
  std::unique_ptr<ClientConsole> console_;
  std::unique_ptr<Subscriber> subscriber_;  // of one that listens, or is about to

  struct Login;  // gone after the login
  std::unique_ptr<Login> login_;
};

}  // namespace pgsidecar::proxy
