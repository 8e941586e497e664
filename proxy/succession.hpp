// The two processes of an online restart, as one of them sees the other: the link between them, who of them listens, and how they share
// what exists once. Owned by the Worker, on the data loop, until the other process has ended.
//
// The predecessor says of which pools that have connections it can `spare` one; with that the successor logs in to try. It says
// `ready` when it could listen and what it found of its database; the predecessor stops accepting, says what it `held` of each pool and
// `go`; the successor accepts and says `serving`; only then the predecessor closes its sockets and says `over`. Whatever fails before
// `serving` leaves the predecessor in charge. Connections that come meanwhile wait in the sockets, which both have.
//
// Of a pool's `max` connections each process has a share: what the other one holds is lent to it. A share grows by `give` alone, so that
// the sum never exceeds `max`; who has clients that wait for more says `want`, and gets what the other doesn't need, or up to one half. If
// the successor's configuration, or a reload, has another `max`, each process says its own (`max`), and half of the smaller one counts.
// Connections that a server doesn't end count at that server alone: each process tells the other at which addresses it has such ones
// (`hung`), besides those that are among what it holds.
// Cancel requests of the predecessor's clients come to the successor, which hands them on.
#pragma once

#include <sys/types.h>

#include <boost/asio/generic/seq_packet_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pgsidecar::proxy {

class Worker;
struct PoolEntry;

class Succession : public std::enable_shared_from_this<Succession> {
 public:
  /// Preparing: nothing is agreed yet. Passing: `go` is said, `serving` isn't. Passed: the successor serves.
  enum class State { Preparing, Passing, Passed, Over };
  static constexpr std::chrono::seconds kPatience{10};  ///< in which a successor must be ready

  /// The end of the predecessor, which has started `peer`. `done` gets empty once that serves, or why it doesn't.
  Succession(Worker& worker, int link, pid_t peer, std::function<void(std::string error)> done);
  /// The end of the successor, which is at an end itself if the predecessor ends before `go`.
  Succession(Worker& worker, int link);
  void start();
  /// As one that was to be a successor and can't.
  static void tell_failure(int link, const std::string& why);

  State state() const { return state_; }
  pid_t peer() const { return peer_; }
  bool is_successor() const { return successor_; }
  /// As the successor: the pools, by database and user, that the predecessor has connections of and leaves one.
  const std::vector<std::pair<std::string, std::string>>& spared() const { return spared_; }
  /// As the successor: listens, and this is what it found of the database (empty: it answers).
  void ready(const std::string& database_error);
  /// As the predecessor: it is known to whom it has to be that the successor has taken over.
  void over() { send({"over"}); }
  /// As the predecessor, while nothing is passed on yet: the successor isn't wanted any more.
  void abandon(const std::string& why);
  void cancel(std::uint32_t pid, std::string_view key);
  /// Something has changed in the pool: gives what the other one wants and may have, wants what is missing.
  void balance(PoolEntry& entry);
  /// What the other one holds of a pool that has just been made.
  void join(PoolEntry& entry);
  /// How many connections the other one has, besides those it holds, that the server at these addresses doesn't end.
  std::uint32_t hung_at(const PoolEntry& entry, const std::function<bool(const std::string& address)>& there) const;

 private:
  using Socket = boost::asio::basic_seq_packet_socket<boost::asio::generic::seq_packet_protocol, boost::asio::io_context::executor_type>;
  using Key = std::pair<std::string, std::string>;  // database and user
  struct Share {
    std::uint32_t given = 0;                                               // to the other one, which may hold as many
    std::uint32_t wanted = 0;                                              // by the other one, besides
    std::uint32_t asked = 0;                                               // of the other one
    std::uint32_t max = 0;                                                 // the pool's here, as the other one was told
    std::uint32_t others_max = std::numeric_limits<std::uint32_t>::max();  // the pool's there, once it is told
    std::vector<std::string> hung;                                         // the addresses of those of the other one's
    std::uint32_t hung_held = 0;                                           // so many are among what it holds
    std::vector<std::string> told_hung;                                    // what the other one was told
  };

  void receive();
  void on_message(std::vector<std::string_view> fields);
  void on_end();
  void close();
  void pass();
  void take_over(bool had_client);
  void fail(const std::string& why);
  void send(const std::vector<std::string>& fields);
  void flush();
  void balance(const Key& key, Share& share, PoolEntry* entry);
  void give(const Key& key, Share& share, std::uint32_t count);
  void tell_hung(const Key& key, Share& share, const PoolEntry& entry);

  Worker& worker_;
  Socket socket_;
  boost::asio::steady_timer timer_;
  pid_t peer_ = 0;
  const bool successor_;
  State state_ = State::Preparing;
  bool ended_ = false;  // the other process
  std::function<void(std::string error)> done_;
  std::map<Key, Share> shares_;
  std::vector<Key> spared_;
  std::deque<std::string> unsent_;
  bool writing_ = false;
};

}  // namespace pgsidecar::proxy
