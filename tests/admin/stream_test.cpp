#include "admin/stream.hpp"

#include <algorithm>
#include <boost/json.hpp>

#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using namespace test;
namespace json = boost::json;

constexpr const char* kAsk = "GET /api/monitoring/stream HTTP/1.1\r\nHost: localhost\r\n\r\n";

// What one event brought; nothing if the connection ended first.
json::value next(Connection& stream, std::string_view event = "sample") {
  const std::string text = stream.read_until("event: " + std::string(event) + "\ndata: ", 5s);
  if (text.empty()) return {};
  const std::string data = stream.read_until("\n\n", 5s);
  return json::parse(data.substr(0, data.size() - 2));
}

// Whether one more reader is served before `limit` has passed.
bool gets_a_place(const AdminServer& server, std::chrono::seconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (std::chrono::steady_clock::now() < deadline) {
    Connection late(server.port());
    late.send(kAsk);
    if (late.read_until("\r\n\r\n", limit).find("200 OK") != std::string::npos) return true;
    std::this_thread::sleep_for(100ms);
  }
  return false;
}

TEST(AdminStream, ASampleASecond) {
  AdminServer server;
  Connection stream(server.port());
  stream.send(kAsk);
  const std::string head = stream.read_until("\r\n\r\n", 5s);
  EXPECT_NE(head.find("200 OK"), std::string::npos) << head;
  EXPECT_NE(head.find("Content-Type: text/event-stream\r\n"), std::string::npos) << head;
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) {
    const json::value sample = next(stream);
    EXPECT_EQ(sample.at("health").at("status").as_string(), "healthy");
    EXPECT_EQ(sample.at("stats").at("perPool").as_array().size(), 1u);
    EXPECT_TRUE(sample.at("stats").at("alerts").is_array());
  }
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took, 1800ms);
  EXPECT_LT(took, 4s);
}

TEST(AdminStream, ItFollowsTheSnapshot) {
  AdminServer server;
  Connection stream(server.port());
  stream.send(kAsk);
  EXPECT_FALSE(next(stream).at("health").at("draining").as_bool());
  server.edit([](pool::Snapshot& s) { s.draining = true; });
  EXPECT_TRUE(next(stream).at("health").at("draining").as_bool());
}

TEST(AdminStream, ReadersShareASample) {
  AdminServer server;
  Connection a(server.port()), b(server.port());
  for (auto* c : {&a, &b}) c->send(kAsk);
  next(a), next(b);
  const int before = server.snapshots();
  for (int i = 0; i < 2; ++i) EXPECT_EQ(next(a).at("stats").at("timestamp"), next(b).at("stats").at("timestamp"));
  EXPECT_EQ(server.snapshots() - before, 2);
}

TEST(AdminStream, NobodyReadsNothingIsSampled) {
  AdminServer server;
  {
    Connection stream(server.port());
    stream.send(kAsk);
    next(stream);
  }
  // The loss is noticed by the writes that follow it.
  int before = -1;
  for (int i = 0; i < 10 && server.snapshots() != before; ++i) {
    before = server.snapshots();
    std::this_thread::sleep_for(1200ms);
  }
  EXPECT_EQ(server.snapshots(), before);
  EXPECT_LE(before, 6);
}

TEST(AdminStream, TheNinthIsRefusedAndOthersAreAnswered) {
  AdminServer server;
  std::vector<std::unique_ptr<Connection>> streams;
  for (std::size_t i = 0; i < Stream::kReaders; ++i) {
    streams.push_back(std::make_unique<Connection>(server.port()));
    streams.back()->send(kAsk);
    ASSERT_FALSE(next(*streams.back()).is_null());
  }
  const Response refused = server.get("/api/monitoring/stream");
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.body.find("too many streams"), std::string::npos);
  // Connections that want a place push out silent ones, no stream.
  std::vector<std::unique_ptr<Connection>> silent;
  for (int i = 0; i < 40; ++i) silent.push_back(std::make_unique<Connection>(server.port()));
  EXPECT_EQ(server.get("/health/live").status, 200);
  for (auto& stream : streams) EXPECT_FALSE(next(*stream).is_null());
  streams.pop_back();
  EXPECT_TRUE(gets_a_place(server, 5s)) << "a place that was left is free again";
}

TEST(AdminStream, ASilentDataLoopIsTold) {
  AdminServer server;
  server.hold();
  Connection stream(server.port());
  stream.send(kAsk);
  EXPECT_NE(next(stream, "silent").at("error").as_string().find("data loop"), std::string_view::npos);
  server.release();
  EXPECT_FALSE(next(stream).is_null());
}

TEST(AdminStream, AReaderThatTakesNothingIsDropped) {
  AdminServer server;
  server.edit([](pool::Snapshot& s) { s.pools.resize(1000, s.pools[0]); });  // most of a megabyte a sample
  std::vector<std::unique_ptr<Connection>> slow;
  for (std::size_t i = 0; i < Stream::kReaders; ++i) {
    slow.push_back(std::make_unique<Connection>(server.port()));
    slow.back()->send(kAsk);
    ASSERT_NE(slow.back()->read_until("\r\n\r\n", 15s).find("200 OK"), std::string::npos);
  }
  EXPECT_EQ(server.get("/api/monitoring/stream").status, 503);
  EXPECT_TRUE(gets_a_place(server, 60s));
  EXPECT_TRUE(std::any_of(slow.begin(), slow.end(), [](const auto& one) { return one->closes_within(2s); }));
}

TEST(AdminStream, StopEndsIt) {
  AdminServer server;
  Connection stream(server.port());
  stream.send(kAsk);
  next(stream);
  server.stop();
  EXPECT_TRUE(stream.closes_within(500ms));
}

TEST(AdminStream, HeadAndPost) {
  AdminServer server;
  const Response head = server.request("HEAD", "/api/monitoring/stream");
  EXPECT_EQ(head.status, 200);
  EXPECT_TRUE(head.has("Content-Type: text/event-stream")) << head.head;
  EXPECT_EQ(server.request("POST", "/api/monitoring/stream", "Host: localhost\r\nContent-Length: 0\r\n").status, 405);
}

}  // namespace
}  // namespace pgsidecar::admin
