#include "proxy/server_connection.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <cassert>
#include <cerrno>

#include "proxy/client_session.hpp"
#include "proxy/log.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::Backend;
using protocol::Bytes;
using protocol::kHeaderSize;
using protocol::Owed;
using protocol::Request;
using protocol::TxStatus;
using protocol::Verdict;

namespace {

constexpr std::size_t kMaxParsed = 1u << 20;                         // of a message of the server that is looked into
constexpr auto kSoon = std::chrono::milliseconds(100);               // in which a survey is answered
constexpr auto kBetweenStatements = std::chrono::milliseconds(100);  // a server that has answered one may ignore a cancel request
constexpr auto kEnd = std::chrono::seconds(5);                       // in which a server that is well has ended
constexpr auto kLastWait = std::chrono::minutes(3);                  // for a server's end that is overdue
constexpr auto kUnused = std::chrono::seconds(2);                    // a connection that ends so early was of no use to anybody

/// Messages that are looked into and so wanted whole.
bool wanted_whole(Backend type) {
  switch (type) {
    case Backend::ReadyForQuery:
    case Backend::ErrorResponse:
    case Backend::NoticeResponse:
    case Backend::ParameterStatus:
    case Backend::CommandComplete:
    case Backend::NotificationResponse: return true;
    default: return false;
  }
}

/// What a server may say at any time. PostgreSQL documentation, section 55.2.7.
bool is_asynchronous(Backend type) {
  return type == Backend::ParameterStatus || type == Backend::NoticeResponse || type == Backend::NotificationResponse;
}

/// Rows, or what describes them.
bool is_of_rows(std::uint8_t type) {
  return type == static_cast<std::uint8_t>(Backend::DataRow) || type == static_cast<std::uint8_t>(Backend::CopyData) ||
         type == static_cast<std::uint8_t>(Backend::RowDescription);
}

bool is_error(Bytes message, std::string_view sqlstate) {
  const auto fields = protocol::parse_error(message.subspan(kHeaderSize));
  return fields && fields->sqlstate == sqlstate;
}

}  // namespace

ServerConnection::ServerConnection(Worker& worker, PoolEntry& entry, std::uint64_t id)
    : worker_(worker), entry_(entry), keeps_entry_(entry.shared_from_this()), id_(id), permit_(entry.pool.permits()) {}

void ServerConnection::transition(State next) {
  state_ = next;
  if (!alive() && std::exchange(listener_, false)) entry_.listener.on_gone();
}

bool ServerConnection::returns_soon(pool::Time now) const {
  return state_ == State::Resetting && !condemned && now - surveyed_since_ < kSoon;
}

// --- reading and writing

void ServerConnection::wait_readable() {
  if (readiness_.pending() || state_ == State::Closed) return;
  const bool for_end = !answered_ || !alive();
  channel_->transport.wait_readable(for_end, readiness_);
  if (channel_->transport.may_miss()) worker_.arm_tick(kLook);
}

void ServerConnection::on_readiness(const boost::system::error_code& ec) {
  if (!ec) worker_.step(*this, [this] { on_readable(); });
}

void ServerConnection::on_readable() {
  if (state_ == State::Closed) return;
  for (int round = 0; round < 4; ++round) {
    paused_ = client_ && client_->queued() > kHighMark;
    if (paused_) return;  // resumed when the client has read, or has gone
    const IoResult got = channel_->transport.read(worker_.scratch());
    if (got.status == IoStatus::WouldBlock) break;
    if (got.status != IoStatus::Ok) {
      if (state_ == State::Closing) return closed();
      if (farewell_) return lost(farewell_->sqlstate, farewell_->message, true);
      return lost("08006", "server closed the connection unexpectedly", true);
    }
    if (state_ == State::Closing) continue;
    entry_.pool.counters().serverBytesReceived += got.bytes;
    const Bytes fresh(worker_.scratch().data(), got.bytes);
    if (channel_->unread.empty()) {
      channel_->keep(fresh, process(fresh));
    } else {
      channel_->unread.append(reinterpret_cast<const char*>(fresh.data()), fresh.size());
      const Bytes all(reinterpret_cast<const std::uint8_t*>(channel_->unread.data()), channel_->unread.size());
      channel_->keep(all, process(all));
    }
    if (state_ == State::Closed) return;
    if (got.bytes < worker_.scratch().size() && !channel_->transport.pending()) break;
  }
  if (channel_->transport.pending()) return read_soon();
  wait_readable();
}

