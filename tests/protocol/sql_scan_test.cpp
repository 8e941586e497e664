#include "protocol/sql_scan.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::protocol {
namespace {

TEST(SqlScan, Rows) {
  const struct {
    const char* sql;
    std::uint32_t residue;
  } rows[] = {
      {"", kNone},
      {"SELECT 1", kNone},
      {"select set_from, reset, listen from t where discard = 1", kNone},
      {"INSERT INTO t VALUES ('SET x = 1; LISTEN y')", kSequenceWrite},
      {"SELECT $$SET x = 1$$, $a$ LISTEN b $b$ $a$", kNone},
      {"-- SET x = 1\nSELECT 1 /* LISTEN /* nested */ x */", kNone},
      {"UPDATE t SET x = 1", kSequenceWrite},
      {"SELECT nextval('s'), setval('s', 1)", kSequenceWrite},
      {"DROP TABLE t", kDrop},
      {"CLOSE c", kDrop},
      {"SET x = 1", kSettings},
      {"  /* c */ sEt  x TO 1", kSettings},
      {"SET SESSION x = 1", kSettings},
      {"SET ROLE bob", kSettings},
      {"SET TIME ZONE 'UTC'", kSettings},
      {"SET LOCAL x = 1", kNone},
      {"SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", kNone},
      {"SET CONSTRAINTS ALL DEFERRED", kNone},
      {"SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", kSettings},
      {"RESET ALL", kSettings | kReset},
      {"SET x TO DEFAULT", kSettings | kReset},
      {"SET TIME ZONE LOCAL", kSettings | kReset},
      {"SET LOCAL x = 1", kNone},
      {"SELECT 1; SET x = 1", kSettings},
      {"SET app.tenant = 'x'", kSettings | kCustomSetting},
      {"SET SESSION app.tenant = 'x'", kSettings | kCustomSetting},
      {"SET LOCAL app.tenant = 'x'", kNone},
      {"SET app /**/ . -- \n tenant = 'x'", kSettings | kCustomSetting},
      {"SET \"x\" = 1", kSettings},
      {"SET \"app.tenant\" = 1", kSettings | kCustomSetting},
      {"SET SESSION \"app.tenant\" = 1", kSettings | kCustomSetting},
      {"SET LOCAL \"app.tenant\" = 1", kNone},
      {"SET x = a.b", kSettings},
      {"SET NAMES", kSettings | kReset},
      {"SET NAMES /* ; */;", kSettings | kReset},
      {"SET NAMES 'utf8'", kSettings},
      {"SELECT set_config('work_mem', '1MB', false)", kSettings},
      {"SELECT set_config('app.x', $1, false)", kSettings | kCustomSetting},
      {"SELECT set_config('app.x', upper(1, true), true)", kNone},
      {"SELECT set_config('app.x', f(1, true), true)", kFunction},
      {"SELECT set_config('app.x', $1, $2)", kSettings | kCustomSetting},
      {"SELECT set_config($1, $2, false)", kSettings | kCustomSetting},
      {"SELECT set_config('a' || '.b', $2, false)", kSettings | kCustomSetting},
      {"SELECT set_config('work_mem'::text, '1MB'::text, false)", kSettings},
      {"SELECT set_config('work_mem'::text || 'x', '1MB', false)", kSettings | kCustomSetting},
      {"SELECT set_config('app.pid', pg_backend_pid()::text, true)", kBackendPid},
      {"SELECT set_config('app.x', set_config('work_mem', '1MB', false), true)", kSettings},
      {"SELECT set_config('seed', '0.5', true)", kSeed},
      {"UPDATE pg_settings SET setting = '1MB' WHERE name = 'work_mem'", kSettings | kSequenceWrite},
      {"WITH s AS (UPDATE pg_catalog.pg_settings SET setting = 'x' RETURNING name) TABLE s", kSettings | kSequenceWrite},
      {"SELECT setting FROM pg_settings", kNone},
      {"SELECT f()", kFunction},
      {"SELECT s.now(), 1", kFunction},
      {"SELECT \"Now\" (1)", kFunction},
      {"SELECT a FROM b JOIN c ON f(c.d)", kFunction},
      {"INSERT INTO s.t (a, b) VALUES (1, f(2))", kFunction | kSequenceWrite},
      {"CREATE INDEX i ON t (f(x))", kFunction},
      {"CREATE TABLE t AS SELECT * FROM a JOIN b ON f(x)", kFunction},
      {"CREATE INDEX ON s.f (a)", kNone},
      {"SELECT count(*), pg_catalog.now(), COALESCE(a, 1)::numeric(3, 1) FROM t AS x (a) WHERE a IN (1) AND EXISTS (SELECT 1)", kNone},
      {"INSERT INTO s.t (a, b) VALUES (1, 'f(2)') ON CONFLICT (a) DO UPDATE SET (a, b) = (1, 2) RETURNING (a)", kSequenceWrite},
      {"WITH RECURSIVE t (n) AS (SELECT 1) SELECT sum(n) OVER (PARTITION BY n) FROM t, LATERAL (SELECT 1) u JOIN v USING (n)", kNone},
      {"CREATE TABLE IF NOT EXISTS t (a varchar(3) CHECK (a > 'b') REFERENCES u (a), PRIMARY KEY (a))", kNone},
      {"CREATE UNIQUE INDEX i ON t (a)", kNone},
      {"COPY t (a) FROM STDIN WITH (FORMAT csv)", kSequenceWrite | kCopy},
      {"SELECT 1; notify a", kNotify},
      {"SELECT pg_notify('a', notify) FROM t", kNotify},
      {"SELECT count(*) FROM pg_listening_channels()", kChannels},
      {"DO $$BEGIN NOTIFY a; END$$", kCode | kNotify},
      {"PREPARE p AS SELECT 1", kPrepared},
      {"EXECUTE p(1)", kPrepared},
      {"EXPLAIN ANALYZE EXECUTE p", kPrepared},
      {"CREATE TABLE t AS EXECUTE p", kPrepared},
      {"DEALLOCATE ALL", kPrepared},
      {"PREPARE TRANSACTION 'x'", kTransaction | kCommit},
      {"COMMIT PREPARED 'x'", kTransaction | kCommit},
      {"SELECT 1; END", kTransaction | kCommit},
      {"ROLLBACK", kTransaction},
      {"BEGIN", kTransaction},
      {"START TRANSACTION", kTransaction},
      {"ROLLBACK TO SAVEPOINT a", kTransaction},
      {"LISTEN c", kListen | kNewChannel},
      {"/* a */ LISTEN c", kListen | kNewChannel},
      {"SAVEPOINT a; RELEASE a", kNone},
      {"SAVEPOINT a; ROLLBACK TO a", kTransaction},
      {"UNLISTEN *", kListen},
      {"NOTIFY c", kNotify},
      {"SELECT pg_advisory_lock(1)", kAdvisoryLock},
      {"SELECT PG_TRY_ADVISORY_LOCK_SHARED(1, 2)", kAdvisoryLock},
      {"SELECT pg_advisory_xact_lock(1)", kNone},
      {"SELECT pg_advisory_Xact_lock(1)", kNone},
      {"SELECT pg_advisory_unlock_all()", kAdvisoryLock},
      {"CREATE TEMP TABLE t ()", kTemporary | kMakesTemporary},
      {"CREATE GLOBAL TEMPORARY TABLE t ()", kTemporary | kMakesTemporary},
      {"SELECT 1; CREATE OR REPLACE TEMP VIEW v AS SELECT 1", kTemporary | kMakesTemporary},
      {"CREATE VIEW temp AS SELECT 1", kTemporary},
      {"CREATE TABLE t (temp int)", kTemporary},
      {"CREATE \"temp\" TABLE t (i int)", kTemporary},
      {"DROP TABLE pg_temp.t", kTemporary | kDrop},
      {"EXPLAIN CREATE TEMP TABLE t AS SELECT 1", kTemporary},
      {"SELECT 1 INTO TEMP t", kTemporary},
      {"CREATE TABLE pg_temp.t ()", kTemporary},
      {"DECLARE c CURSOR WITH HOLD FOR SELECT 1", kCursor},
      {"DECLARE c CURSOR FOR SELECT 1", kNone},
      {"DO $$BEGIN END$$", kCode},
      {"CALL p()", kCode | kFunction},
      {"DO $$BEGIN IF true THEN SET app.x = 1; END IF; END$$", kCode | kSettings | kCustomSetting},
      {"DO 'BEGIN PERFORM f(); END'", kCode | kFunction},
      {"DO 'BEGIN x := ''--''; SET app.x = 1; END'", kCode | kSettings | kCustomSetting},
      {"DO E'BEGIN x := \\'--\\';\\nSET app.x = 1; END'", kCode | kSettings | kCustomSetting},
      {"DO E'BEGIN \\x41 END'", kCode | kUnreadable},
      {"LOAD 'x'", kLibrary},
      {"DISCARD ALL", kDiscard | kReset},
      {"DISCARD PLANS", kDiscard},
      {"SELECT currval('s')", kSequenceRead},
      {"SELECT lastval()", kSequenceRead},
      {"SELECT setseed(0)", kSeed},
      {"SET SESSION seed = 0.5", kSettings | kSeed},
      {"SELECT * FROM pg_stat_activity WHERE pid <> pg_backend_pid()", kNone},
      {"SELECT 1 FROM pg_stat_activity WHERE pid != pg_backend_pid() AND pid <> pg_backend_pid ()", kNone},
      {"SELECT * FROM pg_locks WHERE pid = pg_backend_pid()", kBackendPid},
      {"SELECT a <> 1, pg_backend_pid()", kBackendPid},
      {"SELECT name FROM pg_prepared_statements", kPrepared},
      {"SELECT pg_backend_pid()", kBackendPid},
      {"SELECT E'it\\'s; SET x', 1", kNone},
      {"SELECT 'a''b; SET x = 1'", kNone},
      {"SELECT E'a'\n'\\'; SET x', 1", kNone},
      {"SELECT E'a' --'\n 'b', '; SET x'", kNone},
      {"SELECT E'a\\'\n; SET x = 1; --'", kNone},
      {"SELECT E'a', '\\'; SET x = 1; --'", kSettings},
      {"SELECT 1$$ ' $$, f(1), '", kFunction | kUnreadable},
      {"SELECT 1e'\\'', f(1)", kFunction},
      {"SELECT 1e3, 0x1e, 1.e5, 1.5e3", kNone},
      {"SELECT 'open", kUnreadable},
      {"SELECT \"open", kUnreadable},
      {"SELECT $a$ open $b$", kUnreadable},
      {"SELECT /* open", kUnreadable},
      {"SELECT U&\"s\\0065t_config\"('a', 'b', false)", kUnreadable | kFunction},
  };
  for (const auto& row : rows) EXPECT_EQ(scan_sql(row.sql) & ~(kMeaning | kPath | kDefinition), row.residue) << row.sql;
}

TEST(SqlScan, WhatDecidesWhereNamesAreLookedUp) {
  for (const char* sql :
       {"SET search_path = a", "set local \"search_path\" to b", "RESET search_path", "RESET ALL", "SET SCHEMA 'a'", "SET ROLE bob",
        "SET SESSION AUTHORIZATION bob", "SELECT set_config('search_path', $1, true)", "SELECT set_config($1, 'x', true)"})
    EXPECT_TRUE(scan_sql(sql) & kPath) << sql;
  for (const char* sql : {"SET app.x = 1", "SET LOCAL app.search_path = 'a'", "SET datestyle = 'German'",
                          "SELECT set_config('app.x', $1, true)", "SET TRANSACTION READ ONLY", "SELECT search_path FROM t"})
    EXPECT_FALSE(scan_sql(sql) & kPath) << sql;
}

TEST(SqlScan, WhatMayGiveNamesAnotherMeaning) {
  for (const char* sql : {"CREATE TABLE t (a int)", "BEGIN; alter table t add b int; COMMIT", "/* a */ DROP VIEW v", "SELECT 1 AS a INTO t",
                          "DO $$BEGIN CREATE TABLE t (a int); END$$"})
    EXPECT_TRUE(scan_sql(sql) & kDefinition) << sql;
  for (const char* sql :
       {"INSERT INTO t SELECT 1", "SELECT \"create\", alter FROM t", "WITH a AS (INSERT INTO t VALUES (1) RETURNING *) TABLE a"})
    EXPECT_FALSE(scan_sql(sql) & kDefinition) << sql;
  EXPECT_TRUE(scan_body("BEGIN IF a THEN CREATE TABLE t (a int); END IF; END").residue & kDefinition);
  EXPECT_FALSE(scan_body("BEGIN SELECT 1 INTO a; END").residue & kDefinition) << "a variable";
}

TEST(SqlScan, WhatDecidesHowConstantsAreRead) {
  for (const char* sql : {"SET datestyle = 'German'", "SET LOCAL TIME ZONE 'UTC'", "set session \"TimeZone\" to x", "RESET intervalstyle",
                          "RESET ALL", "SELECT set_config('TimeZone', $1, true)", "SELECT set_config($1, 'x', true)", "SET NAMES 'latin1'"})
    EXPECT_TRUE(scan_sql(sql) & kMeaning) << sql;
  for (const char* sql : {"SET app.x = 1", "SET search_path = a", "SET LOCAL statement_timeout = 5", "SET ROLE bob",
                          "SELECT set_config('request.jwt', $1, true)", "SET TRANSACTION READ ONLY", "SET SESSION AUTHORIZATION bob",
                          "SELECT set_config('role', 'a', true)", "RESET work_mem", "UPDATE t SET datestyle = 1"})
    EXPECT_FALSE(scan_sql(sql) & kMeaning) << sql;
}

TEST(SqlScan, WhatNeedsASessionIsReadStrictly) {
  const struct {
    const char* sql;
    std::uint32_t needs;
  } rows[] = {{"CREATE TEMP TABLE t (a int)", kTemporary},
              {"CREATE OR REPLACE TEMPORARY VIEW v AS SELECT 1", kTemporary},
              {"SELECT 1 INTO TEMP t", kTemporary},
              {"SELECT temp, temporary FROM weather WHERE hold > 1 -- LOAD", kNone},
              {"INSERT INTO pg_temp.t VALUES (1)", kTemporary},
              {"SELECT pg_advisory_lock(1)", kAdvisoryLock},
              {"SELECT pg_try_advisory_lock_shared(1)", kAdvisoryLock},
              {"SELECT pg_advisory_unlock(1), pg_advisory_xact_lock(1), pg_try_advisory_xact_lock(1)", kNone},
              {"PREPARE p AS SELECT 1", kPrepared},
              {"PREPARE TRANSACTION 'x'", kNone},
              {"EXECUTE p; DEALLOCATE ALL", kNone},
              {"DECLARE c CURSOR WITH HOLD FOR SELECT 1", kCursor},
              {"DECLARE c CURSOR FOR SELECT hold FROM t", kNone},
              {"SELECT currval('s'), 1", kSequenceRead},
              {"SELECT currval FROM t", kNone},
              {"SELECT setseed(1)", kSeed},
              {"LOAD 'x'", kLibrary},
              {"DO $$BEGIN PERFORM pg_advisory_lock(1); END$$", kAdvisoryLock}};
  for (const auto& row : rows) EXPECT_EQ(needs_session(row.sql), row.needs) << row.sql;
}

TEST(SqlScan, PreparedNames) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(prepared_names("EXECUTE Foo(1)").names, Names{"foo"});
  EXPECT_EQ(prepared_names("EXPLAIN ANALYZE EXECUTE \"A\"\"b\"").names, Names{"A\"b"});
  EXPECT_EQ(prepared_names("CREATE TEMP TABLE t AS EXECUTE q").names, Names{"q"});
  EXPECT_EQ(prepared_names("SELECT 1; PREPARE p (int) AS SELECT $1; DEALLOCATE x").names, (Names{"p", "x"}));
  EXPECT_EQ(prepared_names("DEALLOCATE PREPARE x; DEALLOCATE \"Y\"").deallocated, (Names{"x", "Y"}));
  EXPECT_TRUE(prepared_names("SELECT * FROM pg_prepared_statements").all);
  EXPECT_FALSE(prepared_names("EXECUTE a").all);
  EXPECT_TRUE(prepared_names("DEALLOCATE PREPARE ALL").closes_all);
  EXPECT_EQ(prepared_names("DEALLOCATE ALL").names, Names{});
  EXPECT_FALSE(prepared_names("DEALLOCATE \"all\"").closes_all);
  EXPECT_TRUE(prepared_names("DEALLOCATE u&\"\\0061\"").escaped);
  EXPECT_FALSE(prepared_names("EXECUTE u & \"x\"").escaped);
}

