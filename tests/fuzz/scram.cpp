// SCRAM in both roles: against rubbish, and against each other with a message changed on its way.
#include "protocol/scram.hpp"

#include "fuzz.hpp"

using namespace pgsidecar::protocol;

namespace {

/// Numbers of iterations that would take long: not what is searched for.
bool slow(std::string_view message) {
  const std::size_t at = message.find(",i=");
  return at != std::string_view::npos && message.substr(at + 3, 4).find_first_not_of("0123456789") == std::string_view::npos &&
         message.size() >= at + 7;
}

void change(std::string& message, Choices& choices) {
  if (choices.below(2) == 0) return;
  if (message.empty()) return;
  message[choices.next() % message.size()] = static_cast<char>(choices.next());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static ScramKeyCache cache;
  static const ScramVerifier right = [] {
    ScramVerifier v = cache.verifier("bob", "right");
    return v;
  }();
  Choices choices(data, size);
  std::string error;
  switch (choices.below(4)) {
    case 0: {
      ScramServer server(right, true, choices.below(2) ? "hash" : "");
      const Exact first(choices.take(choices.next()));
      if (!server.first(choices.below(2) ? "SCRAM-SHA-256" : "SCRAM-SHA-256-PLUS", first.text())) break;
      const Exact last(choices.take(size));
      require(!server.final(last.text()), "nobody proves a password without it");
      break;
    }
    case 1: {
      ScramClient client("p", {}, false, false, &cache, "n");
      client.first();
      const Exact first(choices.take(choices.next()));
      if (slow(first.text()) || !client.on_first(first.text(), error)) break;
      const Exact last(choices.take(size));
      require(!client.on_final(last.text()), "a server without the password proves nothing");
      break;
    }
    case 2: {
      const Exact text(choices.take(size));
      if (const auto verifier = parse_verifier(text.text()))
        require(verifier->iterations > 0 && !verifier->salt.empty(), "a verifier is usable");
      if (const auto bytes = base64_decode(text.text()))
        require(base64_encode(*bytes).size() == text.text().size(), "base64 keeps its size");
      break;
    }
    default: {
      const bool plus = choices.below(2);
      const bool knows = choices.below(2);
      const std::string binding = plus ? "hash" : "";
      ScramServer server(right, true, binding);
      ScramClient client(knows ? "right" : "wrong", binding, plus, plus, &cache);
      const std::string first = client.first();
      std::string heard = first;
      change(heard, choices);
      const auto challenge = server.first(plus ? "SCRAM-SHA-256-PLUS" : "SCRAM-SHA-256", heard);
      bool same = heard == first;
      if (!challenge) {
        require(!same, "an honest first message is taken");
        break;
      }
      std::string told = *challenge;
      change(told, choices);
      same &= told == *challenge;
      if (slow(told) && told != *challenge) break;
      const auto proof = client.on_first(told, error);
      if (!proof) {
        require(!same, "an honest challenge is taken");
        break;
      }
      std::string proven = *proof;
      change(proven, choices);
      same &= proven == *proof;
      const auto signature = server.final(proven);
      require(signature.has_value() == (knows && same), "who knows the password, untampered, gets in, and nobody else");
      if (signature) require(client.on_final(*signature), "the server proves itself");
    }
  }
  return 0;
}

std::vector<std::string> seeds() {
  using namespace std::string_literals;
  return {"\0\0\x0bn,,n=,r=abc\0c=biws,r=abc,p=QQ=="s,
          "\0\1\x1fp=tls-server-end-point,,n=,r=abc\1c=,r=,p="s,
          "\1\x16r=nx,s=QQ==,i=1v=QQ=="s,
          "\1\x0fr=nx,s=QQ==,i=1v=QQ=="s,
          "\2SCRAM-SHA-256$4096:QQ==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="s,
          "\3\0\1\0\0\0"s,
          "\3\1\1\0\0\0"s,
          "\3\1\0\0\0\0"s,
          "\3\1\1\1\5x\0\0"s,
          "\3\1\1\0\1\x09y\0"s,
          "\3\1\1\0\0\1\x11z"s};
}