void ServerConnection::read_soon() {
  boost::asio::post(worker_.loop(), [self = shared_from_this()] { self->worker_.step(*self, [&self] { self->on_readable(); }); });
}

bool ServerConnection::look() {
  if (!channel_) return false;
  if (channel_->transport.has_missed()) read_soon();
  return channel_->transport.may_miss();
}

void ServerConnection::resume_reading() {
  if (alive() && !readiness_.pending())
    boost::asio::post(worker_.loop(), [self = shared_from_this()] {
      if (self->alive() && !self->readiness_.pending()) self->worker_.step(*self, [&self] { self->on_readable(); });
    });
}

void ServerConnection::send(Gather& gather) {
  if (gather.empty()) return;
  if (!alive()) return gather.clear();
  entry_.pool.counters().serverBytesSent += gather.size();
  if (!channel_->send(gather, worker_.tls_scratch())) return read_soon();  // what the server said before it went
  if (channel_->queued() > 0) wait_writable();
}

void ServerConnection::wait_writable() {
  if (channel_->writing || state_ == State::Closed) return;
  channel_->writing = true;
  channel_->transport.wait_writable([self = shared_from_this()](const boost::system::error_code& ec) {
    self->channel_->writing = false;
    if (!ec) self->worker_.step(*self, [&self] { self->on_writable(); });
  });
}

void ServerConnection::on_writable() {
  if (!alive()) return;
  if (!channel_->flush(worker_.tls_scratch())) return read_soon();
  if (channel_->queued() > 0) return wait_writable();
  if (client_)
    client_->resume_reading();
  else
    settle();
}

std::size_t ServerConnection::process(Bytes in) {
  const Worker::Visit visit(worker_, client_);
  assert(worker_.to_server.empty() && worker_.to_client.empty());
  std::size_t at = 0;
  Gather& out = worker_.to_client;
  ClientSession* const reader = client_;  // closed or not, it lives until this turn is over (Worker::on_client_closed)
  bool ready = false;
  answered_ = false;
  while (at < in.size() && alive()) {
    const Bytes left = in.subspan(at);
    if (pass_left_ > 0) [[unlikely]] {
      const std::size_t n = std::min(pass_left_, left.size());
      if (pass_forward_ && client_) out.add(left.data(), n);
      pass_left_ -= n;
      at += n;
      if (pass_left_ > 0 || !pipeline.injects()) continue;
      inject();
      if (client_ && client_->waits_for_answers()) client_->on_maybe_answered();
      continue;
    }
    if (const std::size_t rows = is_of_rows(left[0]) ? pass_rows(left) : 0) {
      at += rows;
      continue;
    }
    if (left.size() < kHeaderSize) break;
    const std::uint32_t length = protocol::load_u32(left.data() + 1);
    const std::size_t total = std::size_t{length} + 1;
    if (length < 4 || length > protocol::kMaxMessageSize) {
      lost("08P01", "invalid message length from the server");
      break;
    }
    const auto type = static_cast<Backend>(left[0]);
    if (left.size() < total && total <= kMaxParsed && (wanted_whole(type) || looks_into())) break;
    const Bytes available = left.first(std::min(total, left.size()));
    if (!(is_asynchronous(type) ? on_asynchronous(type, available, total) : on_reply(type, available, total))) {
      if (alive()) lost("08P01", "unexpected message from the server");
      break;
    }
    at += available.size();
    answered_ = type == Backend::ReadyForQuery;
    ready |= answered_;
  }
  answered_ &= at == in.size();
  if (reader && reader->server() == this) [[likely]]
    reader->send(out);
  else
    out.clear();
  if (alive()) [[likely]] {
    send(worker_.to_server);
    if (std::exchange(in_refused_block_, false) && client_) [[unlikely]]
      client_->fatal("0A000", "transaction blocks are not allowed in statement mode (pool.mode)");
    if (ready && client_ && client_->is_sending()) [[unlikely]]
      client_->ready_later();
    else if (ready)
      on_ready();
  } else {
    worker_.to_server.clear();
  }
  return at;
}

/// What the server answers now.
bool ServerConnection::looks_into() const {
  const Owed* front = pipeline.front();
  return front && (front->owner == protocol::kProxy || (front->request == Request::Describe && front->note != 0));
}

