#include "protocol/normalize.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::protocol {
namespace {

TEST(Normalize, TextsThatDifferInTheirValuesAreOne) {
  const struct {
    const char *sql, *normal;
  } rows[] = {{"SELECT 1", "SELECT ?"},
              {"  SELECT\n\t a,  'it''s' -- why\n FROM t;", "SELECT a, ? FROM t;"},
              {"SELECT E'a\\'b', $$x$$, $t$ $$ $t$, B'01', 1.5e-3", "SELECT ?-?"},
              {"SELECT * FROM t WHERE a IN (1, 2,3) AND b = $1", "SELECT * FROM t WHERE a IN (?) AND b = $1"},
              {"SELECT /* a /* nested */ b */ \"x 1\"", "SELECT \"x 1\""},
              {"SET app.user = 'secret'", "SET app.user = ?"},
              {"SELECT 'open", "SELECT ?"},
              {"SELECT t1.a$b", "SELECT t1.a$b"},
              {"", ""}};
  for (const auto& row : rows) EXPECT_EQ(normalize_sql(row.sql), row.normal) << row.sql;
}

TEST(Normalize, IsBounded) {
  const std::string text = normalize_sql("SELECT " + std::string(1000, 'x'), 50);
  EXPECT_EQ(text, "SELECT...");
  EXPECT_LE(normalize_sql(std::string(500, '('), 50).size(), 50u);
}

}  // namespace
}  // namespace pgsidecar::protocol
