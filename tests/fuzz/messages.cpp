// The messages that are parsed: a startup, its options, errors; and the frames of a login in both roles.
#include "protocol/messages.hpp"

#include "fuzz.hpp"
#include "protocol/login.hpp"

using namespace pgsidecar::protocol;
using namespace std::string_literals;

namespace {

void startup(std::string_view text) {
  const Exact body(text);
  const auto read = parse_startup(body.view());
  if (!read) return;
  std::string again;
  write_startup(again, *read);
  require(again.size() == text.size() + 4 && again.substr(4) == text, "a startup is written as it was read");
  std::string complaint;
  if (const auto options = read->get("options"); !options.empty()) parse_options(Exact(options).text(), complaint);
}

void error(std::string_view text) {
  const Exact body(text);
  const auto read = parse_error(body.view());
  if (!read) return;
  require(read->sqlstate.size() == 5, "an error has a SQLSTATE");
  std::string again;
  write_error(again, Severity::Error, read->sqlstate, read->message, read->detail, read->hint);
  const Exact written(std::string_view(again).substr(kHeaderSize));
  const auto second = parse_error(written.view());
  require(second && second->sqlstate == read->sqlstate && second->message == read->message && second->hint == read->hint,
          "an error is read as it was written");
}

/// Frames: a type, a length byte, a body.
template <class Frame>
void frames(Choices& choices, Frame&& frame) {
  while (choices.more()) {
    const char type = static_cast<char>(choices.next());
    const std::size_t size = choices.next();
    const Exact body(choices.take(size));
    if (!frame(type, body.view())) return;
  }
}

void server_login(Choices& choices) {
  ServerCredentials credentials;
  credentials.user = "u";
  credentials.password = "p";
  const std::uint8_t how = choices.next();
  const bool require_binding = how & 1;
  if (require_binding) credentials.binding = ServerCredentials::Binding::Require;
  if (how & 2) credentials.channel_binding = "hash";
  if (how & 4) credentials.private_way = true;
  if (how & 8) credentials.require_auth = {"scram-sha-256"};
  ServerLogin login(credentials, {});
  std::string out;
  login.begin(out);
  frames(choices, [&](char type, Bytes body) {
    if (type == 'R' && body.size() > 200) return false;
    if (type == 'R' && body.size() > 4 && body[3] == 11 &&
        std::string_view(reinterpret_cast<const char*>(body.data()), body.size()).find(",i=") != std::string_view::npos)
      return false;  // a derivation takes its time
    const auto step = login.on_frame(type, body, out);
    // Nobody here knows the password, so nobody can pass for a server that must prove itself.
    if (step == ServerLogin::Step::Ready) require(!require_binding && !(how & 8), "a login that needs proof ends without");
    return step == ServerLogin::Step::NeedFrame;
  });
}

void client_login(Choices& choices) {
  static ScramKeyCache cache;
  const auto method = static_cast<ClientAuth>(1 + choices.below(3));
  ClientLogin login(method, "bob", {choices.below(2) ? std::optional<std::string>("a secret that nobody guesses") : std::nullopt},
                    choices.below(2) ? "hash" : "", &cache);
  std::string out;
  login.begin(out);
  frames(choices, [&](char type, Bytes body) {
    const auto step = login.on_frame(type, body, out);
    require(step != ClientLogin::Step::Accepted, "a client without the secret is not accepted");
    return step == ClientLogin::Step::NeedFrame;
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices(data, size);
  std::string complaint;
  switch (choices.below(5)) {
    case 0: startup(choices.take(size)); break;
    case 1: error(choices.take(size)); break;
    case 2: parse_options(Exact(choices.take(size)).text(), complaint); break;
    case 3: server_login(choices); break;
    default: client_login(choices); break;
  }
  return 0;
}

std::vector<std::string> seeds() {
  const auto frame = [](char type, const std::string& body) { return std::string(1, type) + static_cast<char>(body.size()) + body; };
  return {
      "\0\0\3\0\0user\0u\0options\0-c a=b --c=d\\ e\0\0"s,
      "\0"s +
          "\0\3\0\2user\0u\0_pq_.x\0"
          "1\0\0"s,
      "\1SERROR\0VERROR\0C53300\0Mm\0Dd\0Hh\0\0"s,
      "\2-c a=b -cc=d --e-f=g\\ h"s,
      "\3\2"s + frame('R', "\0\0\0\x0aSCRAM-SHA-256\0SCRAM-SHA-256-PLUS\0\0"s) + frame('R', "\0\0\0\x0br=x,s=QQ=="s) +
          frame('R', "\0\0\0\x0cv=QQ=="s) + frame('R', "\0\0\0\0"s),
      "\3\4"s + frame('R', "\0\0\0\3"s) + frame('R', "\0\0\0\0"s) + frame('S', "a\0b\0"s) + frame('K', "\0\0\0\1keys"s) + frame('Z', "I"),
      "\3\5"s + frame('R', "\0\0\0\5salt"s) + frame('E', "SFATAL\0C28P01\0Mno\0\0"s),
      "\4\2\1\1"s + frame('p', "SCRAM-SHA-256-PLUS\0\0\0\0\x1fp=tls-server-end-point,,n=,r=abc"s) + frame('p', "c=cD10bHMt,r=abc,p=QQ=="),
      "\4\2\1\0"s + frame('p', "SCRAM-SHA-256\0\0\0\0\x0bn,,n=,r=abc"s) + frame('p', "c=biws,r=abc,p=QQ=="),
      "\4\0\1\0"s + frame('p', "password\0"s),
      "\4\1\1\0"s + frame('p', "md50123\0"s)};
}