void ServerConnection::on_ready() {
  if (pipeline.releasable()) {
    if (client_)
      client_->on_server_ready();
    else
      settle();
  } else if (client_ && client_->subscriber() && pipeline.empty()) {
    client_->subscriber()->on_answered();
  }
}

void ServerConnection::send_held_sync(protocol::OwnerId owner) {
  if (pipeline.take_held_sync()) sync(Verdict::Forward, owner);
}

void ServerConnection::sync(Verdict verdict, protocol::OwnerId owner, std::uint64_t note) {
  worker_.to_server.own([](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Sync).end(); });
  pipeline.push({Request::Sync, verdict, owner, note});
}

void ServerConnection::flush() {
  worker_.to_server.own([](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Flush).end(); });
}

std::size_t ServerConnection::pass_rows(Bytes in) {
  const Owed* front = pipeline.front();
  if (!client_ || !front || front->owner != client_->id() || front->verdict != Verdict::Forward) return 0;
  if (front->request != Request::Query && front->request != Request::Execute) return 0;
  std::size_t at = 0;
  while (in.size() - at >= kHeaderSize && pass_left_ == 0) {
    if (!is_of_rows(in[at])) break;
    const std::uint32_t length = protocol::load_u32(in.data() + at + 1);
    if (length < 4 || length > protocol::kMaxMessageSize) break;
    const std::size_t available = std::min(std::size_t{length} + 1, in.size() - at);
    pass_left_ = length + 1 - available;
    running.bytes += length + 1;
    at += available;
  }
  if (at == 0) return 0;
  worker_.to_client.add(in.data(), at);
  pass_forward_ = true;
  answered_ = false;
  farewell_.reset();
  return at;
}

bool ServerConnection::on_asynchronous(Backend type, Bytes available, std::size_t total) {
  const Owed* front = pipeline.front();
  const bool restoring = front && front->owner == protocol::kProxy && front->note == kRestore;
  const bool to_client = client_ && (!front || front->owner == client_->id() || restoring);
  const Bytes body = available.subspan(kHeaderSize);
  if (type == Backend::NotificationResponse) return on_notification(body);
  if (type == Backend::ParameterStatus && !on_parameter(body)) return false;
  // Told to quit at once (SIGQUIT), a server process can say so in a warning alone.
  if (type == Backend::NoticeResponse && available.size() == total) on_notice(body);
  const bool heard = type == Backend::ParameterStatus || !restoring;
  pass(to_client && heard && client_->state() != ClientSession::State::Greeting, available, total);
  return true;
}

void ServerConnection::pass(bool forward, Bytes available, std::size_t total) {
  if (forward) worker_.to_client.add(available.data(), available.size());
  pass_left_ = total - available.size();
  pass_forward_ = forward;
}

bool ServerConnection::on_parameter(Bytes body) {
  protocol::Reader reader(body);
  const std::string_view name = reader.cstring();
  const std::string_view value = reader.cstring();
  if (!reader.ok()) return false;
  parameters_[std::string(name)] = value;
  told_ = true;
  fingerprint_ = 0;
  if (name == "standard_conforming_strings") conforming_strings_ = value != "off";
  if (name == "in_hot_standby") on_role_changed();
  return true;
}

void ServerConnection::on_notice(Bytes body) {
  farewell_ = protocol::parse_error(body);
  if (farewell_ && !farewell_->sqlstate.starts_with("57P")) farewell_.reset();
}

bool ServerConnection::on_notification(Bytes body) {
  const auto notification = protocol::parse_notification(body);
  if (!notification) return false;
  if (listener_)
    entry_.listener.on_notification(*notification);
  else if (client_)
    client_->on_notification(*notification);
  return true;
}

// What an error says of the connection and of what is prepared on it, whoever it is for. False: it isn't one.
bool ServerConnection::on_error(Bytes body) {
  const auto error = protocol::parse_error(body);
  if (!error) return false;
  if (error->sqlstate == "25006") on_write_refused();
  // Whoever parses the same text anew must get a new plan, as on a connection of its own, and so must who never relied on the old one.
  if (const Owed* front = pipeline.front();
      front && error->sqlstate == "0A000" && (front->request == Request::Bind || front->request == Request::Describe))
    if (const auto statement = statements.find(front->note)) {
      worker_.statements.retire(*statement);
      drop_statement(statement->id);
    }
  // Code of a client's has deallocated it.
  if (const Owed* front = pipeline.front(); front && error->sqlstate == "26000" && front->note != 0 && statements.find(front->note))
    drop_statement(front->note);
  if (error->severity != "FATAL" && error->severity != "PANIC" && !pipeline.empty()) return true;
  // Of what its client has sent in COPY mode, whose rest the server can't make out.
  if (error->sqlstate == "08P01" && client_) client_->fatal(error->sqlstate, error->message);
  lost(error->sqlstate, error->message);
  return true;
}

