#include "proxy/listener.hpp"

#include <openssl/rand.h>

#include <array>
#include <boost/asio/post.hpp>

#include "protocol/sql_scan.hpp"
#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/server_connection.hpp"
#include "proxy/settings.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Channels;
using protocol::Notification;

namespace {

constexpr std::size_t kMaxKept = std::size_t{1} << 20;  // bytes of notifications that a client hasn't taken
constexpr std::size_t kMaxChannels = 10000;             // of a pool

std::string joined(const std::vector<std::string>& statements) {
  std::string sql;
  for (const std::string& statement : statements) (sql += sql.empty() ? "" : ";") += statement;
  return sql;
}

std::string random_name() {
  std::array<unsigned char, 8> bytes{};
  RAND_bytes(bytes.data(), bytes.size());
  std::string name = "pgsidecar_";
  for (const unsigned char byte : bytes) name += fmt::format("{:02x}", byte);
  return name;
}

bool writes(std::string_view tag) {
  for (const std::string_view word : {"INSERT", "UPDATE", "DELETE", "MERGE", "COPY"})
    if (tag.starts_with(word)) return true;
  return false;
}

}  // namespace

// --- the connection that listens

Listener::Listener(PoolEntry& entry) : entry_(entry), marker_channel_(random_name()) {}

bool Listener::usable() const {
  return entry_.pool.settings().max > 1;
}

bool Listener::crowded() const {
  const pool::Pool& pool = entry_.pool;
  const bool hangs = pool.stuck_here() > 0 && pool.capacity() <= pool.stuck_here() + 1;
  return !server_ && (hangs || (pool.settings().max == 2 && pool.lent() > 0));
}

void Listener::adopt(ServerConnection& server) {
  server_ = &server;
  setting_up_ = true;
  asked_.assign(1, nullptr);
  // A session that is idle for good mustn't end, whatever the last client has left or the role's settings say.
  std::string sql = server.listen_for_pool();
  sql +=
      "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) 'idle_session_timeout'";
  sql += ";LISTEN " + marker_channel_;
  subscriptions_.for_each_channel([&](const std::string& channel) { sql += ";LISTEN " + identifier(channel); });
  server.tell_listening(sql);
}

void Listener::recycle() {
  if (server_ && server_->condemned) server_->close(pool::CloseReason::Reload);
}

void Listener::end() {
  std::vector<std::shared_ptr<ClientSession>> listening;
  for (Subscriber* who : subscribers_) listening.push_back(who->client().shared_from_this());
  for (const auto& client : listening)
    client->fatal("57P01", "terminating connection since the only server connection is needed for more than to listen",
                  "pool.max leaves one, here or during an online restart: connect and LISTEN again.");
}

void Listener::leave(Subscriber& who) {
  subscribers_.erase(&who);
  std::replace(asked_.begin(), asked_.end(), &who, static_cast<Subscriber*>(nullptr));
  boost::unordered::erase_if(expected_, [&](const auto& entry) { return entry.second == &who; });
}

bool Listener::has_room(const Channels& channels) const {
  std::size_t more = 0;
  for (const std::string& channel : channels) more += !subscriptions_.contains(channel);
  return subscriptions_.size() + more <= kMaxChannels;
}

bool Listener::listen(const Channels& channels, Subscriber& who) {
  std::string sql;
  bool fresh = false;
  for (const std::string& channel : channels) {
    fresh |= subscriptions_.add(channel, &who);
    sql += (sql.empty() ? "LISTEN " : ";LISTEN ") + identifier(channel);
  }
  if (!server_) return true;  // with all others, once there is one
  if (!fresh && asked_.empty()) return false;
  asked_.push_back(&who);
  server_->tell_listening(sql);
  return true;
}

void Listener::unsubscribe(std::string_view channel, Subscriber& who) {
  if (!subscriptions_.remove(channel, &who) || !server_) return;
  if (!subscriptions_.empty()) {
    asked_.push_back(nullptr);
    return server_->tell_listening("UNLISTEN " + identifier(channel));
  }
  ServerConnection* server = std::exchange(server_, nullptr);
  asked_.clear();
  expected_.clear();
  setting_up_ = lost_ = false;
  server->stop_listening();
}

std::uint64_t Listener::expect(Subscriber& who) {
  expected_.emplace(next_marker_, &who);
  return next_marker_++;
}

