// The replies that a server connection still owes, in order. Each entry names its owner (a client, or the proxy itself)
// and its verdict, so that one connection may carry requests of several owners behind each other. Decides for each
// message of the server whose it is and whether it completes a request; knows transaction status, COPY and the skipping
// of everything up to Sync after an error. Moves no bytes. PostgreSQL documentation, sections 55.2.2 to 55.2.6.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "protocol/ring.hpp"
#include "protocol/wire.hpp"

namespace pgsidecar::protocol {

using OwnerId = std::uint64_t;
inline constexpr OwnerId kProxy = 0;

enum class Verdict : std::uint8_t {
  Forward,  ///< the owner asked for it and gets it
  Skip,     ///< the proxy asked; only an ErrorResponse goes on, if the owner is a client
  Inject,   ///< the server wasn't asked: the proxy makes the reply when its turn comes
};

enum class Request : std::uint8_t { Query, Parse, Bind, Describe, Execute, Close, Sync, FunctionCall, CopyEnd };

/// The last of the answer is ReadyForQuery, and nothing sent before waits for a Sync any more.
constexpr bool ends_with_ready(Request request) {
  return request == Request::Query || request == Request::Sync || request == Request::FunctionCall;
}

struct Owed {
  Request request = Request::Query;
  Verdict verdict = Verdict::Forward;
  OwnerId owner = kProxy;
  std::uint64_t note = 0;  ///< the caller's own; returned with the reply
  /// Of a Query: the Sync behind it tells the client its ReadyForQuery, since the server may skip the Query.
  bool ready_behind = false;
};

class Pipeline {
 public:
  struct Reply {
    Owed owed;
    bool completes = false;  ///< the entry has left the queue
  };

  /// Records a request that is about to be sent. False: the server will not answer it (it skips up to Sync after an
  /// error, or ignores Sync during COPY), so it is not owed; send it all the same unless it is a Sync in COPY.
  bool push(const Owed& owed);

  /// What a message of the server is. nullopt: it is none that the server could send now. `dropped(Owed)` is called for
  /// each request that an error makes the server skip. Notices, parameter changes and notifications aren't for here.
  template <class Dropped>
  std::optional<Reply> receive(Backend type, TxStatus status, Dropped&& dropped);

  /// The entry in front is one to inject now.
  bool injects() const { return !empty() && ring_.front().verdict == Verdict::Inject; }
  std::optional<Owed> take_injection();

  const Owed* front() const { return empty() ? nullptr : &ring_.front(); }
  bool empty() const { return ring_.empty(); }
  std::size_t size() const { return ring_.size(); }
  std::size_t owed_to_clients() const { return owed_to_clients_; }  ///< of the entries, those that aren't the proxy's
  std::size_t readies_owed() const { return readies_owed_; }        ///< how many ReadyForQuery clients are still to hear
  TxStatus status() const { return status_; }
  bool copy_in() const { return copy_in_; }
  /// The server says nothing before the client has sent the COPY's data or its end.
  bool awaits_copy_data() const { return copy_in_ && !copy_ended_; }
  /// What was sent behind a COPY isn't its data, and the server doesn't get to see it.
  bool copy_interrupted() const { return awaits_copy_data() && size() > 1 && ring_[ring_.begin() + 1].verdict == Verdict::Inject; }
  /// CopyData is about to be sent. A COPY that reads any has read the Syncs before it, and ignored them.
  void note_copy_data() {
    if (!std::exchange(copy_data_, true)) held_sync_ = false;
  }
  /// A Sync was held back during COPY and must be sent now, because the COPY has failed.
  bool take_held_sync();
  /// Nothing is owed, no transaction is open, and no request waits for its Sync.
  bool releasable() const { return empty() && !unsynced_ && status_ == TxStatus::Idle; }
  bool unsynced() const { return unsynced_; }
  /// Requests sent since the last Sync are being skipped by the server.
  bool failed() const { return failed_; }
  template <class F>
  void for_each(F&& f) const {
    for (std::size_t i = ring_.begin(); i != ring_.end(); ++i) f(ring_[i]);
  }

