#include "proxy/tls.hpp"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <ctime>
#include <set>
#include <stdexcept>
#include <vector>

namespace pgsidecar::proxy {

namespace {

constexpr unsigned char kAlpn[] = "\x0apostgresql";
constexpr unsigned kAlpnSize = sizeof kAlpn - 1;

[[noreturn]] void fail(const std::string& what) {
  const unsigned long code = ERR_get_error();
  const char* reason = code ? ERR_reason_error_string(code) : nullptr;
  ERR_clear_error();
  throw std::runtime_error(what + (reason ? std::string(": ") + reason : std::string()));
}

/// Of a context towards servers: the newest session, for resumption, and the file of the CAs. Attached to it and freed with it.
struct Towards {
  SSL_SESSION* session = nullptr;
  std::string roots{};
  ~Towards() { SSL_SESSION_free(session); }
};

int towards_index() {
  static const int index = SSL_CTX_get_ex_new_index(
      0, nullptr, nullptr, nullptr, [](void*, void* data, CRYPTO_EX_DATA*, int, long, void*) { delete static_cast<Towards*>(data); });
  return index;
}

int keep_session(SSL* ssl, SSL_SESSION* session) {
  auto* towards = static_cast<Towards*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), towards_index()));
  SSL_SESSION_free(towards->session);
  towards->session = session;
  return 1;
}

int choose_alpn(SSL*, const unsigned char** out, unsigned char* size, const unsigned char* in, unsigned in_size, void*) {
  unsigned char* chosen = nullptr;
  if (SSL_select_next_proto(&chosen, size, kAlpn, kAlpnSize, in, in_size) != OPENSSL_NPN_NEGOTIATED) return SSL_TLSEXT_ERR_ALERT_FATAL;
  *out = chosen;
  return SSL_TLSEXT_ERR_OK;
}

int version_of(const std::string& name) {
  if (name.empty()) return 0;
  if (name == "TLSv1.2") return TLS1_2_VERSION;
  if (name == "TLSv1.3") return TLS1_3_VERSION;
  if (name == "TLSv1.1") return TLS1_1_VERSION;
  if (name == "TLSv1") return TLS1_VERSION;
  throw std::runtime_error("invalid TLS version \"" + name + "\" (TLSv1.2, TLSv1.3)");
}

/// libpq's rule: a key is its owner's alone, or root's and readable by the group.
void check_key_file(const std::string& file) {
  struct stat info {};
  if (::stat(file.c_str(), &info) != 0) throw std::runtime_error("could not read private key file \"" + file + "\"");
  const bool ok = info.st_uid == 0 && ::geteuid() != 0 ? (info.st_mode & 0137) == 0
                                                       : (info.st_mode & 0177) == 0 || (info.st_uid == 0 && (info.st_mode & 0137) == 0);
  if (!ok)
    throw std::runtime_error("private key file \"" + file +
                             "\" has group or world access; file must have permissions u=rw (0600) or less if owned by the "
                             "current user, or permissions u=rw,g=r (0640) or less if owned by root");
}

int give_password(char* buffer, int size, int, void* password) {
  const auto& text = *static_cast<const std::string*>(password);
  const auto n = std::min(static_cast<std::size_t>(size), text.size());
  std::copy_n(text.data(), n, buffer);
  return static_cast<int>(n);
}

/// There is none; without this OpenSSL asks the terminal for it.
int refuse_password(char*, int, int, void* asked) {
  *static_cast<bool*>(asked) = true;
  return -1;
}

void use_key(SSL_CTX* c, const std::string& file) {
  bool encrypted = false;
  SSL_CTX_set_default_passwd_cb(c, refuse_password);
  SSL_CTX_set_default_passwd_cb_userdata(c, &encrypted);
  const bool ok = SSL_CTX_use_PrivateKey_file(c, file.c_str(), SSL_FILETYPE_PEM) == 1;
  SSL_CTX_set_default_passwd_cb_userdata(c, nullptr);
  if (encrypted) ERR_clear_error();
  if (encrypted) fail("tls.key: \"" + file + "\" is encrypted: it has to be stored without a pass phrase");
  if (!ok) fail("tls.key: cannot use \"" + file + "\"");
}

bool is_address(const std::string& host) {
  unsigned char buffer[16];
  return ::inet_pton(AF_INET, host.c_str(), buffer) == 1 || ::inet_pton(AF_INET6, host.c_str(), buffer) == 1;
}

}  // namespace