// Of the client's own request: whether the server's error goes on as it is, with nothing else in its place.
bool ServerConnection::passes_error(const Owed& owed, Bytes available, bool whole) {
  sends_temporary = false;
  own_open_temporary_ &= pipeline.status() != TxStatus::Idle;
  bool as_it_is = false;
  if (whole && owed.request == Request::Parse && client_->pending_parse_error()) {
    rename_error(available, *client_->pending_parse_error());
  } else if (const std::string* name = whole && owed.request == Request::Bind ? client_->name_of(owed.note) : nullptr) {
    rename_error(available, *name);
  } else if (running.overdue && is_error(available, "57014")) {
    client_->tell_query_timeout();
  } else if (!unadopted_.empty() && is_error(available, "26000")) {  // the server would have looked at the statement itself
    count_told({reinterpret_cast<const std::uint8_t*>(unadopted_.data()), unadopted_.size()});
    worker_.to_client.own([this](std::string& out) { out += unadopted_; });
  } else if (owed.note == kRaised) {
    tell_raised(available);
  } else {
    as_it_is = true;
    count_told(available);
  }
  client_->forget_pending_parse_error();
  return as_it_is;
}

void ServerConnection::on_tag(std::string_view tag) {
  if (client_->subscriber()) client_->subscriber()->on_tag(tag);
  if (client_->made_temporary() || own_open_temporary_ || sends_temporary) note_temporary(tag);
  open_definition_ |= changed_.defined;
  open_change_ |= open_definition_ || client_->redefines();
  const bool counts_rows = !tag.empty() && tag.back() >= '0' && tag.back() <= '9';
  if (!counts_rows) on_utility(tag);
}

void ServerConnection::on_utility(std::string_view tag) {
  if (tag == "DEALLOCATE") client_->on_deallocated();
  if (tag == "DISCARD PLANS") on_plans_discarded();
  if (tag == "DISCARD ALL" || tag == "DEALLOCATE ALL") client_->on_statements_gone();
  open_definition_ |= changes_catalog(tag) || (tag == "COMMIT PREPARED" && worker_.changes_prepared);
  open_change_ |= open_definition_;
  worker_.changes_prepared |= tag == "PREPARE TRANSACTION" && open_change_;
}

bool ServerConnection::on_reply(Backend type, Bytes available, std::size_t total) {
  farewell_.reset();
  const bool whole = available.size() == total;
  if (type == Backend::ErrorResponse && whole) [[unlikely]] {
    if (!on_error(available.subspan(kHeaderSize))) return false;
    if (!alive()) return true;
  }
  const TxStatus before = pipeline.status();
  const TxStatus status = type == Backend::ReadyForQuery && total == 6 ? static_cast<TxStatus>(available[5]) : TxStatus::Idle;
  bool skipped = false;  // all behind the first
  const auto reply = pipeline.receive(type, status, [&](const Owed& owed) { on_dropped(owed, std::exchange(skipped, true)); });
  if (!reply) return false;
  const Owed& owed = reply->owed;
  const bool ours = client_ && owed.owner == client_->id();
  bool forward = ours && owed.verdict == Verdict::Forward;
  if (forward) running.bytes += total;
  if (type == Backend::ReadyForQuery) forward = on_ready_for_query(before, owed);
  if (owed.request == Request::Describe && owed.note != 0) on_described(type, owed, available, total);
  if (owed.owner == protocol::kProxy) [[unlikely]] {
    on_proxy_reply(type, owed.note, available);
    cancel_due_ &= client_ && !pipeline.empty();
    if (cancel_due_) {
      deadline = worker_.now() + kBetweenStatements;
      worker_.kick();
    }
  } else if (type == Backend::ErrorResponse) [[unlikely]] {
    if (ours) note_error(owed, available, total);
    forward = ours && passes_error(owed, available, whole);  // one that isn't whole is too long for a name to be put back in
    if (!ours || !client_->is_sending()) send_held_sync(owed.owner);
  } else if (type == Backend::ParseComplete) {
    const auto* const held = owed.note != 0 && client_ ? statements.look_up(owed.note) : nullptr;
    if (held) held->statement->proven_with = client_->settings->number, held->statement->proven_in = worker_.statements.generation();
    if (forward) client_->on_name_done(true);
  } else if (type == Backend::CloseComplete) {
    if (ours && owed.verdict != Verdict::Skip && owed.note == kOfStatement) client_->on_name_done(true);
  } else if (forward && type == Backend::CommandComplete) {
    const std::string_view tag = protocol::Reader(available.subspan(kHeaderSize)).cstring();
    note_end(owed, tag);
    on_tag(tag);
  } else if (forward && (type == Backend::EmptyQueryResponse || type == Backend::PortalSuspended)) [[unlikely]] {
    note_end(owed, {});
  }
  pass(forward, available, total);
  if (pipeline.injects()) [[unlikely]]
    inject();
  if (!client_) return true;
  if (client_->waits_for_answers()) [[unlikely]]
    client_->on_maybe_answered();
  if (client_ && pipeline.empty() && pipeline.unsynced()) [[unlikely]]
    client_->on_flushed();
  if (client_ && pipeline.copy_interrupted()) [[unlikely]]
    client_->end_interrupted_copy();
  return true;
}

