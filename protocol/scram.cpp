#include "protocol/scram.hpp"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <openssl/sha.h>
#include <stringprep.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <stdexcept>

namespace pgsidecar::protocol {

namespace {

constexpr std::uint32_t kMaxIterations = 10'000'000;
constexpr std::size_t kMaxMessage = 8 * 1024, kMaxCached = 1024, kNonce = 18;

const unsigned char* data(std::string_view s) {
  return reinterpret_cast<const unsigned char*>(s.data());
}
std::string_view view(const ScramKey& key) {
  return {reinterpret_cast<const char*>(key.data()), key.size()};
}

/// As the server and libpq do: a password that can't be prepared is taken as it is. RFC 4013.
std::string saslprep(const std::string& password) {
  if (std::all_of(password.begin(), password.end(), [](char c) { return static_cast<unsigned char>(c) < 128; })) return password;
  char* prepared = nullptr;
  if (stringprep_profile(password.c_str(), &prepared, "SASLprep", STRINGPREP_NO_UNASSIGNED) != STRINGPREP_OK) return password;
  std::string out(prepared);
  std::free(prepared);
  return out.empty() ? password : out;
}

ScramKey sha256(std::string_view text) {
  ScramKey out;
  SHA256(data(text), text.size(), out.data());
  return out;
}

ScramKey operator^(const ScramKey& a, const ScramKey& b) {
  ScramKey out;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = a[i] ^ b[i];
  return out;
}

bool equal(const ScramKey& a, const ScramKey& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

std::optional<ScramKey> to_key(std::string_view bytes) {
  if (bytes.size() != 32) return std::nullopt;
  ScramKey key;
  std::copy(bytes.begin(), bytes.end(), key.begin());
  return key;
}

/// Takes `x=value` off the front of a message; nullopt if the attribute is another.
std::optional<std::string_view> attribute(std::string_view& message, char name) {
  if (message.size() < 2 || message[0] != name || message[1] != '=') return std::nullopt;
  const std::size_t comma = message.find(',');
  const std::string_view value = message.substr(2, comma == std::string_view::npos ? comma : comma - 2);
  message = comma == std::string_view::npos ? std::string_view() : message.substr(comma + 1);
  return value;
}

}  // namespace

ScramKey hmac_sha256(std::string_view key, std::string_view text) {
  ScramKey out;
  unsigned size = 0;
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()), data(text), text.size(), out.data(), &size);
  return out;
}

std::string random_bytes(std::size_t n) {
  std::string out(n, '\0');
  if (RAND_bytes(reinterpret_cast<unsigned char*>(out.data()), static_cast<int>(n)) != 1) throw std::runtime_error("no randomness");
  return out;
}

std::string base64_encode(std::string_view bytes) {
  std::string out((bytes.size() + 2) / 3 * 4, '\0');
  EVP_EncodeBlock(reinterpret_cast<unsigned char*>(out.data()), data(bytes), static_cast<int>(bytes.size()));
  return out;
}

std::optional<std::string> base64_decode(std::string_view text) {
  if (text.size() % 4 != 0 || text.size() > kMaxMessage) return std::nullopt;
  std::string out(text.size() / 4 * 3, '\0');
  if (text.empty()) return out;
  if (EVP_DecodeBlock(reinterpret_cast<unsigned char*>(out.data()), data(text), static_cast<int>(text.size())) < 0) return std::nullopt;
  if (text.back() == '=') out.pop_back();
  if (text[text.size() - 2] == '=') out.pop_back();
  // OpenSSL takes blanks at the ends, and '=' for an 'A' in the middle.
  if (base64_encode(out) != text) return std::nullopt;
  return out;
}

