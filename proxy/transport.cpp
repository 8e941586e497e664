#include "proxy/transport.hpp"

#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>

#include "proxy/tls.hpp"

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kRecord = 16 * 1024;
constexpr std::size_t kPieces = 64;  // of one sendmsg

// What OpenSSL reads and writes by: as its own socket BIO, but counted and timed as ours.
struct Wire {
  Meter& meter;
  int fd;
  bool ended = false;
  bool drained = false;
};

Wire& wire_of(BIO* bio) {
  return *static_cast<Wire*>(BIO_get_data(bio));
}

bool would_block() {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

// `drained`: there are no more bytes, since there were fewer than asked for (epoll(7), "Questions and answers").
ssize_t receive(Meter& meter, int fd, void* out, std::size_t size, bool& drained) {
  const Meter::Span span(meter, pool::Phase::Receive);
  ssize_t n;
  do {
    ++meter.counters.receives;
    n = ::recv(fd, out, size, MSG_DONTWAIT);
  } while (n < 0 && errno == EINTR);
  drained = n > 0 ? static_cast<std::size_t>(n) < size : n < 0 && would_block();
  return n;
}

/// At most kPieces, of `size` bytes in all.
ssize_t send_pieces(int fd, std::span<const std::span<const std::uint8_t>> pieces, int flags, std::size_t& size) {
  std::array<iovec, kPieces> vectors;
  size = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    vectors[i] = {const_cast<std::uint8_t*>(pieces[i].data()), pieces[i].size()};
    size += pieces[i].size();
  }
  msghdr message{};
  message.msg_iov = vectors.data();
  message.msg_iovlen = pieces.size();
  return ::sendmsg(fd, &message, flags);
}

int read_wire(BIO* bio, char* out, std::size_t size, std::size_t* got) {
  Wire& wire = wire_of(bio);
  BIO_clear_retry_flags(bio);
  errno = 0;
  const ssize_t n = receive(wire.meter, wire.fd, out, size, wire.drained);
  *got = static_cast<std::size_t>(std::max<ssize_t>(0, n));
  wire.ended = n == 0;
  if (n < 0 && wire.drained) BIO_set_retry_read(bio);
  return n > 0 ? 1 : static_cast<int>(n);
}

int write_wire(BIO* bio, const char* bytes, std::size_t size, std::size_t* taken) {
  Wire& wire = wire_of(bio);
  const Meter::Span span(wire.meter, pool::Phase::Send);
  ++wire.meter.counters.sends;
  BIO_clear_retry_flags(bio);
  errno = 0;
  const ssize_t n = ::send(wire.fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT);
  *taken = static_cast<std::size_t>(std::max<ssize_t>(0, n));
  if (n < 0 && would_block()) BIO_set_retry_write(bio);
  return n > 0 ? 1 : static_cast<int>(n);
}

long control_wire(BIO* bio, int command, long /*number*/, void* /*pointer*/) {
  if (command == BIO_CTRL_EOF) return wire_of(bio).ended;
  return command == BIO_CTRL_FLUSH;
}

int destroy_wire(BIO* bio) {
  delete static_cast<Wire*>(BIO_get_data(bio));
  return 1;
}

BIO* new_wire(Meter& meter, int fd) {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "counted socket");
    BIO_meth_set_read_ex(m, read_wire);
    BIO_meth_set_write_ex(m, write_wire);
    BIO_meth_set_ctrl(m, control_wire);
    BIO_meth_set_destroy(m, destroy_wire);
    return m;
  }();
  BIO* bio = BIO_new(method);
  if (!bio) return nullptr;
  BIO_set_data(bio, new Wire{meter, fd});
  BIO_set_init(bio, 1);
  return bio;
}

}  // namespace

KeepAlive keep_alive_of(const conf::PoolSettings& pool) {
  return {.idle = std::min(KeepAlive::kMostIdle, pool.keepAliveInitialDelayMillis / 1000)};
}

void set_keep_alive(int fd, const KeepAlive& times) {
  const auto set = [fd](int level, int option, std::uint32_t value) { ::setsockopt(fd, level, option, &value, sizeof value); };
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  if (times.idle > 0) set(IPPROTO_TCP, TCP_KEEPIDLE, times.idle);
  set(IPPROTO_TCP, TCP_KEEPINTVL, times.interval);
  set(IPPROTO_TCP, TCP_KEEPCNT, times.count);
}

