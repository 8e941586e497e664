#include "proxy/lost_transaction.hpp"

#include <gtest/gtest.h>

#include "protocol/messages.hpp"
#include "support.hpp"

namespace pgsidecar::proxy {
namespace {

using namespace std::string_literals;

/// A client whose transaction is lost, before it has heard so unless `told`.
struct Lost {
  explicit Lost(bool told)
      : transaction("57P01", "gone", told, [this](std::string_view sqlstate) { counted += sqlstate == "57P01" ? "E!" : "E"; }) {
    statements.set("commit", cache.intern("COMMIT\0\0\0"s));
    statements.set("select", cache.intern("SELECT 1\0\0\0"s));
  }
  protocol::StatementCache cache;
  protocol::ClientStatements statements;
  LostTransaction transaction;
  std::string counted, errors;  ///< as it says, and as heard
  bool over = false;

  /// One request; the answer as letters: an error is its SQLSTATE's class and a ReadyForQuery's status follows it.
  std::string ask(char type, const std::string& body) {
    const std::string exact(body.data(), body.size());
    std::string out, letters;
    over = transaction.answer(type, test::view(exact), statements, cache, nullptr, out);
    for (std::size_t at = 0; at < out.size();) {
      const std::size_t total = 1 + protocol::load_u32(test::view(out).data() + at + 1);
      const char letter = out[at];
      if (letter == 'E') {
        const auto error = protocol::parse_error(test::view(out).subspan(at + 5, total - 5));
        EXPECT_EQ(error->severity, "ERROR");
        const std::string heard = error->sqlstate == "57P01" ? "E!" : error->sqlstate == "25P02" ? "E" : "?";
        letters += heard;
        errors += heard;
      } else {
        letters += letter;
      }
      if (letter == 'Z') letters += out[at + 5];
      at += total;
    }
    return letters;
  }
  /// A script: Q:text, P:name=text, B:statement, D (of the portal), D:statement, E, S, C:statement, F, H, d, c, f.
  std::string play(const std::vector<std::string>& script) {
    std::string heard;
    for (const std::string& step : script) {
      if (over) heard += "(over)";
      const std::string rest = step.size() > 2 ? step.substr(2) : "";
      std::string body;
      switch (step[0]) {
        case 'Q': body = rest + '\0'; break;
        case 'P': body = rest.substr(0, rest.find('=')) + '\0' + rest.substr(rest.find('=') + 1) + "\0\0\0"s; break;
        case 'B': body = '\0' + rest + "\0\0\0\0\0\0\0"s; break;
        case 'D': body = step.size() > 1 ? 'S' + rest + '\0' : "P\0"s; break;
        case 'C': body = 'S' + rest + '\0'; break;
        case 'E': body = "\0\0\0\0\0"s; break;
        default: break;
      }
      heard += ask(step[0], body);
    }
    return heard;
  }
};

// As PostgreSQL 15 answers in a failed transaction; E! is the loss itself, told once.
TEST(LostTransaction, Conversations) {
  const struct {
    std::vector<std::string> script;
    std::string heard;
    bool told = true;
    bool over = false;
  } rows[] = {
      {{"Q:SELECT 1"}, "EZE"},
      {{"Q:SELECT 1", "Q:SELECT 2"}, "E!ZEEZE", false},
      {{"Q:COMMIT"}, "CZI", true, true},
      {{"Q:COMMIT"}, "E!ZI", false, true},  // not done, and not heard of yet
      {{"Q: end work;"}, "E!ZI", false, true},
      {{"Q:ROLLBACK"}, "CZI", false, true},
      {{"Q:SELECT 1", "Q:rollback;"}, "E!ZECZI", false, true},
      {{"Q:ROLLBACK TO SAVEPOINT a"}, "EZE"},
      {{"Q:"}, "EZE"},
      {{"F"}, "EZE"},
      // extended
      {{"P:=SELECT 1", "B:", "D", "E", "S"}, "EZE"},
      {{"P:=SELECT 1", "B:", "D", "E", "S"}, "E!ZE", false},
      {{"P:=COMMIT", "B:", "D", "E", "S"}, "12nCZI", true, true},
      {{"P:=COMMIT", "B:", "E", "S"}, "12E!ZI", false, true},
      {{"P:=ROLLBACK", "B:", "E", "S"}, "12CZI", false, true},
      {{"P:=COMMIT", "D:", "B:", "E", "S"}, "1tn2CZI", true, true},
      {{"P:=COMMIT", "S", "B:", "E", "S"}, "1ZE2CZI", true, true},
      {{"P:=COMMIT", "B:", "S"}, "12ZE"},  // bound and not executed
      {{"P:=COMMIT", "H", "B:", "H", "E", "H", "S"}, "12CZI", true, true},
      {{"B:commit", "E", "S"}, "2CZI", true, true},  // prepared before the loss
      {{"D:commit", "S"}, "tnZE"},
      {{"B:select", "E", "S"}, "EZE"},
      {{"D:select", "S"}, "EZE"},
      {{"B:unknown", "E", "S"}, "EZE"},
      {{"P:s9=ROLLBACK", "B:s9", "E", "S"}, "12CZI", true, true},  // pgjdbc names its ROLLBACK after some uses
      {{"P:s9=ROLLBACK", "S", "B:s9", "E", "S"}, "1ZE2CZI", true, true},
      {{"P:commit=ROLLBACK", "S"}, "EZE"},                                            // the name is taken
      {{"P:=ROLLBACK", "P:=SELECT 1", "S", "B:", "E", "S"}, "1EZE2CZI", true, true},  // a failed Parse changes nothing
      {{"C:select", "S"}, "3ZE"},
      {{"C:commit", "B:commit", "S"}, "3EZE"},
      {{"E", "S"}, "EZE"},
      {{"D", "S"}, "EZE"},
      // everything up to Sync is skipped after an error
      {{"B:select", "P:=COMMIT", "B:", "E", "Q:COMMIT", "F", "C:x", "S", "Q:COMMIT"}, "EZECZI", true, true},
      {{"P:=COMMIT", "B:", "E", "B:select", "E", "S"}, "12CEZI", true, true},  // behind the end: refused, yet ended
      // the rest of a COPY
      {{"d", "d", "c", "Q:SELECT 1"}, "EZE"},
      {{"f", "S"}, "ZE"},
      {{"S", "S"}, "ZEZE"},
  };
  for (const auto& row : rows) {
    std::string name;
    for (const std::string& step : row.script) name += step + " ";
    Lost lost(row.told);
    EXPECT_EQ(lost.play(row.script), row.heard) << name;
    EXPECT_EQ(lost.over, row.over) << name;
    EXPECT_EQ(lost.counted, lost.errors) << name;
  }
}

TEST(LostTransaction, WhatIsParsedOrClosedInItStays) {
  Lost lost(true);
  EXPECT_EQ(lost.play({"P:s9=ROLLBACK", "C:select", "P:=COMMIT", "S"}), "131ZE");
  EXPECT_TRUE(lost.statements.find("s9"));
  EXPECT_FALSE(lost.statements.find("select"));
  EXPECT_TRUE(lost.statements.find(""));
  EXPECT_EQ(lost.play({"Q:ROLLBACK"}), "CZI");
  EXPECT_FALSE(lost.statements.find(""));  // a simple query ends the unnamed statement
}

TEST(LostTransaction, MessagesCutShortAreRefused) {
  for (const auto& [type, body] :
       {std::pair('Q', "COMMIT\0"s), {'P', "\0COMMIT\0\0\0"s}, {'B', "\0commit\0\0\0\0\0\0\0"s}, {'D', "Scommit\0"s}, {'C', "Scommit\0"s}})
    for (std::size_t n = 0; n < body.size(); ++n) {
      Lost lost(true);
      const std::string heard = lost.ask(type, body.substr(0, n));
      EXPECT_FALSE(lost.over) << type << n;
      if (type == 'Q') {
        EXPECT_EQ(heard, "EZE") << n;
      }
    }
}

TEST(LostTransaction, StatementsThatEndOne) {
  for (const char* sql : {"COMMIT", "commit", "End", "COMMIT;", " ;COMMIT WORK ; ", "\nEND\n"})
    EXPECT_EQ(transaction_end(sql), TransactionEnd::Commit) << sql;
  for (const char* sql : {"ROLLBACK", "abort", "ROLLBACK\tTRANSACTION"}) EXPECT_EQ(transaction_end(sql), TransactionEnd::Rollback) << sql;
  for (const char* sql : {"", ";", "COMMITTED", "COMMIT PREPARED 'x'", "ROLLBACK TO a", "ROLLBACK AND CHAIN", "ROLLBACK; SELECT 1",
                          "SELECT 1; ROLLBACK", "SELECT 1", "work", "COM", "ROLLBACK WORK TO SAVEPOINT a"})
    EXPECT_EQ(transaction_end(sql), TransactionEnd::None) << sql;
}

}  // namespace
}  // namespace pgsidecar::proxy
