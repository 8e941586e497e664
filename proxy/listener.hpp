// LISTEN in transaction mode. A Listener is one server connection of a pool that listens for all of its clients; a Subscriber is
// a client that listens through it. The server executes the client's own LISTEN and UNLISTEN on its leased connection, so that
// transactions, savepoints and functions are its business; what that connection listens to afterwards (the residue check says) is
// handed over to the listener before the client's ReadyForQuery. A client that changes or asks what it listens to gets its channels
// onto its leased connection first. Where in the order of notifications a hand-over happens is told by markers: notifications
// of the proxy's own on a channel of its own (protocol::Inbox).
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>
#include <boost/unordered/unordered_flat_set.hpp>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "pool/pool.hpp"
#include "protocol/notifications.hpp"

namespace pgsidecar::proxy {

class ClientSession;
class ServerConnection;
class Subscriber;
struct PoolEntry;

class Listener {
 public:
  explicit Listener(PoolEntry& entry);

  /// A pool of one connection has none to spare: its clients are pinned.
  bool usable() const;
  /// Nor has one of two, while the other process of an online restart holds one, or those that hang all but one: LISTEN is refused.
  bool crowded() const;
  bool has_server() const { return server_ != nullptr; }
  bool up() const { return server_ && !setting_up_; }
  /// There are channels and no connection to listen on.
  bool wants() const { return !server_ && !subscriptions_.empty(); }
  bool wants_server(pool::Time now) const { return wants() && now >= retry_at_ && usable(); }
  /// Takes a connection that is leased to nobody and owes nothing.
  void adopt(ServerConnection& server);
  void recycle();  ///< a connection that the configuration has outdated
  void end();      ///< the only connection that there may be is needed: its clients are disconnected
  std::size_t clients() const { return subscribers_.size(); }
  std::size_t channels() const { return subscriptions_.size(); }
  const std::string& marker_channel() const { return marker_channel_; }

  // For Subscriber.
  void enter(Subscriber& who) { subscribers_.insert(&who); }
  void leave(Subscriber& who);
  bool has_room(const protocol::Channels& channels) const;
  /// False: the server listens to them already; else Subscriber::on_listened follows.
  bool listen(const protocol::Channels& channels, Subscriber& who);
  void unsubscribe(std::string_view channel, Subscriber& who);
  std::uint64_t expect(Subscriber& who);  ///< a new marker, told to `who` when the listener sees it
  void forget(std::uint64_t marker) { expected_.erase(marker); }

  // From the connection.
  void on_notification(const protocol::Notification& notification);
  void on_answer(bool ok);
  void on_gone();

 private:
  PoolEntry& entry_;
  const std::string marker_channel_;
  ServerConnection* server_ = nullptr;
  bool setting_up_ = false, lost_ = false;
  pool::Time retry_at_{};
  std::uint64_t next_marker_ = 1;
  protocol::Subscriptions<Subscriber*> subscriptions_;
  boost::unordered_flat_set<Subscriber*> subscribers_;
  boost::unordered_flat_map<std::uint64_t, Subscriber*> expected_;
  std::deque<Subscriber*> asked_;  // who waits for each of the server's answers; null: nobody
};

class Subscriber {
 public:
  /// What becomes of a client's message. Go: on to the server. Wait: it is looked at anew later. Refused: answered.
  enum class Verdict { Go, Wait, Refused };

  Subscriber(ClientSession& client, Listener& listener);
  Subscriber(const Subscriber&) = delete;
  Subscriber& operator=(const Subscriber&) = delete;
  ~Subscriber();

  // The client's side.
  Verdict ahead(std::uint32_t residue, bool simple);
  bool busy() const { return in_turn() || waiting_; }  ///< what the client sends has to wait
  bool in_turn() const { return step_ != Step::None; }
  bool waits_for_listener() const { return waits_for_listener_; }
  bool stop_waiting();                                          ///< True: it did
  bool owes_ready() const { return in_turn() || ready_held_; }  ///< the client waits for the end of its turn
  bool dirty() const { return step_ != Step::None || real_ != Real::No; }
  bool over() const { return step_ == Step::None && channels_.empty() && inbox_.empty(); }
  bool listens() const { return !channels_.empty(); }
  ClientSession& client() { return client_; }

  // The leased connection's side.
  /// ReadyForQuery outside a transaction, the last one owed: is it kept until the notifications before it are known?
  bool holds_ready(std::uint32_t residue);
  void flush(std::string& out);  ///< what goes ahead of a ReadyForQuery outside a transaction
  void on_tag(std::string_view tag);
  void on_leased(const protocol::Notification& notification);
  void on_told(bool ok) { told_ok_ &= ok; }
  bool on_answered();  ///< it owes nothing more. True: the client's message that waited for that is next
  void on_channels(std::optional<protocol::Channels> channels);
  bool begin();    ///< residue is known. True: the lease goes on until what begins now is over
  void advance();  ///< the next step of that
  void on_server_lost();

  // The listener's side.
  void on_notification(const protocol::Notification& notification);
  void on_marker(std::uint64_t marker);
  void on_listened();
  void on_listener_gone();
  void on_listener_up(bool lost, bool listened);  ///< `listened`: to all of the client's channels
  void deliver_if_idle();

 private:
  /// Materialising: its channels are put on the leased connection. Subscribing: the listener is asked to listen. Marking: markers are
  /// on their way.
  enum class Step : std::uint8_t { None, Materialising, Subscribing, Marking };
  /// Does the leased connection listen to the client's channels? InTransaction: if the open transaction is committed.
  enum class Real : std::uint8_t { No, InTransaction, Yes };

  bool idle() const;
  void inject(const std::vector<std::string>& statements);
  Verdict refuse(std::string_view what, bool simple);
  std::vector<std::string> materialise_sql();
  std::string notify_sql(std::uint64_t marker) const;
  void mark();
  void adopted();
  void finish_if_done();
  void finish();
  void answer(std::string bytes);
  void reset_turn();
  protocol::HandOver hand_over();
  protocol::Inbox::Pids pids() const;
  void become(protocol::Channels channels);
  void check_bound();

  ClientSession& client_;
  Listener& listener_;
  protocol::Channels channels_;
  protocol::Inbox inbox_;
  std::optional<protocol::Channels> rows_;  // what the leased connection listens to, as the server says
  Step step_ = Step::None;
  Real real_ = Real::No;
  bool waiting_ = false, waits_for_listener_ = false;
  bool ready_held_ = false, fence_ = false, unsure_ = false, told_ok_ = true;
  bool marked_ = false, reached_ = false;  // of Marking: by the leased connection, by the listener
  bool deaf_ = false;                      // since `begin_` was expected there was a time without a listener
  bool overflowed_ = false;
  std::uint64_t begin_ = 0, own_ = 0, end_ = 0;
};

}  // namespace pgsidecar::proxy
