#include "protocol/sql_memory.hpp"

#include <gtest/gtest.h>

#include <random>

#include "protocol/footprint.hpp"
#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"

namespace pgsidecar::protocol {
namespace {

TEST(SqlMemory, NumbersAloneMayDiffer) {
  const struct {
    const char *a, *b;
    bool same;
  } rows[] = {{"SELECT 1", "SELECT 23456789", true},
              {"SELECT 1", "SELECT 1", true},
              {"SELECT 12", "SELECT 1", true},
              {"SELECT 12;", "SELECT 13 ;", false},
              {"SELECT 1", "SELECT ", false},
              {"SELECT ", "SELECT 1", false},
              {"SELECT 1.5, 'a 1'", "SELECT 1.75, 'a 200'", true},
              {"SELECT 1.5", "SELECT 1", false},
              {"UPDATE t SET a = a + -3 WHERE b = 1", "UPDATE t SET a = a + -31234 WHERE b = 99999", true},
              {"UPDATE t SET a = a + -3", "UPDATE t SET a = a + 3", false},
              {"SELECT a1", "SELECT a2", false},
              {"SELECT a1", "SELECT a11", false},
              {"SELECT $1", "SELECT $2", false},
              {"SELECT 1e5", "SELECT 1e6", false},
              {"DO E'log\\10(1)'", "DO E'log\\11(1)'", false},
              {"SELECT 0x1", "SELECT 00x1", false},
              {"SELECT 1a", "SELECT 2a", false},
              {"SELECT 1\xc3\xa9", "SELECT 2\xc3\xa9", false},
              {"1", "22", true},
              {"1", "2 ", false},
              {"12345678901234567890,1", "1,12345678901234567890", true},
              {"", "", true},
              {"", "1", false}};
  for (const auto& row : rows) {
    EXPECT_EQ(same_but_for_numbers(row.a, row.b), row.same) << row.a << " | " << row.b;
    EXPECT_EQ(same_but_for_numbers(row.b, row.a), row.same) << row.b << " | " << row.a;
  }
}

TEST(SqlMemory, ANumberInAQuotedNameCountsForTheFingerprint) {
  EXPECT_TRUE(has_numbered_names("SELECT 1 FROM \"area 51\""));
  EXPECT_TRUE(has_numbered_names("SELECT \"1\""));
  EXPECT_FALSE(has_numbered_names("SELECT \"a1\", '\"1\"', 1"));
  SqlMemory memory;
  EXPECT_NE(memory.read("SELECT \"area 51\"", true).fingerprint, memory.read("SELECT \"area 52\"", true).fingerprint);
}

TEST(SqlMemory, WhatIsReadDependsOnStandardConformingStrings) {
  const std::string_view sql = "SELECT '\\', set_config('work_mem', '1MB', false); --'";
  SqlMemory memory;
  for (const bool conforming : {true, false, true, false}) EXPECT_EQ(memory.read(sql, conforming).residue, scan_sql(sql, conforming));
  ASSERT_NE(scan_sql(sql, true), scan_sql(sql, false));
}

/// Texts put together of pieces, with other numbers each time: what is remembered is what would be read.
TEST(SqlMemory, WhatIsRememberedIsWhatWouldBeRead) {
  const char* pieces[] = {"SELECT ",
                          "#",
                          " ",
                          ";",
                          "'",
                          "\"",
                          "$$",
                          "$#",
                          "SET a.b = ",
                          "set_config(",
                          "'work_mem'",
                          ", ",
                          "true",
                          "false",
                          ")",
                          "DO ",
                          ".",
                          "e",
                          "E'",
                          "\\",
                          "/*",
                          "*/",
                          "--",
                          "\n",
                          "(",
                          "f#(",
                          "pg_temp.",
                          "IN (#, #)",
                          "EXECUTE p#",
                          "-",
                          "+",
                          "x",
                          "$x#$",
                          "LISTEN ",
                          "INSERT INTO t VALUES (#), (#)",
                          "U&\"",
                          "::int#",
                          "BEGIN",
                          "nextval(",
                          "DO E'log\\1#(1)'",
                          "DO $$ E'log\\#(1)' $$"};
  std::mt19937 random(20261126);
  const auto pick = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(random); };
  SqlMemory memory;
  std::size_t same = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string form;
    for (std::size_t n = 1 + pick(12); n > 0; --n) form += pieces[pick(std::size(pieces))];
    std::string before;
    for (int variant = 0; variant < 20; ++variant) {
      std::string sql;
      for (const char c : form) {
        if (c == '#')
          sql += std::to_string(pick(3) == 0 ? pick(10) : pick(10'000'000));
        else
          sql += c;
      }
      const bool conforming = pick(4) != 0;
      const SqlReading reading = memory.read(sql, conforming);
      ASSERT_EQ(reading.residue, scan_sql(sql, conforming)) << sql;
      ASSERT_EQ(reading.fingerprint, fingerprint_sql(sql)) << sql;
      same += !before.empty() && before != sql && same_but_for_numbers(before, sql);
      before = sql;
    }
  }
  EXPECT_GT(same, 1000u);
}

TEST(SqlMemory, TextsDoNotDriveEachOtherOut) {
  SqlMemory memory;
  std::size_t bytes = 0;
  for (char letter = 'a'; letter <= 'z'; ++letter) {
    std::string text = "SELECT count(*) FROM a_table_of_the_name_";
    memory.read(text += letter, true);
    bytes += footprint(std::string(text));
  }
  EXPECT_EQ(memory.footprint(), bytes);
}

TEST(SqlMemory, ALongTextIsReadAnew) {
  SqlMemory memory;
  const std::string sql = "SELECT " + std::string(SqlMemory::kLongest, '1');
  EXPECT_EQ(memory.read(sql, true).fingerprint, fingerprint_sql(sql));
  EXPECT_EQ(memory.footprint(), 0u);
  memory.read("SELECT a_name_that_is_longer_than_a_short_string", true);
  EXPECT_GT(memory.footprint(), 0u);
}

}  // namespace
}  // namespace pgsidecar::protocol
