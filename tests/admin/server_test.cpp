#include "admin/server.hpp"

#include <boost/asio/ip/udp.hpp>
#include <boost/json.hpp>
#include <fstream>

#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using namespace test;
namespace json = boost::json;
using Database = pool::Snapshot::Database;

TEST(AdminServer, EveryReadingRouteAnswersGetAndHead) {
  AdminServer server;
  const struct {
    const char *path, *type;
  } routes[] = {{"/", "text/plain; charset=utf-8"},
                {"/health", "application/json"},
                {"/health/", "application/json"},
                {"/health?verbose", "application/json"},
                {"/health/live", "application/json"},
                {"/health/ready", "application/json"},
                {"/health/startup", "application/json"},
                {"/healthz", "application/json"},
                {"/livez", "application/json"},
                {"/readyz", "application/json"},
                {"/startup", "application/json"},
                {"/liveness", "application/json"},
                {"/readiness", "application/json"},
                {"/api/monitoring/pool-stats", "application/json"},
                {"/api/monitoring/compute-health", "application/json"},
                {"/metrics", "text/plain; version=0.0.4; charset=utf-8"}};
  for (const auto& route : routes) {
    SCOPED_TRACE(route.path);
    const Response r = server.get(route.path);
    EXPECT_EQ(r.status, 200);
    EXPECT_TRUE(r.has("Cache-Control: no-store")) << r.head;
    EXPECT_TRUE(r.has("Content-Type: " + std::string(route.type))) << r.head;
    EXPECT_FALSE(r.body.empty());
    if (route.type == std::string("application/json")) {
      EXPECT_NO_THROW(json::parse(r.body)) << r.body;
    }
    const Response head = server.request("HEAD", route.path);
    EXPECT_EQ(head.status, 200);
    EXPECT_EQ(head.head.find("Content-Length: 0\r\n"), std::string::npos) << head.head;
    EXPECT_EQ(server.request("POST", route.path, "Host: localhost\r\nContent-Length: 0\r\n").status, 405);
  }
  EXPECT_EQ(server.probes(), 0) << "reading must not wake the database";
}

TEST(AdminServer, HealthFollowsTheSnapshot) {
  const struct {
    bool started, draining;
    Database database;
    int health, live, ready, startup;
    const char* status;
  } rows[] = {{true, false, Database::Up, 200, 200, 200, 200, "healthy"},
              {true, false, Database::Unknown, 200, 200, 200, 200, "healthy"},
              {true, false, Database::Down, 503, 200, 503, 200, "unhealthy"},
              {true, true, Database::Up, 200, 200, 503, 200, "degraded"},
              {false, false, Database::Unknown, 503, 200, 503, 503, "unhealthy"}};
  AdminServer server;
  for (const auto& row : rows) {
    SCOPED_TRACE(row.status);
    server.edit([&](pool::Snapshot& s) {
      s.started = row.started;
      s.draining = row.draining;
      s.database = row.database;
      s.databaseError = row.database == Database::Down ? "connection \"refused\"" : "";
    });
    const Response health = server.get("/health");
    EXPECT_EQ(health.status, row.health);
    EXPECT_EQ(json::parse(health.body).at("status").as_string(), row.status);
    EXPECT_EQ(server.get("/health/live").status, row.live);
    EXPECT_EQ(server.get("/health/startup").status, row.startup);
    const Response ready = server.get("/health/ready");
    EXPECT_EQ(ready.status, row.ready);
    EXPECT_EQ(json::parse(ready.body).at("ready").as_bool(), row.ready == 200);
    if (row.database == Database::Down) {
      EXPECT_EQ(json::parse(ready.body).at("reason").as_string(), "database down: connection \"refused\"");
    }
  }
}

TEST(AdminServer, IsNotReadyBeforeTheDrainNorWhileTheLoginIsRefused) {
  AdminServer server;
  server.edit([](pool::Snapshot& s) { s.leaving = true; });
  Response ready = server.get("/health/ready");
  EXPECT_EQ(ready.status, 503);
  EXPECT_NE(ready.body.find("shutdown.delayMillis"), std::string::npos);
  EXPECT_EQ(server.get("/health").status, 200);
  server.edit([](pool::Snapshot& s) {
    s.leaving = false;
    s.loginRefused = "password authentication failed for user \"app\"";
  });
  ready = server.get("/health/ready");
  EXPECT_EQ(ready.status, 503);
  EXPECT_EQ(json::parse(ready.body).at("reason").as_string(),
            "the database refuses the login: password authentication failed for user \"app\"");
  const Response health = server.get("/health");
  EXPECT_EQ(health.status, 503);
  EXPECT_EQ(json::parse(health.body).at("checks").at("database").at("error").as_string(),
            "password authentication failed for user \"app\"");
  EXPECT_EQ(server.get("/health/live").status, 200);
}