void Listener::on_notification(const Notification& notification) {
  if (notification.channel == marker_channel_) {
    const auto it = expected_.find(std::strtoull(std::string(notification.payload).c_str(), nullptr, 10));
    if (it == expected_.end()) return;
    const auto [marker, who] = *it;
    expected_.erase(it);
    return who->on_marker(marker);
  }
  for (Subscriber* who : subscriptions_.of(notification.channel)) who->on_notification(notification);
}

void Listener::on_answer(bool ok) {
  if (asked_.empty()) return;
  if (!ok) {
    retry_at_ = pool::Clock::now() + std::chrono::seconds(1);
    return server_->close(pool::CloseReason::Broken);
  }
  Subscriber* who = asked_.front();
  asked_.pop_front();
  if (!std::exchange(setting_up_, false)) {
    if (who) who->on_listened();
    return;
  }
  const bool lost = std::exchange(lost_, false);
  if (lost)
    log::info("listener_back", entry_.about(), "{}@{}: listening again for {} clients", entry_.user, entry_.database, subscribers_.size());
  const std::vector<Subscriber*> all(subscribers_.begin(), subscribers_.end());
  for (Subscriber* one : all)
    if (subscribers_.contains(one)) one->on_listener_up(lost, std::find(asked_.begin(), asked_.end(), one) == asked_.end());
}

void Listener::on_gone() {
  server_ = nullptr;
  setting_up_ = false;
  asked_.clear();
  expected_.clear();
  if (subscriptions_.empty() || entry_.clients == 0) return;
  lost_ = true;
  ++entry_.pool.counters().listenerLosses;
  log::warn("listener_lost", entry_.about(), "{}@{}: the connection that listens for {} clients is lost", entry_.user, entry_.database,
            subscribers_.size());
  const std::vector<Subscriber*> all(subscribers_.begin(), subscribers_.end());
  for (Subscriber* one : all)
    if (subscribers_.contains(one)) one->on_listener_gone();
}

// --- a client that listens

Subscriber::Subscriber(ClientSession& client, Listener& listener) : client_(client), listener_(listener) {
  listener_.enter(*this);
}

Subscriber::~Subscriber() {
  listener_.leave(*this);
  if (rows_) channels_.insert(rows_->begin(), rows_->end());
  for (const std::string& channel : channels_) listener_.unsubscribe(channel, *this);
}

std::string Subscriber::notify_sql(std::uint64_t marker) const {
  return "NOTIFY " + listener_.marker_channel() + ",'" + std::to_string(marker) + "'";
}

std::vector<std::string> Subscriber::materialise_sql() {
  begin_ = listener_.expect(*this);
  deaf_ = !listener_.up();
  std::vector<std::string> statements{"LISTEN " + listener_.marker_channel()};
  for (const std::string& channel : channels_) statements.push_back("LISTEN " + identifier(channel));
  statements.push_back(notify_sql(begin_));
  client_.residue_ |= protocol::kListen;
  return statements;
}

void Subscriber::inject(const std::vector<std::string>& statements) {
  ServerConnection& server = *client_.server_;
  if (!server.pipeline.unsynced()) return server.ask_listening(joined(statements));
  for (const std::string& statement : statements) server.ask_extended(statement);
}

