#include "admin/access.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace pgsidecar::admin {
namespace {

using boost::asio::ip::make_address;

struct TokenFile {
  explicit TokenFile(std::string_view text) : path(testing::TempDir() + "token." + std::to_string(getpid())) {
    std::ofstream(path) << text;
  }
  ~TokenFile() { unlink(path.c_str()); }
  std::string path;
};

unsigned status(const conf::Admin& admin, const char* peer, std::string_view host, std::string_view authorization = {},
                std::string_view origin = {}, std::string_view site = {}) {
  Caller caller;
  caller.peer = make_address(peer);
  caller.local = make_address(caller.peer.is_v6() ? "::ffff:10.1.2.3" : "10.1.2.3");
  caller.host = host;
  caller.authorization = authorization;
  caller.origin = origin;
  caller.fetchSite = site;
  return refusal_of(admin, caller).status;
}

TEST(Access, HostAllowList) {
  conf::Admin admin;
  admin.hosts = {"Pooler.internal"};
  admin.listen.host = "sidecar";
  const struct {
    const char* host;
    unsigned expected;
  } rows[] = {{"localhost", 0},  {"LOCALHOST:5000", 0}, {"127.0.0.1:5000", 0}, {"127.0.0.2", 0},
              {"[::1]:5000", 0}, {"10.1.2.3:5000", 0},  {"sidecar", 0},        {"pooler.internal:80", 0},
              {"", 403},         {"evil.example", 403}, {"10.1.2.4", 403},     {"localhost.evil.example", 403},
              {"[::2]", 403},    {"[::1", 403},         {":5000", 403},        {"pooler.internal.evil", 403}};
  for (const auto& row : rows) EXPECT_EQ(status(admin, "127.0.0.1", row.host), row.expected) << row.host;
}

TEST(Access, BrowsersFromOtherSites) {
  const conf::Admin admin;
  EXPECT_EQ(status(admin, "127.0.0.1", "localhost:5000", "", "http://localhost:5000", "same-origin"), 0u);
  EXPECT_EQ(status(admin, "127.0.0.1", "localhost:5000", "", "http://localhost:3000"), 403u);
  EXPECT_EQ(status(admin, "127.0.0.1", "localhost:5000", "", "https://evil.example"), 403u);
  EXPECT_EQ(status(admin, "127.0.0.1", "localhost:5000", "", "null"), 403u);
  EXPECT_EQ(status(admin, "127.0.0.1", "localhost:5000", "", "", "cross-site"), 403u);
}

TEST(Access, PeersOffLoopbackNeedTheToken) {
  conf::Admin admin;
  EXPECT_EQ(status(admin, "::1", "localhost"), 0u);
  EXPECT_EQ(status(admin, "::ffff:127.0.0.1", "localhost"), 0u);
  EXPECT_EQ(status(admin, "10.9.9.9", "10.1.2.3", "Bearer x"), 403u) << "no token is set";
  const TokenFile file("s3cret-token\n");
  admin.tokenFile = file.path;
  const struct {
    const char* authorization;
    unsigned expected;
  } rows[] = {{"Bearer s3cret-token", 0},
              {"bearer  s3cret-token ", 0},
              {"", 401},
              {"Bearer ", 401},
              {"Bearer s3cret-toke", 401},
              {"Bearer s3cret-tokenn", 401},
              {"Bearer S3cret-token", 401},
              {"Basic s3cret-token", 401},
              {"s3cret-token", 401}};
  for (const auto& row : rows) {
    EXPECT_EQ(status(admin, "10.9.9.9", "10.1.2.3", row.authorization), row.expected) << row.authorization;
    EXPECT_EQ(status(admin, "::ffff:10.9.9.9", "10.1.2.3", row.authorization), row.expected) << row.authorization;
  }
  EXPECT_EQ(status(admin, "10.9.9.9", "evil.example", "Bearer s3cret-token"), 403u);
}

TEST(Access, AnEmptyOrMissingTokenFileAdmitsNobody) {
  conf::Admin admin;
  const TokenFile empty(" \n");
  for (const auto& path : {empty.path, std::string("/nonexistent/token")}) {
    admin.tokenFile = path;
    EXPECT_EQ(status(admin, "10.9.9.9", "10.1.2.3", "Bearer "), 403u);
    EXPECT_EQ(status(admin, "10.9.9.9", "10.1.2.3"), 403u);
  }
}

TEST(Access, OpenMetricsPreference) {
  const struct {
    const char* accept;
    bool expected;
  } rows[] = {{"", false},
              {"*/*", false},
              {"text/plain", false},
              {"application/openmetrics-text", true},
              {"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2", true},
              {"text/plain;q=0.9, Application/OpenMetrics-Text; q=0.4", false},
              {"application/openmetrics-text;q=0", false},
              {"application/openmetrics-textual", false}};
  for (const auto& row : rows) EXPECT_EQ(prefers_open_metrics(row.accept), row.expected) << row.accept;
}

}  // namespace
}  // namespace pgsidecar::admin
