#include "proxy/server_connection.hpp"

#include <algorithm>
#include <boost/asio/post.hpp>

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

constexpr std::uint32_t kMaxMessage = 0x40000000;
constexpr std::size_t kMaxParsed = 1u << 20;  // of a message of the server that is looked into
// Notes of the proxy's own queries.
constexpr std::uint32_t kRaised = 0xffffffff;  // of an error that the proxy has the server raise for the client
constexpr std::uint32_t kApply = 1, kResidue = 2, kReset = 3, kRestore = 4, kLearn = 5, kSurvey = 6, kListening = 7;

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

/// After which a text prepared before may have other columns, so that who prepares it anew must get a new plan.
bool changes_results(std::string_view tag) {
  return tag.starts_with("ALTER ") || tag.starts_with("DROP ") || tag == "CREATE VIEW" || tag == "CREATE FUNCTION";
}

/// The columns of a DataRow in text; NULL is empty. False: it isn't one of so many.
template <std::size_t N>
bool read_row(Bytes whole, std::string (&field)[N]) {
  protocol::Reader reader(whole.subspan(kHeaderSize));
  if (reader.u16() != N) return false;
  for (std::string& one : field) {
    const std::uint32_t size = reader.u32();
    if (size == 0xffffffff) continue;
    const Bytes value = reader.bytes(size);
    one.assign(reinterpret_cast<const char*>(value.data()), value.size());
  }
  return reader.done();
}

}  // namespace

ServerConnection::ServerConnection(Worker& worker, PoolEntry& entry, std::uint64_t id)
    : worker_(worker), entry_(entry), id_(id), permit_(entry.pool.permits()) {}

void ServerConnection::transition(State next) {
  state_ = next;
  if (!alive() && std::exchange(listener_, false)) entry_.listener.on_gone();
}

// --- reading and writing

void ServerConnection::wait_readable() {
  if (channel_->reading || state_ == State::Closed) return;
  channel_->reading = true;
  channel_->transport.wait_readable([self = shared_from_this()](const boost::system::error_code& ec) { self->on_readable(ec); });
}