Subscriber::Verdict Subscriber::ahead(std::uint32_t residue, bool simple) {
  if (channels_.empty()) return Verdict::Go;
  const auto& pipeline = client_.server_->pipeline;
  if (pipeline.failed()) return Verdict::Go;
  const bool boundary = !pipeline.unsynced();
  const bool outside = boundary && pipeline.empty() && pipeline.status() == protocol::TxStatus::Idle;
  fence_ |= (residue & (protocol::kNotify | protocol::kFunction | protocol::kCode | protocol::kUnreadable)) != 0;
  unsure_ |= real_ == Real::InTransaction && (residue & protocol::kTransaction);

  const bool asks = residue & protocol::kChannels;
  const bool changes = asks || (residue & (protocol::kListen | protocol::kDiscard)) || (outside && (residue & protocol::kFunction));
  if (!changes || real_ == Real::Yes) {
    if (!(residue & protocol::kNotify) || own_ != 0 || real_ != Real::No || !listener_.has_server()) return Verdict::Go;
    if (!listener_.up()) {
      waiting_ = waits_for_listener_ = true;
      return Verdict::Wait;
    }
    own_ = listener_.expect(*this);
    inject({notify_sql(own_)});
    return Verdict::Go;
  }
  if (boundary && !pipeline.empty()) {
    waiting_ = true;  // what it is in when this one's turn comes isn't known yet
    return Verdict::Wait;
  }
  if (!outside) {
    if (boundary && pipeline.status() == protocol::TxStatus::Failed) return Verdict::Go;
    if (!asks && !(residue & protocol::kListen)) return Verdict::Go;  // DISCARD ALL isn't for transactions
    if (asks) return refuse("pg_listening_channels() in a transaction", simple);
    if (unsure_) return refuse("LISTEN or UNLISTEN after another one and ROLLBACK TO SAVEPOINT", simple);
    if (real_ == Real::No) {
      if (listener_.has_server() && !listener_.up()) {
        waiting_ = waits_for_listener_ = true;  // it must hear the marker, which tells a COMMIT from a ROLLBACK
        return Verdict::Wait;
      }
      inject(materialise_sql());
      real_ = Real::InTransaction;
    }
    return Verdict::Go;
  }
  if (!listener_.up()) {
    waiting_ = waits_for_listener_ = true;
    // Whoever waits for the listener mustn't hold what it needs.
    if (!listener_.has_server() && !client_.pinned()) listener_.adopt(*client_.surrender());
    return Verdict::Wait;
  }
  step_ = Step::Materialising;
  told_ok_ = true;
  client_.server_->ask_listening(joined(materialise_sql()));
  client_.server_->ask_listening("UNLISTEN " + listener_.marker_channel());
  return Verdict::Wait;
}

// The server itself must fail, so that the client's transaction does.
Subscriber::Verdict Subscriber::refuse(std::string_view what, bool simple) {
  const bool whole = simple && !client_.server_->pipeline.unsynced();
  client_.server_->raise(whole, std::string(what) + " is not supported in transaction mode for a client that listens already",
                         "It works outside of a transaction, and with pool.mode session.");
  return whole ? Verdict::Refused : Verdict::Go;
}

bool Subscriber::holds_ready(std::uint32_t residue) {
  const bool holds = real_ != Real::No || fence_ || (residue & protocol::kListen);
  ready_held_ |= holds;
  return holds;
}

void Subscriber::flush(std::string& out) {
  if (inbox_.empty() || real_ != Real::No) return;
  inbox_.take(own_, pids(), out);
}

void Subscriber::on_tag(std::string_view tag) {
  if (listens() && writes(tag)) fence_ = true;  // a trigger may have notified
}

void Subscriber::on_leased(const Notification& notification) {
  if (notification.channel == listener_.marker_channel()) {
    const std::uint64_t marker = std::strtoull(std::string(notification.payload).c_str(), nullptr, 10);
    if (marker != 0 && (marker == begin_ || marker == end_)) inbox_.mark_leased(marker);
    return;
  }
  if (begin_ == 0 && channels_.contains(notification.channel)) return;  // the listener delivers these
  ++client_.entry_->pool.counters().notifications;
  inbox_.from_leased(notification);
  deliver_if_idle();
  check_bound();
}

bool Subscriber::on_answered() {
  if (!waiting_ || waits_for_listener_) return false;
  waiting_ = false;
  client_.worker_.run_later(client_);
  return !ready_held_;
}

bool Subscriber::stop_waiting() {
  waits_for_listener_ = false;
  return std::exchange(waiting_, false);
}

void Subscriber::on_channels(std::optional<Channels> channels) {
  if (channels) channels->erase(listener_.marker_channel());
  rows_ = std::move(channels);
}

bool Subscriber::begin() {
  if (step_ != Step::None) return true;
  const bool changed = rows_ && (real_ != Real::No || !rows_->empty());
  // Without another reason to stay, the connection itself becomes the listener's; with one, it goes on listening for its client.
  if (changed && !listener_.has_server() && !client_.pinned() && !rows_->empty()) {
    adopted();
    return true;
  }
  if (changed && !listener_.has_server() && rows_->empty()) {
    mark();
    return true;
  }
  if (changed && (listener_.has_server() || listens())) {
    step_ = Step::Subscribing;
    if (!listener_.listen(*rows_, *this)) on_listened();
    return true;
  }
  if (fence_ && listener_.has_server()) {
    rows_.reset();
    step_ = Step::Subscribing;
    if (listener_.up()) on_listened();
    return true;
  }
  std::string out;
  if (!inbox_.empty()) inbox_.take(own_, pids(), out);
  answer(std::move(out));
  reset_turn();
  return false;
}

