// One data loop and all that lives on it: listeners, clients, pools, server connections, the scratch buffers, one tick.
// Could exist twice. Everything here runs on the data loop; the control loop asks by posting.
#pragma once

#include <algorithm>
#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <memory_resource>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "conf/config.hpp"
#include "conf/listen.hpp"
#include "pool/addresses.hpp"
#include "pool/backoff.hpp"
#include "pool/pool.hpp"
#include "pool/statement_stats.hpp"
#include "pool/stats.hpp"
#include "protocol/login.hpp"
#include "protocol/scram.hpp"
#include "protocol/sql_memory.hpp"
#include "proxy/catalog.hpp"
#include "proxy/client_session.hpp"
#include "proxy/console_show.hpp"
#include "proxy/control.hpp"
#include "proxy/listener.hpp"
#include "proxy/log.hpp"
#include "proxy/meter.hpp"
#include "proxy/ports.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/succession.hpp"

namespace pgsidecar::proxy {

/// One pool and its connections.
struct PoolEntry : std::enable_shared_from_this<PoolEntry> {
  PoolEntry(std::string database_name, std::string user_name, const conf::PoolSettings& policy, conf::Upstream from)
      : database(std::move(database_name)), user(std::move(user_name)), pool(policy), upstream(std::move(from)) {}
  log::About about(std::string_view sqlstate = {}) const {
    log::About about;
    about.database = database;
    about.user = user;
    about.sqlstate = sqlstate;
    return about;
  }
  pool::Time oldest_wait() const { return std::min(pool.oldest_wait(), logins.empty() ? pool::Time::max() : logins.front().since); }
  bool lacks_password() const { return passes_password_on && !given_password; }
  /// Nobody waits for a connection, and none is to be opened.
  bool content() const {
    return !pool.any_waiting() && logins.empty() && !listener.wants() && replacements == 0 && pool.staying() >= pool.settings().min &&
           pool.stuck() == 0;
  }
  std::string database, user;
  std::uint32_t number = 0;  // from 1
  pool::Pool pool;
  conf::Upstream upstream;
  SettingsCache settings;
  Catalog catalog{settings};
  Listener listener{*this};
  boost::unordered_flat_map<std::uint64_t, std::shared_ptr<ServerConnection>> servers;
  std::uint32_t connecting = 0;
  std::vector<std::function<void()>> probes;  // who waits for what becomes of those
  std::uint32_t clients = 0;
  pool::Time left_at{};                // by the last of them
  bool used = false;                   // by one that has logged in
  bool shared = false;                 // by one in transaction or statement mode
  pool::Backoff backoff;               // after connects that failed
  pool::Addresses addresses;           // of its upstream
  pool::Time looked_at{};              // its names were looked up
  std::uint64_t leases_then = 0;       // when they were
  pool::Time losing_until{};           // connections are being lost
  pool::Time write_refused_at{};       // by a standby
  protocol::ErrorFields last_failure;  // of a connect; no message: none since the last success
  std::uint32_t replacements = 0;      // of connections that were worn out while in use: opened before they are missed
  bool passes_password_on = false;
  bool serving = false;                        // those that wait
  bool paused = false;                         // by an operator: nobody gets a server connection
  bool sequences_matter = false;               // its clients use currval or lastval
  pool::Transparency transparency;             // what its statements leave in sessions
  std::shared_ptr<const Upstream> found;       // when its names were looked up; null: they weren't yet
  std::optional<std::string> given_password;   // users: {"*": {}}: what the server has accepted from a client
  pool::Time given_at{};                       // when it did
  std::deque<ServerConnection::Login> logins;  // of clients that the server is still to be asked about
};

bool stands_alone(const PoolEntry& entry);                ///< no connection of it is open
bool is_refused(const PoolEntry& entry, pool::Time now);  ///< by the server at the last login, and it is too early to try again

/// The tick's waits have memory of their own, so that arming it anew takes nothing from the heap nor from the blocks that Asio
/// keeps for the connections' waits. Shared, because the loop may outlive the Worker.
template <class T>
struct TickAllocator {
  using value_type = T;
  explicit TickAllocator(std::shared_ptr<std::pmr::memory_resource> from) : memory(std::move(from)) {}
  template <class U>
  TickAllocator(const TickAllocator<U>& other) : memory(other.memory) {}
  T* allocate(std::size_t n) { return static_cast<T*>(memory->allocate(n * sizeof(T), alignof(T))); }
  void deallocate(T* p, std::size_t n) { memory->deallocate(p, n * sizeof(T), alignof(T)); }
  friend bool operator==(const TickAllocator&, const TickAllocator&) = default;
  std::shared_ptr<std::pmr::memory_resource> memory;
};

std::string address_of(const Target& target);  ///< what tells it from others
bool is_answer(std::string_view sqlstate);     ///< of a failed connect: the server is up
bool is_permanent(std::string_view sqlstate);  ///< more tries won't mend it: wrong credentials, no such database

/// A configuration with what is read from the files that it names. Made on any thread; once there is one, nothing can fail any more.
struct Prepared {
  Prepared(std::shared_ptr<const conf::Config> config, const conf::Environment& env);  ///< throws with what is wrong
  std::shared_ptr<const conf::Config> config;
  SslContext client_tls;
  conf::ConnectParams upstream;  ///< the global one
};

class Worker {
 public:
  Worker(boost::asio::io_context& data, Control& control, Prepared prepared);
  ~Worker();

