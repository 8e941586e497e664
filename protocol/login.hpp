// Both roles of a login, without I/O: ClientLogin is us as the server towards a client, ServerLogin is us as the client
// towards a server. A frame goes in; bytes to send and a step come out. PostgreSQL documentation, sections 55.2.1
// "Start-up" and 55.3 "SASL Authentication"; RFC 5802, RFC 7677, RFC 5929 (tls-server-end-point).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "protocol/messages.hpp"
#include "protocol/scram.hpp"
#include "protocol/wire.hpp"

namespace pgsidecar::protocol {

enum class ClientAuth { Trust, Password, Md5, Scram };

/// What a client must prove. `secret` is pg_authid's form: plain text, `md5...` or `SCRAM-SHA-256$...`; absent: there is
/// no such user, and the exchange is played to its end with a mock verifier before it fails (no user enumeration).
struct ClientSecret {
  std::optional<std::string> secret;
  bool pass_on = false;  ///< nobody here knows it: what the client gives (method Password) is for the server to judge
};

/// Authenticates one client after its StartupMessage. `Md5` with a SCRAM verifier as secret is done by SCRAM, as
/// PostgreSQL does. Failure: FATAL 28P01 `password authentication failed for user "..."` is in `out`.
class ClientLogin {
 public:
  /// `channel_binding`: hash of our own certificate if the client is on TLS (then -PLUS is offered), else empty.
  ClientLogin(ClientAuth method, std::string user, ClientSecret secret, std::string channel_binding = {}, ScramKeyCache* cache = nullptr);

  enum class Step { NeedFrame, Accepted, Rejected, Given };  // Given: given_password() is to be judged; then confirm()
  Step begin(std::string& out);                              ///< appends the first AuthenticationRequest, or AuthenticationOk
  Step on_frame(char type, Bytes body, std::string& out);    ///< 'p' messages; anything else is rejected with 08P01
  static void confirm(std::string& out);                     ///< AuthenticationOk
  /// The password that the client gave in clear text (method Password), for passing on.
  const std::string& given_password() const { return given_password_; }

 private:
  ClientAuth method_;
  std::string user_;
  ClientSecret secret_;
  std::string channel_binding_;
  std::string given_password_;
  Step reject(std::string& out);
  Step on_sasl(Reader& reader, std::string& out);

  ScramKeyCache* cache_;
  std::string salt_;
  std::optional<ScramServer> scram_;
};

/// What ServerLogin may use. An empty password fails clearly when the server asks for one.
struct ServerCredentials {
  std::string user, password;
  std::string channel_binding;  ///< hash of the server's certificate on TLS, else empty
  enum class Binding { Disable, Prefer, Require } binding = Binding::Prefer;
  std::vector<std::string> require_auth;  ///< empty: any; else names as in libpq's require_auth
  bool private_way = false;               ///< TLS or a Unix socket; cleartext passwords are refused if not
};

/// Logs in to a server: from the StartupMessage to the first ReadyForQuery.
class ServerLogin {
 public:
  ServerLogin(ServerCredentials credentials, Startup startup, ScramKeyCache* cache = nullptr);

  enum class Step { NeedFrame, Ready, Failed };
  Step begin(std::string& out);  ///< appends the StartupMessage
  /// Keys that on_frame() is going to derive from this message. It needn't if they are in the cache by then.
  std::optional<ScramDerivation> derivation(char type, Bytes body) const;
  Step on_frame(char type, Bytes body, std::string& out);

  // After Ready:
  const std::map<std::string, std::string>& parameters() const { return parameters_; }  ///< ParameterStatus
  std::uint32_t pid() const { return pid_; }
  const std::string& key() const { return key_; }  ///< cancel key, 4 bytes (3.0) to 256 (3.2)
  // After Failed: the server's own error, or ours.
  const ErrorFields& error() const { return error_; }

 private:
  ServerCredentials credentials_;
  Startup startup_;
  std::map<std::string, std::string> parameters_;
  std::uint32_t pid_ = 0;
  std::string key_;
  ErrorFields error_;
  Step on_authentication(Reader& reader, std::string& out);
  Step fail(std::string sqlstate, std::string message);
  bool allowed(std::string_view method) const;

  ScramKeyCache* cache_;
  std::optional<ScramClient> scram_;
  bool asked_ = false, bound_ = false, continued_ = false, verified_ = false, authenticated_ = false;
};

}  // namespace pgsidecar::protocol
