#include "proxy/tls.hpp"

#include <gtest/gtest.h>

#include <csignal>

#include "support.hpp"

namespace pgsidecar::proxy {
namespace {

using conf::SslMode;
using conf::TlsMode;
using test::Identity;

/// Two authorities and what they have signed.
struct World {
  test::Certificates files;
  Identity ca = files.make({.common_name = "our CA", .authority = true});
  Identity rsa_ca = files.make({.common_name = "RSA CA", .rsa = true, .authority = true});
  Identity other_ca = files.make({.common_name = "another CA", .authority = true});
  Identity server = files.make({.common_name = "ignored", .names = "DNS:db.example,DNS:*.wild.example,IP:127.0.0.1,IP:::1"}, &ca);
  Identity by_name = files.make({.common_name = "old.example"}, &ca);  // no subjectAltName: the common name counts
  Identity expired = files.make({.common_name = "x", .names = "DNS:db.example", .from_days = -9, .to_days = -1}, &ca);
  Identity future = files.make({.common_name = "x", .names = "DNS:db.example", .from_days = 1, .to_days = 9}, &ca);
  Identity foreign = files.make({.common_name = "x", .names = "DNS:db.example"}, &other_ca);
  Identity own = files.make({.common_name = "x", .names = "DNS:db.example"});
  Identity alice = files.make({.common_name = "alice"}, &ca);
  Identity mallory = files.make({.common_name = "mallory"}, &other_ca);
};

World& world() {
  static World all;
  return all;
}

conf::Tls serving(const Identity& identity, TlsMode mode = TlsMode::Allow, const std::string& ca = {}) {
  conf::Tls tls;
  tls.mode = mode;
  tls.certificate = identity.certificate_file;
  tls.key = identity.key_file;
  tls.ca = ca;
  return tls;
}

conf::ConnectParams connecting(SslMode mode, const std::string& root = {}) {
  conf::ConnectParams params;
  params.sslmode = mode;
  params.sslrootcert = root;
  return params;
}

/// One connection between two contexts.
struct Connected : test::Pair {
  Connected(SSL_CTX* server, SSL_CTX* client, const conf::ConnectParams& params, const std::string& host = "db.example") {
    std::signal(SIGPIPE, SIG_IGN);
    near->start_tls(client, false);
    far->start_tls(server, true);
    prepare_client(near->ssl(), params, {host, {}, 5432, {}});
    ok = test::shake(*near, *far);
    // TLS 1.3: the client is through before the server has judged its certificate, and the tickets come behind.
    if (ok) ok = test::write(*far, {"x"}).status == IoStatus::Ok && test::read_all(*near) == "x";
  }
  bool ok;
};

struct Outcome {
  bool ok;
  std::string error;
};

Outcome shake(const conf::Tls& tls, const conf::ConnectParams& params, const std::string& host = "db.example") {
  const SslContext server = make_server_context(tls), client = make_client_context(params);
  Connected link(server.get(), client.get(), params, host);
  return {link.ok, link.ok ? "" : link.near->tls_error()};
}

TEST(Tls, EverySslmodeWithEveryCertificate) {
  World& w = world();
  constexpr SslMode kModes[] = {SslMode::Allow, SslMode::Prefer, SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull};
  const struct {
    const char* what;
    const Identity* server;
    const char* host;
    std::string root;
    const char* ok;  // y or n for each mode
  } rows[] = {
      {"right", &w.server, "db.example", w.ca.certificate_file, "yyyyy"},
      {"no root given: the system's CAs don't know it", &w.server, "db.example", "", "yyynn"},
      {"root system", &w.server, "db.example", "system", "yyynn"},
      {"wrong name", &w.server, "other.example", w.ca.certificate_file, "yyyyn"},
      {"wildcard", &w.server, "a.wild.example", w.ca.certificate_file, "yyyyy"},
      {"wildcard for one label", &w.server, "a.b.wild.example", w.ca.certificate_file, "yyyyn"},
      {"case of the name", &w.server, "DB.Example", w.ca.certificate_file, "yyyyy"},
      {"the common name beside subjectAltName", &w.server, "ignored", w.ca.certificate_file, "yyyyn"},
      {"the common name alone", &w.by_name, "old.example", w.ca.certificate_file, "yyyyy"},
      {"IPv4 address", &w.server, "127.0.0.1", w.ca.certificate_file, "yyyyy"},
      {"IPv6 address", &w.server, "::1", w.ca.certificate_file, "yyyyy"},
      {"wrong address", &w.server, "127.0.0.2", w.ca.certificate_file, "yyyyn"},
      {"wrong CA", &w.foreign, "db.example", w.ca.certificate_file, "nnnnn"},
      {"signed by itself", &w.own, "db.example", w.ca.certificate_file, "nnnnn"},
      {"itself the root", &w.own, "db.example", w.own.certificate_file, "yyyyy"},
      {"expired", &w.expired, "db.example", w.ca.certificate_file, "nnnnn"},
      {"not yet valid", &w.future, "db.example", w.ca.certificate_file, "nnnnn"},
  };
  for (const auto& row : rows)
    for (std::size_t i = 0; i < std::size(kModes); ++i) {
      const Outcome outcome = shake(serving(*row.server), connecting(kModes[i], row.root), row.host);
      EXPECT_EQ(outcome.ok, row.ok[i] == 'y') << row.what << ", mode " << i << ": " << outcome.error;
      if (!outcome.ok) {
        EXPECT_TRUE(outcome.error.starts_with("certificate verify failed: ")) << row.what << outcome.error;
      }
    }
}

TEST(Tls, ClientCertificates) {
  World& w = world();
  const std::string& ca = w.ca.certificate_file;
  const struct {
    const char* what;
    TlsMode mode;
    std::string server_ca;
    const Identity* client;
    bool ok;
    const char* name;
  } rows[] = {
      {"none asked for, none given", TlsMode::Require, "", nullptr, true, ""},
      {"none asked for, one given", TlsMode::Require, "", &w.alice, true, ""},
      {"asked for and given", TlsMode::Require, ca, &w.alice, true, "alice"},
      {"asked for and missing", TlsMode::Require, ca, nullptr, true, ""},
      {"asked for and foreign", TlsMode::Require, ca, &w.mallory, false, ""},
      {"demanded and given", TlsMode::VerifyFull, ca, &w.alice, true, "alice"},
      {"demanded and missing", TlsMode::VerifyFull, ca, nullptr, false, ""},
      {"demanded and foreign", TlsMode::VerifyFull, ca, &w.mallory, false, ""},
  };
  for (const char* version : {"TLSv1.2", "TLSv1.3"})
    for (const auto& row : rows) {
      conf::ConnectParams params = connecting(SslMode::VerifyFull, ca);
      params.sslMaxProtocolVersion = version;
      if (row.client) params.sslcert = row.client->certificate_file, params.sslkey = row.client->key_file;
      const SslContext server = make_server_context(serving(w.server, row.mode, row.server_ca)), client = make_client_context(params);
      Connected link(server.get(), client.get(), params);
      EXPECT_EQ(link.ok, row.ok) << row.what << " " << version;
      EXPECT_EQ(peer_common_name(link.far->ssl()), row.ok ? row.name : "") << row.what << " " << version;
    }
  EXPECT_EQ(peer_common_name(nullptr), "");
}

TEST(Tls, AVerificationThatFailsNamesTheKeyThatItIsAbout) {
  World& w = world();
  const auto error = [&](const Identity& server, SslMode mode, const std::string& root, const std::string& host = "db.example") {
    return shake(serving(server), connecting(mode, root), host).error;
  };
  const std::string &ours = w.ca.certificate_file, &others = w.other_ca.certificate_file;
  EXPECT_NE(error(w.server, SslMode::VerifyFull, "").find("(sslrootcert=FILE names the CA; sslmode=require"), std::string::npos);
  for (const SslMode mode : {SslMode::Require, SslMode::VerifyFull})
    EXPECT_TRUE(error(w.server, mode, others).ends_with(" (its CA isn't in \"" + others + "\", sslrootcert)"));
  EXPECT_TRUE(error(w.server, SslMode::VerifyFull, ours, "other.example").ends_with("sslmode=verify-ca doesn't compare the name)"));
  EXPECT_EQ(error(w.expired, SslMode::VerifyFull, ours), "certificate verify failed: certificate has expired");

  conf::ConnectParams params = connecting(SslMode::Require);
  params.sslcert = w.mallory.certificate_file, params.sslkey = w.mallory.key_file;
  const SslContext server = make_server_context(serving(w.server, TlsMode::Require, ours)), client = make_client_context(params);
  Connected link(server.get(), client.get(), params);
  EXPECT_TRUE(link.far->tls_error().ends_with(" (tls.ca names the CA of the clients' certificates)")) << link.far->tls_error();
}

TEST(Tls, Versions) {
  World& w = world();
  conf::ConnectParams params = connecting(SslMode::VerifyFull, w.ca.certificate_file);
  for (const auto& [low, high, version] : {std::tuple("", "", TLS1_3_VERSION),
                                           {"TLSv1.3", "", TLS1_3_VERSION},
                                           {"", "TLSv1.2", TLS1_2_VERSION},
                                           {"TLSv1.2", "TLSv1.3", TLS1_3_VERSION}}) {
    params.sslMinProtocolVersion = low;
    params.sslMaxProtocolVersion = high;
    const SslContext server = make_server_context(serving(w.server)), client = make_client_context(params);
    Connected link(server.get(), client.get(), params);
    EXPECT_TRUE(link.ok);
    EXPECT_EQ(SSL_version(link.near->ssl()), version) << low << " " << high;
  }
  params.sslMinProtocolVersion = "TLSv1";
  params.sslMaxProtocolVersion = "TLSv1.1";
  EXPECT_FALSE(shake(serving(w.server), params).ok);  // our own server starts at 1.2
  params.sslMaxProtocolVersion = "TLSv9";
  EXPECT_THROW(make_client_context(params), std::runtime_error);
}

// A resumed handshake costs a fraction; tickets of TLS 1.3 are for one use, each connection brings new ones.
TEST(Tls, SessionsAreResumed) {
  World& w = world();
  for (const char* version : {"TLSv1.2", "TLSv1.3"}) {
    conf::ConnectParams params = connecting(SslMode::VerifyFull, w.ca.certificate_file);
    params.sslMaxProtocolVersion = version;
    const SslContext server = make_server_context(serving(w.server)), client = make_client_context(params);
    for (int round = 0; round < 4; ++round) {
      Connected link(server.get(), client.get(), params);
      EXPECT_TRUE(link.ok);
      EXPECT_EQ(SSL_session_reused(link.near->ssl()) == 1, round > 0) << version << " " << round;
      // Channel binding holds in a resumed session too.
      EXPECT_FALSE(channel_binding(link.near->ssl(), false).empty()) << version << " " << round;
      EXPECT_EQ(channel_binding(link.near->ssl(), false), channel_binding(link.far->ssl(), true));
    }
    // Two at once: the second has no ticket of its own to use, and gets through all the same.
    Connected one(server.get(), client.get(), params), two(server.get(), client.get(), params);
    EXPECT_TRUE(one.ok && two.ok);
    // A server that has forgotten the tickets' key.
    const SslContext anew = make_server_context(serving(w.server));
    Connected link(anew.get(), client.get(), params);
    EXPECT_TRUE(link.ok);
    EXPECT_FALSE(SSL_session_reused(link.near->ssl()));
  }
}

TEST(Tls, AlpnIsPostgresqlWithDirectNegotiationAlone) {
  World& w = world();
  for (const bool direct : {false, true}) {
    conf::ConnectParams params = connecting(SslMode::VerifyFull, w.ca.certificate_file);
    if (direct) params.sslnegotiation = conf::SslNegotiation::Direct;
    const SslContext server = make_server_context(serving(w.server)), client = make_client_context(params);
    Connected link(server.get(), client.get(), params);
    EXPECT_TRUE(link.ok);
    for (Transport* end : {&*link.near, &*link.far}) {
      const unsigned char* name = nullptr;
      unsigned size = 0;
      SSL_get0_alpn_selected(end->ssl(), &name, &size);
      EXPECT_EQ(std::string(reinterpret_cast<const char*>(name), size), direct ? "postgresql" : "");
    }
  }
  // Another protocol's client is refused (ALPACA).
  const SslContext server = make_server_context(serving(w.server));
  const conf::ConnectParams params = connecting(SslMode::Prefer);
  const SslContext client = make_client_context(params);
  SSL_CTX_set_alpn_protos(client.get(), reinterpret_cast<const unsigned char*>("\x08http/1.1"), 9);
  EXPECT_FALSE(Connected(server.get(), client.get(), params).ok);
}

TEST(Tls, ServerNameIsSentForNamesAlone) {
  World& w = world();
  for (const auto& [host, sni, sent] :
       {std::tuple("db.example", true, "db.example"), {"db.example", false, ""}, {"127.0.0.1", true, ""}, {"::1", true, ""}}) {
    conf::ConnectParams params = connecting(SslMode::VerifyFull, w.ca.certificate_file);
    params.sslsni = sni;
    const SslContext server = make_server_context(serving(w.server)), client = make_client_context(params);
    static std::string seen;
    seen.clear();
    SSL_CTX_set_client_hello_cb(
        server.get(),
        [](SSL* ssl, int*, void*) {
          const unsigned char* data = nullptr;
          std::size_t size = 0;
          if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_server_name, &data, &size) == 1)
            seen.assign(reinterpret_cast<const char*>(data) + 5, size - 5);
          return SSL_CLIENT_HELLO_SUCCESS;
        },
        nullptr);
    EXPECT_TRUE(Connected(server.get(), client.get(), params, host).ok);
    EXPECT_EQ(seen, sent) << host;
  }
}