void ServerConnection::on_readable(const boost::system::error_code& ec) {
  channel_->reading = false;
  if (ec || state_ == State::Closed) return;
  const Worker::Turn turn(worker_);
  for (int round = 0; round < 4; ++round) {
    if (client_ && client_->queued() > kHighMark) return;  // resumed when the client has read
    const IoResult got = channel_->transport.read(worker_.scratch());
    if (got.status == IoStatus::WouldBlock) break;
    if (got.status != IoStatus::Ok) {
      if (state_ == State::Closing) return closed();
      return lost("08006", "server closed the connection unexpectedly");
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
  if (channel_->transport.pending()) {
    boost::asio::post(worker_.loop(), [self = shared_from_this()] { self->on_readable({}); });
    return;
  }
  wait_readable();
}

void ServerConnection::resume_reading() {
  if (alive() && !channel_->reading)
    boost::asio::post(worker_.loop(), [self = shared_from_this()] {
      if (self->alive() && !self->channel_->reading) self->on_readable({});
    });
}

void ServerConnection::send(Gather& gather) {
  if (gather.empty()) return;
  if (!alive()) return gather.clear();
  entry_.pool.counters().serverBytesSent += gather.size();
  if (!channel_->send(gather, worker_.tls_scratch())) {
    // What the server said before it went is still to be read; on_readable finds the end.
    boost::asio::post(worker_.loop(), [self = shared_from_this()] {
      if (self->alive() && !self->channel_->reading) self->on_readable({});
    });
    return;
  }
  if (channel_->queued() > 0) wait_writable();
}

void ServerConnection::wait_writable() {
  if (channel_->writing || state_ == State::Closed) return;
  channel_->writing = true;
  channel_->transport.wait_writable([self = shared_from_this()](const boost::system::error_code& ec) {
    Channel& channel = *self->channel_;
    channel.writing = false;
    if (ec || !self->alive()) return;
    if (!channel.flush(self->worker_.tls_scratch())) return self->lost("08006", "server closed the connection unexpectedly");
    if (channel.queued() > 0) return self->wait_writable();
    if (self->client_) self->client_->resume_reading();
  });
}

std::size_t ServerConnection::process(Bytes in) {
  const auto self = shared_from_this();
  std::size_t at = 0;
  Gather& out = worker_.to_client;
  ClientSession* const reader = client_;
  const auto reader_alive = reader ? reader->shared_from_this() : nullptr;
  bool ready = false;
  while (at < in.size() && alive()) {
    const Bytes left = in.subspan(at);
    if (pass_left_ > 0) {
      const std::size_t n = std::min(pass_left_, left.size());
      if (pass_forward_ && client_) out.add(left.data(), n);
      pass_left_ -= n;
      at += n;
      continue;
    }
    if (left.size() < kHeaderSize) break;
    const std::uint32_t length = protocol::load_u32(left.data() + 1);
    const std::size_t total = std::size_t{length} + 1;
    if (length < 4 || length > kMaxMessage) {
      lost("08P01", "invalid message length from the server");
      break;
    }
    const auto type = static_cast<Backend>(left[0]);
    const Owed* front = pipeline.front();
    const bool looked_into = front && (front->owner == protocol::kProxy || (front->request == Request::Describe && front->note != 0));
    const bool whole = (wanted_whole(type) || looked_into) && total <= kMaxParsed;
    if (whole && left.size() < total) break;
    const Bytes available = left.first(std::min(total, left.size()));
    if (!on_frame(type, available, total)) {
      if (alive()) lost("08P01", "unexpected message from the server");
      break;
    }
    at += available.size();
    ready |= type == Backend::ReadyForQuery;
  }
  if (reader && reader->server() == this)
    reader->send(out);
  else
    out.clear();
  if (alive()) {
    send(worker_.to_server);
    if (ready && client_ && pipeline.status() != TxStatus::Idle && entry_.pool.settings().mode == conf::PoolMode::Statement)
      client_->fatal("0A000", "transaction blocks are not allowed in statement mode (pool.mode)");
    if (ready && pipeline.releasable()) {
      if (client_)
        client_->on_server_ready();
      else
        settle();
    } else if (ready && client_ && client_->subscriber() && pipeline.empty()) {
      client_->subscriber()->on_answered();
    }
  }
  return at;
}

bool ServerConnection::on_frame(Backend type, Bytes available, std::size_t total) {
  const Owed* front = pipeline.front();
  const bool restoring = front && front->owner == protocol::kProxy && front->note == kRestore;
  const bool to_client = client_ && (!front || front->owner == client_->id() || restoring);
  const auto pass = [&](bool forward) {
    if (forward) worker_.to_client.add(available.data(), available.size());
    pass_left_ = total - available.size();
    pass_forward_ = forward;
    return true;
  };
  switch (type) {
    case Backend::ParameterStatus: {
      protocol::Reader reader(available.subspan(kHeaderSize));
      const std::string_view name = reader.cstring();
      const std::string_view value = reader.cstring();
      if (!reader.ok()) return false;
      parameters_[std::string(name)] = value;
      if (name == "standard_conforming_strings") conforming_strings_ = value != "off";
      return pass(to_client && client_->state() != ClientSession::State::Greeting);
    }
    case Backend::NoticeResponse: return pass(to_client && client_->state() != ClientSession::State::Greeting);
    case Backend::NotificationResponse: {
      const auto notification = protocol::parse_notification(available.subspan(kHeaderSize));
      if (!notification) return false;
      if (listener_)
        entry_.listener.on_notification(*notification);
      else if (client_)
        client_->on_notification(*notification);
      return true;
    }
    default: return on_reply(type, available, total);
  }
}

bool ServerConnection::on_reply(Backend type, Bytes available, std::size_t total) {
  if (type == Backend::ErrorResponse && available.size() == total) {
    const auto error = protocol::parse_error(available.subspan(kHeaderSize));
    if (!error) return false;
    worker_.count_error(error->sqlstate);
    // Whoever parses the same text anew must get a new plan, as on a connection of its own.
    if (const Owed* front = pipeline.front(); front && front->request == Request::Bind && error->sqlstate == "0A000")
      if (const auto statement = statements.find(front->note)) worker_.statements.retire(*statement);
    if (error->severity == "FATAL" || error->severity == "PANIC" || pipeline.empty()) {
      lost(error->sqlstate, error->message);
      return true;
    }
  }
  const TxStatus status = type == Backend::ReadyForQuery && total == 6 ? static_cast<TxStatus>(available[5]) : TxStatus::Idle;
  const auto reply = pipeline.receive(type, status, [this](const Owed& owed) { on_dropped(owed); });
  if (!reply) return false;
  const Owed& owed = reply->owed;
  const bool ours = client_ && owed.owner == client_->id();
  if (type == Backend::ReadyForQuery && status == TxStatus::Idle && std::exchange(open_definition_, false)) on_catalog_changed();
  if (ours && type == Backend::ReadyForQuery) client_->on_answered();
  bool forward = ours && owed.verdict == Verdict::Forward;
  if (owed.request == Request::Describe && owed.note != 0) on_described(type, owed, available, total);
  if (forward && type == Backend::ReadyForQuery && status == TxStatus::Idle) forward = !client_->keeps_ready_back();
  if (owed.owner == protocol::kProxy) {
    on_proxy_reply(type, owed.note, available);
    if (cancel_due_ && client_) cancel();
  } else if (type == Backend::ErrorResponse) {
    if (ours && owed.request == Request::Parse && client_->pending_parse_error()) {
      forward = false;
      rename_error(available, *client_->pending_parse_error());
    } else if (const std::string* name = ours && owed.request == Request::Bind ? client_->name_of(owed.note) : nullptr) {
      forward = false;
      rename_error(available, *name);
    } else if (ours && owed.note == kRaised) {
      forward = false;
      tell_raised(available);
    } else {
      forward = ours;
    }
    if (ours) client_->forget_pending_parse_error();
    if (pipeline.take_held_sync()) {
      worker_.to_server.own([](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Sync).end(); });
      pipeline.push({Request::Sync, Verdict::Forward, owed.owner});
    }
  } else if (type == Backend::ParseComplete) {
    if (const auto statement = owed.note != 0 && client_ ? statements.find(owed.note) : nullptr)
      statement->proven_with = client_->settings.get();
    if (ours && owed.verdict == Verdict::Forward) client_->on_name_done(true);
  } else if (type == Backend::CloseComplete) {
    if (ours && owed.note == kNamed) client_->on_name_done(true);
  } else if (type == Backend::CommandComplete && ours) {
    protocol::Reader reader(available.subspan(kHeaderSize));
    const std::string_view tag = reader.cstring();
    if (client_->subscriber()) client_->subscriber()->on_tag(tag);
    if (tag == "DISCARD ALL" || tag == "DEALLOCATE ALL") client_->on_statements_gone();
    if (changes_results(tag)) worker_.statements.retire_all();
    plans_stale |= client_->made_temporary() && (tag.starts_with("CREATE ") || tag.starts_with("SELECT "));
    open_definition_ |= changes_catalog(tag);
  }
  if (forward) worker_.to_client.add(available.data(), available.size());
  pass_left_ = total - available.size();
  pass_forward_ = forward;
  inject();
  return true;
}

void ServerConnection::ask_shape(const protocol::Statement& statement) {
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer w(out);
    w.begin(protocol::Frontend::Describe).u8('S').cstring(protocol::server_name(statement.id)).end();
    w.begin(protocol::Frontend::Flush).end();
  });
  pipeline.push({Request::Describe, Verdict::Skip, client_->id(), static_cast<std::uint32_t>(statement.id)});
  awaiting_shape_ = true;
}