 private:
  void append(const Owed& owed) {
    count(owed, 1);
    ring_.push_back(owed);
  }
  void remove_front() {
    count(ring_.front(), -1);
    ring_.drop_front();
  }
  void pop() {
    remove_front();
    while (!empty() && ring_.front().request == Request::CopyEnd) remove_front();
  }
  /// The end of a COPY of the request in front: another one may follow.
  void drop_copy_end() {
    if (size() < 2 || ring_[ring_.begin() + 1].request != Request::CopyEnd) return;
    std::swap(ring_.front(), ring_[ring_.begin() + 1]);
    remove_front();
  }
  void count(const Owed& owed, int by) {
    if (owed.owner == kProxy) return;
    owed_to_clients_ += static_cast<std::size_t>(by);
    const bool told = ends_with_ready(owed.request) && owed.verdict == Verdict::Forward && !owed.ready_behind;
    if (told) readies_owed_ += static_cast<std::size_t>(by);
  }
  void begin_copy_in();

  Ring<Owed> ring_;
  std::size_t owed_to_clients_ = 0, readies_owed_ = 0;
  TxStatus status_ = TxStatus::Idle;
  bool unsynced_ = false, failed_ = false, copy_in_ = false, copy_ended_ = false, held_sync_ = false;
  bool copy_data_ = false;  // sent behind the last request but Sync
};

template <class Dropped>
std::optional<Pipeline::Reply> Pipeline::receive(Backend type, TxStatus status, Dropped&& dropped) {
  if (empty()) return std::nullopt;
  const Owed front = ring_.front();
  if (front.verdict == Verdict::Inject) return std::nullopt;
  using R = Request;
  const auto reply = [&](bool completes) {
    if (completes) pop();
    return Reply{front, completes};
  };
  const bool runs = front.request == R::Query || front.request == R::Execute;
  switch (type) {
    case Backend::ReadyForQuery:
      if (!ends_with_ready(front.request)) return std::nullopt;
      status_ = status;
      copy_in_ = copy_ended_ = held_sync_ = false;
      return reply(true);
    case Backend::ErrorResponse:
      if (ends_with_ready(front.request)) {
        copy_in_ = false;
        return reply(false);
      }
      copy_in_ = false;
      while (!empty() && ring_.front().request != R::Sync) {
        const Owed skipped = ring_.front();
        remove_front();
        dropped(skipped);
      }
      failed_ = empty();
      unsynced_ |= failed_;
      return Reply{front, true};
    case Backend::ParseComplete: return front.request == R::Parse ? std::optional(reply(true)) : std::nullopt;
    case Backend::BindComplete: return front.request == R::Bind ? std::optional(reply(true)) : std::nullopt;
    case Backend::CloseComplete: return front.request == R::Close ? std::optional(reply(true)) : std::nullopt;
    case Backend::ParameterDescription: return front.request == R::Describe ? std::optional(reply(false)) : std::nullopt;
    case Backend::NoData: return front.request == R::Describe ? std::optional(reply(true)) : std::nullopt;
    case Backend::RowDescription:
      if (front.request == R::Describe) return reply(true);
      return runs ? std::optional(reply(false)) : std::nullopt;
    case Backend::CommandComplete:
    case Backend::EmptyQueryResponse:
      if (!runs) return std::nullopt;
      if (copy_in_) drop_copy_end();
      copy_in_ = copy_ended_ = held_sync_ = false;
      return reply(front.request == R::Execute);
    case Backend::PortalSuspended:
      if (front.request != R::Execute || copy_in_) return std::nullopt;
      return reply(true);
    case Backend::CopyInResponse:
      if (!runs) return std::nullopt;
      begin_copy_in();
      return reply(false);
    case Backend::DataRow:
    case Backend::CopyOutResponse:
    case Backend::CopyBothResponse:
    case Backend::CopyData:
    case Backend::CopyDone: return runs ? std::optional(reply(false)) : std::nullopt;
    case Backend::FunctionCallResponse: return front.request == R::FunctionCall ? std::optional(reply(false)) : std::nullopt;
    default: return std::nullopt;
  }
}

}  // namespace pgsidecar::protocol