TEST(SqlScan, BackslashesInPlainQuotesIfTheyAreNotStandard) {
  constexpr const char* kSql = "SELECT '\\'; SET x = 1; --'";
  EXPECT_EQ(scan_sql(kSql, true), kSettings | kMeaning);
  EXPECT_EQ(scan_sql(kSql, false), kNone);
}

TEST(SqlScan, EveryPrefixIsRead) {
  const std::string sql = "SET a.b = $q$ x $q$; SELECT set_config('c.d', E'\\'', f(\"x\"\"y\", 1.5e3)) /* /* */ */ -- end\n; DO 'x'";
  for (std::size_t n = 0; n <= sql.size(); ++n) {
    const std::string exact(sql, 0, n);
    scan_sql(std::string_view(exact.data(), n));
    std::vector<std::string> names;
    custom_setting_names(std::string_view(exact.data(), n), names);
  }
}

TEST(SqlScan, TextsWithinTextsAreReadToADepth) {
  std::string sql = "SET a.b = 1";
  for (int depth = 0; depth < 20000; ++depth) {
    const std::string tag = "$x" + std::to_string(depth) + "$";
    sql = tag + sql + tag;
    if (depth == 3) {
      EXPECT_EQ(scan_sql("DO " + sql), kCode | kSettings | kCustomSetting);
    }
  }
  EXPECT_EQ(scan_sql("DO " + sql), kCode | kSettings | kCustomSetting | kFunction);
  std::vector<std::string> names;
  EXPECT_FALSE(custom_setting_names("DO " + sql, names));
}

