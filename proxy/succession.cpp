#include "proxy/succession.hpp"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <boost/algorithm/hex.hpp>
#include <charconv>
#include <csignal>

#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

namespace {

constexpr char kBetween = '\0';  // fields; names have none, and a cancel key comes last

std::uint32_t number(std::string_view text) {
  std::uint32_t n = 0;
  std::from_chars(text.data(), text.data() + text.size(), n);
  return n;
}

std::vector<std::string_view> split(std::string_view text, std::size_t most) {
  std::vector<std::string_view> fields;
  while (fields.size() + 1 < most) {
    const auto end = text.find(kBetween);
    if (end == std::string_view::npos) break;
    fields.push_back(text.substr(0, end));
    text.remove_prefix(end + 1);
  }
  fields.push_back(text);
  return fields;
}

}  // namespace

Succession::Succession(Worker& worker, int link, pid_t peer, std::function<void(std::string error)> done)
    : worker_(worker), socket_(worker.loop()), timer_(worker.loop()), peer_(peer), successor_(false), done_(std::move(done)) {
  socket_.assign({AF_UNIX, 0}, link);
}

Succession::Succession(Worker& worker, int link) : worker_(worker), socket_(worker.loop()), timer_(worker.loop()), successor_(true) {
  ucred peer{};
  socklen_t size = sizeof peer;
  ::getsockopt(link, SOL_SOCKET, SO_PEERCRED, &peer, &size);
  peer_ = peer.pid;
  socket_.assign({AF_UNIX, 0}, link);
}

void Succession::start() {
  receive();
  if (successor_) return;
  worker_.for_each_pool([this](PoolEntry& entry) {
    const Key key{entry.database, entry.user};
    tell_hung(key, shares_[key], entry);
    if (entry.pool.open() == 0 || entry.pool.open_here() >= entry.pool.settings().max) return;
    entry.pool.set_lent(1);
    send({"spare", "1", entry.database, entry.user});
  });
  timer_.expires_after(kPatience);
  timer_.async_wait([self = shared_from_this()](const boost::system::error_code& ec) {
    if (!ec) self->fail("it was not ready within " + std::to_string(kPatience.count()) + " s");
  });
}

// --- the link