SslContext make_server_context(const conf::Tls& tls) {
  SslContext context(SSL_CTX_new(TLS_server_method()));
  if (!context) fail("TLS");
  SSL_CTX* c = context.get();
  SSL_CTX_set_min_proto_version(c, TLS1_2_VERSION);
  SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_mode(c, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_alpn_select_cb(c, choose_alpn, nullptr);
  if (SSL_CTX_use_certificate_chain_file(c, tls.certificate.c_str()) != 1) fail("tls.certificate: cannot use \"" + tls.certificate + "\"");
  use_key(c, tls.key);
  if (SSL_CTX_check_private_key(c) != 1) fail("tls.key: \"" + tls.key + "\" is not the key of tls.certificate");
  if (!tls.ca.empty()) {
    if (SSL_CTX_load_verify_locations(c, tls.ca.c_str(), nullptr) != 1) fail("tls.ca: cannot use \"" + tls.ca + "\"");
    SSL_CTX_set_client_CA_list(c, SSL_load_client_CA_file(tls.ca.c_str()));
    SSL_CTX_set_verify(c, SSL_VERIFY_PEER | (tls.mode == conf::TlsMode::VerifyFull ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0), nullptr);
  } else if (tls.mode == conf::TlsMode::VerifyFull) {
    throw std::runtime_error("tls.mode verify-full needs tls.ca, the CA of the clients' certificates");
  }
  static constexpr unsigned char kContext[] = "pgsidecar";
  SSL_CTX_set_session_id_context(c, kContext, sizeof kContext - 1);
  return context;
}

SslContext make_client_context(const conf::ConnectParams& p) {
  SslContext context(SSL_CTX_new(TLS_client_method()));
  if (!context) fail("TLS");
  SSL_CTX* c = context.get();
  SSL_CTX_set_min_proto_version(c, p.sslMinProtocolVersion.empty() ? TLS1_2_VERSION : version_of(p.sslMinProtocolVersion));
  if (!p.sslMaxProtocolVersion.empty()) SSL_CTX_set_max_proto_version(c, version_of(p.sslMaxProtocolVersion));
  SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION);
  const bool system = p.sslrootcert.empty() || p.sslrootcert == "system";
  const bool verify = p.sslmode == conf::SslMode::VerifyCa || p.sslmode == conf::SslMode::VerifyFull || !system;
  if (verify) {
    if (system ? SSL_CTX_set_default_verify_paths(c) != 1 : SSL_CTX_load_verify_locations(c, p.sslrootcert.c_str(), nullptr) != 1)
      fail("could not read root certificate file \"" + p.sslrootcert + "\" (sslrootcert)");
    SSL_CTX_set_verify(c, SSL_VERIFY_PEER, nullptr);
    if (!p.sslcrl.empty() || !p.sslcrldir.empty()) {
      X509_STORE* store = SSL_CTX_get_cert_store(c);
      if (!p.sslcrl.empty() && X509_STORE_load_file(store, p.sslcrl.c_str()) != 1) fail("could not read \"" + p.sslcrl + "\" (sslcrl)");
      if (!p.sslcrldir.empty() && X509_STORE_load_path(store, p.sslcrldir.c_str()) != 1)
        fail("could not use \"" + p.sslcrldir + "\" (sslcrldir)");
      X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
    }
  }
  if (!p.sslcert.empty()) {
    if (SSL_CTX_use_certificate_chain_file(c, p.sslcert.c_str()) != 1)
      fail("could not read certificate file \"" + p.sslcert + "\" (sslcert)");
    check_key_file(p.sslkey);
    SSL_CTX_set_default_passwd_cb(c, give_password);
    SSL_CTX_set_default_passwd_cb_userdata(c, const_cast<std::string*>(&p.sslpassword));
    int ok = SSL_CTX_use_PrivateKey_file(c, p.sslkey.c_str(), SSL_FILETYPE_PEM);
    if (ok != 1) ok = SSL_CTX_use_PrivateKey_file(c, p.sslkey.c_str(), SSL_FILETYPE_ASN1);
    SSL_CTX_set_default_passwd_cb_userdata(c, nullptr);
    if (ok != 1) fail("could not load private key file \"" + p.sslkey + "\" (sslkey)");
    if (SSL_CTX_check_private_key(c) != 1) fail("certificate does not match private key file \"" + p.sslkey + "\"");
  }
  SSL_CTX_set_ex_data(c, towards_index(), new Towards{nullptr, system ? std::string() : p.sslrootcert});
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL_STORE);
  SSL_CTX_sess_set_new_cb(c, keep_session);
  return context;
}

conf::FileChecks file_checks() {
  return {[](const conf::Tls& tls) { make_server_context(tls); },
          [passed = std::set<std::vector<std::string>>()](const conf::ConnectParams& p) mutable {
            const bool named = (!p.sslrootcert.empty() && p.sslrootcert != "system") || !(p.sslcert + p.sslcrl + p.sslcrldir).empty();
            if (p.sslmode == conf::SslMode::Disable || !named) return;  // the system's CAs would take memory
            std::vector<std::string> asks{p.sslrootcert, p.sslcert, p.sslkey, p.sslpassword, p.sslcrl, p.sslcrldir};
            asks.insert(asks.end(), {std::to_string(static_cast<int>(p.sslmode)), p.sslMinProtocolVersion, p.sslMaxProtocolVersion});
            if (passed.contains(asks)) return;  // of another database
            make_client_context(p);
            passed.insert(std::move(asks));
          }};
}