  /// Opens the clients' ports, those that were passed on included. Throws std::runtime_error naming the address and the key to change.
  void listen(conf::PassedSockets& passed);
  void begin();  ///< accepts clients
  void reload(Prepared prepared);
  void adjust(std::shared_ptr<const conf::Config> config);  ///< to settings that differ from before by SET alone
  void shut_down();                                         ///< as at SIGTERM: drains after shutdown.delayMillis
  void drain();
  void stop(ConsoleCommand::Stop how);            ///< as SHUTDOWN says
  std::function<void()> on_draining;              ///< it ends: at SIGTERM or for another reason
  std::function<void(int exit_code)> on_stopped;  ///< nothing is left

  // An online restart (succession.hpp).
  std::string why_no_successor() const;            ///< empty: one may be started
  std::vector<conf::Listening> listening() const;  ///< what it would get
  std::function<void()> on_taken_over;             ///< as successor: clients come here now
  std::function<void()> on_alone;                  ///< as successor: nobody thinks that the predecessor is in charge any more
  void succeed(int link, pid_t successor, std::function<void(std::string error)> done);
  void take_place(int link, std::function<void(std::function<void()> then)> other_loop);  ///< of the process at the other end
  void handed_over();                                                                     ///< whom it concerns has been told
  bool operated() const { return all_paused_ || !paused_databases_.empty() || !disabled_databases_.empty(); }  ///< by an operator
  bool had_client() const { return had_client_; }
  pool::Snapshot::Upstream main_upstream() const;                            ///< what is known of that of upstream.url
  PoolEntry* pool_of(const std::string& database, const std::string& user);  ///< null: there is none yet
  void for_each_pool(const std::function<void(PoolEntry&)>& what);
  std::uint32_t missing(const PoolEntry& entry) const;  ///< connections that somebody waits for
  void close_outdated(PoolEntry& entry);                ///< idle ones
  Ports& ports() { return ports_; }
  void take_over(bool had_client, pid_t from);
  /// Opens a connection where the predecessor leaves one. `done` gets why the server refuses it.
  void try_login(std::function<void(std::string refusal)> done);
  void retire(pid_t successor);
  void on_peer_ended(const Succession& which);
  /// What a snapshot holds besides counts: who is connected; what the statements cost.
  using Detail = pool::Snapshot::Detail;
  pool::Snapshot snapshot(Detail detail = Detail::None);
  void watch(std::function<void()> happened) { watcher_ = std::move(happened); }  ///< called once, when anything happens
  /// Has the database of upstream.url seen anew. `done` is called when it is, which takes kProbeMillis, or a connect.
  void probe(std::function<void()> done);
  static constexpr std::uint32_t kProbeMillis = 5000;
  /// `done` gets empty, or why it couldn't be done, at once or when the server connections are closed that it waits for. `owner`:
  /// the client that may abandon it.
  void operate(const pool::Command& command, std::function<void(std::string error)> done, std::uint32_t owner = 0);
  std::string execute(const pool::Command& command);  ///< those that wait for nothing
  /// What the control loop does for the console: RELOAD, SET, SHUTDOWN. Its answer comes on the data loop.
  std::function<void(const ConsoleCommand&, std::function<void(std::string error)> done)> on_request;