TEST(SqlScan, NamesOfCustomSettings) {
  std::vector<std::string> names;
  EXPECT_TRUE(custom_setting_names("SET App.Tenant = 'x'; SET SESSION \"a\".\"b\" TO 1; SELECT set_config('c.d', $1, false)", names));
  EXPECT_EQ(names, (std::vector<std::string>{"app.tenant", "a.b", "c.d"}));
  EXPECT_TRUE(custom_setting_names("SET a.b = '\\'; SET c.d = 1; --'", names, true));
  EXPECT_EQ(names, (std::vector<std::string>{"a.b", "c.d"}));
  EXPECT_TRUE(custom_setting_names("SET a.b = '\\'; SET c.d = 1; --'", names, false));
  EXPECT_EQ(names, (std::vector<std::string>{"a.b"}));
  EXPECT_FALSE(custom_setting_names("SELECT set_config($1, $2, false)", names));
  EXPECT_FALSE(custom_setting_names("SELECT set_config(E'a.b', $2, false)", names));
}

TEST(SqlScan, Bodies) {
  const struct {
    const char* body;
    std::uint32_t residue;
    std::vector<std::string> calls, custom_settings;
  } rows[] = {
      {"BEGIN RETURN NEW; END", kNone, {}, {}},
      {"DECLARE x int; BEGIN x := f(1) + \"G\"(2); RETURN lower(x); END", kNone, {"f", "G"}, {}},
      {"BEGIN PERFORM set_config('app.User', $1, false); END", kSettings, {}, {"app.user"}},
      {"BEGIN PERFORM set_config('app.user', $1, true); END", kNone, {}, {}},
      {"BEGIN PERFORM set_config($1, $2, false); END", kSettings | kCustomSetting, {}, {}},
      {"BEGIN IF a THEN SET work_mem = '1MB'; ELSE LISTEN c; END IF; END", kSettings | kListen | kNewChannel, {}, {}},
      {"BEGIN EXECUTE format('SET app.user = %L', u); END", kFunction | kPrepared | kSettings, {}, {"app.user"}},
      {"BEGIN EXECUTE format('SET %I = %L', a, b); END", kFunction | kPrepared | kSettings | kCustomSetting, {}, {}},
      {"BEGIN FOR r IN EXECUTE 'SELECT 1' LOOP PERFORM pg_advisory_lock(1); END LOOP; END", kFunction | kAdvisoryLock, {}, {}},
  };
  for (const auto& row : rows) {
    const BodyScan found = scan_body(row.body);
    EXPECT_EQ(found.residue & ~(kMeaning | kPath), row.residue) << row.body;
    EXPECT_EQ(found.calls, row.calls) << row.body;
    EXPECT_EQ(found.custom_settings, row.custom_settings) << row.body;
  }
  EXPECT_EQ(called_functions("SELECT a.F(1), now(), \"G\"(2)"), (std::vector<std::string>{"f", "G"}));
}