void prepare_client(SSL* ssl, const conf::ConnectParams& params, const conf::Host& host) {
  const bool address = is_address(host.name);
  if (params.sslsni && !address && !host.name.empty()) SSL_set_tlsext_host_name(ssl, host.name.c_str());
  if (params.sslmode == conf::SslMode::VerifyFull) {
    X509_VERIFY_PARAM* verify = SSL_get0_param(ssl);
    X509_VERIFY_PARAM_set_hostflags(verify, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    if (address)
      X509_VERIFY_PARAM_set1_ip_asc(verify, host.name.c_str());
    else
      X509_VERIFY_PARAM_set1_host(verify, host.name.c_str(), host.name.size());
  }
  if (params.sslnegotiation == conf::SslNegotiation::Direct) SSL_set_alpn_protos(ssl, kAlpn, kAlpnSize);
  const auto note_request = [](SSL* asked, void*) { return SSL_set_app_data(asked, asked); };
  SSL_set_cert_cb(ssl, note_request, nullptr);
  if (params.sslcertRequired) return;  // of a resumed session no certificate is asked for
  auto* towards = static_cast<Towards*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), towards_index()));
  if (towards && towards->session) {
    SSL_set_session(ssl, towards->session);
    if (SSL_SESSION_get_protocol_version(towards->session) == TLS1_3_VERSION) {  // its tickets are for one use
      SSL_SESSION_free(towards->session);
      towards->session = nullptr;
    }
  }
}

std::string channel_binding(SSL* ssl, bool own) {
  X509* certificate = own ? SSL_get_certificate(ssl) : SSL_get0_peer_certificate(ssl);
  if (!certificate) return {};
  int digest = NID_undef;
  // Of RSA-PSS too, whose digest is a parameter (PostgreSQL 16 and newer).
  if (X509_get_signature_info(certificate, &digest, nullptr, nullptr, nullptr) != 1 || digest == NID_undef) return {};
  if (digest == NID_md5 || digest == NID_sha1) digest = NID_sha256;
  const EVP_MD* md = EVP_get_digestbynid(digest);
  unsigned char hash[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  if (!md || X509_digest(certificate, md, hash, &size) != 1) return {};
  return {reinterpret_cast<const char*>(hash), size};
}

namespace {

bool is_of_unknown_ca(long verify) {
  return verify == X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT || verify == X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY ||
         verify == X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE || verify == X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT ||
         verify == X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN;
}

std::string hint_of(const SSL* ssl, long verify) {
  if (verify == X509_V_ERR_HOSTNAME_MISMATCH || verify == X509_V_ERR_IP_ADDRESS_MISMATCH)
    return " (it is another host's; sslmode=verify-ca doesn't compare the name)";
  if (!is_of_unknown_ca(verify)) return {};
  if (SSL_is_server(ssl)) return " (tls.ca names the CA of the clients' certificates)";
  const auto* towards = static_cast<const Towards*>(SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), towards_index()));
  return !towards || towards->roots.empty() ? " (sslrootcert=FILE names the CA; sslmode=require encrypts without verification)"
                                            : " (its CA isn't in \"" + towards->roots + "\", sslrootcert)";
}

}  // namespace

std::string verification_error(const SSL* ssl) {
  const long verify = SSL_get_verify_result(ssl);
  return std::string("certificate verify failed: ") + X509_verify_cert_error_string(verify) + hint_of(ssl, verify);
}

bool asked_for_certificate(SSL* ssl) {
  return SSL_get_app_data(ssl) != nullptr;
}

bool negotiated_alpn(SSL* ssl) {
  const unsigned char* protocol = nullptr;
  unsigned size = 0;
  SSL_get0_alpn_selected(ssl, &protocol, &size);
  return size > 0;
}

std::optional<std::int64_t> expiry(const X509* certificate) {
  std::tm utc{};
  if (!certificate || ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &utc) != 1) return std::nullopt;
  return ::timegm(&utc);
}

std::string peer_common_name(SSL* ssl) {
  X509* certificate = ssl ? SSL_get0_peer_certificate(ssl) : nullptr;
  if (!certificate || SSL_get_verify_result(ssl) != X509_V_OK) return {};
  const X509_NAME* name = X509_get_subject_name(certificate);
  const int at = X509_NAME_get_index_by_NID(name, NID_commonName, -1);
  if (at < 0) return {};
  const ASN1_STRING* text = X509_NAME_ENTRY_get_data(X509_NAME_get_entry(name, at));
  const std::string cn(reinterpret_cast<const char*>(ASN1_STRING_get0_data(text)), static_cast<std::size_t>(ASN1_STRING_length(text)));
  return cn.find('\0') == std::string::npos ? cn : std::string();
}

}  // namespace pgsidecar::proxy