void ServerConnection::on_described(Backend type, const Owed& owed, Bytes available, std::size_t total) {
  if (type == Backend::ParameterDescription) {
    shape_ = available.size() == total ? protocol::shape_of(type, available.subspan(kHeaderSize), 0) : 0;
    return;
  }
  if (type != Backend::RowDescription && type != Backend::NoData) return;
  if (available.size() < total) shape_ = 0;  // too long to be looked at
  if (shape_ != 0) shape_ = protocol::shape_of(type, available.subspan(kHeaderSize), shape_);
  if (const auto statement = statements.find(owed.note); statement && shape_ != 0) {
    if (statement->shape == 0) statement->shape = shape_;
    if (statement->shape != shape_) changed_ = owed.note;
  }
  if (owed.verdict == Verdict::Skip) stop_awaiting_shape();
}

void ServerConnection::stop_awaiting_shape() {
  if (std::exchange(awaiting_shape_, false) && client_) worker_.run_later(*client_);
}

bool ServerConnection::take_changed(const protocol::Statement& statement) {
  if (changed_ != statement.id) return false;
  changed_ = 0;
  worker_.statements.retire(statement);
  statements.erase(statement.id);
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(protocol::server_name(statement.id)).end();
  });
  pipeline.push({Request::Close, Verdict::Skip, client_->id()});
  raise(false, "cached plan must not change result type", "");
  return true;
}