  /// One handler's run on the loop. Clients that got a lease in it go on at its end, before the loop waits again.
  class Turn {
   public:
    explicit Turn(Worker& worker) : worker_(worker) {
      if (worker_.turns_++ > 0) [[unlikely]]
        return;
      worker_.turn_began_ = pool::Clock::now();
      worker_.meter.begin_turn();
      worker_.stir();
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() {
      if (--worker_.turns_ > 0) [[unlikely]]
        return;
      if (!worker_.runnable_.empty()) [[unlikely]]
        worker_.run_runnable();
      worker_.to_client.clear();  // what was for a connection that is gone is nobody else's
      worker_.to_server.clear();
      worker_.meter.end_turn();
    }

   private:
    Worker& worker_;
  };

  /// A step of a session, a turn or a part of one. What it throws, when memory has run out above all, ends that session and no other.
  template <class Session, class Step>
  void step(Session& session, Step&& what) {
    const Turn turn(*this);
    try {
      what();
    } catch (const std::exception& e) {
      session.failed(e);
      to_client.clear();
      to_server.clear();
    }
  }

  /// What is gathered for a server connection while this lives is sent to it then; what the turn has gathered for another one stays.
  class Aside {
   public:
    Aside(Worker& worker, ServerConnection& server) : worker_(worker), server_(server) { std::swap(others_, worker_.to_server); }
    Aside(const Aside&) = delete;
    Aside& operator=(const Aside&) = delete;
    ~Aside() {
      server_.send(worker_.to_server);
      std::swap(others_, worker_.to_server);
    }

   private:
    Worker& worker_;
    ServerConnection& server_;
    Gather others_;
  };

  /// What is gathered for a client while this lives, and for its server, doesn't mix with what the turn has gathered for others.
  class Visit {
   public:
    Visit(Worker& worker, const ClientSession* client) : worker_(worker), before_(worker.visited_) {
      if (before_ && before_ != client) [[unlikely]]
        swap(*(others_ = std::make_unique<Gathers>()));
      worker_.visited_ = client;
    }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;
    ~Visit() {
      if (others_) [[unlikely]]
        swap(*others_);
      worker_.visited_ = before_;
    }

   private:
    using Gathers = std::pair<Gather, Gather>;
    void swap(Gathers& with) {
      std::swap(with.first, worker_.to_client);
      std::swap(with.second, worker_.to_server);
    }
    Worker& worker_;
    const ClientSession* const before_;
    std::unique_ptr<Gathers> others_;
  };

  // For clients and servers.
  boost::asio::io_context& loop() { return data_; }
  Control& control() { return control_; }
  const conf::Config& config() const { return *config_; }
  pool::Time now() const { return turns_ > 0 ? turn_began_ : pool::Clock::now(); }  ///< read once a turn
  std::span<std::uint8_t> scratch() { return scratch_; }
  std::span<std::uint8_t> tls_scratch() { return tls_scratch_; }
  double random() { return std::uniform_real_distribution<>(0, 1)(random_); }

  Meter meter;
  pool::Lag lag;  ///< of this loop
  pool::StatementStats statement_stats{pool::Clock::now()};
  std::uint64_t next_request() { return ++last_request_; }
  Gather to_client, to_server;  // of the turn that is running
  protocol::StatementCache statements;
  bool changes_prepared = false;  ///< a PREPARE TRANSACTION had made, altered or dropped something
  protocol::LongTexts long_texts;
  const protocol::StatementRef nothing = statements.make({"\0\0\0", 3}, {});  ///< an empty text, without parameters
  protocol::SqlMemory sql_memory;
  protocol::ScramKeyCache scram_keys;
  SSL_CTX* client_tls() { return client_tls_.get(); }

  /// The pool for a login; nullptr and an error text in PostgreSQL's words if there is none.
  PoolEntry* find_pool(const std::string& database, const std::string& user, std::string& sqlstate, std::string& error);
  /// A user whom only the server knows: its password is passed on.
  bool passes_password_on(const std::string& user) const;
  /// Has the server say whether a password that was passed on is right, and what the client's DateStyle means, unless that is known; ends
  /// in ClientSession::verified or refused.
  void verify(ClientSession& client, const std::string& password, const std::vector<std::string>& date_styles);
  /// The secret that a user must prove; nullopt: no such user.
  std::optional<std::string> secret_of(const std::string& user, const std::string& database);

