#include "admin/page.hpp"

#include "admin/access.hpp"
#include "tests/admin/harness.hpp"

namespace pgsidecar::admin {
namespace {

using namespace test;

constexpr std::string_view kBrowser = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8";

std::string headers(std::string_view accept, std::string_view encoding = {}, std::string_view etag = {}) {
  std::string text = "Host: localhost\r\nAccept: " + std::string(accept) + "\r\n";
  if (!encoding.empty()) text += "Accept-Encoding: " + std::string(encoding) + "\r\n";
  if (!etag.empty()) text += "If-None-Match: " + std::string(etag) + "\r\n";
  return text;
}

TEST(AdminPage, QualityOfANameInAList) {
  const struct {
    std::string_view list, name;
    double quality;
  } rows[] = {{"gzip, deflate, br", "gzip", 1},
              {"GZIP;q=0.5", "gzip", 0.5},
              {"gzip;q=0", "gzip", 0},
              {"identity", "gzip", 0},
              {"x-gzip", "gzip", 0},
              {"", "gzip", 0},
              {"gzip; q=x", "gzip", 0},
              {",;,", "gzip", 0},
              {"gzip;q=", "gzip", 0},
              {"gzip;q", "gzip", 1},
              {"a;q=0.1,a", "a", 1}};
  for (const auto& row : rows) EXPECT_EQ(quality(row.list, row.name), row.quality) << row.list;
}

TEST(AdminPage, ABrowserGetsThePageAndCurlTheList) {
  AdminServer server;
  for (const std::string_view accept : {kBrowser, std::string_view("text/html")}) {
    const Response r = server.request("GET", "/", headers(accept, "gzip"));
    EXPECT_EQ(r.status, 200);
    EXPECT_TRUE(r.has("Content-Type: text/html; charset=utf-8")) << r.head;
    EXPECT_TRUE(r.has("Content-Encoding: gzip")) << r.head;
    EXPECT_EQ(r.body, kPage.gzip);
  }
  for (const std::string_view accept : {"*/*", "text/plain", "application/json", "text/html;q=0", "text/html;q=0.5, text/plain"}) {
    const Response r = server.request("GET", "/", headers(accept, "gzip"));
    EXPECT_EQ(r.status, 200);
    EXPECT_TRUE(r.has("Content-Type: text/plain; charset=utf-8")) << accept << r.head;
    EXPECT_TRUE(r.has("Vary: Accept")) << r.head;
    EXPECT_NE(r.body.find("/api/monitoring/pool-stats"), std::string::npos);
  }
}

TEST(AdminPage, WithoutGzipItIsTheSamePage) {
  AdminServer server;
  for (const std::string_view encoding : {"", "identity", "br", "gzip;q=0"}) {
    const Response r = server.request("GET", "/", headers(kBrowser, encoding));
    EXPECT_EQ(r.status, 200);
    EXPECT_EQ(r.head.find("Content-Encoding"), std::string::npos);
    EXPECT_EQ(r.body.size(), kPage.size);
    EXPECT_TRUE(r.body.starts_with("<!doctype html>"));
    EXPECT_TRUE(r.body.ends_with("</html>\n"));
  }
}

TEST(AdminPage, NothingInItComesFromElsewhere) {
  const std::string html = page_answer({}, {}).body;
  for (const char* reference : {"<link rel=\"stylesheet\"", "<script src", "@import", "url("})
    EXPECT_EQ(html.find(reference), std::string::npos) << reference;
}

TEST(AdminPage, HeadersThatProtectIt) {
  AdminServer server;
  const Response r = server.request("GET", "/", headers(kBrowser, "gzip"));
  for (const char* line :
       {"X-Content-Type-Options: nosniff", "Referrer-Policy: no-referrer", "Cache-Control: no-cache", "Vary: Accept, Accept-Encoding"})
    EXPECT_TRUE(r.has(line)) << line << r.head;
  EXPECT_TRUE(r.has("Content-Security-Policy: " + std::string(kPage.policy))) << r.head;
  for (const char* part : {"default-src 'none'", "script-src 'sha256-", "style-src 'sha256-", "connect-src 'self'", "base-uri 'none'",
                           "form-action 'none'", "frame-ancestors 'none'"})
    EXPECT_NE(kPage.policy.find(part), std::string::npos) << part;
  EXPECT_EQ(kPage.policy.find("unsafe"), std::string::npos);
}

TEST(AdminPage, WhoHasItIsToldSo) {
  AdminServer server;
  const std::string etag(kPage.etag);
  for (const std::string& given : {etag, "W/" + etag, "\"other\", " + etag, std::string("*")}) {
    Connection c(server.port());
    c.send("GET / HTTP/1.1\r\n" + headers(kBrowser, "gzip", given) + "\r\n");
    const Response r = c.read(true);
    EXPECT_EQ(r.status, 304) << given;
    EXPECT_TRUE(r.has("ETag: " + etag)) << r.head;
    EXPECT_EQ(r.head.find("Content-Length"), std::string::npos) << r.head;
    c.send("GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n");  // the connection goes on, without a body between
    EXPECT_EQ(c.read().status, 200);
  }
  EXPECT_EQ(server.request("GET", "/", headers(kBrowser, "gzip", "\"other\"")).status, 200);
}

TEST(AdminPage, HeadTellsItsLength) {
  AdminServer server;
  const Response r = server.request("HEAD", "/", headers(kBrowser, "gzip"));
  EXPECT_EQ(r.status, 200);
  EXPECT_TRUE(r.has("Content-Length: " + std::to_string(kPage.gzip.size()))) << r.head;
  EXPECT_TRUE(r.has("ETag: " + std::string(kPage.etag))) << r.head;
  EXPECT_EQ(server.request("POST", "/", headers(kBrowser)).status, 405);
}

}  // namespace
}  // namespace pgsidecar::admin