void Succession::tell_failure(int link, const std::string& why) {
  const std::string message = "failed" + std::string(1, kBetween) + why;
  ::send(link, message.data(), std::min<std::size_t>(message.size(), 16 * 1024), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::close(link);
}

void Succession::send(const std::vector<std::string>& fields) {
  if (ended_) return;
  std::string message;
  for (const std::string& field : fields) message.append(message.empty() ? 0 : 1, kBetween).append(field);
  unsent_.push_back(std::move(message));
  flush();
}

void Succession::flush() {
  while (!unsent_.empty() && !writing_) {
    if (::send(socket_.native_handle(), unsent_.front().data(), unsent_.front().size(), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) {
      unsent_.pop_front();
      continue;
    }
    if (errno != EAGAIN) return;  // its end is told by receive()
    writing_ = true;
    socket_.async_wait(Socket::wait_write, [self = shared_from_this()](const boost::system::error_code& ec) {
      self->writing_ = false;
      if (!ec) self->flush();
    });
  }
}

void Succession::receive() {
  socket_.async_wait(Socket::wait_read, [self = shared_from_this()](const boost::system::error_code& ec) {
    if (ec || self->state_ == State::Over) return;
    const Worker::Turn turn(self->worker_);
    std::string message(64 * 1024, '\0');
    for (;;) {
      const ssize_t n = ::recv(self->socket_.native_handle(), message.data(), message.size(), MSG_DONTWAIT);
      if (n < 0 && errno == EAGAIN) break;
      if (n < 0 && errno == ECONNRESET) continue;  // it went without having read all; what it has said comes now
      if (n <= 0) return self->on_end();
      self->on_message(split({message.data(), static_cast<std::size_t>(n)}, message.starts_with("cancel") ? 3 : 4));
      if (self->state_ == State::Over) return;
    }
    self->receive();
  });
}

void Succession::on_message(std::vector<std::string_view> fields) {
  const std::string_view what = fields[0];
  fields.resize(4);
  if (what == "ready" && !successor_ && state_ == State::Preparing) {
    if (!fields[1].empty() && worker_.main_upstream().state == pool::Snapshot::Database::Up)
      return fail("it cannot use the database, which this process can: " + std::string(fields[1]));
    if (worker_.operated()) return fail("databases are paused or disabled, which it wouldn't know");
    return pass();
  }
  if (what == "failed" && !successor_) {
    ended_ = true;  // it is about to
    return fail(std::string(fields[1]));
  }
  if (what == "go" && successor_) return take_over(fields[1] == "1");
  if (what == "serving" && !successor_ && state_ == State::Passing) {
    timer_.cancel();
    state_ = State::Passed;
    worker_.retire(peer_);
    return std::exchange(done_, nullptr)({});
  }
  if (what == "spare" && successor_) return void(spared_.emplace_back(fields[2], fields[3]));
  if (what == "over" && successor_) return worker_.on_alone();
  if (what == "cancel") return worker_.cancel(number(fields[1]), fields[2]);
  if (what != "held" && what != "give" && what != "want" && what != "max" && what != "hung") return;
  const std::vector<std::string_view> rest = split(fields[3], std::string_view::npos);  // the user, then what else is told
  const Key key{fields[2], rest.front()};
  Share& share = shares_[key];
  const std::uint32_t count = number(fields[1]);
  if (what == "held") share.given = count;
  if (what == "want") share.wanted = count;
  if (what == "max") share.others_max = count;
  if (what == "give") {
    share.given -= std::min(share.given, count);
    share.asked -= std::min(share.asked, count);
  }
  if (what == "hung") {
    share.hung_held = count;
    share.hung.clear();
    for (auto address = rest.begin() + 1; address != rest.end(); ++address)
      share.hung.push_back(boost::algorithm::unhex(std::string(*address)));
  }
  PoolEntry* entry = worker_.pool_of(key.first, key.second);
  if (entry) {
    entry->pool.set_lent(share.given);
    if (what == "give" || what == "hung") return worker_.serve(*entry);  // and balances
  }
  balance(key, share, entry);
}

void Succession::on_end() {
  if (std::exchange(ended_, true)) return;
  if (!successor_ && state_ != State::Passed) return fail("it ended before it was ready");
  close();
  worker_.on_peer_ended(*this);
}

void Succession::close() {
  state_ = State::Over;
  timer_.cancel();
  boost::system::error_code ignored;
  socket_.close(ignored);
}

// --- who listens

void Succession::ready(const std::string& database_error) {
  send({"ready", database_error});
}

void Succession::pass() {
  state_ = State::Passing;
  worker_.ports().suspend();
  worker_.for_each_pool([this](PoolEntry& entry) {
    const std::uint32_t max = entry.pool.settings().max;
    Share& share = shares_[{entry.database, entry.user}];
    share.given = max - std::min(max, entry.pool.open_here());
    entry.pool.set_lent(share.given);
    tell_hung({entry.database, entry.user}, share, entry);
    send({"held", std::to_string(entry.pool.open_here()), entry.database, entry.user});
  });
  send({"go", worker_.had_client() ? "1" : "0"});
}

void Succession::take_over(bool had_client) {
  state_ = State::Passed;
  worker_.take_over(had_client, peer_);
  send({"serving"});
}

void Succession::abandon(const std::string& why) {
  if (state_ == State::Preparing && !successor_) fail(why);
}

void Succession::fail(const std::string& why) {
  if (state_ == State::Over) return;
  const auto self = shared_from_this();
  if (!ended_) ::kill(peer_, SIGKILL);
  if (state_ == State::Passing) worker_.ports().accept();
  close();
  worker_.on_peer_ended(*this);
  if (done_) std::exchange(done_, nullptr)(why);
}

void Succession::cancel(std::uint32_t pid, std::string_view key) {
  if (successor_ && state_ != State::Over) send({"cancel", std::to_string(pid), std::string(key)});
}

// --- the pools' places

void Succession::join(PoolEntry& entry) {
  const auto it = shares_.find({entry.database, entry.user});
  if (it != shares_.end()) entry.pool.set_lent(it->second.given);
  // A pool of the predecessor's that came after the rest was told begins with nothing.
  if (it == shares_.end() && !successor_ && state_ != State::Preparing) {
    const std::uint32_t max = entry.pool.settings().max;
    shares_[{entry.database, entry.user}].given = max;
    entry.pool.set_lent(max);
  }
}

void Succession::balance(PoolEntry& entry) {
  if (state_ != State::Passed && state_ != State::Passing) return;
  const Key key{entry.database, entry.user};
  balance(key, shares_[key], &entry);
}

std::uint32_t Succession::hung_at(const PoolEntry& entry, const std::function<bool(const std::string& address)>& there) const {
  const auto it = shares_.find({entry.database, entry.user});
  if (it == shares_.end()) return 0;
  const auto count = static_cast<std::uint32_t>(std::ranges::count_if(it->second.hung, there));
  return count - std::min(count, it->second.hung_held);
}

void Succession::tell_hung(const Key& key, Share& share, const PoolEntry& entry) {
  const std::vector<std::string> addresses = worker_.stuck_addresses(entry);
  if (addresses.empty() && share.told_hung.empty()) return;
  const pool::Pool& pool = entry.pool;
  const std::uint32_t holds = pool.settings().max - std::min(pool.settings().max, share.given);
  const std::uint32_t alive = pool.open() - pool.stuck();
  const std::uint32_t held = std::min(pool.stuck_here(), holds - std::min(holds, alive));
  std::vector<std::string> message{"hung", std::to_string(held), key.first, key.second};
  for (const std::string& address : addresses) message.push_back(boost::algorithm::hex(address));
  if (message == share.told_hung) return;
  send(message);
  share.told_hung = std::move(message);
}

void Succession::give(const Key& key, Share& share, std::uint32_t count) {
  share.given += count;
  share.wanted -= std::min(share.wanted, count);
  send({"give", std::to_string(count), key.first, key.second});
}

void Succession::balance(const Key& key, Share& share, PoolEntry* entry) {
  if (!entry) {  // no client has come for it
    if (share.wanted > 0) give(key, share, share.wanted);
    return;
  }
  tell_hung(key, share, *entry);
  pool::Pool& pool = entry->pool;
  const std::uint32_t max = pool.settings().max;
  if (std::exchange(share.max, max) != max) send({"max", std::to_string(max), key.first, key.second});
  const std::uint32_t waiting = worker_.missing(*entry);
  // What is lent is what may be given as soon as it is free: connections beyond the rest are closed as they come back.
  const std::uint32_t half = std::min(max, share.others_max) / 2;
  const std::uint32_t used = pool.staying() - static_cast<std::uint32_t>(pool.idle_count());
  const std::uint32_t most = max - (waiting > 0 ? half : std::min(half, used));
  pool.set_lent(std::max(share.given, std::min(share.given + share.wanted, most)));
  worker_.close_outdated(*entry);
  const std::uint32_t room = max - std::min(max, pool.open_here());
  const std::uint32_t now = std::min(pool.lent(), std::max(room, share.given));
  if (now > share.given) give(key, share, now - share.given);
  const std::uint32_t beyond = share.given - std::min(share.given, max);  // it has them by a `max` that is greater there
  const std::uint32_t ask = waiting == 0 || pool.room() > 0 ? 0 : std::min(waiting + beyond, share.given);
  if (ask <= share.asked && (ask != 0 || share.asked == 0)) return;
  share.asked = ask;
  send({"want", std::to_string(ask), key.first, key.second});
}

}  // namespace pgsidecar::proxy