/// `before`: as the one before it said. True: the client hears of it, and not later.
bool ServerConnection::on_ready_for_query(TxStatus before, const Owed& owed) {
  const TxStatus status = pipeline.status();
  const bool ours = client_ && owed.owner == client_->id();
  const bool asked = ours && owed.verdict == Verdict::Forward, told = asked && !owed.ready_behind;
  if (status == TxStatus::Idle) [[likely]] {
    // Who prepares a text anew must get a new plan: it may have other columns, and its names may be of something else.
    if (std::exchange(open_change_, false)) worker_.statements.begin_generation();
    if (std::exchange(open_definition_, false)) on_catalog_changed();
    own_temporary_ |= std::exchange(own_open_temporary_, false) && before == TxStatus::Idle;  // else its COMMIT has failed
  }
  if (!ours) [[unlikely]]
    return false;
  if (asked && owed.request == Request::Query) finish_execution(owed.note == kRaised ? pool::kNoStatement : owed.note);
  cancel_due_ = false;
  unadopted_.clear();
  client_->on_answered(told);
  if ((changed_.block | changed_.commit) != 0) [[unlikely]]
    for (std::uint64_t* unknown : {&changed_.block, &changed_.commit})
      if (client_->readies_told() >= *unknown || client_->answered()) *unknown = 0;
  if (!told) return false;
  // What the client brought at its login comes back first, so that its next statement isn't in the way of the look at its session.
  const Owed* next = pipeline.front();
  restoring_ = next && next->owner == protocol::kProxy && next->note == kRestore;
  in_refused_block_ |= status != TxStatus::Idle && client_->mode() == conf::PoolMode::Statement;
  return !restoring_ && !in_refused_block_ && (status != TxStatus::Idle || !client_->keeps_ready_back());
}

void ServerConnection::describe(std::uint64_t id) {
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer(out).begin(protocol::Frontend::Describe).u8('S').cstring(protocol::server_name(id)).end();
  });
  pipeline.push({Request::Describe, Verdict::Skip, client_->id(), id});
}

void ServerConnection::ask_shape(const protocol::Statement& statement, bool first) {
  describe(statement.id);
  flush();
  asked_ = statement.id;
  awaiting_shape_ = true;
  shape_first_ = first;
}

void ServerConnection::on_described(Backend type, const Owed& owed, Bytes available, std::size_t total) {
  if (type == Backend::ParameterDescription) {
    shape_ = 0;
    types_.clear();
    if (available.size() < total) return;
    shape_ = protocol::shape_of(type, available.subspan(kHeaderSize), 0);
    protocol::Reader reader(available.subspan(kHeaderSize));
    for (std::size_t left = reader.u16(); left > 0 && reader.ok(); --left) types_.push_back(reader.u32());
    return;
  }
  if (type != Backend::RowDescription && type != Backend::NoData) return;
  if (available.size() < total) shape_ = 0;  // too long to be looked at
  if (shape_ != 0) shape_ = protocol::shape_of(type, available.subspan(kHeaderSize), shape_);
  auto* const held = statements.look_up(owed.note);
  if (held) held->shape = shape_;
  const auto& statement = held ? held->statement : statements.unnamed;
  if (statement && statement->id == owed.note && shape_ != 0 && !types_.empty()) worker_.statements.note_told(*statement, shape_, types_);
  if (awaiting_shape_ && owed.verdict == Verdict::Skip && owed.note == asked_)
    stop_awaiting_shape();
  else if (client_ && client_->id() == owed.owner)
    client_->statements.set_shape(owed.note, shape_);
}

