#include "proxy/transport.hpp"

#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kRecord = 16 * 1024;

/// Counts the system calls that OpenSSL makes for us.
long on_bio(BIO* bio, int operation, const char* /*data*/, std::size_t /*size*/, int /*argi*/, long /*argl*/, int result,
            std::size_t* /*processed*/) {
  Meter& meter = *reinterpret_cast<Meter*>(BIO_get_callback_arg(bio));
  switch (operation) {
    case BIO_CB_READ:
      ++meter.counters.receives;
      meter.enter(pool::Phase::Receive);
      break;
    case BIO_CB_WRITE:
      ++meter.counters.sends;
      meter.enter(pool::Phase::Send);
      break;
    case BIO_CB_READ | BIO_CB_RETURN:
    case BIO_CB_WRITE | BIO_CB_RETURN: meter.enter(pool::Phase::Tls); break;
    default: break;
  }
  return result;
}

}  // namespace

Transport::Transport(Socket socket, Meter& meter) : socket_(std::move(socket)), meter_(meter) {
  boost::system::error_code ignored;
  socket_.non_blocking(true, ignored);
}

IoResult Transport::read(std::span<std::uint8_t> out) {
  if (!socket_.is_open()) return {IoStatus::Error, 0};
  if (!ssl_) {
    const Meter::Span span(meter_, pool::Phase::Receive);
    for (;;) {
      ++meter_.counters.receives;
      const ssize_t n = ::recv(socket_.native_handle(), out.data(), out.size(), MSG_DONTWAIT);
      if (n > 0) return {IoStatus::Ok, static_cast<std::size_t>(n)};
      if (n == 0) return {IoStatus::Eof, 0};
      if (errno == EINTR) continue;
      return {errno == EAGAIN || errno == EWOULDBLOCK ? IoStatus::WouldBlock : IoStatus::Error, 0};
    }
  }
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
      char text[256];
      ERR_error_string_n(code, text, sizeof text);
      error_ = code ? ERR_reason_error_string(code) ? ERR_reason_error_string(code) : text : "";
      return {IoStatus::Error, 0};
    }
  }
}

IoResult Transport::write(std::span<const std::span<const std::uint8_t>> pieces, std::span<std::uint8_t> scratch) {
  if (!socket_.is_open()) return {IoStatus::Error, 0};
  std::size_t total = 0;
  if (!ssl_) {
    const Meter::Span span(meter_, pool::Phase::Send);
    constexpr std::size_t kPieces = 64;
    std::array<iovec, kPieces> vectors;
    std::size_t first = 0, skip = 0;
    while (first < pieces.size()) {
      std::size_t count = 0, size = 0;
      for (std::size_t i = first; i < pieces.size() && count < kPieces; ++i, ++count) {
        const auto piece = pieces[i].subspan(i == first ? skip : 0);
        vectors[count] = {const_cast<std::uint8_t*>(piece.data()), piece.size()};
        size += piece.size();
      }
      msghdr message{};
      message.msg_iov = vectors.data();
      message.msg_iovlen = count;
      ++meter_.counters.sends;
      const ssize_t n = ::sendmsg(socket_.native_handle(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) {
        if (errno == EINTR) continue;
        return {errno == EAGAIN || errno == EWOULDBLOCK ? IoStatus::WouldBlock : IoStatus::Error, total};
      }
      total += static_cast<std::size_t>(n);
      if (static_cast<std::size_t>(n) < size) return {IoStatus::WouldBlock, total};
      first += count;
      skip = 0;
    }
    return {IoStatus::Ok, total};
  }
  const Meter::Span span(meter_, pool::Phase::Tls);
  std::size_t piece = 0, offset = 0;
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
  SSL_set_fd(ssl_.get(), static_cast<int>(socket_.native_handle()));
  BIO_set_callback_arg(SSL_get_rbio(ssl_.get()), reinterpret_cast<char*>(&meter_));  // the same for writing
  BIO_set_callback_ex(SSL_get_rbio(ssl_.get()), on_bio);
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
  if (const long verify = SSL_get_verify_result(ssl_.get()); verify != X509_V_OK)
    return std::string("certificate verify failed: ") + X509_verify_cert_error_string(verify) +
           " (sslrootcert=FILE names the CA; sslmode=require encrypts without verification)";
  return error_.empty() ? "connection closed during the TLS handshake" : error_;
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