std::optional<ScramVerifier> parse_verifier(std::string_view text) {
  constexpr std::string_view kPrefix = "SCRAM-SHA-256$";
  if (!text.starts_with(kPrefix)) return std::nullopt;
  text.remove_prefix(kPrefix.size());
  const std::size_t colon = text.find(':'), dollar = text.find('$'), second = text.rfind(':');
  if (colon == std::string_view::npos || dollar == std::string_view::npos || colon > dollar || second < dollar) return std::nullopt;
  ScramVerifier v;
  const auto [end, ec] = std::from_chars(text.data(), text.data() + colon, v.iterations);
  if (ec != std::errc() || end != text.data() + colon || v.iterations == 0 || v.iterations > kMaxIterations) return std::nullopt;
  const auto salt = base64_decode(text.substr(colon + 1, dollar - colon - 1));
  const auto stored = base64_decode(text.substr(dollar + 1, second - dollar - 1));
  const auto server = base64_decode(text.substr(second + 1));
  if (!salt || salt->empty() || !stored || !server) return std::nullopt;
  const auto stored_key = to_key(*stored), server_key = to_key(*server);
  if (!stored_key || !server_key) return std::nullopt;
  v.salt = *salt;
  v.stored_key = *stored_key;
  v.server_key = *server_key;
  return v;
}

ScramKeys derive_keys(const ScramDerivation& from) {
  const std::string password = saslprep(from.password);
  ScramKey salted;
  PKCS5_PBKDF2_HMAC(password.data(), static_cast<int>(password.size()), data(std::string_view(from.salt)),
                    static_cast<int>(from.salt.size()), static_cast<int>(from.iterations), EVP_sha256(), static_cast<int>(salted.size()),
                    salted.data());
  const ScramKeys keys{hmac_sha256(view(salted), "Client Key"), hmac_sha256(view(salted), "Server Key")};
  OPENSSL_cleanse(salted.data(), salted.size());
  return keys;
}

ScramKeyCache::ScramKeyCache() : secret_(random_bytes(32)) {}

std::string ScramKeyCache::key_of(const ScramDerivation& from) const {
  std::string what = std::to_string(from.iterations) + ":" + base64_encode(from.salt) + ":" + from.password;
  std::string key(view(hmac_sha256(secret_, what)));
  OPENSSL_cleanse(what.data(), what.size());
  return key;
}

ScramKeys ScramKeyCache::derive(const ScramDerivation& from) {
  if (const auto it = keys_.find(key_of(from)); it != keys_.end()) return it->second;
  const ScramKeys keys = derive_keys(from);
  add(from, keys);
  return keys;
}

void ScramKeyCache::add(const ScramDerivation& from, const ScramKeys& keys) {
  if (keys_.size() >= kMaxCached) keys_.clear();
  keys_.emplace(key_of(from), keys);
}

ScramVerifier ScramKeyCache::verifier(std::string_view user, std::optional<std::string_view> password) {
  ScramVerifier v;
  v.salt = std::string(view(hmac_sha256(secret_, "salt:" + std::string(user)))).substr(0, 16);
  if (!password) {
    v.stored_key = hmac_sha256(secret_, "mock:" + std::string(user));
    v.server_key = v.stored_key;
    return v;
  }
  const ScramKeys keys = derive({std::string(*password), v.salt, v.iterations});
  v.stored_key = sha256(view(keys.client_key));
  v.server_key = keys.server_key;
  return v;
}

std::optional<std::string> ScramServer::first(std::string_view mechanism, std::string_view message) {
  if (message.size() > kMaxMessage || message.find('\0') != std::string_view::npos) return std::nullopt;
  plus_ = mechanism == "SCRAM-SHA-256-PLUS";
  if ((plus_ && binding_.empty()) || (!plus_ && mechanism != "SCRAM-SHA-256")) return std::nullopt;
  const std::string_view whole = message;
  // gs2-header: p=type | n | y, then an authorization identity, which PostgreSQL doesn't take.
  if (message.starts_with("p=tls-server-end-point,")) {
    if (!plus_) return std::nullopt;
    message.remove_prefix(message.find(',') + 1);
  } else if (message.starts_with("n,") || message.starts_with("y,")) {
    // "y": the client could bind but believes that we can't; with -PLUS on offer someone has cut it out.
    if (plus_ || (message[0] == 'y' && !binding_.empty())) return std::nullopt;
    message.remove_prefix(2);
  } else {
    return std::nullopt;
  }
  if (!message.starts_with(",")) return std::nullopt;
  message.remove_prefix(1);
  gs2_header_ = whole.substr(0, whole.size() - message.size());
  client_bare_ = message;
  const auto user = attribute(message, 'n');
  const auto nonce = attribute(message, 'r');
  if (!user || !nonce || nonce->empty()) return std::nullopt;
  nonce_ = std::string(*nonce) + base64_encode(random_bytes(kNonce));
  server_first_ = "r=" + nonce_ + ",s=" + base64_encode(verifier_.salt) + ",i=" + std::to_string(verifier_.iterations);
  return server_first_;
}