void ServerConnection::inject() {
  while (const auto owed = pipeline.take_injection()) {
    const bool ours = client_ && owed->owner == client_->id();
    if (!ours) continue;
    if (owed->request == Request::Parse || owed->note == kNamed) client_->on_name_done(true);
    const auto type = owed->request == Request::Parse ? Backend::ParseComplete : Backend::CloseComplete;
    worker_.to_client.own([type](std::string& out) { protocol::Writer(out).begin(type).end(); });
  }
}

void ServerConnection::on_dropped(const Owed& owed) {
  if (owed.owner == protocol::kProxy) return;
  const bool ours = client_ && owed.owner == client_->id();
  if (owed.request == Request::Close && owed.note == kNamed && ours) client_->on_name_done(false);
  if (owed.request == Request::Describe && owed.verdict == Verdict::Skip && ours) stop_awaiting_shape();
  if (owed.request != Request::Parse) return;
  if (owed.verdict == Verdict::Inject) {
    if (ours) client_->on_name_done(false);
    return;
  }
  if (owed.note != 0) {
    // A Parse of a name that exists already has failed because of that; what it named stays.
    const bool duplicate = ours && owed.verdict == Verdict::Forward && client_->pending_is_duplicate();
    if (!duplicate) statements.erase(owed.note);
  } else {
    statements.unnamed.reset();
  }
  if (owed.verdict == Verdict::Forward && ours) client_->on_name_done(false);
}

// The server knows a client's statement under the proxy's name for it; in its error the client's own name belongs.
void ServerConnection::rename_error(Bytes whole, const std::string& name) {
  auto error = protocol::parse_error(whole.subspan(kHeaderSize));
  const std::size_t open = error ? error->message.find("\"pgsidecar_") : std::string::npos;
  if (open == std::string::npos) return worker_.to_client.add(whole.data(), whole.size());
  const std::size_t shut = error->message.find('"', open + 1);
  error->message.replace(open, shut == std::string::npos ? std::string::npos : shut + 1 - open, "\"" + name + "\"");
  worker_.to_client.own([&](std::string& out) {
    protocol::write_error(out, protocol::Severity::Error, error->sqlstate, error->message, error->detail, error->hint);
  });
}

// --- the proxy's own queries

void ServerConnection::ask(std::uint32_t note, std::string_view sql) {
  pipeline.push({Request::Query, Verdict::Skip, protocol::kProxy, note});
  statements.unnamed.reset();
  worker_.to_server.own([&](std::string& out) { protocol::write_query(out, sql); });
}

void ServerConnection::on_proxy_reply(Backend type, std::uint32_t note, Bytes whole) {
  if (note == kResidue) {
    if (type == Backend::DataRow) {
      ResidueRow row;
      if (read_row(whole, row))
        residue_.add(row, login_user_);
      else
        residue_.failed = true;
    } else if (type == Backend::ErrorResponse) {
      const auto error = protocol::parse_error(whole.subspan(kHeaderSize));
      // lastval() says 55000 if there is none, and 42501 if there is one that may not be seen.
      if (error && error->sqlstate == "42501")
        residue_.reasons |= pool::bit(pool::PinReason::Sequence);
      else if (!error || error->sqlstate != "55000")
        residue_.failed = true;
    } else if (type == Backend::ReadyForQuery) {
      finish_residue();
    }
    return;
  }
  if (note == kLearn || note == kSurvey) {
    std::string field[4];
    if (type == Backend::DataRow && read_row(whole, field)) {
      if (note == kSurvey)
        survey_->answer(field);
      else
        entry_.catalog.answer(inquiry_, field[0], field[1], field[2] == "t", field[3]);
    } else if (type == Backend::DataRow || type == Backend::ErrorResponse) {
      residue_failed_ = true;
    } else if (type == Backend::ReadyForQuery) {
      finish_learning();
    }
    return;
  }
  if (type == Backend::ErrorResponse) {
    const auto error = protocol::parse_error(whole.subspan(kHeaderSize));
    own_query_failed_ = true;
    if (note == kApply && client_ && error) {
      apply_failed(*error);
    }
    return;
  }
  if (type != Backend::ReadyForQuery) return;
  if (note == kListening && listener_)
    entry_.listener.on_answer(!own_query_failed_);
  else if (note == kListening && client_ && client_->subscriber())
    client_->subscriber()->on_told(!own_query_failed_);
  if (note == kApply && client_ && client_->state() == ClientSession::State::Greeting && !own_query_failed_) {
    settings->welcome = parameters_;
  }
  own_query_failed_ = false;
}

