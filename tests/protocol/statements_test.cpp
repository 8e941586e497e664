#include "protocol/statements.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::protocol {
namespace {

using namespace std::string_literals;

TEST(StatementCache, SameTextAndTypesAreOneStatement) {
  StatementCache cache;
  const auto a = cache.intern("SELECT 1\0\0\0"s);
  EXPECT_EQ(a, cache.intern("SELECT 1\0\0\0"s));
  EXPECT_NE(a, cache.intern("SELECT 1\0\0\1\0\0\0\x17"s));
  EXPECT_EQ(cache.size(), 1u);  // the one that nobody held is gone
}

TEST(StatementCache, WhatStandsForTheMomentIsNotShared) {
  StatementCache cache;
  for (const char* sql : {"SELECT 'now'::timestamp", "SELECT date $$Today$$", "SELECT 'tomorrow' :: date", "SELECT '  yesterday '::date"}) {
    const auto a = cache.intern(sql);
    EXPECT_NE(a, cache.intern(sql)) << sql;
  }
  EXPECT_EQ(cache.size(), 0u);
  for (const char* sql : {"SELECT now()", "SELECT 'x', now()", "SELECT 'nowhere'", "SELECT knows, 'x'"}) {
    const auto a = cache.intern(sql);
    EXPECT_EQ(a, cache.intern(sql)) << sql;
  }
}

TEST(StatementCache, ForgetsWhatNobodyHolds) {
  StatementCache cache;
  {
    const auto a = cache.intern("SELECT 1\0\0\0"s);
    ClientStatements client;
    client.set("s1", a);
    client.set("", a);
    EXPECT_EQ(a.use_count(), 3);
  }
  EXPECT_EQ(cache.size(), 0u);
}

TEST(StatementCache, ItsFootprintIsWhatLives) {
  StatementCache cache;
  const std::string text(10'000, 'x');
  {
    const auto a = cache.intern(text + "\0\0\0"s);
    const auto again = cache.intern(text + "\0\0\0"s);
    const auto alone = cache.make(text, {});
    cache.retire(*a);
    EXPECT_GE(cache.footprint(), 2 * text.size()) << "what was retired lives while it is held";
    EXPECT_LT(cache.footprint(), 3 * text.size());
  }
  EXPECT_LT(cache.footprint(), text.size());
}

TEST(StatementCache, ARetiredBodyIsAnotherStatement) {
  StatementCache cache;
  const auto before = cache.intern("SELECT * FROM t");
  cache.retire(*before);
  auto after = cache.intern("SELECT * FROM t");
  EXPECT_NE(before->id, after->id);
  EXPECT_EQ(after, cache.intern("SELECT * FROM t"));
}

TEST(StatementCache, TypesThatWereToldHaveOtherNumbersInAnotherDatabase) {
  StatementCache cache;
  const auto statement = cache.intern("SELECT $1\0\0\0"s);
  cache.note_told(*statement, 1, {23});
  cache.note_told(*statement, 2, {16385});
  EXPECT_TRUE(cache.with_told_types(*statement, 1));
  EXPECT_TRUE(cache.with_told_types(*statement, 2));
  cache.forget_told_types();
  EXPECT_TRUE(cache.with_told_types(*statement, 1)) << "a type of pg_catalog's";
  EXPECT_FALSE(cache.with_told_types(*statement, 2));
  cache.note_told(*statement, 2, {16385});
  EXPECT_TRUE(cache.with_told_types(*statement, 2));
}

TEST(ClientStatements, NamesAreTheClientsOwn) {
  StatementCache cache;
  ClientStatements one, two;
  one.set("s", cache.intern("SELECT 1"));
  two.set("s", cache.intern("SELECT 2"));
  EXPECT_NE(one.find("s"), two.find("s"));
  one.erase("s");
  EXPECT_FALSE(one.find("s"));
  EXPECT_TRUE(two.find("s"));
  EXPECT_FALSE(two.find(""));
  two.clear_named();
  EXPECT_EQ(two.size(), 0u);
}

TEST(ServerStatements, LeastRecentlyUsedLeaves) {
  StatementCache cache;
  ServerStatements server;
  const auto a = cache.intern("A"), b = cache.intern("B"), c = cache.intern("C");
  for (const auto& s : {a, b, c}) server.add(s, 1);
  EXPECT_FALSE(server.evict(3));
  EXPECT_TRUE(server.touch(a));
  EXPECT_EQ(server.evict(2), b);
  EXPECT_FALSE(server.touch(b));
  server.erase(c->id);
  EXPECT_EQ(server.size(), 1u);
  server.clear();
  EXPECT_FALSE(server.touch(a));
}

TEST(ServerStatements, LongOnesLeaveEarlier) {
  StatementCache cache;
  ServerStatements server;
  const auto text = [&](char c) { return cache.intern(std::string(ServerStatements::kMostBytes / 2 - 10, c)); };
  const auto a = text('a'), b = text('b'), c = text('c'), whole = cache.intern(std::string(2 * ServerStatements::kMostBytes, 'w'));
  server.add(a, 1);
  server.add(b, 1);
  EXPECT_FALSE(server.evict(500));
  server.add(c, 1);
  EXPECT_EQ(server.evict(500), a);
  EXPECT_FALSE(server.evict(500));
  server.erase_if([&](const auto& held) { return held.statement == b; });
  server.add(a, 1);
  EXPECT_FALSE(server.evict(500)) << "what was closed doesn't count";
  server.add(whole, 1);
  EXPECT_EQ(server.evict(500), c);
  EXPECT_EQ(server.evict(500), a);
  EXPECT_FALSE(server.evict(500)) << "the last one stays, whatever its length";
  server.clear();
  server.add(b, 1);
  server.add(c, 1);
  EXPECT_FALSE(server.evict(500));
}

TEST(ServerStatements, ALongUnnamedOneIsDropped) {
  StatementCache cache;
  ServerStatements server;
  for (const std::size_t length : {kLongText, kLongText + 1}) {
    server.unnamed = cache.intern(std::string(length, 'x'));
    server.drop_long_unnamed();
    EXPECT_EQ(server.unnamed == nullptr, length > kLongText);
  }
}

TEST(LongTexts, AFewInAll) {
  StatementCache cache;
  LongTexts kept;
  ClientStatements clients[100], short_one;
  short_one.set("", cache.intern("SELECT 1"));
  kept.keep(short_one);
  EXPECT_EQ(kept.bytes(), 0u);
  const std::size_t length = 1 << 20;
  for (std::size_t i = 0; i < 100; ++i) {
    clients[i].set("", cache.intern(std::to_string(i) + std::string(length, 'x')));
    kept.keep(clients[i]);
    EXPECT_LE(kept.bytes(), LongTexts::kMost);
  }
  EXPECT_LT(cache.footprint(), LongTexts::kMost + length);
  EXPECT_NE(clients[99].long_unnamed(), 0u);
  EXPECT_EQ(clients[0].long_unnamed(), 0u);
  EXPECT_TRUE(clients[0].find("")) << "there is one, of which a Bind may be told";
  EXPECT_TRUE(clients[0].find("")->body.empty());
  kept.let_go(clients[99]);
  kept.keep(clients[99]);
  clients[98].clear_unnamed();  // by what the proxy answered itself
  for (std::size_t i = 90; i < 100; ++i) kept.let_go(clients[i]);
  EXPECT_EQ(kept.bytes(), 0u);
  clients[1].set("", cache.intern(std::string(2 * LongTexts::kMost, 'y')));
  kept.keep(clients[1]);
  EXPECT_NE(clients[1].long_unnamed(), 0u) << "one is kept, whatever its length";
}

TEST(ServerStatements, TheShapeIsThatOfWhatIsPrepared) {
  StatementCache cache;
  ServerStatements server;
  const auto a = cache.intern("A"), b = cache.intern("B");
  server.add(a, 1).shape = 7;
  server.add(b, 1);
  EXPECT_EQ(server.look_up(a->id)->shape, 7u);
  EXPECT_EQ(server.add(a, 2).shape, 7u);
  EXPECT_EQ(server.look_up(b->id)->shape, 0u);
  server.erase(a->id);
  EXPECT_EQ(server.look_up(a->id), nullptr);
  EXPECT_EQ(server.add(a, 1).shape, 0u);
}

TEST(ClientStatements, WhatItWasToldIsTheClientsOwn) {
  StatementCache cache;
  ClientStatements one, two;
  const auto a = cache.intern("A"), b = cache.intern("B");
  for (ClientStatements* client : {&one, &two})
    for (const char* name : {"a", "again"}) client->set(name, a);
  one.set("b", b);
  one.set_shape(a->id, 7);
  EXPECT_EQ(one.look_up("a").shape, 7u);
  EXPECT_EQ(one.look_up("again").shape, 7u);
  EXPECT_EQ(one.look_up("b").shape, 0u);
  EXPECT_EQ(two.look_up("a").shape, 0u);
  one.set("a", b);
  EXPECT_EQ(one.look_up("a").shape, 0u);
}

}  // namespace
TEST(Statements, WhatTheirReadingHangsOn) {
  StatementCache cache;
  const auto constants = [&](const std::string& sql) { return cache.intern(sql + "\0\0\0"s)->has_constants; };
  for (const char* sql : {"SELECT 'x'", "select $$x$$", "SELECT $a$x$a$", "SELECT U&\"\\0061\"", "SHOW \"\xc3\xa9\"", "EXPLAIN SELECT 'x'"})
    EXPECT_TRUE(constants(sql)) << sql;
  for (const char* sql : {"SELECT $1, 2", "COMMIT", "SET x = 'y'", "create unique index i on t (a)", "PREPARE TRANSACTION 'x'"})
    EXPECT_FALSE(constants(sql)) << sql;
  const auto infers = [&](const std::string& body) { return cache.intern(body)->infers_types; };
  EXPECT_TRUE(infers("SELECT $1\0\0\0"s));
  EXPECT_TRUE(infers("SELECT $1, $2\0\0\2\0\0\0\x17\0\0\0\0"s));
  EXPECT_FALSE(infers("SELECT $1\0\0\1\0\0\0\x17"s));
  EXPECT_FALSE(infers("SELECT 1\0\0\0"s));
}

}  // namespace pgsidecar::protocol
