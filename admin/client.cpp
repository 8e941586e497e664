#include "admin/client.hpp"

#include <algorithm>
#include <boost/asio/buffer.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <cstdio>
#include <fstream>
#include <string>
#include <thread>

namespace pgsidecar::admin {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using namespace std::chrono_literals;
using std::chrono::milliseconds;

constexpr milliseconds kRequestTime = 5s;
constexpr milliseconds kUpgradeTime = 20s;
constexpr milliseconds kPollTime = 200ms;

struct Result {
  unsigned status = 0;  // 0: no answer, `text` says why
  std::string text;     // else the body
};

// Where to reach what listens on `settings.listen`: a wildcard is reached over loopback.
std::string target_host(const conf::Admin& settings) {
  const std::string& host = settings.listen.host;
  if (host.empty() || host == "*" || host == "0.0.0.0") return "127.0.0.1";
  return host == "::" ? "::1" : host;
}

std::string authority(const conf::Admin& settings) {
  const std::string host = target_host(settings);
  return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(settings.listen.port);
}

Result request(const conf::Admin& settings, http::verb verb, const char* path, milliseconds limit) {
  Result result;
  if (!settings.enabled) {
    result.text = "the admin port is off (admin.listen, PGSIDECAR_ADMIN_LISTEN)";
    return result;
  }
  asio::io_context io;
  beast::tcp_stream stream(io);
  error_code ec = asio::error::timed_out;
  // Runs the one operation that was started, within what is left of the limit.
  const auto finish = [&] {
    io.restart();
    io.run();
  };
  const auto keep = [&](error_code e, auto&&...) { ec = e; };

  error_code failed;
  tcp::resolver resolver(io);
  const auto endpoints = resolver.resolve(target_host(settings), std::to_string(settings.listen.port), failed);
  if (!failed) {
    stream.expires_after(limit);
    stream.async_connect(endpoints, keep);
    finish();
    failed = ec;
  }
  if (failed) {
    result.text = "cannot reach http://" + authority(settings) + ": " + failed.message() +
                  "; is it running, and with the same admin.listen (PGSIDECAR_ADMIN_LISTEN)?";
    return result;
  }

  http::request<http::empty_body> question(verb, path, 11);
  question.set(http::field::host, authority(settings));
  question.set(http::field::user_agent, "pgsidecar/" PGSIDECAR_VERSION);
  question.keep_alive(false);
  if (verb == http::verb::post) {
    question.content_length(0);
    std::string token;
    if (!settings.tokenFile.empty()) std::getline(std::ifstream(settings.tokenFile), token);
    while (!token.empty() && (token.back() == '\r' || token.back() == ' ')) token.pop_back();
    if (!token.empty()) question.set(http::field::authorization, "Bearer " + token);
  }
  http::async_write(stream, question, keep);
  finish();
  http::response_parser<http::string_body> parser;
  parser.body_limit(std::uint64_t{64} * 1024);
  if (!ec) {
    beast::flat_buffer buffer;
    http::async_read(stream, buffer, parser, keep);
    finish();
  }
  if (ec) {
    result.text = "no answer from http://" + authority(settings) + path + ": " +
                  (ec == beast::error::timeout ? "timed out after " + std::to_string(limit.count()) + " ms" : ec.message());
    return result;
  }
  if (parser.get()[http::field::server] != "pgsidecar") {
    result.text = "something else answers at http://" + authority(settings) +
                  ", not pgsidecar; is it running, and with the same admin.listen (PGSIDECAR_ADMIN_LISTEN)?";
    return result;
  }
  result.status = parser.get().result_int();
  result.text = parser.get().body();
  while (!result.text.empty() && result.text.back() == '\n') result.text.pop_back();
  return result;
}

// Why it isn't 200, as one line.
std::string explain(const conf::Admin& settings, const char* path, const Result& result) {
  if (result.status == 0) return result.text;
  return "http://" + authority(settings) + path + " answered " + std::to_string(result.status) + ": " + result.text;
}

int complain(const char* command, const std::string& why) {
  std::fprintf(stderr, "pgsidecar %s: %s\n", command, why.c_str());
  return 1;
}

}  // namespace

int healthcheck(const conf::Admin& settings) {
  const char* path = "/health/live";
  const Result result = request(settings, http::verb::get, path, kRequestTime);
  return result.status == 200 ? 0 : complain("healthcheck", explain(settings, path, result));
}

int wait(const conf::Admin& settings, milliseconds max, bool started) {
  const char* path = started ? "/health/startup" : "/health/ready";
  const auto deadline = std::chrono::steady_clock::now() + max;
  for (;;) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - std::chrono::steady_clock::now());
    const Result result = request(settings, http::verb::get, path, std::clamp(left, milliseconds(100), kRequestTime));
    if (result.status == 200) return 0;
    const auto now = std::chrono::steady_clock::now();
    if (!settings.enabled || now + kPollTime >= deadline)
      return complain("wait", std::string(started ? "not started" : "not ready") + " within " + std::to_string(max.count()) +
                                  " ms: " + explain(settings, path, result));
    std::this_thread::sleep_for(kPollTime);
  }
}

int shutdown(const conf::Admin& settings) {
  const char* path = settings.quitquitquit ? "/quitquitquit" : "/api/admin/drain";
  const Result result = request(settings, http::verb::post, path, kRequestTime);
  return result.status == 200 ? 0 : complain("shutdown", explain(settings, path, result));
}

int upgrade(const conf::Admin& settings) {
  const char* path = "/api/admin/upgrade";
  const Result result = request(settings, http::verb::post, path, kUpgradeTime);
  if (result.status != 200) return complain("upgrade", explain(settings, path, result));
  std::printf("%s\n", result.text.c_str());
  return 0;
}

}  // namespace pgsidecar::admin
