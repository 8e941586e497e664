// One connection's bytes: a non-blocking TCP or unix socket, plain or TLS, with OpenSSL driven directly on the
// descriptor. Decides how bytes move, not what they mean. Never blocks, never allocates per call; holds no read buffer.
// Used by client_session and server_connection. Readiness, then read: wait, read until WouldBlock, wait again.
// OpenSSL too reads and writes by calls of ours, which are counted.
#pragma once

#include <openssl/ssl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "conf/config.hpp"
#include "proxy/meter.hpp"
#include "proxy/readiness.hpp"

namespace pgsidecar::proxy {

enum class IoStatus { Ok, WouldBlock, Eof, Error };

/// What one read or write did. `bytes` may be less than asked for.
struct IoResult {
  IoStatus status = IoStatus::Ok;
  std::size_t bytes = 0;
};

/// TCP keepalive, in seconds: where nothing is under way, a peer whose machine is gone is noticed after `idle` and `count` intervals.
struct KeepAlive {
  static constexpr std::uint32_t kMostIdle = 32767;  ///< that Linux takes
  std::uint32_t idle = 0;                            ///< 0: the system's
  std::uint32_t interval = 1, count = 10;
};
KeepAlive keep_alive_of(const conf::PoolSettings& pool);
void set_keep_alive(int fd, const KeepAlive& times);

class Transport {
 public:
  Transport(Socket socket, Meter& meter);  ///< sets the socket non-blocking
  Transport(Transport&&) = default;

  Socket& socket() { return socket_; }
  bool is_tls() const { return ssl_ != nullptr; }
  SSL* ssl() const { return ssl_.get(); }

  /// Reads at most out.size() bytes. After Ok with a full buffer, or while pending() is true, read again before waiting:
  /// there may be no new readiness edge.
  IoResult read(std::span<std::uint8_t> out);
  /// Writes from the pieces, in order, as much as the kernel takes now (one sendmsg; on TLS pieces are coalesced into
  /// records of at most 16 KiB with `scratch`). Returns the bytes taken.
  IoResult write(std::span<const std::span<const std::uint8_t>> pieces, std::span<std::uint8_t> scratch);
  bool pending() const { return pending_; }          ///< TLS may hold more than the last read had room for
  bool wants_write() const { return wants_write_; }  ///< a TLS read, write or handshake last wanted writability

  /// TLS: takes an SSL from a context, on the descriptor, as server or client; then call handshake() on readiness until Ok.
  void start_tls(SSL_CTX* context, bool server);
  IoResult handshake();           ///< WouldBlock: wait for readability, or writability if wants_write()
  std::string tls_error() const;  ///< text of the last failure (verification result included), empty if none

  void shutdown_send();  ///< close_notify on TLS (best effort), then half close
  void close();          ///< once; later calls do nothing

  /// After a read that left no bytes this makes no system call, and doesn't tell of the stream's end, nor of a reset, that came together
  /// with the last of them: has_missed() does, which somebody has to call within a moment. `for_end`: that moment is too long.
  template <class Session>
  void wait_readable(bool for_end, Readiness<Session>& readiness) {
    const Meter::Span span(meter_, pool::Phase::Wait);
    const bool quiet = std::exchange(drained_, false) && !for_end;
    doubt_ = quiet ? Doubt::Fresh : Doubt::None;
    meter_.counters.waits += !quiet;
    readiness.wait(socket_, quiet);
  }
  bool may_miss() const { return doubt_ != Doubt::None; }
  bool has_missed();  ///< looks only if the wait has lasted since it was asked before
  bool has_unread();  ///< bytes in the kernel, or the end of the stream, or an error
  template <class Handler>
  void wait_writable(Handler&& h) {
    const Meter::Span span(meter_, pool::Phase::Wait);
    ++meter_.counters.waits;
    socket_.async_wait(Socket::wait_write, std::forward<Handler>(h));
  }

 private:
  struct SslDelete {
    void operator()(SSL* s) const {
      // A connection that was cut off would else make its session unfit for resumption, just when many reconnect.
      SSL_set_shutdown(s, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
      SSL_free(s);
    }
  };
  IoResult failed(int result);  // of an OpenSSL call
  IoResult read_tls(std::span<std::uint8_t> out);
  IoResult write_plain(std::span<const std::span<const std::uint8_t>> pieces);
  IoResult write_tls(std::span<const std::span<const std::uint8_t>> pieces, std::span<std::uint8_t> scratch);

  Socket socket_;
  Meter& meter_;
  std::unique_ptr<SSL, SslDelete> ssl_;
  unsigned long error_ = 0;  // OpenSSL's code of the last failure
  bool wants_write_ = false;
  bool pending_ = false;
  bool drained_ = false;                                                      // the last read left no bytes in the kernel
  enum class Doubt : std::uint8_t { None, Fresh, Old } doubt_ = Doubt::None;  // whether what is waited for may be there already
};

}  // namespace pgsidecar::proxy