  void want_server(ClientSession& client);  ///< queues it and opens connections
  void run_later(ClientSession& client);    ///< at the end of this turn
  void refuse_waiters(PoolEntry& entry);    ///< by its last failure, or since nothing but a login brings a password
  /// Of a client that has waited in vain; a stranger, whose password isn't known to be right, hears of no other client.
  protocol::ErrorFields wait_error(const PoolEntry& entry, bool stranger = false) const;
  std::string use_of(const PoolEntry& entry) const;  ///< "2 of 2 in use, of which 1 doesn't end"
  void serve(PoolEntry& entry);                      ///< gives idle connections to waiters, opens what is missing
  void on_connected(ServerConnection& server);
  void on_connect_failed(ServerConnection& server, const protocol::ErrorFields& error);
  void on_server_closed(ServerConnection& server);
  void connects_last(PoolEntry& entry);  ///< a new connection can be used
  void lost_unused(const ServerConnection& server, const protocol::ErrorFields& why);
  void on_write_refused(const ServerConnection& server);  ///< by a standby: 25006
  void on_client_closed(ClientSession& client);
  /// In the order in which to try them.
  std::vector<Target> targets_of(const PoolEntry& entry, const Upstream& upstream);
  void saw_addresses(PoolEntry& entry, std::shared_ptr<const Upstream> upstream);
  /// What the server doesn't end takes all of the pool's places there, with the one that is about to be used.
  bool is_full(const PoolEntry& entry, const Target& target) const;
  /// Where the connections are that their server doesn't end, each by itself.
  std::vector<std::string> stuck_addresses(const PoolEntry& entry) const;
  void outdate_address(PoolEntry& entry, const std::string& address);  ///< its connections are closed as they come back
  void on_login();
  void on_greeted() { had_client_ = true; }
  /// Of the client that has this key. `done` is let go of when the server has heard of it.
  void cancel(std::uint32_t pid, std::string_view key, std::shared_ptr<void> done = {});
  void reject(pool::RejectReason reason) { ++rejected_[static_cast<std::size_t>(reason)]; }
  void count_error(std::string_view sqlstate);  ///< that a client is told
  /// What a connect to an upstream has shown; by its name as upstream_of() has it.
  void database_seen(const std::string& upstream, bool up, std::string error = {});
  /// True once for each upstream, to whoever can ask it what it allows.
  bool take_capacity_question(const std::string& upstream);
  void saw_capacity(const std::string& upstream, std::uint32_t max, std::uint32_t reserved, std::uint32_t used);
  void connect_begins(const std::string& upstream);
  /// A text needs a database that nobody is connected to: the connections to it that nobody uses go.
  void leave_database(std::string_view sql);
  void saw_suspend(PoolEntry& entry);  ///< the server has ended an idle connection
  void saw_certificate(const std::string& whose, const X509* certificate);
  /// Takes a place for a login that was given up, until the server has noticed.
  void see_off(PoolEntry& entry, Channel channel, const Target& target, bool answered);
  /// A server connection of an upstream's has been open already.
  bool is_connected(const std::string& upstream);
  void database_took(const std::string& upstream, pool::Clock::duration time);  ///< a connect
  const std::string& upstream_of(const std::string& database) { return databases_[database].upstream; }
  /// The client_encoding that a database's connection string asks for; empty: none.
  const std::string& encoding_of(const std::string& database) { return databases_[database].encoding; }
  void arm_tick(std::chrono::milliseconds after) {
    if (const pool::Time at = now() + after; at < tick_at_ && !stopped_) [[unlikely]]
      tick_at(at);
  }
  void kick();  ///< deadlines are near: the tick runs soon
  bool draining() const { return draining_; }
  static constexpr std::uint32_t kMostConsoles = 16;
  /// A process's number on any Linux is smaller, so that a client's is never a server's.
  static constexpr std::uint32_t kMaxPid = 1u << 22;
  bool is_console(const std::string& database) const;  ///< what a client calls the SQL console
  bool admit_console();
  bool abandon_operation(std::uint32_t owner);  ///< False: it has none
  bool disabled(const std::string& database) const { return disabled_databases_.contains(database); }
  bool refuses_clients() const {
    if (retired_) return !waits_for_clients_;  // those that come were accepted before
    return draining_ && (waits_for_clients_ || !config_->shutdown.acceptWhileDraining);
  }
  const Averages& averages() const { return averages_; }
  /// There are descriptors for so many clients' connections.
  void set_room(std::size_t clients);
  std::uint32_t most_clients() const { return static_cast<std::uint32_t>(std::min<std::size_t>(config_->limits.maxClients, room_)); }
  bool full() const { return logged_in_ >= most_clients(); }
  bool crowded() const { return clients_.size() - consoles_ > room_; }  ///< with those that haven't logged in
  std::size_t clients() const { return clients_.size(); }