void ServerConnection::apply_failed(const protocol::ErrorFields& error) {
  condemned = true;  // what its session holds is not known
  settings.reset();
  if (client_->state() == ClientSession::State::Greeting) {
    ClientSession* client = std::exchange(client_, nullptr);
    client->on_greeting_failed(error);
  } else {
    ClientSession* client = std::exchange(client_, nullptr);
    client->on_apply_failed(error);
  }
  boost::asio::post(worker_.loop(), [self = shared_from_this()] {
    if (self->alive()) self->close(pool::CloseReason::Broken);
  });
}

void ServerConnection::ask_residue() {
  asking_residue_ = true;
  if (ask_catalog()) return;
  residue_failed_ = false;
  inquiry_ = entry_.catalog.inquire(unknown_calls, worker_.now());
  if (!inquiry_.names.empty()) {
    ask(kLearn, Catalog::question(inquiry_));
    return send(worker_.to_server);
  }
  residue_ = {};
  ++entry_.pool.counters().residueChecks;
  ask(kResidue, residue_sql(entry_.settings.custom_names(), entry_.sequences_matter));
  send(worker_.to_server);
}

bool ServerConnection::ask_catalog() {
  const pool::Time now = worker_.now();
  if (!survey_) {
    const conf::PoolSettings& policy = entry_.pool.settings();
    if (!entry_.catalog.due(now) || policy.mode == conf::PoolMode::Session || policy.residueCheck == conf::ResidueCheck::Never)
      return false;
    survey_ = std::make_unique<Survey>(entry_.catalog, now);
  }
  const std::string question = survey_->next(now);
  if (question.empty()) {
    unknown_residue_ |= survey_->residue_of(std::exchange(unknown_names, {}));
    survey_.reset();
    if (entry_.catalog.take_late()) {
      log::info("{}@{}: functions leave something in sessions that didn't before: every server connection is replaced", entry_.user,
                entry_.database);
      for (const auto& [id, server] : entry_.servers) server->condemned |= !server->listener_;
      pool::CloseReason reason{};
      while (pool::Slot* idle = entry_.pool.outdated(now, reason)) static_cast<ServerConnection*>(idle)->close(reason);
    }
    return false;
  }
  residue_failed_ = false;
  Gather others;
  std::swap(others, worker_.to_server);
  ask(kSurvey, question);
  send(worker_.to_server);
  std::swap(others, worker_.to_server);
  return true;
}

void ServerConnection::finish_learning() {
  if (survey_)
    survey_->answered(worker_.now(), residue_failed_);
  else
    entry_.catalog.answered(inquiry_, worker_.now(), residue_failed_);
  asking_residue_ = client_ && survey_ && ask_catalog();
  if (client_ && !asking_residue_) client_->on_learned();
}

std::uint32_t ServerConnection::residue_of_unknown() {
  if (entry_.catalog.surveyed() && !unknown_names.empty())
    unknown_residue_ |= entry_.catalog.residue_of_names(std::exchange(unknown_names, {}));
  const Catalog::Names names = std::exchange(unknown_calls, {});
  return std::exchange(unknown_residue_, 0) | entry_.catalog.residue_of_calls(names, worker_.now(), unknown_calls);
}

bool ServerConnection::changes_catalog(std::string_view tag) const {
  if (tag == "CREATE TABLE" || tag == "CREATE INDEX") return !client_->made_temporary();
  return tag.starts_with("CREATE ") || tag.starts_with("ALTER ") || tag == "DO" || tag == "IMPORT FOREIGN SCHEMA";
}

void ServerConnection::on_catalog_changed() {
  entry_.catalog.forget();
  for (const auto& [id, server] : entry_.servers)
    if (server->client_) server->client_->on_learned();  // it may be using what was made already
}

