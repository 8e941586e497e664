#include "protocol/login.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

namespace pgsidecar::protocol {
namespace {

/// The frames in a stream, each as (type, body).
std::vector<std::pair<char, std::string>> frames(const std::string& bytes) {
  std::vector<std::pair<char, std::string>> out;
  for (std::size_t at = 0; at + kHeaderSize <= bytes.size();) {
    const std::uint32_t length = load_u32(reinterpret_cast<const std::uint8_t*>(bytes.data() + at + 1));
    out.emplace_back(bytes[at], bytes.substr(at + kHeaderSize, length - 4));
    at += 1 + length;
  }
  return out;
}

Bytes view(const std::string& s) {
  return {reinterpret_cast<const std::uint8_t*>(s.data()), s.size()};
}

struct Outcome {
  ClientLogin::Step client_side{};
  ServerLogin::Step server_side{};
  std::string error;
  std::size_t messages = 0;
};

using Tamper = std::function<void(std::size_t message, std::string& body)>;

/// Both roles against each other.
Outcome play(ClientAuth method, std::optional<std::string> secret, const std::string& password, std::string our_binding = {},
             std::string their_binding = {}, ServerCredentials::Binding binding = ServerCredentials::Binding::Prefer,
             std::vector<std::string> require = {}, bool encrypted = true, const Tamper& tamper = {}) {
  ScramKeyCache cache;
  ClientLogin server(method, "bob", {std::move(secret)}, std::move(our_binding), &cache);
  ServerCredentials credentials;
  credentials.user = "bob";
  credentials.password = password;
  credentials.channel_binding = std::move(their_binding);
  credentials.binding = binding;
  credentials.require_auth = std::move(require);
  credentials.private_way = encrypted;
  ServerLogin client(credentials, {}, &cache);
  std::string to_server, to_client;
  client.begin(to_server);
  Outcome outcome;
  outcome.client_side = server.begin(to_client);
  outcome.server_side = ServerLogin::Step::NeedFrame;
  for (int round = 0; round < 10; ++round) {
    to_server.clear();
    for (auto& [type, body] : frames(std::exchange(to_client, {}))) {
      if (tamper) tamper(outcome.messages, body);
      ++outcome.messages;
      outcome.server_side = client.on_frame(type, view(body), to_server);
      if (outcome.server_side != ServerLogin::Step::NeedFrame) break;
    }
    if (outcome.server_side == ServerLogin::Step::Failed || outcome.client_side != ClientLogin::Step::NeedFrame) break;
    for (auto& [type, body] : frames(to_server)) {
      if (tamper) tamper(outcome.messages, body);
      ++outcome.messages;
      outcome.client_side = server.on_frame(type, view(body), to_client);
      if (outcome.client_side != ClientLogin::Step::NeedFrame) break;
    }
  }
  if (outcome.client_side == ClientLogin::Step::Accepted && outcome.server_side == ServerLogin::Step::NeedFrame)
    outcome.server_side = client.on_frame('Z', view(std::string("I")), to_server);
  outcome.error = client.error().message;
  return outcome;
}

constexpr auto kAccepted = ClientLogin::Step::Accepted;
constexpr auto kReady = ServerLogin::Step::Ready;

std::string verifier(const std::string& password) {
  ScramKeyCache cache;
  const ScramVerifier v = cache.verifier("bob", password);
  const auto text = [](const ScramKey& k) { return base64_encode({reinterpret_cast<const char*>(k.data()), k.size()}); };
  return "SCRAM-SHA-256$4096:" + base64_encode(v.salt) + "$" + text(v.stored_key) + ":" + text(v.server_key);
}

TEST(Login, EveryMethodWithEverySecret) {
  // md5("secretbob")
  const std::string md5 = "md5f59d5b8a35c0b0fe4a3ec1e9a3c5d5aa";
  for (const ClientAuth method : {ClientAuth::Password, ClientAuth::Md5, ClientAuth::Scram})
    for (const std::string& secret : {std::string("secret"), verifier("secret")}) {
      const Outcome right = play(method, secret, "secret");
      EXPECT_TRUE(right.client_side == kAccepted && right.server_side == kReady)
          << static_cast<int>(method) << " " << secret << " " << right.error;
      for (const std::string wrong : {"Secret", "secret ", "s"}) {
        const Outcome refused = play(method, secret, wrong);
        EXPECT_EQ(refused.client_side, ClientLogin::Step::Rejected) << static_cast<int>(method) << " " << wrong;
        EXPECT_EQ(refused.error, "password authentication failed for user \"bob\"");
      }
    }
  EXPECT_EQ(play(ClientAuth::Md5, md5, "wrong").client_side, ClientLogin::Step::Rejected);
  EXPECT_EQ(play(ClientAuth::Trust, std::nullopt, "").server_side, kReady);
}

TEST(Login, AnUnknownUserHearsTheSameAsAWrongPassword) {
  for (const ClientAuth method : {ClientAuth::Password, ClientAuth::Md5, ClientAuth::Scram}) {
    const Outcome unknown = play(method, std::nullopt, "x"), wrong = play(method, "secret", "x");
    EXPECT_EQ(unknown.client_side, ClientLogin::Step::Rejected);
    EXPECT_EQ(unknown.error, wrong.error);
    EXPECT_EQ(unknown.messages, wrong.messages);
  }
}

TEST(Login, ChannelBinding) {
  using B = ServerCredentials::Binding;
  const std::string hash(32, 'h'), other(32, 'o');
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", hash, hash).server_side, kReady);
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", hash, hash, B::Require).server_side, kReady);
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", hash, hash, B::Disable).server_side, kReady);
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", hash, other).client_side, ClientLogin::Step::Rejected);  // a man in the middle
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", {}, hash, B::Require).server_side, ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Trust, {}, "s", {}, hash, B::Require).server_side, ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Password, "s", "s", {}, hash, B::Require).server_side, ServerLogin::Step::Failed);
}

TEST(Login, WhatTheServerMayAskFor) {
  EXPECT_EQ(play(ClientAuth::Password, "s", "s", {}, {}, ServerCredentials::Binding::Prefer, {}, false).server_side,
            ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Md5, "s", "s", {}, {}, ServerCredentials::Binding::Prefer, {"scram-sha-256"}).server_side,
            ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Md5, "s", "s", {}, {}, ServerCredentials::Binding::Prefer, {"!md5"}).server_side, ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Scram, "s", "s", {}, {}, ServerCredentials::Binding::Prefer, {"!md5"}).server_side, kReady);
  EXPECT_EQ(play(ClientAuth::Trust, {}, "s", {}, {}, ServerCredentials::Binding::Prefer, {"scram-sha-256"}).server_side,
            ServerLogin::Step::Failed);
  EXPECT_EQ(play(ClientAuth::Scram, "s", "").server_side, ServerLogin::Step::Failed);
}