void Subscriber::on_listened() {
  if (step_ == Step::Subscribing && client_.server_) mark();
}

void Subscriber::mark() {
  step_ = Step::Marking;
  marked_ = false;
  reached_ = !listener_.has_server();
  told_ok_ = true;
  ServerConnection& server = *client_.server_;
  end_ = listener_.expect(*this);
  const bool listens_there = rows_.has_value();
  server.tell_listening(listens_there ? "LISTEN " + listener_.marker_channel() + ";" + notify_sql(end_) : notify_sql(end_));
  if (listens_there) server.tell_listening("UNLISTEN *");
}

void Subscriber::advance() {
  if (step_ == Step::Materialising) {
    step_ = Step::None;
    if (!told_ok_) return client_.fatal("58000", "could not listen on this client's channels on another server connection");
    real_ = Real::Yes;
    client_.worker_.run_later(client_);
  } else if (step_ == Step::Marking) {
    marked_ = true;
    if (!told_ok_) {
      std::string warning;
      protocol::write_warning(warning, "01000", "notifications may have been lost: the server refused to notify");
      inbox_.insert(std::move(warning));
      reached_ = true;
    }
    finish_if_done();
  }
}

void Subscriber::on_marker(std::uint64_t marker) {
  inbox_.mark_listener(marker);
  if (step_ != Step::Marking || marker != end_) return;
  reached_ = true;
  finish_if_done();
}

void Subscriber::finish_if_done() {
  if (step_ == Step::Marking && marked_ && reached_) finish();
}

protocol::HandOver Subscriber::hand_over() {
  protocol::HandOver h;
  h.begin = begin_;
  h.own = own_;
  h.end = end_;
  h.before = channels_;
  if (rows_) h.now = *std::exchange(rows_, std::nullopt);
  return h;
}

void Subscriber::finish() {
  const auto alive = client_.shared_from_this();
  if (real_ == Real::InTransaction && rows_ && rows_->empty() && deaf_ && !inbox_.marked_by_listener(begin_))
    return client_.fatal("58000", "whether this client's LISTEN or UNLISTEN was committed isn't known",
                         "The connection that listens for it was lost during the transaction. Connect and LISTEN again.");
  std::string out;
  become(inbox_.settle(hand_over(), pids(), out));
  answer(std::move(out));
  reset_turn();
  client_.worker_.run_later(client_);
  client_.on_server_ready();  // may end this
}

void Subscriber::adopted() {
  const auto alive = client_.shared_from_this();
  std::string out;
  const protocol::Inbox::Pids ids = pids();
  become(inbox_.settle(hand_over(), ids, out));
  listener_.listen(channels_, *this);
  ServerConnection* server = client_.surrender();
  answer(std::move(out));
  reset_turn();
  listener_.adopt(*server);
  client_.worker_.run_later(client_);
  if (client_.draining_) client_.fatal("57P01", "terminating connection due to administrator command");
}

void Subscriber::become(Channels channels) {
  channels.swap(channels_);
  for (const std::string& gone : channels)
    if (!channels_.contains(gone)) listener_.unsubscribe(gone, *this);
}

void Subscriber::answer(std::string bytes) {
  const bool ready = std::exchange(ready_held_, false);
  if (bytes.empty() && !ready) return;
  const Worker::Visit visit(client_.worker_, &client_);
  client_.worker_.to_client.own([&](std::string& out) {
    out += bytes;
    if (ready) protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  });
  client_.send(client_.worker_.to_client);
}

void Subscriber::reset_turn() {
  if (rows_)  // not handed over
    for (const std::string& channel : *rows_)
      if (!channels_.contains(channel)) listener_.unsubscribe(channel, *this);
  for (const std::uint64_t marker : {begin_, own_, end_}) listener_.forget(marker);
  begin_ = own_ = end_ = 0;
  step_ = Step::None;
  real_ = Real::No;
  rows_.reset();
  fence_ = unsure_ = marked_ = reached_ = deaf_ = false;
}

void Subscriber::on_server_lost() {
  ready_held_ = waiting_ = waits_for_listener_ = false;
  reset_turn();
}

