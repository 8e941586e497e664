// TLS contexts for both sides, verification by sslmode, session resumption and channel binding. PostgreSQL
// documentation, section 34.19 "SSL Support", 19.9 "Secure TCP/IP Connections with SSL"; RFC 5929 section 4.
#pragma once

#include <openssl/ssl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "conf/config.hpp"
#include "conf/load.hpp"
#include "conf/url.hpp"

namespace pgsidecar::proxy {

struct SslContextDelete {
  void operator()(SSL_CTX* c) const { SSL_CTX_free(c); }
};
using SslContext = std::unique_ptr<SSL_CTX, SslContextDelete>;

/// Towards clients: certificate, key, optional CA (Require with a CA asks for a client certificate, VerifyFull demands
/// one), TLS 1.2 and up, no renegotiation, ALPN `postgresql`. Throws std::runtime_error naming the file and the reason.
SslContext make_server_context(const conf::Tls& tls);

/// Towards a server: CAs, client certificate, versions, verification as sslmode says (require with sslrootcert verifies
/// the CA, as libpq does); keeps the newest session for resumption. Throws std::runtime_error.
SslContext make_client_context(const conf::ConnectParams& params);

/// Contexts can be made of what the configuration names.
conf::FileChecks file_checks();

/// Prepares one connection to `host`: SNI (unless an IP literal or sslsni=0), the name or address to verify
/// (verify-full), ALPN if sslnegotiation=direct, the session to resume (not with sslcertmode=require).
void prepare_client(SSL* ssl, const conf::ConnectParams& params, const conf::Host& host);

/// tls-server-end-point data of a certificate (RFC 5929): its hash by its signature's digest, MD5 and SHA-1 as SHA-256.
/// `own`: of our own certificate (we are the server), else of the peer's. Empty if there is none.
std::string channel_binding(SSL* ssl, bool own);

/// Why the peer's certificate isn't trusted, and the key that says which is. Not if it is.
std::string verification_error(const SSL* ssl);

bool asked_for_certificate(SSL* ssl);  ///< the server, of us
bool negotiated_alpn(SSL* ssl);        ///< the peers have agreed on a protocol

/// When it expires, seconds since the epoch; nullopt if there is none.
std::optional<std::int64_t> expiry(const X509* certificate);

/// The common name of the peer's verified certificate (auth: cert); empty if none.
std::string peer_common_name(SSL* ssl);

}  // namespace pgsidecar::proxy