void ServerConnection::stop_awaiting_shape() {
  if (std::exchange(awaiting_shape_, false) && client_) worker_.run_later(*client_);
}

void ServerConnection::inject() {
  if (pass_left_ > 0) return;  // not in the middle of a message of the server's
  while (const auto owed = pipeline.take_injection()) {
    const bool ours = client_ && owed->owner == client_->id();
    if (!ours) continue;
    if (owed->request == Request::Parse || owed->note == kOfStatement) client_->on_name_done(true);
    const auto type = owed->request == Request::Parse ? Backend::ParseComplete : Backend::CloseComplete;
    worker_.to_client.own([type](std::string& out) { protocol::Writer(out).begin(type).end(); });
  }
}

void ServerConnection::on_dropped(const Owed& owed, bool skipped) {
  adoption_skipped_ |= owed.owner == protocol::kProxy && owed.note == kAdopt;
  if (owed.owner == protocol::kProxy) return;
  const bool ours = client_ && owed.owner == client_->id();
  if (owed.request == Request::Close) {
    if (owed.verdict == Verdict::Skip && owed.note != 0)
      unclosed_.insert(owed.note);
    else if (owed.note == kOfStatement && ours)
      client_->on_name_done(false);
  }
  if (owed.request == Request::Describe && owed.verdict == Verdict::Skip && ours) {
    asked_ = 0;
    stop_awaiting_shape();
  }
  if (owed.request != Request::Parse) return;
  if (owed.verdict == Verdict::Inject) {
    if (ours) client_->on_name_done(false);
    return;
  }
  if (owed.note != 0) {
    // A Parse of a name that exists already has failed because of that; what it named stays.
    const bool duplicate = ours && owed.verdict == Verdict::Forward && client_->pending_is_duplicate();
    if (!duplicate) statements.erase(owed.note);
  } else if (owed.verdict == Verdict::Skip) {
    statements.unnamed.reset();
    adoption_skipped_ |= ours;
  }
  if (owed.verdict == Verdict::Forward && ours) client_->on_name_done(false, skipped);
}

void ServerConnection::count_told(Bytes error) {
  if (const auto fields = protocol::parse_error(error.subspan(kHeaderSize))) worker_.count_error(fields->sqlstate);
}

// The server knows a client's statement under the proxy's name for it; in its error the client's own name belongs.
void ServerConnection::rename_error(Bytes whole, const std::string& name) {
  const Bytes body = whole.subspan(kHeaderSize);
  count_told(whole);
  auto error = protocol::parse_error(body);
  const std::size_t open = error ? error->message.find("\"pgsidecar_") : std::string::npos;
  if (open == std::string::npos) return worker_.to_client.add(whole.data(), whole.size());
  const std::size_t shut = error->message.find('"', open + 1);
  error->message.replace(open, shut == std::string::npos ? std::string::npos : shut + 1 - open, "\"" + name + "\"");
  worker_.to_client.own([&](std::string& out) { protocol::write_error_with(out, body, error->message); });
}

// --- leases

void ServerConnection::lease(ClientSession& client) {
  transition(State::Leased);
  entry_.pool.lease(*this);
  client_ = &client;
  leased_anew_ = true;
  cancel_due_ = awaiting_shape_ = restoring_ = reset_unread_ = adoption_skipped_ = false;
  open_definition_ = open_change_ = false;
  asked_ = 0;
  unknown_calls.clear();
  unknown_names.clear();
  unknown_residue_ = 0;
  sequences_touched = false;
  forget_changed();
  suspect.clear();
  unadopted_.clear();
  running.first = running.last = running.named = running.portal = 0;
  running.portals.clear();
  running.untold = 0;
  running.reset.reset();
  running.effects = running.named_effects = 0;
  own_temporary_ = own_open_temporary_ = sends_temporary = false;
  running.leaking = running.overdue = false;
  worker_.arm_tick(entry_.pool.limit_check());
  client.on_lease(*this);
}

ClientSession* ServerConnection::let_go() {
  if (client_ && client_->is_sending()) cut_off_ = true;
  if (std::exchange(paused_, false)) resume_reading();
  return std::exchange(client_, nullptr);
}

