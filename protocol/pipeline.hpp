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
#include <vector>

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
};

class Pipeline {
 public:
  struct Reply {
    Owed owed;
    bool completes = false;  ///< the entry has left the queue
  };

  /// Records a request that is about to be sent. False: the server will not answer it (it skips up to Sync after an
  /// error, or ignores Sync during COPY), so it is not owed; send it all the same unless it is a Sync in COPY.
  bool push(Owed owed);

  /// What a message of the server is. nullopt: it is none that the server could send now. `dropped(Owed)` is called for
  /// each request that an error makes the server skip. Notices, parameter changes and notifications aren't for here.
  template <class Dropped>
  std::optional<Reply> receive(Backend type, TxStatus status, Dropped&& dropped);

  /// The entry in front is one to inject now.
  bool injects() const { return !empty() && ring_[head_ & mask()].verdict == Verdict::Inject; }
  std::optional<Owed> take_injection();

  const Owed* front() const { return empty() ? nullptr : &ring_[head_ & mask()]; }
  bool empty() const { return head_ == tail_; }
  std::size_t size() const { return tail_ - head_; }
  TxStatus status() const { return status_; }
  bool copy_in() const { return copy_in_; }
  /// The server says nothing before the client has sent the COPY's data or its end.
  bool awaits_copy_data() const { return copy_in_ && !copy_ended_; }
  /// What was sent behind a COPY isn't its data, and the server doesn't get to see it.
  bool copy_interrupted() const { return awaits_copy_data() && size() > 1 && ring_[(head_ + 1) & mask()].verdict == Verdict::Inject; }
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
    for (std::size_t i = head_; i != tail_; ++i) f(ring_[i & mask()]);
  }

 private:
  std::size_t mask() const { return ring_.size() - 1; }
  Owed& at(std::size_t i) { return ring_[i & mask()]; }
  void pop() {
    ++head_;
    skip_copy_ends();
  }
  void skip_copy_ends() {
    while (head_ != tail_ && at(head_).request == Request::CopyEnd) ++head_;
  }
  /// The end of a COPY of the request in front: another one may follow.
  void drop_copy_end() {
    if (head_ + 1 == tail_ || at(head_ + 1).request != Request::CopyEnd) return;
    at(head_ + 1) = at(head_);
    ++head_;
  }
  void append(Owed owed);
  void begin_copy_in();

  std::vector<Owed> ring_;  // size is a power of two
  std::size_t head_ = 0, tail_ = 0;
  TxStatus status_ = TxStatus::Idle;
  bool unsynced_ = false, failed_ = false, copy_in_ = false, copy_ended_ = false, held_sync_ = false;
  bool copy_data_ = false;  // sent behind the last request but Sync
};

template <class Dropped>
std::optional<Pipeline::Reply> Pipeline::receive(Backend type, TxStatus status, Dropped&& dropped) {
  if (empty()) return std::nullopt;
  const Owed front = at(head_);
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
      while (head_ != tail_ && at(head_).request != R::Sync) {
        const Owed skipped = at(head_);
        ++head_;
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
