// Every stream at every split and every exchange cut at every step, through a whole Worker.
#include <gtest/gtest.h>

#include "harness.hpp"

namespace pgsidecar::proxy {
namespace {

using namespace test;
using protocol::Frontend;

std::string query() {
  std::string out;
  protocol::write_query(out, "SELECT 1");
  return out;
}

std::string extended(std::string_view name) {
  std::string out;
  Writer(out).begin(Frontend::Parse).cstring(name).cstring("SELECT $1::text").u16(0).end();
  Writer(out).begin(Frontend::Bind).cstring("").cstring(name).u16(0).u16(1).u32(1).u8('x').u16(0).end();
  Writer(out).begin(Frontend::Describe).u8('P').cstring("").end();
  Writer(out).begin(Frontend::Execute).cstring("").u32(0).end();
  Writer(out).begin(Frontend::Close).u8('S').cstring(name).end();
  Writer(out).begin(Frontend::Sync).end();
  return out;
}

conf::PoolSettings settings() {
  conf::PoolSettings pool;
  pool.max = 1;
  pool.min = 0;
  return pool;
}

void send_split(Client& client, const std::string& bytes, std::size_t at) {
  client.send(bytes.substr(0, at));
  if (at > 0) drained(client.fd());
  client.send(bytes.substr(at));
}

TEST(Split, WhatAClientSends) {
  Proxy proxy(settings());
  Client client(proxy.path());
  for (const std::string& bytes : {query(), extended(""), extended("name"), query() + extended("a") + query()})
    for (std::size_t n = 0; n <= bytes.size(); ++n) {
      send_split(client, bytes, n);
      const std::size_t rounds = bytes.size() > 150 ? 3 : 1;
      for (std::size_t i = 0; i < rounds; ++i) ASSERT_TRUE(client.read_ready()) << n << client.error();
    }
}

TEST(Split, AClientsLogin) {
  Proxy proxy(settings());
  const std::string hello = Client::hello();
  for (std::size_t n = 0; n <= hello.size(); ++n) {
    Client client(proxy.path(), n);
    client.send(query());
    ASSERT_TRUE(client.read_ready()) << n << client.error();
  }
}

/// A new server connection for each query.
conf::PoolSettings used_once() {
  conf::PoolSettings pool = settings();
  pool.maxUses = 1;
  return pool;
}

constexpr long kLogin = 9 + 25 + 13 + 6;  // AuthenticationOk, ParameterStatus, BackendKeyData, ReadyForQuery
constexpr long kAnswer = 90;              // as long as any

TEST(Split, AServersLogin) {
  Proxy proxy(used_once());
  Client client(proxy.path());
  for (long n = 1; n < kLogin; ++n) {
    g_split_login = n;
    client.send(query());
    ASSERT_TRUE(client.read_ready()) << n << client.error();
  }
}

TEST(Split, AServersAnswer) {
  Proxy proxy(settings());
  Client client(proxy.path());
  for (const std::string& request : {query(), extended(""), extended("name")})
    for (long n = 1; n < kAnswer; ++n) {
      g_split_answer = n;
      client.send(request);
      ASSERT_TRUE(client.read_ready()) << n << client.error();
    }
}

// Between two messages the client hears of it in PostgreSQL's words, stays, and its next query is answered. In the middle of a
// message of which it has had a part, nothing could be told: its connection ends, as a direct one would.
TEST(Split, AServerThatEndsInTheMiddleOfAnAnswer) {
  int heard = 0, ended = 0;
  for (const std::string& request : {query(), extended(""), extended("name")}) {
    Proxy proxy(settings());
    auto client = std::make_unique<Client>(proxy.path());
    for (long n = 0; n < 59; ++n) {  // the shortest answer
      g_cut_answer = n;
      client->send(request);
      ASSERT_FALSE(client->read_ready()) << n;
      if (client->ended()) {
        ++ended;
        ASSERT_EQ(client->error(), "") << n;
        client = std::make_unique<Client>(proxy.path());
      } else {
        ++heard;
        ASSERT_NE(client->error().find("08006"), std::string::npos) << n << client->error();
      }
      client->send(request);
      ASSERT_TRUE(client->read_ready()) << n << client->error();
    }
  }
  EXPECT_GT(heard, 60);
  EXPECT_GT(ended, 10);
}

// One that ends in the middle of its login is tried again, and the client doesn't hear of it.
TEST(Split, AServerThatEndsInTheMiddleOfItsLogin) {
  for (const long n : {0L, 1L, 8L, 9L, 20L, kLogin - 1}) {
    Proxy proxy(settings());
    g_cut_login = n;
    Client client(proxy.path());
    client.send(query());
    ASSERT_TRUE(client.read_ready()) << n << client.error();
  }
}

}  // namespace
}  // namespace pgsidecar::proxy