TEST(SqlScan, WhatATextResets) {
  const struct {
    const char *sql, *name;
    bool local = false, begins = false;
  } rows[] = {{"RESET search_path", "search_path"},
              {" /* a */ reset App . \n Thing ; ", "app.thing"},
              {"RESET ALL", ""},
              {"RESET TIME ZONE", "timezone"},
              {"RESET role;;", "role"},
              {"SET TimeZone TO DEFAULT", "timezone"},
              {"SET SESSION a.b.c = DEFAULT", "a.b.c"},
              {"SET LOCAL x = DEFAULT", "x", true},
              {"SET TIME ZONE LOCAL", "timezone"},
              {"SET LOCAL TIME ZONE DEFAULT", "timezone", true},
              {"BEGIN; RESET x", "x", false, true},
              {"START TRANSACTION READ ONLY;; reset all", "", false, true}};
  for (const auto& row : rows) {
    const auto reset = reset_of(row.sql);
    ASSERT_TRUE(reset) << row.sql;
    EXPECT_EQ(reset->name, row.name) << row.sql;
    EXPECT_EQ(reset->local, row.local) << row.sql;
    EXPECT_EQ(reset->begins, row.begins) << row.sql;
    EXPECT_FALSE(reset->discard) << row.sql;
  }
  ASSERT_TRUE(reset_of("DISCARD ALL"));
  EXPECT_TRUE(reset_of("DISCARD ALL")->discard);
  for (const char* sql : {"",
                          "BEGIN",
                          "RESET",
                          "RESET a; RESET b",
                          "SELECT 1; RESET a",
                          "RESET a; SET b = 1",
                          "RESET \"a\"",
                          "RESET a 5",
                          "RESET a b",
                          "RESET SESSION AUTHORIZATION",
                          "RESET TRANSACTION ISOLATION LEVEL",
                          "SET a = 1",
                          "SET NAMES",
                          "SET SESSION AUTHORIZATION DEFAULT",
                          "SET a TO 'DEFAULT'",
                          "SET a DEFAULT",
                          "DISCARD PLANS",
                          "SELECT reset('a')",
                          "RESET a; COMMIT",
                          "RESET a /*"})
    EXPECT_FALSE(reset_of(sql)) << sql;
}

}  // namespace
TEST(DatabaseLeft, IsTheOneThatNobodyMayBeConnectedTo) {
  EXPECT_EQ(database_left("DROP DATABASE App"), "app");
  EXPECT_EQ(database_left("drop database if exists \"My \"\"App\"\" \" with (force)"), "My \"App\" ");
  EXPECT_EQ(database_left("ALTER DATABASE a RENAME TO b"), "a");
  EXPECT_EQ(database_left("ALTER DATABASE a SET TABLESPACE b"), "a");
  EXPECT_EQ(database_left("CREATE DATABASE b WITH OWNER x TEMPLATE = \"A\""), "A");
  for (const char* none : {"ALTER DATABASE a SET work_mem = 1", "CREATE DATABASE a", "DROP DATABASE", "DROP TABLE database", "", "\""})
    EXPECT_EQ(database_left(none), "") << none;
}

}  // namespace pgsidecar::protocol