TEST(Login, EveryMessageCutShortOrChangedFails) {
  const std::size_t messages = play(ClientAuth::Scram, "s", "s").messages;
  for (std::size_t at = 0; at + 1 < messages; ++at) {
    for (const int how : {0, 1, 2}) {
      const Outcome outcome = play(ClientAuth::Scram, "s", "s", {}, {}, ServerCredentials::Binding::Prefer, {}, true,
                                   [&](std::size_t message, std::string& body) {
                                     if (message != at || body.empty()) return;
                                     if (how == 0) body.pop_back();
                                     if (how == 1) body.clear();
                                     if (how == 2) body[body.size() / 2] ^= 1;
                                   });
      EXPECT_FALSE(outcome.client_side == kAccepted && outcome.server_side == kReady) << at << " " << how;
    }
  }
}

// RFC 7677, section 3.
TEST(Scram, TheRfcsExample) {
  ScramClient client("pencil", {}, false, false, nullptr, "rOprNGfwEbeRWgbNEkqO");
  EXPECT_EQ(client.first(), "n,,n=,r=rOprNGfwEbeRWgbNEkqO");
  std::string error;
  const auto last = client.on_first("r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096", error);
  ASSERT_TRUE(last) << error;
  EXPECT_TRUE(last->starts_with("c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p="));
}