void ServerConnection::detach(bool dirty, bool finish) {
  const ClientSession* client = let_go();
  if (pipeline.injects()) inject();  // what the client isn't told any more
  asking_residue_ = awaiting_shape_ = cancel_due_ = false;
  others_had_temporary_ |= had_temporary_;
  plans_stale |= std::exchange(had_temporary_, false);
  pass_forward_ = false;
  if (!alive()) return;
  if (dirty) return start_reset(finish, client && client->mode() == conf::PoolMode::Session);
  if (!adopted_.empty()) {
    const Worker::Aside aside(worker_, *this);
    close_adopted();
  }
  settle();
}

void ServerConnection::start_reset(bool finish, bool asks_temporary) {
  transition(State::Resetting);
  ++entry_.pool.counters().resets;
  if (pipeline.copy_in()) return close(pool::CloseReason::Broken);
  deadline = finish ? pool::Time::max() : worker_.now() + std::chrono::seconds(1);  // then what is still running is cancelled
  worker_.kick();
  const Worker::Aside aside(worker_, *this);
  if (pipeline.unsynced()) {
    run_within({"ROLLBACK"});  // a Sync alone would commit
    sync(Verdict::Skip, protocol::kProxy);
  }
  ask(kReset, "ROLLBACK");
  ask(kReset, "DISCARD ALL");
  if (asks_temporary) ask(kTemporarySchema, "SELECT pg_catalog.pg_my_temp_schema()");
  forget_statements();
  sequences_dirty = plans_stale = functions_stale = planned_otherwise_ = false;
  planned_.reset();
  changed_ = {};
  settings = entry_.settings.intern({});
}

void ServerConnection::settle() {
  if (!alive() || state_ == State::Idle) return;
  if (client_ || listener_ || !pipeline.releasable() || pass_left_ > 0 || cancels_pending > 0 || channel_->queued() > 0) return;
  deadline = pool::Time::max();
  pool::CloseReason reason{};
  if (!settings) reason = pool::CloseReason::Broken, condemned = true;
  if (settings && std::exchange(told_, false)) entry_.settings.saw_parameters(settings->values, parameters_);
  if (!condemned && catalog_due() && ask_catalog()) {
    if (state_ != State::Resetting) surveyed_since_ = worker_.now();
    transition(State::Resetting);
    deadline = worker_.now() + std::chrono::seconds(5);
    return worker_.kick();
  }
  if (entry_.pool.worn_out(*this, worker_.now(), reason)) {
    if (reason != pool::CloseReason::Surplus) ++entry_.replacements;
    close(reason);
    return worker_.serve(entry_);
  }
  if (uses == 0) worker_.connects_last(entry_);
  overdue_ = 0;
  transition(State::Idle);
  entry_.pool.put_idle(*this, worker_.now());
  worker_.arm_tick(entry_.pool.idle_check());
  worker_.serve(entry_);
}

void ServerConnection::cancel(std::shared_ptr<void> done) {
  const Owed* front = pipeline.front();
  cancel_due_ = front && front->owner == protocol::kProxy;
  if (front && client_ && front->owner == client_->id()) send_cancel(std::move(done));
}

void ServerConnection::settle_after_cancel() {
  if (!client_ && (state_ == State::Leased || state_ == State::Resetting)) settle();
}

void ServerConnection::on_deadline(pool::Time now) {
  if (now < deadline) return;
  if (state_ != State::Resetting && state_ != State::Closing) {
    deadline = pool::Time::max();
    if (cancel_due_) cancel();
    return;
  }
  // A cancel request that comes before its statement is lost.
  if (!pipeline.empty() && ++overdue_ < (state_ == State::Resetting ? 10 : 5)) {
    send_cancel();
    deadline = now + std::chrono::seconds(1);
    return;
  }
  if (state_ != State::Closing) return close(pool::CloseReason::Broken);
  if (permit_.stuck() || !awaited_) return closed();
  permit_.stick();
  deadline = now + kLastWait;
  log::warn("server_stuck", about(), "server {} ({}@{}, pid {}): the server doesn't end it; until it does it counts for pool.max", id_,
            entry_.user, entry_.database, pid_);
}

// --- the end

log::About ServerConnection::about(std::string_view sqlstate) const {
  log::About about = client_ ? client_->about() : entry_.about();
  about.server = id_;
  about.pid = pid_;
  about.sqlstate = sqlstate;
  return about;
}