// RFC 5929, section 4.1: the digest is the signature's. (MD5 and SHA-1 can't be used in a test: OpenSSL refuses them.)
TEST(Tls, ChannelBindingIsTheSameOnBothSides) {
  World& w = world();
  const struct {
    const EVP_MD* signature;
    bool pss;
    const EVP_MD* hash;
  } rows[] = {
      {EVP_sha256(), false, EVP_sha256()}, {EVP_sha384(), false, EVP_sha384()}, {EVP_sha512(), false, EVP_sha512()},
      {EVP_sha256(), true, EVP_sha256()},  {EVP_sha384(), true, EVP_sha384()},
  };
  for (const auto& row : rows) {
    test::Wish wish{.common_name = "x", .names = "DNS:db.example"};
    wish.digest = row.signature;
    wish.pss = row.pss;
    const Identity identity = w.files.make(wish, row.pss ? &w.rsa_ca : &w.ca);
    const conf::ConnectParams params = connecting(SslMode::Prefer);
    const SslContext server = make_server_context(serving(identity)), client = make_client_context(params);
    Connected link(server.get(), client.get(), params);
    ASSERT_TRUE(link.ok);
    unsigned char hash[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    X509_digest(identity.certificate.get(), row.hash, hash, &size);
    const std::string expected(reinterpret_cast<const char*>(hash), size);
    const std::string name = std::string(EVP_MD_get0_name(row.signature)) + (row.pss ? " PSS" : "");
    EXPECT_EQ(channel_binding(link.near->ssl(), false), expected) << name;
    EXPECT_EQ(channel_binding(link.far->ssl(), true), expected) << name;
    EXPECT_EQ(channel_binding(link.far->ssl(), false), "");  // the client has no certificate
  }
}

TEST(Tls, MistakesAreNamed) {
  World& w = world();
  const auto complaint = [](const auto& make, const auto& from) -> std::string {
    try {
      make(from);
    } catch (const std::runtime_error& e) {
      return e.what();
    }
    return {};
  };
  const std::string text = w.files.directory() + "/not.pem";
  std::FILE* file = std::fopen(text.c_str(), "w");
  std::fputs("hello\n", file);
  std::fclose(file);
  conf::Tls tls = serving(w.server);
  tls.certificate = "/nowhere.crt";
  EXPECT_NE(complaint(make_server_context, tls).find("tls.certificate"), std::string::npos);
  tls.certificate = text;
  EXPECT_NE(complaint(make_server_context, tls).find("tls.certificate"), std::string::npos);
  tls = serving(w.server);
  tls.key = w.alice.key_file;
  EXPECT_NE(complaint(make_server_context, tls).find("tls.key"), std::string::npos);
  tls.key = w.files.directory() + "/encrypted.key";
  file = std::fopen(tls.key.c_str(), "w");
  char phrase[] = "phrase";
  PEM_write_PKCS8PrivateKey(file, w.server.key.get(), EVP_aes_256_cbc(), phrase, sizeof phrase - 1, nullptr, nullptr);
  std::fclose(file);
  EXPECT_EQ(complaint(make_server_context, tls), "tls.key: \"" + tls.key + "\" is encrypted: it has to be stored without a pass phrase");
  tls = serving(w.server, TlsMode::VerifyFull);
  EXPECT_NE(complaint(make_server_context, tls).find("tls.ca"), std::string::npos);
  tls = serving(w.server, TlsMode::Require, text);
  EXPECT_NE(complaint(make_server_context, tls).find("tls.ca"), std::string::npos);

  conf::ConnectParams params = connecting(SslMode::VerifyFull, "/nowhere.crt");
  EXPECT_NE(complaint(make_client_context, params).find("sslrootcert"), std::string::npos);
  params = connecting(SslMode::VerifyFull, w.ca.certificate_file);
  params.sslcert = w.alice.certificate_file;
  params.sslkey = w.mallory.key_file;
  EXPECT_NE(complaint(make_client_context, params).find("key"), std::string::npos);
  params.sslkey = "/nowhere.key";
  EXPECT_NE(complaint(make_client_context, params).find("private key file"), std::string::npos);
  params.sslkey = w.alice.key_file;
  std::filesystem::permissions(params.sslkey, std::filesystem::perms::others_read, std::filesystem::perm_options::add);
  EXPECT_NE(complaint(make_client_context, params).find("group or world access"), std::string::npos);
  std::filesystem::permissions(params.sslkey, std::filesystem::perms::others_read, std::filesystem::perm_options::remove);
  EXPECT_EQ(complaint(make_client_context, params), "");
  params.sslcrl = "/nowhere.crl";
  EXPECT_NE(complaint(make_client_context, params).find("sslcrl"), std::string::npos);
}

}  // namespace
}  // namespace pgsidecar::proxy