void Subscriber::on_notification(const Notification& notification) {
  // Before the marker the leased connection delivers those that are new.
  if (!channels_.contains(notification.channel) && !(reached_ && rows_ && rows_->contains(notification.channel))) return;
  ++client_.entry_->pool.counters().notifications;
  inbox_.from_listener(notification);
  deliver_if_idle();
  check_bound();
}

void Subscriber::on_listener_gone() {
  deaf_ |= begin_ != 0;
  if (step_ == Step::Marking) {
    reached_ = true;
    return finish_if_done();
  }
  if (stop_waiting()) client_.worker_.run_later(client_);
  if (step_ != Step::Subscribing) return;
  step_ = Step::None;
  client_.on_server_ready();  // begins anew, maybe as the listener
}

void Subscriber::on_listener_up(bool lost, bool listened) {
  if (lost && listens()) {
    std::string warning;
    protocol::write_warning(warning, "01000", "notifications may have been lost: the connection that listens for this client was lost",
                            "It listens again since.");
    inbox_.insert(std::move(warning));
    deliver_if_idle();
  }
  if (waits_for_listener_ && stop_waiting()) client_.worker_.run_later(client_);
  if (listened) on_listened();
}

bool Subscriber::idle() const {
  if (step_ != Step::None || real_ != Real::No || client_.lost_ || client_.discarding_) return false;
  if (client_.state_ == ClientSession::State::Ready) return true;
  return client_.state_ == ClientSession::State::Active && client_.server_ && !client_.server_->asking_residue() &&
         client_.pass_left_ == 0 && client_.server_->pipeline.releasable();
}

void Subscriber::deliver_if_idle() {
  if (inbox_.empty() || !idle()) return;
  std::string out;
  inbox_.take(own_, pids(), out);
  answer(std::move(out));
}

void Subscriber::check_bound() {
  if (overflowed_ || inbox_.bytes() + client_.queued() <= kMaxKept) return;
  overflowed_ = true;
  ++client_.entry_->pool.counters().notificationOverflows;
  boost::asio::post(client_.worker_.loop(), [client = client_.shared_from_this()] {
    client->fatal("53400", "too many notifications are waiting for this client",
                  "They are kept while it is in a transaction or doesn't read, up to 1 MB.");
  });
}

protocol::Inbox::Pids Subscriber::pids() const {
  return {client_.server_ ? client_.server_->pid() : 0, client_.id()};
}

// --- the client session's part

bool ClientSession::keeps_ready() {
  const conf::PoolSettings& policy = entry_->pool.settings();
  if (!rewrites() || policy.residueCheck == conf::ResidueCheck::Never) return false;
  if (server_->pipeline.releasable()) {
    if (!subscriber_ && entry_->listener.usable()) subscriber_ = std::make_unique<Subscriber>(*this, entry_->listener);
    if (subscriber_ && subscriber_->holds_ready(residue_)) return true;
  }
  if (subscriber_) worker_.to_client.own([this](std::string& out) { subscriber_->flush(out); });
  return false;
}

bool ClientSession::take_channels(std::optional<Channels> channels) {
  if (!subscriber_ && (!channels || channels->empty())) return true;
  if (channels && !channels->empty() && !can_share(*channels)) {
    if (subscriber_) subscriber_->on_channels({});
    return false;
  }
  if (!subscriber_) subscriber_ = std::make_unique<Subscriber>(*this, entry_->listener);
  subscriber_->on_channels(std::move(channels));
  return true;
}

bool ClientSession::can_share(const Channels& channels) const {
  if (!entry_->listener.usable() || !entry_->listener.has_room(channels)) return false;
  // The listener gets all payloads in the encoding of its own session.
  const auto& usual = entry_->settings.intern({})->welcome;
  const auto& own = server_->parameters();
  const auto listeners = usual.find("client_encoding"), clients = own.find("client_encoding");
  return listeners == usual.end() || clients == own.end() || listeners->second == clients->second;
}

void ClientSession::on_notification(const Notification& notification) {
  if (state_ != State::Active) return;
  if (subscriber_) return subscriber_->on_leased(notification);
  Notification told = notification;
  if (rewrites() && told.pid == server_->pid()) told.pid = id_;
  worker_.to_client.own([&](std::string& out) { protocol::write_notification(out, told); });
}

}  // namespace pgsidecar::proxy
