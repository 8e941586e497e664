#include "protocol/login.hpp"

#include <openssl/crypto.h>
#include <openssl/evp.h>

#include <algorithm>

namespace pgsidecar::protocol {

namespace {

// AuthenticationRequest codes.
constexpr std::uint32_t kOk = 0, kCleartext = 3, kMd5 = 5, kSasl = 10, kSaslContinue = 11, kSaslFinal = 12;

std::string md5_hex(std::string_view text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  EVP_Digest(text.data(), text.size(), digest, &size, EVP_md5(), nullptr);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (unsigned i = 0; i < size; ++i) {
    out += kHex[digest[i] >> 4];
    out += kHex[digest[i] & 15];
  }
  return out;
}

/// pg_authid's md5 form.
std::string md5_secret(std::string_view password, std::string_view user) {
  return "md5" + md5_hex(std::string(password) + std::string(user));
}

bool is_md5_secret(std::string_view secret) {
  return secret.size() == 35 && secret.starts_with("md5") && secret.find_first_not_of("0123456789abcdef", 3) == std::string_view::npos;
}

bool equal(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

void write_request(std::string& out, std::uint32_t code, std::string_view rest = {}) {
  Writer(out).begin(Backend::Authentication).u32(code).bytes(rest).end();
}

}  // namespace

// --- towards a client

ClientLogin::ClientLogin(ClientAuth method, std::string user, ClientSecret secret, std::string channel_binding, ScramKeyCache* cache)
    : method_(method), user_(std::move(user)), secret_(std::move(secret)), channel_binding_(std::move(channel_binding)), cache_(cache) {
  // A verifier can't be asked for by md5, nor an md5 hash by SCRAM.
  const bool verifier = secret_.secret && parse_verifier(*secret_.secret);
  if (method_ == ClientAuth::Md5 && verifier) method_ = ClientAuth::Scram;
}

ClientLogin::Step ClientLogin::reject(std::string& out) {
  write_error(out, Severity::Fatal, "28P01", "password authentication failed for user \"" + user_ + "\"");
  return Step::Rejected;
}

ClientLogin::Step ClientLogin::begin(std::string& out) {
  switch (method_) {
    case ClientAuth::Trust: confirm(out); return Step::Accepted;
    case ClientAuth::Password: write_request(out, kCleartext); return Step::NeedFrame;
    case ClientAuth::Md5:
      salt_ = random_bytes(4);
      write_request(out, kMd5, salt_);
      return Step::NeedFrame;
    case ClientAuth::Scram: break;
  }
  std::string mechanisms;
  if (!channel_binding_.empty()) mechanisms += std::string("SCRAM-SHA-256-PLUS") + '\0';
  mechanisms += std::string("SCRAM-SHA-256") + '\0';
  mechanisms += '\0';
  write_request(out, kSasl, mechanisms);
  return Step::NeedFrame;
}

ClientLogin::Step ClientLogin::on_frame(char type, Bytes body, std::string& out) {
  if (type != static_cast<char>(Frontend::Password)) {
    write_error(out, Severity::Fatal, "08P01",
                "expected password response, got message type " + std::to_string(static_cast<unsigned char>(type)));
    return Step::Rejected;
  }
  Reader reader(body);
  if (method_ == ClientAuth::Scram) return on_sasl(reader, out);
  const std::string_view given = reader.cstring();
  if (!reader.done()) {
    write_error(out, Severity::Fatal, "08P01", "invalid password packet size");
    return Step::Rejected;
  }
  if (!secret_.secret && secret_.pass_on && !given.empty()) {
    given_password_ = given;
    return Step::Given;
  }
  if (!secret_.secret) return reject(out);
  const std::string& secret = *secret_.secret;
  bool right = false;
  if (method_ == ClientAuth::Md5) {
    const std::string hash = is_md5_secret(secret) ? secret : md5_secret(secret, user_);
    right = equal(given, "md5" + md5_hex(hash.substr(3) + salt_));
  } else if (is_md5_secret(secret)) {
    right = equal(md5_secret(given, user_), secret);
  } else if (const auto verifier = parse_verifier(secret)) {
    ScramKeyCache once;
    const ScramKeys keys = (cache_ ? *cache_ : once).derive({std::string(given), verifier->salt, verifier->iterations});
    right = keys.server_key == verifier->server_key;
  } else {
    right = equal(given, secret) && !secret.empty();
  }
  if (!right) return reject(out);
  confirm(out);
  return Step::Accepted;
}

void ClientLogin::confirm(std::string& out) {
  write_request(out, kOk);
}

ClientLogin::Step ClientLogin::on_sasl(Reader& reader, std::string& out) {
  if (!scram_) {
    const std::string_view mechanism = reader.cstring();
    const std::uint32_t size = reader.u32();
    const Bytes initial = size == 0xffffffff ? Bytes() : reader.bytes(size);
    if (!reader.done()) {
      write_error(out, Severity::Fatal, "08P01", "malformed SCRAM message");
      return Step::Rejected;
    }
    if (mechanism != "SCRAM-SHA-256" && mechanism != "SCRAM-SHA-256-PLUS") {
      write_error(out, Severity::Fatal, "08P01", "client selected an invalid SASL authentication mechanism");
      return Step::Rejected;
    }
    ScramKeyCache once;
    ScramKeyCache& cache = cache_ ? *cache_ : once;
    // An md5 hash can't be used for SCRAM: as with PostgreSQL, the login fails at its end.
    const bool usable = secret_.secret && !secret_.secret->empty() && !is_md5_secret(*secret_.secret);
    std::optional<ScramVerifier> verifier = usable ? parse_verifier(*secret_.secret) : std::nullopt;
    if (!verifier) verifier = cache.verifier(user_, usable ? std::optional<std::string_view>(*secret_.secret) : std::nullopt);
    scram_.emplace(std::move(*verifier), usable, channel_binding_);
    const auto answer = scram_->first(mechanism, {reinterpret_cast<const char*>(initial.data()), initial.size()});
    if (!answer) {
      write_error(out, Severity::Fatal, "08P01", "malformed SCRAM message");
      return Step::Rejected;
    }
    write_request(out, kSaslContinue, *answer);
    return Step::NeedFrame;
  }
  const Bytes message = reader.rest();
  const auto answer = scram_->final({reinterpret_cast<const char*>(message.data()), message.size()});
  if (!answer) return reject(out);
  write_request(out, kSaslFinal, *answer);
  write_request(out, kOk);
  return Step::Accepted;
}

// --- towards a server

ServerLogin::ServerLogin(ServerCredentials credentials, Startup startup, ScramKeyCache* cache)
    : credentials_(std::move(credentials)), startup_(std::move(startup)), cache_(cache) {}

ServerLogin::Step ServerLogin::begin(std::string& out) {
  write_startup(out, startup_);
  return Step::NeedFrame;
}

std::optional<ScramDerivation> ServerLogin::derivation(char type, Bytes body) const {
  Reader reader(body);
  if (type != static_cast<char>(Backend::Authentication) || reader.u32() != kSaslContinue || !scram_ || !cache_) return std::nullopt;
  const Bytes message = reader.rest();
  auto from = scram_->derivation({reinterpret_cast<const char*>(message.data()), message.size()});
  return from && !cache_->knows(*from) ? std::move(from) : std::nullopt;
}

ServerLogin::Step ServerLogin::fail(std::string sqlstate, std::string message) {
  error_ = {"FATAL", std::move(sqlstate), std::move(message), {}, {}};
  return Step::Failed;
}

// libpq's require_auth: a list of methods, or of methods that must not be used ("!md5").
bool ServerLogin::allowed(std::string_view method) const {
  const auto& wanted = credentials_.require_auth;
  if (wanted.empty()) return true;
  const bool negative = wanted.front().starts_with("!");
  const bool listed = std::any_of(wanted.begin(), wanted.end(), [&](const std::string& w) {
    return (negative && w.starts_with("!") ? std::string_view(w).substr(1) : std::string_view(w)) == method;
  });
  return listed != negative;
}

ServerLogin::Step ServerLogin::on_frame(char type, Bytes body, std::string& out) {
  Reader reader(body);
  switch (static_cast<Backend>(type)) {
    case Backend::Authentication: return on_authentication(reader, out);
    case Backend::ErrorResponse: {
      auto error = parse_error(body);
      if (!error) return fail("08P01", "malformed error message from the server");
      error_ = std::move(*error);
      return Step::Failed;
    }
    case Backend::NoticeResponse:
    case Backend::NegotiateProtocolVersion: return Step::NeedFrame;
    case Backend::ParameterStatus: {
      const std::string_view name = reader.cstring();
      const std::string_view value = reader.cstring();
      if (!reader.done()) break;
      parameters_[std::string(name)] = value;
      return Step::NeedFrame;
    }
    case Backend::BackendKeyData: {
      pid_ = reader.u32();
      const Bytes key = reader.rest();
      if (!reader.ok() || key.size() < 4 || key.size() > 256) break;
      key_.assign(reinterpret_cast<const char*>(key.data()), key.size());
      return Step::NeedFrame;
    }
    case Backend::ReadyForQuery:
      if (!authenticated_ || body.size() != 1) break;
      return Step::Ready;
    default: break;
  }
  return fail("08P01", "unexpected message from the server during login");
}

ServerLogin::Step ServerLogin::on_authentication(Reader& reader, std::string& out) {
  const std::uint32_t code = reader.u32();
  if (!reader.ok() || authenticated_) return fail("08P01", "malformed authentication request from the server");
  const bool must_bind = credentials_.binding == ServerCredentials::Binding::Require;
  if (must_bind && code != kSasl && code != kSaslContinue && code != kSaslFinal && !(code == kOk && bound_))
    return fail("28000", "channel binding required, but the server authenticated the client without channel binding");
  const auto password_needed = [&]() { return credentials_.password.empty(); };
  const auto no_password = [&] {
    return fail("28P01", "the server asks for a password, and none was supplied for user \"" + credentials_.user + "\"");
  };
  const auto answer = [&](std::string_view text) {
    Writer(out).begin(Frontend::Password).cstring(text).end();
    return Step::NeedFrame;
  };
  switch (code) {
    case kOk:
      if (scram_ && !verified_) return fail("28000", "the server ended SCRAM authentication without proving itself");
      if (!asked_ && !allowed("none")) return fail("28000", "the server did not ask for authentication, which require_auth demands");
      authenticated_ = true;
      return Step::NeedFrame;
    case kCleartext:
      if (!allowed("password")) return fail("28000", "the server asks for a cleartext password, which require_auth does not allow");
      if (!credentials_.private_way && credentials_.require_auth.empty())
        return fail("28000", "the server asks for a cleartext password on an unencrypted connection (require_auth=password allows it)");
      if (password_needed()) return no_password();
      asked_ = true;
      return answer(credentials_.password);
    case kMd5: {
      const Bytes salt = reader.bytes(4);
      if (!reader.done()) return fail("08P01", "malformed authentication request from the server");
      if (!allowed("md5")) return fail("28000", "the server asks for an md5 password, which require_auth does not allow");
      if (password_needed()) return no_password();
      asked_ = true;
      const std::string hash =
          is_md5_secret(credentials_.password) ? credentials_.password : md5_secret(credentials_.password, credentials_.user);
      return answer("md5" + md5_hex(hash.substr(3) + std::string(reinterpret_cast<const char*>(salt.data()), 4)));
    }
    case kSasl: {
      bool plain = false, plus = false;
      for (std::string_view name = reader.cstring(); reader.ok() && !name.empty(); name = reader.cstring()) {
        plain |= name == "SCRAM-SHA-256";
        plus |= name == "SCRAM-SHA-256-PLUS";
      }
      if (!reader.done() || scram_) return fail("08P01", "malformed SASL request from the server");
      if (!allowed("scram-sha-256")) return fail("28000", "the server asks for SCRAM, which require_auth does not allow");
      const bool can_bind = !credentials_.channel_binding.empty() && credentials_.binding != ServerCredentials::Binding::Disable;
      const bool use_plus = plus && can_bind;
      if (must_bind && !use_plus)
        return fail("28000", "channel binding is required, but the server did not offer an authentication method that supports it");
      if (!use_plus && !plain) return fail("28000", "none of the server's SASL authentication mechanisms are supported");
      if (password_needed()) return no_password();
      asked_ = true;
      bound_ = use_plus;
      scram_.emplace(credentials_.password, can_bind ? credentials_.channel_binding : std::string(), use_plus, plus, cache_);
      const std::string first = scram_->first();
      Writer(out)
          .begin(Frontend::Password)
          .cstring(use_plus ? "SCRAM-SHA-256-PLUS" : "SCRAM-SHA-256")
          .u32(static_cast<std::uint32_t>(first.size()))
          .bytes(first)
          .end();
      return Step::NeedFrame;
    }
    case kSaslContinue: {
      const Bytes message = reader.rest();
      if (!scram_ || continued_) return fail("08P01", "unexpected SASL message from the server");
      continued_ = true;
      std::string error;
      const auto last = scram_->on_first({reinterpret_cast<const char*>(message.data()), message.size()}, error);
      if (!last) return fail("08P01", error);
      Writer(out).begin(Frontend::Password).bytes(*last).end();
      return Step::NeedFrame;
    }
    case kSaslFinal: {
      const Bytes message = reader.rest();
      if (!continued_ || !scram_->on_final({reinterpret_cast<const char*>(message.data()), message.size()}))
        return fail("28000", "incorrect server signature: the server does not know the password");
      verified_ = true;
      return Step::NeedFrame;
    }
    default:
      return fail("28000",
                  "authentication method " + std::to_string(code) + " asked for by the server is not supported (GSSAPI, SSPI or other)");
  }
}

}  // namespace pgsidecar::protocol
