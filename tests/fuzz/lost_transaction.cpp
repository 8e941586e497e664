// A lost transaction's answers: whatever the client sends, they are whole messages, and one ReadyForQuery for each that is due.
#include "proxy/lost_transaction.hpp"

#include "fuzz.hpp"

using namespace pgsidecar;
using namespace std::string_literals;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices(data, size);
  protocol::StatementCache cache;
  protocol::ClientStatements statements;
  statements.set("c", cache.intern("COMMIT\0\0\0"s));
  statements.set("s", cache.intern("SELECT 1\0\0\0"s));
  proxy::LostTransaction lost("57P01", "gone", choices.below(2) != 0);
  bool skipping = false;
  while (choices.more()) {
    const char type = "QPBDECSHFdcf"[choices.below(12)];
    const std::size_t length = choices.next();
    const Exact body(choices.take(length));
    std::string out;
    const bool over = lost.answer(type, body.view(), statements, cache, nullptr, out);
    int ready = 0, errors = 0;
    char status = 0;
    for (std::size_t at = 0; at < out.size();) {
      require(out.size() - at >= protocol::kHeaderSize, "a whole header");
      const std::size_t total = 1 + std::size_t{protocol::load_u32(reinterpret_cast<const std::uint8_t*>(out.data()) + at + 1)};
      require(out.size() - at >= total, "a whole message");
      if (out[at] == 'Z') ++ready, status = out[at + 5];
      errors += out[at] == 'E';
      at += total;
    }
    const bool due = type == 'S' || (!skipping && (type == 'Q' || type == 'F'));
    require(ready == due, "ReadyForQuery when it is due");
    require(errors <= 1, "one error at most");
    if (skipping && type != 'S') require(out.empty(), "silence up to Sync");
    if (type == 'S')
      skipping = false;
    else if (errors == 1 && !due)
      skipping = true;
    require(over == (status == 'I'), "over when the client hears so");
    if (over) return 0;
  }
  return 0;
}

std::vector<std::string> seeds() {
  // Types by their place in the table, then a length and a body.
  return {"\1\0\7COMMIT\0"s,
          "\0\0\x09SELECT 1\0\0\7commit\0"s,
          "\1\1\x0a\0COMMIT\0\0\0\2\3\0\0\0\4\5\0\0\0\0\0\6\0"s,
          "\0\2\3\0c\0\3\2P\0\4\5\0\0\0\0\0\6\0"s,
          "\1\2\3\0s\0\2\3\0c\0\6\0\3\3Sc\0\5\3Ss\0\6\0"s,
          "\1\1\x0cn\0ROLLBACK\0\0\0\2\3\0n\0\4\0\6\0"s};
}
