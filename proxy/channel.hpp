// What both kinds of connection have: a transport, the bytes read and not yet understood, the bytes that the kernel
// didn't take, and which readiness is being waited for. A channel holds no buffer while nothing is pending.
#pragma once

#include <chrono>
#include <span>
#include <string>

#include "protocol/footprint.hpp"
#include "proxy/gather.hpp"
#include "proxy/transport.hpp"

namespace pgsidecar::proxy {

inline constexpr std::size_t kScratch = 64 * 1024;
inline constexpr std::chrono::milliseconds kLook{250};  // after which an end is looked for that a wait may not have told of
inline constexpr std::size_t kHighMark = 256 * 1024;    // unsent bytes at which the other side isn't read any more

struct Channel {
  Channel(Socket socket, Meter& meter) : transport(std::move(socket), meter) {}

  /// Sends `gather` behind what is queued already. False: the connection is broken.
  bool send(Gather& gather, std::span<std::uint8_t> scratch) {
    const auto pieces = gather.pieces();
    const IoResult result = unsent.empty() ? transport.write(pieces, scratch) : IoResult{IoStatus::WouldBlock};
    if (result.status != IoStatus::Ok) queue(pieces, result.bytes);
    gather.clear();
    return result.status == IoStatus::Ok || result.status == IoStatus::WouldBlock;
  }

  /// All but the first `skip` bytes.
  void queue(std::span<const Gather::Piece> pieces, std::size_t skip) {
    torn = true;
    for (const auto& piece : pieces) {
      const std::size_t taken = std::min(skip, piece.size());
      skip -= taken;
      if (taken < piece.size()) unsent.append(reinterpret_cast<const char*>(piece.data()) + taken, piece.size() - taken);
    }
    torn = false;
  }

  /// Sends what is queued. False: the connection is broken.
  bool flush(std::span<std::uint8_t> scratch) {
    while (unsent_at < unsent.size()) {
      const Gather::Piece piece(reinterpret_cast<const std::uint8_t*>(unsent.data()) + unsent_at, unsent.size() - unsent_at);
      const IoResult result = transport.write(std::span(&piece, 1), scratch);
      unsent_at += result.bytes;
      if (result.status == IoStatus::WouldBlock) return true;
      if (result.status != IoStatus::Ok) return false;
    }
    unsent_at = 0;
    if (unsent.capacity() > 4096)
      std::string().swap(unsent);
    else
      unsent.clear();
    return true;
  }

  std::size_t queued() const { return unsent.size() - unsent_at; }
  /// Of the heap: what is kept, and what Asio keeps of the socket.
  std::size_t footprint() const { return protocol::footprint(unread) + protocol::footprint(unsent) + 288; }

  /// Keeps the rest of `bytes`, which are either fresh or a view of `unread`, for the next read.
  void keep(std::span<const std::uint8_t> bytes, std::size_t consumed) {
    const bool own = !unread.empty();
    if (own) {
      unread.erase(0, consumed);
      if (unread.empty() && unread.capacity() > 1024) std::string().swap(unread);
    } else if (consumed < bytes.size()) {
      unread.assign(reinterpret_cast<const char*>(bytes.data()) + consumed, bytes.size() - consumed);
    }
  }

  Transport transport;
  std::string unread, unsent;
  std::size_t unsent_at = 0;
  bool writing = false;  // a wait is pending
  bool torn = false;     // memory ran out behind half of a message
};

}  // namespace pgsidecar::proxy