 private:
  /// What the configuration says about a pool.
  struct PoolPlan {
    conf::PoolSettings settings;
    conf::Upstream upstream;
  };
  /// A database and the name of its upstream: host:port, of several hosts joined by commas.
  struct DatabaseEntry {
    pool::DatabaseSnapshot shown;
    std::string upstream;
    std::string password;  ///< of the URL's user, if that isn't the global one
    std::string encoding;
    bool pooler = false;
  };
  /// When what happened to an upstream.
  struct UpstreamTimes {
    pool::Time seen{};  ///< it has answered
    pool::Time capacity_asked{}, cold_start{}, suspended{};
    pool::Time waking_since{}, connect_begun{};  ///< the first and the last connect since there was no connection
    pool::Clock::duration probed{};              ///< what a probe took; zero: there was a connect since
  };
  /// What is under way for an operator until server connections are closed.
  struct Operation {
    pool::Command::Kind kind;
    std::string database;
    std::uint32_t owner;
    std::function<void(std::string error)> done;
  };
  static std::string name_of(const conf::ConnectParams& upstream);
  static void show_settings(const conf::PoolSettings& settings, pool::DatabaseSnapshot& shown);
  DatabaseEntry describe(const std::string& name) const;
  /// The password of a database's own user; nullopt: it isn't this one.
  std::optional<std::string> password_of_own_user(const std::string& database, const std::string& user) const;
  std::optional<PoolPlan> plan_database(const std::string& database) const;
  std::optional<PoolPlan> plan_pool(const std::string& database, const std::string& user, std::string& sqlstate, std::string& error) const;
  void stir() {
    if (watcher_) std::exchange(watcher_, nullptr)();
  }
  void serve_from(PoolEntry& entry);
  std::uint32_t returning_soon(const PoolEntry& entry) const;
  /// Of the connections being opened those that serve whoever is next: a login's own may be refused, or is closed again.
  std::uint32_t connecting_for_all(const PoolEntry& entry) const;
  bool wants_listener(const PoolEntry& entry) const;
  void open_server(PoolEntry& entry, std::optional<ServerConnection::Login> login);
  void serve_logins(PoolEntry& entry);
  bool serve_login(PoolEntry& entry, const ServerConnection::Login& login);
  void make_room(PoolEntry& entry);  ///< for a login: closes an idle connection
  /// What it is to be asked is known, if its password needn't be asked about again.
  static bool is_known(const PoolEntry& entry, const ServerConnection::Login& login);
  /// The client of such a login hears of what became of it. True: the pool's other clients aren't concerned.
  bool login_failed(PoolEntry& entry, ServerConnection::Login login, const protocol::ErrorFields& error);
  /// When to forget a pool that nobody uses; max: not at all, as one that the configuration names.
  pool::Time forget_at(const PoolEntry& entry) const;
  bool may_be_waking(const std::string& upstream) const;
  void weigh_capacity(const std::string& upstream);
  bool add_client(Socket socket, std::string peer);  ///< False: no more may come for now
  bool may_accept() const;
  void accept_more();  ///< if they may come again
  /// What a look at all deadlines found of when to look again.
  struct Look {
    bool busy = false;      // soon
    bool in_doubt = false;  // of a connection, whether it has ended
    std::chrono::milliseconds next = std::chrono::hours(1);
    void again_in(std::chrono::milliseconds wait) { next = std::min(next, wait); }
    void again_at(pool::Time at, pool::Time t) {
      if (at != pool::Time::max()) again_in(std::chrono::ceil<std::chrono::milliseconds>(std::max(at, t) - t));
    }
  };
  void tick_at(pool::Time at);
  void tick();
  void look_at(PoolEntry& entry, pool::Time t, Look& look);
  void look_at_clients(pool::Time t, Look& look);
  void cut_off_clients();
  void take_back_places();  ///< that were lent to the other process
  void run_runnable();
  void login_over();
  void check_stopped();
  bool is_deserted() const;
  /// When it ends by itself because nobody uses it; max: it doesn't.
  pool::Time quits_at() const;
  /// The pool of the upstream's own user and database, if the server refuses its login and no connection is left.
  PoolEntry* refused_pool() const;
  /// The pool whose login shows whether the upstream of upstream.url lets anybody in again; null: no login there has failed.
  PoolEntry* shut_out();
  void connect_over(PoolEntry& entry);  ///< is told to who waits for it
  boost::asio::awaitable<void> run_probe(std::shared_ptr<const Upstream> upstream, std::function<void()> done);
  bool is_handing_over() const { return handing_over_ || (succession_ && succession_->state() == Succession::State::Passing); }
  bool is_paused(const std::string& database) const;
  void set_paused();
  void outdate_servers(PoolEntry& entry, const std::function<bool(const ServerConnection&)>& which);
  bool is_away(const PoolEntry& entry) const;
  bool is_gone(const ServerConnection& server) const;
  ServerConnection* take_idle(PoolEntry& entry);
  bool must_look(PoolEntry& entry, pool::Time t) const;
  std::uint32_t stuck_at(const PoolEntry& entry, const Target& target) const;
  bool is_reachable(const PoolEntry& entry, const std::string& address) const;
  void count_stuck(PoolEntry& entry);
  void look_again(PoolEntry& entry);  ///< whether its names have other addresses now
  void recheck(PoolEntry& entry);     ///< whether its secrets or certificates are others now
  void kill(const std::string& database);
  std::string change(const pool::Command& command);
  void end_waits(const std::function<bool(const Operation&)>& which, const std::string& error);
  void check_operations();
  SumsByDatabase sums() const;
  pool::MemoryOwners memory() const;
  bool farewell_over();
  void use_config(Prepared prepared);