// RFC 4013, section 3, and more; what can't be prepared is compared with the server in test_upstream.py.
TEST(Scram, PasswordsArePrepared) {
  const struct {
    const char *password, *same_as;
  } rows[] = {{"I\u00adX", "IX"},  {"\u2168", "IX"}, {"\u00aa", "a"}, {"e\u0301", "\u00e9"}, {"no\u00a0break", "no break"},
              {"\ufb01ne", "fine"}};
  const auto key = [](const char* password) { return derive_keys({password, "salt", 1}).client_key; };
  for (const auto& row : rows) EXPECT_EQ(key(row.password), key(row.same_as)) << row.password;
  EXPECT_NE(key("\xff\xaa"), key("\xff\xab"));
}

TEST(Scram, RefusesBadServerMessages) {
  for (const char* message : {"", "r=", "r=other,s=QQ==,i=1", "r=n,s=QQ==,i=1", "r=nx,s=,i=1", "r=nx,s=Q,i=1", "r=nx,s=QQ==,i=0",
                              "r=nx,s=QQ==,i=99999999999", "r=nx,s=QQ==,i=10000001", "r=nx,s=QQ==,i=1x", "r=nx,s=QQ==", "x"}) {
    ScramClient client("p", {}, false, false, nullptr, "n");
    client.first();
    std::string error;
    EXPECT_FALSE(client.on_first(message, error)) << message;
  }
}

TEST(Scram, Base64IsCanonical) {
  for (const std::string& bytes : {std::string(), std::string("a"), std::string("ab"), std::string("abc"), std::string(33, '\0')})
    EXPECT_EQ(base64_decode(base64_encode(bytes)), bytes);
  // OpenSSL alone takes all of these.
  for (const char* text : {"=AAA", "A=AA", "    QQ==", "QQ==    ", "QR==", "Q", "QQ=", "QQ!=", "QQ==QQ=="})
    EXPECT_FALSE(base64_decode(text)) << text;
}

TEST(Scram, Verifiers) {
  EXPECT_TRUE(parse_verifier(verifier("x")));
  for (const char* text :
       {"", "SCRAM-SHA-256$", "SCRAM-SHA-256$4096:QQ==$QQ==:QQ==", "SCRAM-SHA-1$4096:QQ==$x:y", "SCRAM-SHA-256$0:QQ==$a:b", "md5abc"})
    EXPECT_FALSE(parse_verifier(text)) << text;
}

TEST(Messages, ErrorsAreReadAndWritten) {
  std::string out;
  write_error(out, Severity::Error, "53300", "m", "d", "h");
  const auto error = parse_error(view(frames(out).at(0).second));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->sqlstate, "53300");
  EXPECT_EQ(error->hint, "h");
  const std::string whole = frames(out)[0].second;
  for (std::size_t n = 0; n < whole.size(); ++n) {
    const std::string cut(whole, 0, n);
    const auto partial = parse_error(view(cut));
    EXPECT_TRUE(!partial || partial->sqlstate.size() == 5);
  }
  EXPECT_EQ(parse_error(view(std::string("\0", 1)))->sqlstate, "XX000");
}

TEST(Messages, Startup) {
  Startup startup;
  startup.parameters = {{"user", "u"}, {"options", "-c a=b"}};
  std::string out;
  write_startup(out, startup);
  const std::string body = out.substr(4);
  const auto read = parse_startup(view(body));
  ASSERT_TRUE(read);
  EXPECT_EQ(read->parameters, startup.parameters);
  for (std::size_t n = 0; n < body.size(); ++n) {
    const std::string cut(body, 0, n);
    EXPECT_FALSE(parse_startup(view(cut))) << n;
  }
  EXPECT_FALSE(parse_startup(view(body + "x")));
}

}  // namespace
}  // namespace pgsidecar::protocol