std::optional<std::string> ScramServer::final(std::string_view message) {
  if (message.size() > kMaxMessage) return std::nullopt;
  const std::size_t proof_at = message.rfind(",p=");
  if (proof_at == std::string_view::npos) return std::nullopt;
  const std::string auth = client_bare_ + "," + server_first_ + "," + std::string(message.substr(0, proof_at));
  const auto proof_text = base64_decode(message.substr(proof_at + 3));
  const auto binding = attribute(message, 'c');
  const auto nonce = attribute(message, 'r');
  if (!proof_text || !binding || !nonce || *nonce != nonce_) return std::nullopt;
  if (*binding != base64_encode(gs2_header_ + (plus_ ? binding_ : std::string()))) return std::nullopt;
  const auto proof = to_key(*proof_text);
  if (!proof) return std::nullopt;
  const ScramKey client_key = *proof ^ hmac_sha256(view(verifier_.stored_key), auth);
  if (!equal(sha256(view(client_key)), verifier_.stored_key) || !user_exists_) return std::nullopt;
  return "v=" + base64_encode(view(hmac_sha256(view(verifier_.server_key), auth)));
}

ScramClient::ScramClient(std::string password, std::string channel_binding, bool plus, bool server_offers_plus, ScramKeyCache* cache,
                         std::string nonce)
    : password_(std::move(password)), cache_(cache) {
  if (plus) {
    binding_ = std::move(channel_binding);
    gs2_header_ = "p=tls-server-end-point,,";
  } else {
    gs2_header_ = !channel_binding.empty() && !server_offers_plus ? "y,," : "n,,";
  }
  nonce_ = nonce.empty() ? base64_encode(random_bytes(kNonce)) : std::move(nonce);
}

std::string ScramClient::first() {
  client_bare_ = "n=,r=" + nonce_;  // the user is the StartupMessage's
  return gs2_header_ + client_bare_;
}

std::optional<ScramDerivation> ScramClient::derivation(std::string_view server_first) const {
  if (server_first.size() > kMaxMessage) return std::nullopt;
  const auto nonce = attribute(server_first, 'r');
  const auto salt_text = attribute(server_first, 's');
  const auto count = attribute(server_first, 'i');
  if (!nonce || !salt_text || !count || !nonce->starts_with(nonce_) || nonce->size() == nonce_.size()) return std::nullopt;
  const auto salt = base64_decode(*salt_text);
  std::uint32_t iterations = 0;
  const auto [end, ec] = std::from_chars(count->data(), count->data() + count->size(), iterations);
  if (!salt || salt->empty() || ec != std::errc() || end != count->data() + count->size() || iterations == 0 || iterations > kMaxIterations)
    return std::nullopt;
  return ScramDerivation{password_, *salt, iterations};
}

std::optional<std::string> ScramClient::on_first(std::string_view server_first, std::string& error) {
  const auto from = derivation(server_first);
  if (!from) {
    error = "malformed SCRAM message from the server";
    return std::nullopt;
  }
  const ScramKeys keys = cache_ ? cache_->derive(*from) : derive_keys(*from);
  std::string_view rest = server_first;
  const std::string_view nonce = *attribute(rest, 'r');
  const std::string without_proof = "c=" + base64_encode(gs2_header_ + binding_) + ",r=" + std::string(nonce);
  const std::string auth = client_bare_ + "," + std::string(server_first) + "," + without_proof;
  const ScramKey proof = keys.client_key ^ hmac_sha256(view(sha256(view(keys.client_key))), auth);
  server_signature_ = hmac_sha256(view(keys.server_key), auth);
  return without_proof + ",p=" + base64_encode(view(proof));
}

bool ScramClient::on_final(std::string_view server_final) {
  const auto signature = attribute(server_final, 'v');
  if (!signature) return false;
  const auto bytes = base64_decode(*signature);
  const auto key = bytes ? to_key(*bytes) : std::nullopt;
  return key && equal(*key, server_signature_);
}

}  // namespace pgsidecar::protocol