Transport::Transport(Socket socket, Meter& meter) : socket_(std::move(socket)), meter_(meter) {
  boost::system::error_code ignored;
  socket_.non_blocking(true, ignored);
}

IoResult Transport::read(std::span<std::uint8_t> out) {
  if (!socket_.is_open()) return {IoStatus::Error, 0};
  if (ssl_) {
    const IoResult result = read_tls(out);
    drained_ = !pending_ && wire_of(SSL_get_rbio(ssl_.get())).drained;
    return result;
  }
  const ssize_t n = receive(meter_, socket_.native_handle(), out.data(), out.size(), drained_);
  if (n > 0) return {IoStatus::Ok, static_cast<std::size_t>(n)};
  if (n == 0) return {IoStatus::Eof, 0};
  return {drained_ ? IoStatus::WouldBlock : IoStatus::Error, 0};
}

bool Transport::has_missed() {
  if (doubt_ != Doubt::Old) {
    if (doubt_ == Doubt::Fresh) doubt_ = Doubt::Old;
    return false;
  }
  if (has_unread()) return true;
  doubt_ = Doubt::None;
  return false;
}

bool Transport::has_unread() {
  char byte = 0;
  return ::recv(socket_.native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0 || !would_block();
}

IoResult Transport::read_tls(std::span<std::uint8_t> out) {
  // A record holds at most 16 KiB, so that a full buffer takes several reads.
  const Meter::Span span(meter_, pool::Phase::Tls);
  std::size_t total = 0;
  while (total < out.size()) {
    ERR_clear_error();
    std::size_t n = 0;
    const int done = SSL_read_ex(ssl_.get(), out.data() + total, out.size() - total, &n);
    if (done == 1) {
      total += n;
      wants_write_ = false;
      // A short record with nothing behind it: asking again would only hear that there is nothing.
      if (n < kRecord / 2 && total < out.size() && SSL_has_pending(ssl_.get()) == 0) break;
      continue;
    }
    pending_ = false;
    if (total > 0) return {IoStatus::Ok, total};
    return failed(done);
  }
  pending_ = total == out.size();
  return {IoStatus::Ok, total};
}

IoResult Transport::failed(int result) {
  switch (SSL_get_error(ssl_.get(), result)) {
    case SSL_ERROR_WANT_READ: wants_write_ = false; return {IoStatus::WouldBlock, 0};
    case SSL_ERROR_WANT_WRITE: wants_write_ = true; return {IoStatus::WouldBlock, 0};
    case SSL_ERROR_ZERO_RETURN: return {IoStatus::Eof, 0};
    case SSL_ERROR_SYSCALL: return {errno == 0 ? IoStatus::Eof : IoStatus::Error, 0};
    default: {
      const unsigned long code = ERR_peek_error();
      if (ERR_GET_REASON(code) == SSL_R_UNEXPECTED_EOF_WHILE_READING) return {IoStatus::Eof, 0};
      error_ = code;
      return {IoStatus::Error, 0};
    }
  }
}

IoResult Transport::write(std::span<const std::span<const std::uint8_t>> pieces, std::span<std::uint8_t> scratch) {
  if (!socket_.is_open()) return {IoStatus::Error, 0};
  return ssl_ ? write_tls(pieces, scratch) : write_plain(pieces);
}

IoResult Transport::write_plain(std::span<const std::span<const std::uint8_t>> pieces) {
  const Meter::Span span(meter_, pool::Phase::Send);
  constexpr int flags = MSG_NOSIGNAL | MSG_DONTWAIT;
  const int fd = socket_.native_handle();
  std::size_t total = 0;
  while (!pieces.empty()) {
    const auto now = pieces.first(std::min(pieces.size(), kPieces));
    std::size_t size = 0;
    ssize_t n;
    do {
      ++meter_.counters.sends;
      if (now.size() == 1) {  // send is cheaper than sendmsg
        size = now[0].size();
        n = ::send(fd, now[0].data(), size, flags);
      } else {
        n = send_pieces(fd, now, flags, size);
      }
    } while (n < 0 && errno == EINTR);
    if (n < 0) return {would_block() ? IoStatus::WouldBlock : IoStatus::Error, total};
    total += static_cast<std::size_t>(n);
    if (static_cast<std::size_t>(n) < size) return {IoStatus::WouldBlock, total};
    pieces = pieces.subspan(now.size());
  }
  return {IoStatus::Ok, total};
}

IoResult Transport::write_tls(std::span<const std::span<const std::uint8_t>> pieces, std::span<std::uint8_t> scratch) {
  const Meter::Span span(meter_, pool::Phase::Tls);
  std::size_t total = 0, piece = 0, offset = 0;
  const std::size_t room = std::min(scratch.size(), kRecord);
  while (piece < pieces.size()) {
    std::span<const std::uint8_t> chunk = pieces[piece].subspan(offset);
    if (chunk.empty()) {
      ++piece, offset = 0;
      continue;
    }
    if (chunk.size() < room && piece + 1 < pieces.size()) {
      std::size_t filled = 0;
      for (std::size_t i = piece, from = offset; i < pieces.size() && filled < room; ++i, from = 0) {
        const std::size_t n = std::min(room - filled, pieces[i].size() - from);
        std::copy_n(pieces[i].data() + from, n, scratch.data() + filled);
        filled += n;
      }
      chunk = scratch.first(filled);
    }
    ERR_clear_error();
    std::size_t n = 0;
    const int done = SSL_write_ex(ssl_.get(), chunk.data(), std::min(chunk.size(), kRecord), &n);
    if (done != 1) {
      IoResult result = failed(done);
      result.bytes = total;
      return result;
    }
    total += n;
    while (n > 0) {
      const std::size_t here = std::min(n, pieces[piece].size() - offset);
      n -= here;
      offset += here;
      if (offset == pieces[piece].size()) ++piece, offset = 0;
    }
  }
  return {IoStatus::Ok, total};
}

void Transport::start_tls(SSL_CTX* context, bool server) {
  ssl_.reset(SSL_new(context));
  if (!ssl_) return;
  SSL_set_read_ahead(ssl_.get(), 1);  // a record's header and body by one read
  SSL_set_mode(ssl_.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  BIO* wire = new_wire(meter_, static_cast<int>(socket_.native_handle()));
  SSL_set_bio(ssl_.get(), wire, wire);
  if (server)
    SSL_set_accept_state(ssl_.get());
  else
    SSL_set_connect_state(ssl_.get());
}

IoResult Transport::handshake() {
  if (!ssl_) return {IoStatus::Error, 0};
  const Meter::Span span(meter_, pool::Phase::Tls);
  auto& counted = SSL_is_server(ssl_.get()) ? meter_.counters.clientHandshakes : meter_.counters.serverHandshakes;
  const auto begun = Meter::Clock::now();
  ERR_clear_error();
  const int done = SSL_do_handshake(ssl_.get());
  counted.nanos += static_cast<std::uint64_t>((Meter::Clock::now() - begun).count());
  if (done == 1) {
    ++(SSL_session_reused(ssl_.get()) ? counted.resumed : counted.full);
    wants_write_ = false;
    return {IoStatus::Ok, 0};
  }
  const IoResult result = failed(done);
  counted.failed += result.status != IoStatus::WouldBlock;
  return result;
}

std::string Transport::tls_error() const {
  if (!ssl_) return {};
  if (SSL_get_verify_result(ssl_.get()) != X509_V_OK) return verification_error(ssl_.get());
  if (error_ == 0) return "connection closed during the TLS handshake";
  if (const char* reason = ERR_reason_error_string(error_)) return reason;
  char text[256];
  ERR_error_string_n(error_, text, sizeof text);
  return text;
}

void Transport::shutdown_send() {
  if (!socket_.is_open()) return;
  if (ssl_) {
    ERR_clear_error();
    SSL_shutdown(ssl_.get());
  }
  ::shutdown(socket_.native_handle(), SHUT_WR);
}

void Transport::close() {
  boost::system::error_code ignored;
  if (socket_.is_open()) socket_.close(ignored);
  ssl_.reset();
}

}  // namespace pgsidecar::proxy
