// SCRAM-SHA-256 and -PLUS in both roles, without I/O. RFC 5802, RFC 7677, RFC 5929; PostgreSQL documentation, section 55.3.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

namespace pgsidecar::protocol {

using ScramKey = std::array<std::uint8_t, 32>;

/// What a server stores of a password: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
struct ScramVerifier {
  std::uint32_t iterations = 4096;
  std::string salt;
  ScramKey stored_key{}, server_key{};
};
/// Reads pg_authid's form; nullopt if it is none.
std::optional<ScramVerifier> parse_verifier(std::string_view text);

/// ClientKey and ServerKey of a password.
struct ScramKeys {
  ScramKey client_key{}, server_key{};
};

/// What keys are derived from by PBKDF2: about a millisecond for PostgreSQL's 4096 iterations, seconds for the most that are allowed.
struct ScramDerivation {
  std::string password, salt;
  std::uint32_t iterations = 0;
};
ScramKeys derive_keys(const ScramDerivation& from);

/// Keys derived before. Bounded; keyed by a digest, so that it holds no password.
/// Also the salts of verifiers made here, so that one password has one verifier for the process's life.
class ScramKeyCache {
 public:
  ScramKeyCache();
  ScramKeys derive(const ScramDerivation& from);
  bool knows(const ScramDerivation& from) const { return keys_.contains(key_of(from)); }
  void add(const ScramDerivation& from, const ScramKeys& keys);
  /// A verifier for a password in plain text, or a mock for a user that doesn't exist (`password` nullopt): its salt is
  /// always the same for a name, so that asking twice tells nothing.
  ScramVerifier verifier(std::string_view user, std::optional<std::string_view> password);

 private:
  std::string key_of(const ScramDerivation& from) const;

  std::string secret_;  // random, of this process
  std::unordered_map<std::string, ScramKeys> keys_;
};

/// The server's role.
class ScramServer {
 public:
  ScramServer(ScramVerifier verifier, bool user_exists, std::string channel_binding)
      : verifier_(std::move(verifier)), user_exists_(user_exists), binding_(std::move(channel_binding)) {}
  /// Each takes the client's message and gives the answer; nullopt: refused.
  std::optional<std::string> first(std::string_view mechanism, std::string_view message);
  std::optional<std::string> final(std::string_view message);

 private:
  ScramVerifier verifier_;
  bool user_exists_;
  std::string binding_, gs2_header_, nonce_, client_bare_, server_first_;
  bool plus_ = false;
};

/// The client's role.
class ScramClient {
 public:
  ScramClient(std::string password, std::string channel_binding, bool plus, bool server_offers_plus, ScramKeyCache* cache,
              std::string nonce = {});
  std::string first();
  /// What on_first() will derive keys from; nullopt: the message is malformed.
  std::optional<ScramDerivation> derivation(std::string_view server_first) const;
  std::optional<std::string> on_first(std::string_view server_first, std::string& error);
  bool on_final(std::string_view server_final);

 private:
  std::string password_, binding_, gs2_header_, nonce_, client_bare_;
  ScramKeyCache* cache_;
  ScramKey server_signature_{};
};

ScramKey hmac_sha256(std::string_view key, std::string_view data);
std::string base64_encode(std::string_view bytes);
std::optional<std::string> base64_decode(std::string_view text);
std::string random_bytes(std::size_t n);

}  // namespace pgsidecar::protocol
