#include "admin/client.hpp"

#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using namespace test;

conf::Admin at(std::uint16_t port) {
  conf::Admin admin = settings();
  admin.listen.port = port;
  return admin;
}

std::uint16_t closed_port() {
  asio::io_context io;
  tcp::acceptor acceptor(io, {asio::ip::address_v4::loopback(), 0});
  return acceptor.local_endpoint().port();
}

TEST(AdminClient, HealthcheckSaysAlive) {
  AdminServer server;
  EXPECT_EQ(healthcheck(at(server.port())), 0);
  conf::Admin any = at(server.port());
  any.listen.host = "0.0.0.0";
  EXPECT_EQ(healthcheck(any), 0);
  server.edit([](pool::Snapshot& s) { s.draining = true; });
  EXPECT_EQ(healthcheck(at(server.port())), 0) << "draining is alive";
  server.hold();
  testing::internal::CaptureStderr();
  EXPECT_EQ(healthcheck(at(server.port())), 1);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("answered 503"), std::string::npos);
}

TEST(AdminClient, NobodyListensOrThePortIsOff) {
  testing::internal::CaptureStderr();
  EXPECT_EQ(healthcheck(at(closed_port())), 1);
  std::string text = testing::internal::GetCapturedStderr();
  EXPECT_TRUE(text.starts_with("pgsidecar healthcheck: cannot reach http://127.0.0.1:")) << text;
  EXPECT_NE(text.find("PGSIDECAR_ADMIN_LISTEN"), std::string::npos) << text;
  conf::Admin off = settings();
  off.enabled = false;
  testing::internal::CaptureStderr();
  EXPECT_EQ(wait(off, 10s, false), 1);
  EXPECT_EQ(shutdown(off), 1);
  text = testing::internal::GetCapturedStderr();
  EXPECT_NE(text.find("the admin port is off"), std::string::npos) << text;
}

TEST(AdminClient, WaitReadyWaits) {
  AdminServer server;
  EXPECT_EQ(wait(at(server.port()), 5s, false), 0);
  server.edit([](pool::Snapshot& s) { s.started = false; });
  testing::internal::CaptureStderr();
  EXPECT_EQ(wait(at(server.port()), 500ms, false), 1);
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_NE(text.find("not ready within 500 ms"), std::string::npos) << text;
  EXPECT_NE(text.find("not listening yet"), std::string::npos) << text;
  auto waiting = std::async(std::launch::async, [&] { return wait(at(server.port()), 20s, false); });
  EXPECT_EQ(waiting.wait_for(300ms), std::future_status::timeout);
  server.edit([](pool::Snapshot& s) { s.started = true; });
  EXPECT_EQ(waiting.get(), 0);
}

TEST(AdminClient, ShutdownDrainsOrQuits) {
  AdminServer server;
  EXPECT_EQ(shutdown(at(server.port())), 0);
  EXPECT_EQ(server.actions(), std::vector<std::string>{"drain"});
  conf::Admin quit = settings();
  quit.quitquitquit = true;
  AdminServer other(quit);
  quit.listen.port = other.port();
  EXPECT_EQ(shutdown(quit), 0);
  EXPECT_EQ(other.actions(), std::vector<std::string>{"quit"});
  other.refuse_actions("already draining");
  testing::internal::CaptureStderr();
  EXPECT_EQ(shutdown(quit), 1);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("already draining"), std::string::npos);
}

}  // namespace
}  // namespace pgsidecar::admin
