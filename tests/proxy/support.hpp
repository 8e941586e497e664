// Two transports that face each other, a kernel that takes only so many bytes, and certificates made on the spot.
#pragma once

#include <gtest/gtest.h>
#include <openssl/bn.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "proxy/tls.hpp"
#include "proxy/transport.hpp"

namespace pgsidecar::proxy::test {

/// What sendmsg still takes in this program; negative: as much as the kernel does (support.cpp).
extern long g_send_budget;
extern std::atomic<int> g_sends;  ///< calls of send and sendmsg so far

using Bytes = std::span<const std::uint8_t>;
inline Bytes view(const std::string& s) {
  return {reinterpret_cast<const std::uint8_t*>(s.data()), s.size()};
}

/// A text in which every place differs from its neighbours, so that a mistake in the order shows.
inline std::string pattern(std::size_t size) {
  std::string out(size, '\0');
  for (std::size_t i = 0; i < size; ++i) out[i] = static_cast<char>((i * 131 + i / 251) & 0xff);
  return out;
}

/// Two ends of one unix stream socket.
struct Pair {
  Pair() {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) != 0) throw std::runtime_error("socketpair");
    for (const int i : {0, 1}) {
      Socket socket(loop.get_executor(), boost::asio::local::stream_protocol(), fds[i]);
      (i == 0 ? near : far).emplace(std::move(socket), meter);
    }
  }
  boost::asio::io_context loop;
  Meter meter;
  std::optional<Transport> near, far;
};

inline std::vector<std::uint8_t>& scratch() {
  static std::vector<std::uint8_t> bytes(16 * 1024);
  return bytes;
}

/// Everything that can be read now, by reads into buffers of `step` bytes each.
inline std::string read_all(Transport& transport, IoStatus* last = nullptr, std::size_t step = 64 * 1024) {
  std::string out;
  for (;;) {
    std::vector<std::uint8_t> exact(step);
    const IoResult got = transport.read(exact);
    out.append(reinterpret_cast<const char*>(exact.data()), got.bytes);
    if (last) *last = got.status;
    if (got.status != IoStatus::Ok) return out;
  }
}

inline IoResult write(Transport& transport, const std::vector<std::string>& texts, std::size_t skip = 0) {
  std::vector<Bytes> pieces;
  for (const std::string& text : texts) {
    const std::size_t n = std::min(skip, text.size());
    skip -= n;
    pieces.push_back(view(text).subspan(n));
  }
  return transport.write(pieces, scratch());
}

/// Both ends' handshakes by turns. True: both are through.
inline bool shake(Transport& client, Transport& server) {
  IoStatus c = IoStatus::WouldBlock, s = IoStatus::WouldBlock;
  for (int round = 0; round < 20; ++round) {
    if (c == IoStatus::WouldBlock) c = client.handshake().status;
    if (s == IoStatus::WouldBlock) s = server.handshake().status;
    if (c != IoStatus::WouldBlock && s != IoStatus::WouldBlock) break;
    if (c == IoStatus::Error && round > 4) break;
  }
  return c == IoStatus::Ok && s == IoStatus::Ok;
}

struct KeyDelete {
  void operator()(EVP_PKEY* k) const { EVP_PKEY_free(k); }
};
struct CertificateDelete {
  void operator()(X509* c) const { X509_free(c); }
};

/// A certificate with its key, in files.
struct Identity {
  std::unique_ptr<EVP_PKEY, KeyDelete> key;
  std::unique_ptr<X509, CertificateDelete> certificate;
  std::string certificate_file, key_file;
};

/// What a certificate should be.
struct Wish {
  std::string common_name{};
  std::string names{};  ///< subjectAltName as OpenSSL writes it: DNS:a,IP:127.0.0.1
  long from_days = -1, to_days = 1;
  const EVP_MD* digest = EVP_sha256();
  bool pss = false;  ///< signed by RSA-PSS (the issuer's key is RSA)
  bool rsa = false;
  bool authority = false;
};

/// A directory that is gone at the end, for certificates.
class Certificates {
 public:
  Certificates() {
    std::string name = "/tmp/pgsidecar-tls-XXXXXX";
    directory_ = ::mkdtemp(name.data());
  }
  ~Certificates() { std::filesystem::remove_all(directory_); }
  Certificates(const Certificates&) = delete;

  const std::string& directory() const { return directory_; }
  /// `issuer` nullptr: signs itself.
  Identity make(const Wish& wish, const Identity* issuer = nullptr);

 private:
  std::string directory_;
  long serial_ = 1;
};

}  // namespace pgsidecar::proxy::test