void ServerConnection::finish_residue() {
  asking_residue_ = false;
  if (!client_) return;
  if (residue_.failed) {
    settings.reset();
    return client_->on_residue(nullptr, residue_);
  }
  meaning_changed = false;
  std::erase_if(adopted_, [this](const auto& one) {
    const bool there = std::find(residue_.prepared.begin(), residue_.prepared.end(), one.first) != residue_.prepared.end();
    if (there) client_->statements.set(one.first, one.second);
    return !there;
  });
  settings = entry_.settings.intern(std::move(residue_.settings));
  if (settings->welcome.empty()) settings->welcome = parameters_;
  client_->on_residue(settings, residue_);
}

// --- listening

std::string ServerConnection::listen_for_pool() {
  client_ = nullptr;
  listener_ = true;
  transition(State::Leased);
  std::string sql;
  for (const std::string& statement : settings_statements(settings->values, {})) sql += statement + ";";
  settings = entry_.settings.intern({});
  return sql;
}

void ServerConnection::stop_listening() {
  listener_ = false;
  detach(true);
}

void ServerConnection::ask_listening(std::string_view sql) {
  ask(kListening, sql);
}

void ServerConnection::tell_listening(std::string_view sql) {
  Gather other;
  std::swap(other, worker_.to_server);
  ask(kListening, sql);
  send(worker_.to_server);
  std::swap(other, worker_.to_server);
}

void ServerConnection::ask_extended(const std::string& sql) {
  statements.unnamed.reset();
  worker_.to_server.own([&](std::string& out) {
    using protocol::Frontend;
    protocol::Writer writer(out);
    const std::string_view portal = "pgsidecar_listener";
    writer.begin(Frontend::Parse).cstring("").cstring(sql).u16(0).end();
    writer.begin(Frontend::Bind).cstring(portal).cstring("").u16(0).u16(0).u16(0).end();
    writer.begin(Frontend::Execute).cstring(portal).u32(0).end();
    writer.begin(Frontend::Close).u8('P').cstring(portal).end();
  });
  for (const Request request : {Request::Parse, Request::Bind, Request::Execute, Request::Close})
    pipeline.push({request, Verdict::Skip, client_->id()});
}

// --- leases

void ServerConnection::lease(ClientSession& client) {
  transition(State::Leased);
  entry_.pool.lease(*this);
  client_ = &client;
  leased_anew_ = true;
  cancel_due_ = awaiting_shape_ = plans_stale = false;
  changed_ = 0;
  unknown_calls.clear();
  unknown_names.clear();
  unknown_residue_ = 0;
  sequences_touched = meaning_changed = false;
  suspect.clear();
  client.on_lease(*this);
}

void ServerConnection::apply_settings() {
  if (settings != client_->settings && settings) {
    const auto statements_needed = settings_statements(settings->values, client_->settings->values);
    settings = client_->settings;
    run_ahead(statements_needed);
  }
  if (!leased_anew_) return;
  leased_anew_ = false;
  if (sequences_dirty && entry_.sequences_matter) forget_sequences();
}

void ServerConnection::run_ahead(const std::vector<std::string>& sqls) {
  if (sqls.empty()) return;
  if (pipeline.unsynced()) return run_within(sqls);  // a simple query would end the client's implicit transaction
  std::string all;
  for (const std::string& sql : sqls) all += (all.empty() ? "" : ";") + sql;
  ask(kApply, all);
}

void ServerConnection::run_within(const std::vector<std::string>& sqls) {
  constexpr std::string_view kName = "pgsidecar_ahead";
  for (const std::string& sql : sqls) {
    worker_.to_server.own([&](std::string& out) {
      protocol::Writer w(out);
      w.begin(protocol::Frontend::Parse).cstring(kName).cstring(sql).u16(0).end();
      w.begin(protocol::Frontend::Bind).cstring(kName).cstring(kName).u16(0).u16(0).u16(0).end();
      w.begin(protocol::Frontend::Execute).cstring(kName).u32(0).end();
      w.begin(protocol::Frontend::Close).u8('P').cstring(kName).end();
      w.begin(protocol::Frontend::Close).u8('S').cstring(kName).end();
    });
    for (const Request request : {Request::Parse, Request::Bind, Request::Execute, Request::Close, Request::Close})
      pipeline.push({request, Verdict::Skip, protocol::kProxy, kApply});
  }
}

