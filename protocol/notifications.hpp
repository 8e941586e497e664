// A client's notifications on their way to it. In transaction mode they come from a connection that listens for all clients of a
// pool (the listener), and while a client changes what it listens to from the connection that it has leased. Every connection
// reads the server's notifications in one order, so markers (notifications of the proxy's own) say where in it a hand-over
// happened: each notification is delivered once, in order. Moves no bytes. PostgreSQL documentation, NOTIFY and section 55.2.7.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "protocol/statements.hpp"
#include "protocol/wire.hpp"

namespace pgsidecar::protocol {

using Channels = std::set<std::string, std::less<>>;

struct Notification {
  std::uint32_t pid = 0;  ///< of the backend that notified
  std::string_view channel, payload;
};
/// Reads the body of a NotificationResponse; views into it. nullopt if malformed.
std::optional<Notification> parse_notification(Bytes body);
void write_notification(std::string& out, const Notification& notification);

/// Where a hand-over happens and what it changes. A marker of 0: there is none.
struct HandOver {
  std::uint64_t begin = 0;  ///< from here on the leased connection listens to all that the client listens to, if it was committed
  std::uint64_t own = 0;    ///< what the leased connection's backend notifies from here on is the client's own
  std::uint64_t end = 0;    ///< from here on the listener does again
  Channels before;          ///< those of the client that the listener delivers, up to `end`
  Channels now;             ///< those that the leased connection listens to at `end`
};

/// Keeps what the client can't be given now, and puts it in order.
class Inbox {
 public:
  /// `server`: the leased backend's pid; `client`: what the client was told as its own.
  struct Pids {
    std::uint32_t server = 0, client = 0;
  };

  void from_listener(const Notification& notification) { add(listener_, notification); }
  void from_leased(const Notification& notification) { add(leased_, notification); }
  void mark_listener(std::uint64_t marker) { listener_.push_back({marker, 0, {}, {}}); }
  void mark_leased(std::uint64_t marker) { leased_.push_back({marker, 0, {}, {}}); }
  /// A message that goes between the listener's notifications.
  void insert(std::string message);
  bool marked_by_listener(std::uint64_t marker) const { return marked(listener_, marker); }
  std::size_t bytes() const { return bytes_; }
  bool empty() const { return listener_.empty() && leased_.empty(); }

  /// All so far, while nothing is handed over. What comes after the marker `own` counts as after it in later calls.
  void take(std::uint64_t own, Pids pids, std::string& out);
  /// All so far, at the end of a hand-over. Returns what the client listens to from now on.
  Channels settle(const HandOver& hand_over, Pids pids, std::string& out);

 private:
  struct Entry {
    std::uint64_t marker = 0;
    std::uint32_t pid = 0;
    std::string channel, payload;  // no channel: a message
  };
  using Entries = std::vector<Entry>;

  void add(Entries& to, const Notification& notification);
  static void write(const Entry& entry, bool own, Pids pids, std::string& out);
  static bool marked(const Entries& entries, std::uint64_t marker);
  void clear();

  Entries listener_, leased_;
  std::size_t bytes_ = 0;
  bool own_ = false;  // the marker `own` was among those taken
};

/// Who listens to what.
template <class Who>
class Subscriptions {
 public:
  /// True: nobody did before.
  bool add(std::string_view channel, Who who) {
    auto it = map_.find(channel);
    const bool first = it == map_.end();
    if (first) it = map_.emplace(std::string(channel), std::vector<Who>()).first;
    if (std::find(it->second.begin(), it->second.end(), who) == it->second.end()) it->second.push_back(who);
    return first;
  }
  /// True: nobody does any more.
  bool remove(std::string_view channel, Who who) {
    const auto it = map_.find(channel);
    if (it == map_.end()) return false;
    std::erase(it->second, who);
    if (!it->second.empty()) return false;
    map_.erase(it);
    return true;
  }
  std::span<const Who> of(std::string_view channel) const {
    const auto it = map_.find(channel);
    return it == map_.end() ? std::span<const Who>() : std::span<const Who>(it->second);
  }
  bool contains(std::string_view channel) const { return map_.contains(channel); }
  bool empty() const { return map_.empty(); }
  std::size_t size() const { return map_.size(); }
  template <class F>
  void for_each_channel(F&& f) const {
    for (const auto& [channel, who] : map_) f(channel);
  }

 private:
  StringMap<std::vector<Who>> map_;
};

}  // namespace pgsidecar::protocol