void ServerConnection::lost(const std::string& sqlstate, const std::string& reason, bool ended) {
  if (!alive()) return;
  const auto self = shared_from_this();
  const bool in_transaction = pipeline.status() != TxStatus::Idle;
  entry_.losing_until = worker_.now() + std::chrono::seconds(1);
  log::info("server_lost", about(sqlstate), "server {} ({}@{}, pid {}): lost: {} {}", id_, entry_.user, entry_.database, pid_, sqlstate,
            reason);
  if (state_ == State::Idle && sqlstate.starts_with("57P")) worker_.saw_suspend(entry_);
  unlink();
  transition(State::Closing);
  deadline = worker_.now() + kEnd;
  ++entry_.pool.counters()
        .closed[static_cast<std::size_t>(sqlstate.starts_with("57P") ? pool::CloseReason::AdminShutdown : pool::CloseReason::Error)];
  if (ClientSession* client = let_go()) {
    client->send(worker_.to_client);
    if (pass_left_ > 0 && pass_forward_) {
      // Half a message is on its way: an error behind it would be read as its rest.
      log::info("client_closed", client->about(), "client {}: closed, since its answer ended in the middle of a message", client->id());
      client->close();
    } else {
      client->on_server_lost(sqlstate, reason, in_transaction);
    }
  }
  if (uses == 0 && worker_.now() - connected < kUnused && !sqlstate.starts_with("57P"))
    worker_.lost_unused(*this, {"FATAL", sqlstate, reason, {}, {}});
  if (ended) return closed();
  await_end();
}

void ServerConnection::close_by_operator() {
  const auto self = shared_from_this();
  if (state_ == State::Connecting) {  // closed when it is open
    condemned = true;
    return;
  }
  awaited_ = false;
  if (state_ == State::Closing && permit_.stuck()) return closed();
  if (!alive()) return;
  if (!pipeline.empty()) send_cancel();  // the server counts it until it has noticed
  if (ClientSession* client = let_go()) {
    client->send(worker_.to_client);
    if (pass_left_ > 0 && pass_forward_)
      client->close();  // an error would be read as the rest of a message
    else
      client->on_server_lost("57P01", "terminating connection due to administrator command", pipeline.status() != TxStatus::Idle);
  }
  close(pool::CloseReason::AdminShutdown);
}

void ServerConnection::failed(const std::exception& why) {
  if (client_) return client_->failed(why);
  if (!alive()) return wait_readable();
  log::error("session_failed", about(), "server {} (pid {}): closed: {}", id_, pid_, why.what());
  close_unknown();
}

void ServerConnection::close_unknown() {
  cut_off_ = true;  // for all that is known half a message was sent
  std::string().swap(channel_->unread);
  close(pool::CloseReason::Broken);
}

void ServerConnection::close(pool::CloseReason reason) {
  if (state_ == State::Closed || state_ == State::Closing) return;
  unlink();
  ++entry_.pool.counters().closed[static_cast<std::size_t>(reason)];
  let_go();
  Gather terminate;
  if (channel_->queued() == 0 && !cut_off_) {  // behind half a message it would be read as the rest of that
    terminate.own(protocol::write_terminate);
    channel_->send(terminate, worker_.tls_scratch());
  }
  transition(State::Closing);
  deadline = worker_.now() + (pipeline.empty() || overdue_ > 0 ? kEnd : std::chrono::seconds(1));
  await_end();
}

void ServerConnection::see_off(Channel channel, Target target, bool answered) {
  channel_.emplace(std::move(channel));
  target_ = std::move(target);
  awaited_ = answered;
  transition(State::Closing);
  deadline = worker_.now() + kEnd;
  await_end();
}

// The permit is kept until the server has closed its end: only then it doesn't count this connection any more. That its machine is gone
// TCP tells (pool.keepAlive), so that what takes longer is a server process that hangs.
void ServerConnection::await_end() {
  permit_.leave();
  channel_->transport.shutdown_send();
  worker_.kick();
  wait_readable();
}

void ServerConnection::closed() {
  if (state_ == State::Closed) return;
  transition(State::Closed);
  if (channel_) channel_->transport.close();
  abandon();
  worker_.on_server_closed(*this);
}

void ServerConnection::abandon() {
  unlink();
  permit_.release();
  statements.clear();
  running.reset.reset();
}

}  // namespace pgsidecar::proxy