TEST(AdminServer, ASilentDataLoopIsNotAlive) {
  AdminServer server;
  server.hold();
  const auto begin = std::chrono::steady_clock::now();
  const Response live = server.get("/health/live");
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_EQ(live.status, 503);
  EXPECT_FALSE(json::parse(live.body).at("alive").as_bool());
  EXPECT_GE(took, 900ms);
  EXPECT_LT(took, 4s);
  EXPECT_EQ(server.get("/").status, 200);
  server.release();
  EXPECT_EQ(server.get("/health/live").status, 200);
}

TEST(AdminServer, RequestsShareASnapshotInTheMaking) {
  AdminServer server;
  server.hold();
  Connection a(server.port()), b(server.port());
  for (auto* c : {&a, &b}) c->send("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
  while (server.held() == 0) std::this_thread::yield();
  EXPECT_EQ(server.held(), 1u);
  server.release();
  EXPECT_EQ(a.read().status, 200);
  EXPECT_EQ(b.read().status, 200);
}

TEST(AdminServer, ComputeHealthProbesOnlyWhenAsked) {
  AdminServer server;
  Response r = server.get("/api/monitoring/compute-health?probe=0");
  EXPECT_EQ(json::parse(r.body).at("database").at("source").as_string(), "passive");
  EXPECT_EQ(server.probes(), 0);
  r = server.get("/api/monitoring/compute-health?x=1&probe=1");
  EXPECT_EQ(json::parse(r.body).at("database").at("source").as_string(), "probe");
  EXPECT_EQ(server.probes(), 1);
}

TEST(AdminServer, ADatabaseThatIsDownIsLookedForAgain) {
  AdminServer server;
  EXPECT_EQ(server.get("/health/ready").status, 200);
  EXPECT_EQ(server.probes(), 0);
  server.edit([](pool::Snapshot& s) { s.database = Database::Down; });
  EXPECT_EQ(server.get("/health/ready").status, 503);
  EXPECT_EQ(server.get("/health").status, 503);  // within the same second
  EXPECT_EQ(server.get("/health/live").status, 200);
  EXPECT_EQ(server.probes(), 1);
}

TEST(AdminServer, OpenMetricsByAccept) {
  AdminServer server;
  const Response r =
      server.request("GET", "/metrics", "Host: x\r\nAccept: application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3\r\n");
  EXPECT_TRUE(r.has("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8")) << r.head;
  EXPECT_TRUE(r.body.ends_with("# EOF\n"));
}

TEST(AdminServer, KeepAliveServesSeveralRequestsAlsoPipelined) {
  AdminServer server;
  Connection c(server.port());
  for (int i = 0; i < 3; ++i) {
    c.send("GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n");
    EXPECT_EQ(c.read().status, 200);
  }
  c.send("GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(c.read().status, 200);
  EXPECT_EQ(c.read().status, 404);
  c.send("GET /livez HTTP/1.0\r\n\r\n");
  EXPECT_EQ(c.read().status, 200);
  EXPECT_TRUE(c.closes_within(2s));
}

TEST(AdminServer, UnknownPathsAndMethods) {
  AdminServer server;
  const Response missing = server.get("/helth");
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(json::parse(missing.body).at("hint").as_string(), "GET / lists the endpoints");
  const struct {
    const char *method, *path, *allow;
  } rows[] = {{"POST", "/health", "GET, HEAD"},     {"DELETE", "/metrics", "GET, HEAD"},  {"OPTIONS", "/", "GET, HEAD"},
              {"GET", "/api/admin/reload", "POST"}, {"HEAD", "/api/admin/drain", "POST"}, {"PUT", "/api/admin/drain", "POST"}};
  for (const auto& row : rows) {
    SCOPED_TRACE(std::string(row.method) + row.path);
    const Response r = server.request(row.method, row.path);
    EXPECT_EQ(r.status, 405);
    EXPECT_TRUE(r.has("Allow: " + std::string(row.allow))) << r.head;
  }
  EXPECT_TRUE(server.actions().empty());
}

TEST(AdminServer, ChangesFromLoopback) {
  AdminServer server;
  EXPECT_EQ(server.post("/api/admin/reload").body, "{\"ok\":true,\"action\":\"reload\",\"changes\":[\"pool.max changed\"]}\n");
  EXPECT_EQ(server.post("/api/admin/drain").body, "{\"ok\":true,\"action\":\"drain\"}\n");
  const Response off = server.post("/quitquitquit");
  EXPECT_EQ(off.status, 404);
  EXPECT_NE(off.body.find("admin.quitquitquit"), std::string::npos);
  EXPECT_EQ(server.actions(), (std::vector<std::string>{"reload", "drain"}));
  server.refuse_actions("line 3: unknown key");
  const Response failed = server.post("/api/admin/reload");
  EXPECT_EQ(failed.status, 409);
  EXPECT_EQ(json::parse(failed.body).at("error").as_string(), "line 3: unknown key");

  conf::Admin quit = settings();
  quit.quitquitquit = true;
  AdminServer other(quit);
  EXPECT_EQ(other.get("/quitquitquit").status, 405);
  EXPECT_EQ(other.post("/quitquitquit").status, 200);
  EXPECT_EQ(other.actions(), std::vector<std::string>{"quit"});
}

TEST(AdminServer, AWrongHostChangesNothingButReadsAreFree) {
  AdminServer server;
  EXPECT_EQ(server.request("POST", "/api/admin/drain", "Host: evil.example\r\nContent-Length: 0\r\n").status, 403);
  EXPECT_EQ(server.request("POST", "/api/admin/drain", "Host: localhost\r\nOrigin: https://evil.example\r\nContent-Length: 0\r\n").status,
            403);
  EXPECT_EQ(server.request("GET", "/health", "Host: 10.1.2.3:5000\r\n").status, 200);
  EXPECT_TRUE(server.actions().empty());
}

// An address of this machine that isn't loopback; unspecified if there is none.
asio::ip::address own_address() {
  asio::io_context io;
  asio::ip::udp::socket socket(io, asio::ip::udp::v4());
  boost::system::error_code ec;
  socket.connect({asio::ip::make_address("192.0.2.1"), 9}, ec);  // sends nothing
  if (ec) return {};
  const auto address = socket.local_endpoint(ec).address();
  return ec || address.is_loopback() ? asio::ip::address() : address;
}

TEST(AdminServer, TwoHostHeadersChangeNothing) {
  AdminServer server;
  EXPECT_EQ(server.request("POST", "/api/admin/drain", "Host: localhost\r\nHost: evil.example\r\n").status, 400);
  EXPECT_TRUE(server.actions().empty());
}

TEST(AdminServer, APeerOffLoopbackNeedsTheToken) {
  const auto address = own_address();
  if (address.is_unspecified()) GTEST_SKIP() << "only loopback here";
  conf::Admin any = settings();
  any.listen.host = "0.0.0.0";
  any.tokenFile = testing::TempDir() + "admin-token." + std::to_string(getpid());
  std::ofstream(any.tokenFile) << "t0ken\n";
  AdminServer server(any);
  const auto ask = [&](std::string_view method, std::string_view path, std::string_view headers) {
    Connection c(server.port(), address);
    c.send(std::string(method) + " " + std::string(path) + " HTTP/1.1\r\nHost: " + address.to_string() + ":5000\r\n" +
           std::string(headers) + "Content-Length: 0\r\n\r\n");
    return c.read();
  };
  const Response none = ask("POST", "/api/admin/drain", "");
  EXPECT_EQ(none.status, 401);
  EXPECT_TRUE(none.has("WWW-Authenticate: Bearer")) << none.head;
  EXPECT_EQ(ask("POST", "/api/admin/drain", "Authorization: Bearer t0kem\r\n").status, 401);
  EXPECT_EQ(ask("GET", "/health/ready", "").status, 200);
  EXPECT_TRUE(server.actions().empty());
  EXPECT_EQ(ask("POST", "/api/admin/drain", "Authorization: Bearer t0ken\r\n").status, 200);
  EXPECT_EQ(server.actions(), std::vector<std::string>{"drain"});
  unlink(any.tokenFile.c_str());
}

TEST(AdminServer, ASlowHeaderTimesOut) {
  AdminServer server;
  Connection slow(server.port()), idle(server.port());
  slow.send("GET /health HTTP/1.1\r\nHost: x\r\n");
  const auto begin = std::chrono::steady_clock::now();
  // Bytes that trickle in don't prolong it.
  for (int i = 0; i < 5; ++i) {
    slow.closes_within(500ms);
    slow.send("X-A: b\r\n");
  }
  EXPECT_TRUE(slow.closes_within(10s));
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_GE(took, 4s);
  EXPECT_LT(took, 8s);
  EXPECT_TRUE(idle.closes_within(5s));
  EXPECT_EQ(server.get("/health/live").status, 200);
}

TEST(AdminServer, OversizedRequestsAreRefused) {
  AdminServer server;
  const std::string big(9000, 'a');
  EXPECT_EQ(server.request("GET", "/health", "Host: x\r\nX-Big: " + big + "\r\n").status, 431);
  EXPECT_EQ(server.request("GET", "/" + big).status, 431);
  EXPECT_EQ(server.request("POST", "/api/admin/drain", "Host: localhost\r\nContent-Length: 16385\r\n").status, 413);
  Connection endless(server.port());
  endless.send("GET /health HTTP/1.1\r\nX: " + std::string(60000, 'x'));
  EXPECT_EQ(endless.read().status, 431);
  Connection chunked(server.port());
  chunked.send("POST /api/admin/drain HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n8000\r\n" +
               std::string(0x8000, 'x'));
  EXPECT_EQ(chunked.read().status, 413);
  EXPECT_EQ(server.request("GET", "/health/live", "Host: x\r\nX-Ok: " + std::string(7000, 'a') + "\r\n").status, 200);
  EXPECT_TRUE(server.actions().empty());
}

TEST(AdminServer, WhatIsNotHttpIsRefused) {
  AdminServer server;
  Connection c(server.port());
  c.send("\x16\x03\x01\x02\x00\x01\x00\x01\xfc hello\r\n\r\n");
  EXPECT_EQ(c.read().status, 400);
  EXPECT_TRUE(c.closes_within(3s));
  { Connection gone(server.port()); }
  EXPECT_EQ(server.get("/health/live").status, 200);
}

TEST(AdminServer, The33rdConnectionTakesTheSilentOnesPlace) {
  AdminServer server;
  std::vector<std::unique_ptr<Connection>> open;
  for (int i = 0; i < 32; ++i) {
    open.push_back(std::make_unique<Connection>(server.port()));
    open.back()->send("GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n");
    ASSERT_EQ(open.back()->read().status, 200);
  }
  EXPECT_EQ(server.get("/health/live").status, 200);
  EXPECT_TRUE(open[0]->closes_within(1s));
  open[31]->send("GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_EQ(open[31]->read().status, 200);
}

TEST(AdminServer, The33rdConnectionTakesTheStalledOnesPlace) {
  AdminServer server;
  std::string questions;
  for (int i = 0; i < 2000; ++i) questions += "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
  std::vector<std::unique_ptr<Connection>> open;
  for (int i = 0; i < 32; ++i) {
    open.push_back(std::make_unique<Connection>(server.port()));
    open.back()->send_some(questions);  // and never reads an answer
  }
  Response r;
  for (int i = 0; i < 100 && r.status != 200; ++i) r = server.get("/health/live");
  EXPECT_EQ(r.status, 200);
}

TEST(AdminServer, The33rdConnectionIsRefusedWhileAllAreBusy) {
  AdminServer server;
  server.hold();
  std::vector<std::unique_ptr<Connection>> open;
  // Each has had an answer before, so that its next request is read before a further connection is accepted.
  for (int i = 0; i < 32; ++i) {
    open.push_back(std::make_unique<Connection>(server.port()));
    open.back()->send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    ASSERT_EQ(open.back()->read().status, 200);
  }
  for (auto& c : open) c->send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  while (server.held() == 0) std::this_thread::yield();
  Response refused;
  for (int i = 0; i < 50 && refused.status == 0; ++i) {
    Connection one_more(server.port());
    refused = one_more.read(false, 20ms);
  }
  EXPECT_EQ(refused.status, 503);
  EXPECT_NE(refused.body.find("too many admin connections"), std::string::npos);
  server.release();
  int answered = 0;
  for (auto& c : open) answered += c->read().status == 200;
  EXPECT_EQ(answered, 32);
  EXPECT_EQ(server.get("/health/live").status, 200);
}

TEST(AdminServer, StopEndsIdleAndWaitingRequests) {
  AdminServer server;
  server.hold();
  Connection idle(server.port()), waiting(server.port());
  waiting.send("GET /health HTTP/1.1\r\nHost: x\r\n\r\n");
  while (server.held() == 0) std::this_thread::yield();
  server.stop();
  EXPECT_EQ(waiting.read().status, 503);
  EXPECT_TRUE(idle.closes_within(1s));
  EXPECT_THROW(Connection(server.port()), boost::system::system_error);
}

TEST(AdminServer, ATakenPortNamesTheKey) {
  AdminServer first;
  conf::Admin same = settings();
  same.listen.port = first.port();
  asio::io_context io;
  Server second(io, same, {});
  conf::PassedSockets none;
  try {
    second.listen(none);
    FAIL() << "listens twice";
  } catch (const std::runtime_error& e) {
    const std::string text = e.what();
    for (const char* part : {"admin.listen", "PGSIDECAR_ADMIN_LISTEN", "in use"}) EXPECT_NE(text.find(part), std::string::npos) << text;
    EXPECT_NE(text.find(std::to_string(first.port())), std::string::npos) << text;
  }
  EXPECT_EQ(second.port(), 0);
}

TEST(AdminServer, OffListensNowhere) {
  conf::Admin off = settings();
  off.enabled = false;
  asio::io_context io;
  Server server(io, off, {});
  conf::PassedSockets none;
  server.listen(none);
  server.begin();
  EXPECT_EQ(server.port(), 0);
  EXPECT_EQ(io.run(), 0u);
}

}  // namespace
}  // namespace pgsidecar::admin
