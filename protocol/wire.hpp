// Message types by their documented names, a checked big-endian reader and a writer.
// PostgreSQL documentation, chapter 55 "Frontend/Backend Protocol", section 55.7 "Message Formats".
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace pgsidecar::protocol {

using Bytes = std::span<const std::uint8_t>;

/// Messages that a frontend sends.
enum class Frontend : char {
  Bind = 'B',
  Close = 'C',
  CopyData = 'd',
  CopyDone = 'c',
  CopyFail = 'f',
  Describe = 'D',
  Execute = 'E',
  Flush = 'H',
  FunctionCall = 'F',
  Parse = 'P',
  Password = 'p',  // PasswordMessage, SASLInitialResponse, SASLResponse, GSSResponse
  Query = 'Q',
  Sync = 'S',
  Terminate = 'X',
};

/// Messages that a backend sends.
enum class Backend : char {
  Authentication = 'R',
  BackendKeyData = 'K',
  BindComplete = '2',
  CloseComplete = '3',
  CommandComplete = 'C',
  CopyBothResponse = 'W',
  CopyData = 'd',
  CopyDone = 'c',
  CopyInResponse = 'G',
  CopyOutResponse = 'H',
  DataRow = 'D',
  EmptyQueryResponse = 'I',
  ErrorResponse = 'E',
  FunctionCallResponse = 'V',
  NegotiateProtocolVersion = 'v',
  NoData = 'n',
  NoticeResponse = 'N',
  NotificationResponse = 'A',
  ParameterDescription = 't',
  ParameterStatus = 'S',
  ParseComplete = '1',
  PortalSuspended = 's',
  ReadyForQuery = 'Z',
  RowDescription = 'T',
};

/// The untyped packets with which a connection begins: the code after the length.
enum StartupCode : std::uint32_t {
  kProtocol30 = 3u << 16,
  kProtocol32 = (3u << 16) | 2,
  kCancelRequest = (1234u << 16) | 5678,
  kSslRequest = (1234u << 16) | 5679,
  kGssEncRequest = (1234u << 16) | 5680,
};

/// ReadyForQuery's transaction status.
enum class TxStatus : char { Idle = 'I', InTransaction = 'T', Failed = 'E' };

inline constexpr std::uint32_t kMaxMessageSize = 0x40000000;  // of what the length counts
inline constexpr std::size_t kHeaderSize = 5;                 // type, then the length, which counts itself but not the type

inline std::uint32_t load_u32(const std::uint8_t* p) {
  return std::uint32_t{p[0]} << 24 | std::uint32_t{p[1]} << 16 | std::uint32_t{p[2]} << 8 | p[3];
}
inline void store_u32(std::uint8_t* p, std::uint32_t v) {
  p[0] = static_cast<std::uint8_t>(v >> 24);
  p[1] = static_cast<std::uint8_t>(v >> 16);
  p[2] = static_cast<std::uint8_t>(v >> 8);
  p[3] = static_cast<std::uint8_t>(v);
}

/// Reads from a message's body. An overrun makes the reader bad for good and yields zeros and empty strings, so that
/// one check of ok() at the end is enough.
class Reader {
 public:
  explicit Reader(Bytes bytes) : p_(bytes.data()), end_(bytes.data() + bytes.size()) {}

  bool ok() const { return ok_; }
  std::size_t left() const { return static_cast<std::size_t>(end_ - p_); }
  bool done() const { return ok_ && p_ == end_; }

  std::uint8_t u8() { return need(1) ? *p_++ : std::uint8_t{0}; }
  std::uint16_t u16() {
    if (!need(2)) return 0;
    const auto v = static_cast<std::uint16_t>(p_[0] << 8 | p_[1]);
    p_ += 2;
    return v;
  }
  std::uint32_t u32() {
    if (!need(4)) return 0;
    const std::uint32_t v = load_u32(p_);
    p_ += 4;
    return v;
  }
  /// A zero-terminated string; the view is into the message.
  std::string_view cstring() {
    const void* zero = ok_ && p_ != end_ ? std::memchr(p_, 0, left()) : nullptr;
    if (!zero) {
      ok_ = false;
      return {};
    }
    const auto* z = static_cast<const std::uint8_t*>(zero);
    const std::string_view s(reinterpret_cast<const char*>(p_), static_cast<std::size_t>(z - p_));
    p_ = z + 1;
    return s;
  }
  Bytes bytes(std::size_t n) {
    if (!need(n)) return {};
    const Bytes b(p_, n);
    p_ += n;
    return b;
  }
  Bytes rest() { return bytes(left()); }

 private:
  bool need(std::size_t n) {
    if (ok_ && left() >= n) return true;
    ok_ = false;
    return false;
  }

  const std::uint8_t* p_;
  const std::uint8_t* end_;
  bool ok_ = true;
};

/// Appends messages to a string. begin() and end() bracket one message; end() fills in its length.
class Writer {
 public:
  explicit Writer(std::string& out) : out_(out) {}

  template <class Type>
  Writer& begin(Type type) {
    out_.push_back(static_cast<char>(type));
    return begin_untyped();
  }
  Writer& begin_untyped() {
    start_ = out_.size();
    out_.append(4, '\0');
    return *this;
  }
  Writer& end() {
    store_u32(reinterpret_cast<std::uint8_t*>(out_.data() + start_), static_cast<std::uint32_t>(out_.size() - start_));
    return *this;
  }
  Writer& u8(std::uint8_t v) {
    out_.push_back(static_cast<char>(v));
    return *this;
  }
  Writer& u16(std::uint16_t v) { return u8(static_cast<std::uint8_t>(v >> 8)).u8(static_cast<std::uint8_t>(v)); }
  Writer& u32(std::uint32_t v) { return u16(static_cast<std::uint16_t>(v >> 16)).u16(static_cast<std::uint16_t>(v)); }
  Writer& cstring(std::string_view s) {
    out_.append(s).push_back('\0');
    return *this;
  }
  Writer& bytes(std::string_view s) {
    out_.append(s);
    return *this;
  }

 private:
  std::string& out_;
  std::size_t start_ = 0;
};

}  // namespace pgsidecar::protocol