void ServerConnection::raise(bool simple, const std::string& message, const std::string& hint) {
  const std::string sql = "DO $pgsidecar$BEGIN RAISE EXCEPTION USING ERRCODE='0A000', MESSAGE=" + literal(message) +
                          ", HINT=" + literal(hint) + "; END$pgsidecar$";
  statements.unnamed.reset();
  if (simple) {
    pipeline.push({Request::Query, Verdict::Forward, client_->id(), kRaised});
    return worker_.to_server.own([&](std::string& out) { protocol::write_query(out, sql); });
  }
  worker_.to_server.own([&](std::string& out) {
    protocol::Writer w(out);
    w.begin(protocol::Frontend::Parse).cstring("").cstring(sql).u16(0).end();
    w.begin(protocol::Frontend::Bind).cstring("").cstring("").u16(0).u16(0).u16(0).end();
    w.begin(protocol::Frontend::Execute).cstring("").u32(0).end();
  });
  for (const Request request : {Request::Parse, Request::Bind}) pipeline.push({request, Verdict::Skip, client_->id()});
  pipeline.push({Request::Execute, Verdict::Skip, client_->id(), kRaised});
}

// Without the context of the statement that raised it.
void ServerConnection::tell_raised(Bytes whole) {
  if (const auto error = protocol::parse_error(whole.subspan(kHeaderSize)))
    worker_.to_client.own([&](std::string& out) {
      protocol::write_error(out, protocol::Severity::Error, error->sqlstate, error->message, error->detail, error->hint);
    });
}

void ServerConnection::forget_sequences() {
  if (!sequences_dirty || sequences_touched) return;
  sequences_dirty = false;
  run_ahead({"DISCARD SEQUENCES"});
}

void ServerConnection::adopt(const std::string& name, const protocol::StatementRef& statement, Verdict verdict) {
  const auto known = std::find_if(adopted_.begin(), adopted_.end(), [&](const auto& one) { return one.first == name; });
  if (known != adopted_.end() && verdict == Verdict::Skip) return;
  worker_.to_server.own(
      [&](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Parse).cstring(name).bytes(statement->body).end(); });
  pipeline.push({Request::Parse, verdict, client_->id()});
  if (known == adopted_.end())
    adopted_.emplace_back(name, statement);
  else
    known->second = statement;
}

void ServerConnection::close_shared_statements() {
  statements.for_each([this](const protocol::StatementRef& statement) {
    worker_.to_server.own([&](std::string& out) {
      protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(protocol::server_name(statement->id)).end();
    });
    pipeline.push({Request::Close, Verdict::Skip, client_->id()});
  });
  statements.clear();
}

void ServerConnection::forget_adopted(std::string_view name) {
  std::erase_if(adopted_, [&](const auto& one) { return one.first == name; });
}

void ServerConnection::forget_statements() {
  statements.clear();
  adopted_.clear();
}

void ServerConnection::close_adopted() {
  if (adopted_.empty()) return;
  worker_.to_server.own([&](std::string& out) {
    for (const auto& [name, statement] : adopted_) protocol::Writer(out).begin(protocol::Frontend::Close).u8('S').cstring(name).end();
    protocol::Writer(out).begin(protocol::Frontend::Sync).end();
  });
  for (std::size_t i = 0; i < adopted_.size(); ++i) pipeline.push({Request::Close, Verdict::Skip, protocol::kProxy, kReset});
  pipeline.push({Request::Sync, Verdict::Skip, protocol::kProxy, kReset});
  adopted_.clear();
}

void ServerConnection::restore_settings(const Settings& login) {
  ask(kRestore, restore_sql(login));
}

void ServerConnection::detach(bool dirty) {
  client_ = nullptr;
  asking_residue_ = awaiting_shape_ = false;
  pass_forward_ = false;
  if (!alive()) return;
  if (dirty) return start_reset();
  if (!adopted_.empty()) {
    Gather others;
    std::swap(others, worker_.to_server);
    close_adopted();
    send(worker_.to_server);
    std::swap(others, worker_.to_server);
  }
  settle();
}