  boost::asio::io_context& data_;
  Control& control_;
  std::shared_ptr<const conf::Config> config_;
  std::array<std::uint8_t, kScratch> scratch_;
  std::array<std::uint8_t, 16 * 1024> tls_scratch_;
  std::minstd_rand random_{std::random_device{}()};
  std::shared_ptr<std::pmr::memory_resource> tick_memory_ = std::make_shared<std::pmr::unsynchronized_pool_resource>();
  boost::asio::steady_timer timer_;
  pool::Time tick_at_ = pool::Time::max();
  std::map<std::pair<std::string, std::string>, std::shared_ptr<PoolEntry>> pools_;
  boost::unordered_flat_map<std::uint32_t, std::shared_ptr<ClientSession>> clients_;
  Ports ports_;
  bool handing_over_ = false;
  bool retired_ = false;                    // its place is taken: it serves the clients that it has
  std::shared_ptr<Succession> succession_;  // while the other process lives
  std::function<void(std::string refusal)> tried_;
  SslContext client_tls_;
  conf::ConnectParams upstream_;  // the global upstream as read at start or reload
  std::map<std::string, DatabaseEntry> databases_;
  std::uint32_t logging_in_ = 0, logged_in_ = 0;
  std::size_t room_ = std::numeric_limits<std::uint32_t>::max();
  std::vector<std::shared_ptr<ClientSession>> runnable_, running_;
  int turns_ = 0;
  const ClientSession* visited_ = nullptr;  // whose bytes to_client has
  pool::Time turn_began_{};
  std::uint64_t next_server_ = 1, last_request_ = 0;
  std::uint32_t last_pool_ = 0;
  bool draining_ = false, started_ = false, stopped_ = false, had_client_ = false;
  bool cut_short_ = false;  // queries are being cancelled at the end
  pool::Time drain_at_ = pool::Time::max(), drain_until_ = pool::Time::max(), idle_since_ = pool::Time::max(), started_at_;
  std::array<std::uint64_t, static_cast<std::size_t>(pool::RejectReason::kCount)> rejected_{};
  std::map<std::string, std::uint64_t, std::less<>> errors_;
  std::string database_version_;
  std::map<std::string, pool::Snapshot::Upstream> upstreams_;
  std::map<std::string, UpstreamTimes> upstream_times_;
  std::set<std::string> weighed_, outweighed_;        // upstreams whose pools were told to fit, or not to
  std::map<std::string, std::int64_t> certificates_;  // as Snapshot has them
  std::function<void()> watcher_;
  pool::Time farewell_at_{};
  int exit_code_ = 0;
  bool all_paused_ = false, waits_for_clients_ = false, keeps_places_ = false;
  std::set<std::string> paused_databases_, disabled_databases_;
  std::vector<Operation> operations_;
  std::uint32_t consoles_ = 0;  // of clients_
  Averages averages_;
};

}  // namespace pgsidecar::proxy
