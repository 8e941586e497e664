#include "protocol/normalize.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::protocol {
namespace {

TEST(Normalize, TextsThatDifferInTheirValuesAreOne) {
  const struct {
    const char *sql, *normal;
  } rows[] = {{"SELECT 1", "SELECT ?"},
              {"  SELECT\n\t a,  'it''s' -- why\n FROM t;", "SELECT a, ? FROM t;"},
              {"SELECT E'a\\'b', $$x$$, $t$ $$ $t$, B'01', 1.5e-3", "SELECT ?, ..."},
              {"SELECT * FROM t WHERE a IN (1, 2,3) AND b = $1", "SELECT * FROM t WHERE a IN (?, ...) AND b = $1"},
              {"SELECT * FROM t WHERE a IN (1) AND b IN ($1, $2 , $3)", "SELECT * FROM t WHERE a IN (?) AND b IN ($1, ...)"},
              {"INSERT INTO t VALUES (1, 'a'), (2, 'b'),(3,/**/'c') RETURNING id", "INSERT INTO t VALUES (?, ...), ... RETURNING id"},
              {"INSERT INTO t VALUES (1), (f(2)), (3)", "INSERT INTO t VALUES (?), (f(?)), (?)"},
              {"SELECT (1), (2) FROM t", "SELECT (?), ... FROM t"},
              {"SELECT 1 - 2 + 1-2 * 0x1e-3", "SELECT ? - ? + ?-? * ?-?"},
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

TEST(Normalize, AFingerprintIsTheNormalisedTexts) {
  const char* texts[] = {"SELECT 1",
                         "SELECT  $1",
                         "SELECT a FROM t WHERE b IN (1,2)",
                         "SELECT a FROM t WHERE b IN ('x',  $2, 3) -- now",
                         "SELECT a FROM t WHERE b = 1",
                         "select 1",
                         "",
                         "SELECT abcdefgh",
                         "SELECT abcdefghi",
                         "SELECT 'x'/**/"};
  for (const char* a : texts)
    for (const char* b : texts)
      EXPECT_EQ(fingerprint_sql(a) == fingerprint_sql(b), normalize_sql(a) == normalize_sql(b)) << a << " | " << b;
}

TEST(Normalize, TagsAreTheCommentAtTheEndOrTheStart) {
  const struct {
    std::string_view sql, tags;
  } rows[] = {{"SELECT 1 /*traceparent='00-ab-cd-01',app='x'*/", "traceparent='00-ab-cd-01',app='x'"},
              {"SELECT 1 /* a */ + 2 /*b:c*/ ; \n", "b:c"},
              {"SELECT 1 /* app='x\\'y' , db_driver='%27' */", " app='x\\'y' , db_driver='%27' "},
              {"SELECT 1 /*application:Shop,line:/app/user.rb:12:in*/", "application:Shop,line:/app/user.rb:12:in"},
              {"SELECT 1 /* password hunter2 */", ""},
              {"SELECT 1 /* was: 'hunter2' */", ""},
              {"SELECT 1 /* a = 'hunter2' */", ""},
              {"SELECT 1 /*a='x' AND b='hunter2'*/", ""},
              {"SELECT 1 /*a='x',*/", ""},
              {"SELECT 1 /*a='x\\*/", ""},
              {"SELECT 1 /*a:*/", ""},
              {"/* hunter2 */ SELECT 1", ""},
              {" /* controller:users */ SELECT 1", " controller:users "},
              {"SELECT 1", ""},
              {"SELECT 1 /*", ""},
              {"*/", ""},
              {"/*/", ""},
              {"/**/", ""}};
  for (const auto& row : rows) EXPECT_EQ(comment_tags(row.sql), row.tags) << row.sql;
}

}  // namespace
}  // namespace pgsidecar::protocol