void ServerConnection::start_reset() {
  transition(State::Resetting);
  ++entry_.pool.counters().resets;
  if (pipeline.copy_in()) return close(pool::CloseReason::Broken);
  deadline = worker_.now() + std::chrono::seconds(1);  // then what is still running is cancelled
  worker_.kick();
  Gather out;
  std::swap(out, worker_.to_server);
  if (pipeline.unsynced()) {
    worker_.to_server.own([](std::string& o) { protocol::Writer(o).begin(protocol::Frontend::Sync).end(); });
    pipeline.push({Request::Sync, Verdict::Skip, protocol::kProxy});
  }
  ask(kReset, "ROLLBACK");
  ask(kReset, "DISCARD ALL");
  statements.clear();
  adopted_.clear();
  sequences_dirty = false;
  settings = entry_.settings.intern({});
  send(worker_.to_server);
  std::swap(out, worker_.to_server);
}

void ServerConnection::settle() {
  if (client_ || listener_ || !alive() || !pipeline.releasable() || pass_left_ > 0 || cancels_pending > 0 || channel_->queued() > 0) return;
  deadline = pool::Time::max();
  pool::CloseReason reason{};
  if (!settings) reason = pool::CloseReason::Broken, condemned = true;
  if (!condemned && ask_catalog()) {
    transition(State::Resetting);
    deadline = worker_.now() + std::chrono::seconds(5);
    return worker_.kick();
  }
  if (entry_.pool.worn_out(*this, worker_.now(), reason)) {
    ++entry_.replacements;
    close(reason);
    return worker_.serve(entry_);
  }
  transition(State::Idle);
  entry_.pool.put_idle(*this, worker_.now());
  worker_.arm_tick(entry_.pool.idle_check());
  worker_.serve(entry_);
}

void ServerConnection::cancel() {
  const Owed* front = pipeline.front();
  cancel_due_ = front && front->owner == protocol::kProxy;
  if (front && client_ && front->owner == client_->id()) send_cancel();
}

void ServerConnection::settle_after_cancel() {
  if (!client_ && (state_ == State::Leased || state_ == State::Resetting)) settle();
}

void ServerConnection::on_deadline(pool::Time now) {
  if (now < deadline) return;
  switch (state_) {
    case State::Resetting:
      if (!pipeline.empty() && ++resets_overdue_ < 10) {
        send_cancel();
        deadline = now + std::chrono::seconds(1);
        return;
      }
      return close(pool::CloseReason::Broken);
    case State::Closing: return closed();
    default: deadline = pool::Time::max();
  }
}

// --- the end

void ServerConnection::lost(const std::string& sqlstate, const std::string& reason) {
  if (!alive()) return;
  const auto self = shared_from_this();
  const bool in_transaction = pipeline.status() != TxStatus::Idle;
  log::info("server {} ({}@{}, pid {}): lost: {} {}", id_, entry_.user, entry_.database, pid_, sqlstate, reason);
  unlink();
  transition(State::Closing);
  ++entry_.pool.counters()
        .closed[static_cast<std::size_t>(sqlstate.starts_with("57P") ? pool::CloseReason::AdminShutdown : pool::CloseReason::Error)];
  if (ClientSession* client = std::exchange(client_, nullptr)) {
    client->send(worker_.to_client);
    if (pass_left_ > 0 && pass_forward_) {
      // Half a message is on its way: an error behind it would be read as its rest.
      log::info("client {}: closed, since its answer ended in the middle of a message", client->id());
      client->close();
    } else {
      client->on_server_lost(sqlstate, reason, in_transaction);
    }
  }
  closed();
}

void ServerConnection::close(pool::CloseReason reason) {
  if (state_ == State::Closed || state_ == State::Closing) return;
  unlink();
  ++entry_.pool.counters().closed[static_cast<std::size_t>(reason)];
  client_ = nullptr;
  Gather terminate;
  if (channel_->queued() == 0) {
    terminate.own([](std::string& out) { protocol::Writer(out).begin(protocol::Frontend::Terminate).end(); });
    channel_->send(terminate, worker_.tls_scratch());
  }
  transition(State::Closing);
  permit_.leave();
  // The permit is kept until the server has closed its end: only then it doesn't count this connection any more.
  channel_->transport.shutdown_send();
  deadline = worker_.now() + std::chrono::seconds(5);
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
}

}  // namespace pgsidecar::proxy
