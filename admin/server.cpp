#include "admin/server.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/buffer.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core/error.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <list>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "admin/access.hpp"
#include "admin/page.hpp"
#include "admin/profile.hpp"
#include "admin/render.hpp"
#include "admin/routes.hpp"
#include "admin/stream.hpp"
#include "conf/listen.hpp"

namespace pgsidecar::admin {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using namespace std::chrono_literals;
using SnapshotPtr = std::shared_ptr<const pool::Snapshot>;

constexpr std::size_t kMaxConnections = 32;
constexpr std::uint32_t kHeaderLimit = 8 * 1024;
constexpr std::uint64_t kBodyLimit = std::uint64_t{16} * 1024;
constexpr auto kRequestTime = 5s;   // from the first wait for a request to its last byte; also to write the answer
constexpr auto kSnapshotTime = 1s;  // a data loop that is silent for so long isn't alive
constexpr auto kPauseTime = 30s;    // in which the server connections of a paused database are released
constexpr auto kUpgradeTime = 15s;  // longer than a new process has to be ready
constexpr auto kProbeTime = 10s;    // longer than connectionTimeoutMillis' default
constexpr auto kRecheckTime = 1s;   // between probes of a database that is known to be down
constexpr auto kLingerTime = 1s;    // so that an answer to an unread request isn't lost to a reset

constexpr const char* kServer = "pgsidecar";  // client.cpp knows by it whom it talks to
constexpr const char* kJson = "application/json";
constexpr const char* kHtml = "text/html; charset=utf-8";
constexpr const char* kEvents = "text/event-stream";
constexpr const char* kText = "text/plain; charset=utf-8";
constexpr const char* kPrometheus = "text/plain; version=0.0.4; charset=utf-8";
constexpr const char* kSilent = R"({"error":"the data loop did not answer within 1 s"})";
constexpr const char* kOpenMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8";

constexpr std::string_view kContinue = "HTTP/1.1 100 Continue\r\n\r\n";

using Request = http::request<http::string_body>;

struct Answer {
  unsigned status = 200;
  const char* type = kJson;
  std::string body;
  const char* allow = nullptr;
  bool bearer = false;  // asks for a token
  bool stream = false;  // Stream answers instead
  Headers headers;      // besides
};

Answer failure(unsigned status, std::string_view error, std::string_view hint = {}) {
  Answer answer;
  answer.status = status;
  answer.body = error_json(error, hint);
  return answer;
}

// One request's wait for the data loop. The frame of the request owns it; callbacks hold it weakly, so that a
// late answer finds nothing.
struct Wait {
  explicit Wait(asio::io_context& control) : timer(control) {}
  void finish(SnapshotPtr s) {
    snapshot = std::move(s);
    answered = true;
    timer.cancel();
  }
  asio::steady_timer timer;
  SnapshotPtr snapshot;
  std::string error;  // of a command
  std::string text;   // of stacks
  int pid = 0;        // of the process that has taken over
  bool answered = false;
};

// What is asked of the data loop: a snapshot of some detail, or one after a probe of the database.
enum class Question : std::size_t { Counts, Rows, Statements, Memory, Probe, kCount };

Question question_of(Route route) {
  switch (route) {
    case Route::Clients:
    case Route::Servers:
    case Route::Leaks: return Question::Rows;
    case Route::Queries: return Question::Statements;
    case Route::Profile: return Question::Memory;
    default: return Question::Counts;
  }
}

// Requests that come while a snapshot is being made share it: the data loop is asked once at a time.
struct Fetch {
  std::vector<std::weak_ptr<Wait>> waits;
  std::uint64_t number = 0;  // of the question in flight; 0: none
  std::chrono::steady_clock::time_point asked;
};

// `since` says when the silence began of a client that sends no request, or doesn't take its answer.
struct Session {
  enum class State { Reading, Answering, Writing, Streaming };
  explicit Session(tcp::socket socket) : stream(std::move(socket)) {}
  beast::tcp_stream stream;
  asio::ip::address peer, local;
  State state = State::Reading;
  std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();
};

std::string_view view(boost::beast::string_view s) {
  return {s.data(), s.size()};
}

/// As a proxy is asked. The target's authority counts then, whatever the Host header says (RFC 9112, section 3.2.2).
void strip_authority(Request& request) {
  constexpr std::string_view kScheme = "http://";
  const std::string target(view(request.target()));
  if (!beast::iequals(target.substr(0, kScheme.size()), kScheme) || request.count(http::field::host) > 1) return;
  const auto end = std::min(target.find_first_of("/?", kScheme.size()), target.size());
  request.set(http::field::host, target.substr(kScheme.size(), end - kScheme.size()));
  const std::string path = target.substr(end);
  request.target(path.starts_with('/') ? path : "/" + path);
}

}  // namespace

class Server::Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(asio::io_context& control, const conf::Admin& settings, Callbacks callbacks)
      : control_(control), settings_(settings), callbacks_(std::move(callbacks)), stream_(control) {}

  void listen(conf::PassedSockets& passed);
  void begin();
  std::vector<conf::Listening> listening() const { return sockets_; }
  std::uint16_t port() const { return port_; }
  void set(conf::Admin settings) {
    settings.enabled = settings_.enabled;
    settings.listen = settings_.listen;
    settings_ = std::move(settings);
  }
  std::chrono::seconds publish(const Sample& sample);
  void stop();

 private:
  asio::awaitable<void> accept_loop(std::shared_ptr<Impl> self, tcp::acceptor& acceptor);
  asio::awaitable<void> serve(std::shared_ptr<Impl> self, std::shared_ptr<Session> session);
  asio::awaitable<Answer> answer(const Session& session, const Request& request);
  asio::awaitable<SnapshotPtr> fetch(Question question);
  asio::awaitable<Answer> command(Route route, std::uint64_t id);
  asio::awaitable<Answer> stacks(std::string_view query);
  asio::awaitable<Answer> operate(Route route, std::string_view query);
  asio::awaitable<Answer> upgrade();
  asio::awaitable<void> perform(const pool::Command& command, std::shared_ptr<Wait> wait);
  asio::awaitable<void> write(Session& session, const Answer& answer, unsigned version, bool head, bool keep_alive, error_code& ec);
  asio::awaitable<void> linger(Session& session);
  asio::awaitable<void> stream(Session& session);

  void add(const conf::Listening& socket);
  void admit(tcp::socket socket);
  bool make_room();
  void refuse(tcp::socket& socket);
  void ask(Question question, const std::shared_ptr<Wait>& wait);
  void recheck(const pool::Snapshot& snapshot);
  void answered(Question question, std::uint64_t number, const SnapshotPtr& snapshot);
  std::optional<Answer> refuse(const Session& session, const Request& request) const;
  Answer change(const Endpoint& endpoint);

  asio::io_context& control_;
  conf::Admin settings_;
  const Callbacks callbacks_;
  std::list<tcp::acceptor> acceptors_;
  std::vector<conf::Listening> sockets_;  // the same, of which they are the owners
  std::uint16_t port_ = 0;
  bool stopped_ = false;
  std::list<std::shared_ptr<Session>> sessions_;
  std::array<Fetch, static_cast<std::size_t>(Question::kCount)> fetches_;
  std::chrono::steady_clock::time_point rechecked_{};
  std::uint64_t next_number_ = 1;
  LabelSets labels_;
  Stream stream_;
};

void Server::Impl::add(const conf::Listening& socket) {
  acceptors_.emplace_back(control_).assign(socket.family == AF_INET6 ? tcp::v6() : tcp::v4(), socket.fd);
  sockets_.push_back(socket);
  port_ = acceptors_.back().local_endpoint().port();
}

void Server::Impl::begin() {
  for (tcp::acceptor& acceptor : acceptors_) asio::co_spawn(control_, accept_loop(shared_from_this(), acceptor), asio::detached);
}

void Server::Impl::listen(conf::PassedSockets& passed) {
  if (!settings_.enabled) return;
  const auto& where = settings_.listen;
  const std::string shown = conf::print_address(where.host, where.port);
  const auto fail = [&](const std::string& why) {
    throw std::runtime_error("admin.listen: " + shown + ": " + why +
                             "; choose another address by admin.listen or PGSIDECAR_ADMIN_LISTEN (off: no admin port)");
  };
  if (where.kind != conf::Listen::Kind::Tcp) fail("the admin port can't be a unix socket");

  for (const conf::Listening& one : passed.take_passed(true)) {
    if (one.family == AF_UNIX) throw std::runtime_error("LISTEN_FDS: the admin port can't be a unix socket: " + one.address);
    add(one);
  }
  try {
    for (const conf::Listening& one : conf::open_listeners(where, 128, passed, true)) add(one);
  } catch (const std::system_error& e) {
    fail(e.code().value() == EADDRINUSE ? "the port is already in use, often by the application itself" : e.code().message());
  } catch (const std::runtime_error& e) {
    fail("can't resolve the name: " + std::string(e.what()));
  }
}

void Server::Impl::stop() {
  stopped_ = true;
  error_code ec;
  for (auto& acceptor : acceptors_) acceptor.close(ec);
  stream_.stop();
  for (auto& fetch : fetches_)
    for (const auto& weak : std::exchange(fetch.waits, {}))
      if (const auto wait = weak.lock()) wait->finish(nullptr);
  for (const auto& session : sessions_)
    if (session->state == Session::State::Reading) session->stream.close();
}

asio::awaitable<void> Server::Impl::accept_loop([[maybe_unused]] std::shared_ptr<Impl> self, tcp::acceptor& acceptor) {
  asio::steady_timer pause(control_);  // after an accept that failed, e.g. for want of descriptors
  while (!stopped_) {
    tcp::socket socket(control_);
    error_code ec;
    co_await acceptor.async_accept(socket, asio::redirect_error(asio::use_awaitable, ec));
    if (stopped_) break;
    if (!ec) {
      admit(std::move(socket));
      continue;
    }
    pause.expires_after(100ms);
    co_await pause.async_wait(asio::redirect_error(asio::use_awaitable, ec));
  }
}

void Server::Impl::admit(tcp::socket socket) {
  error_code ec, ignored;
  const auto peer = socket.remote_endpoint(ec);
  if (ec) return;
  const auto local = socket.local_endpoint(ignored);
  if (sessions_.size() >= kMaxConnections && !make_room()) {
    refuse(socket);
    return;
  }
  auto session = std::make_shared<Session>(std::move(socket));
  session->peer = peer.address();
  session->local = local.address();
  session->stream.socket().set_option(tcp::no_delay(true), ignored);
  sessions_.push_back(session);
  asio::co_spawn(control_, serve(shared_from_this(), std::move(session)), asio::detached);
}

// At the bound the connection that has been silent for longest goes, or else the one that has not taken its answer for
// longest: neither idle scrapers nor stalled ones must keep a probe out.
bool Server::Impl::make_room() {
  auto oldest = sessions_.end();
  for (const auto state : {Session::State::Reading, Session::State::Writing})
    for (auto it = sessions_.begin(); it != sessions_.end() && (oldest == sessions_.end() || (*oldest)->state == state); ++it)
      if ((*it)->state == state && (oldest == sessions_.end() || (*it)->since < (*oldest)->since)) oldest = it;
  if (oldest == sessions_.end()) return false;
  (*oldest)->stream.close();
  sessions_.erase(oldest);
  return true;
}

// All connections are busy. Nothing waits for this one: what the socket doesn't take at once is lost.
void Server::Impl::refuse(tcp::socket& socket) {
  const std::string body = error_json("too many admin connections", "at most 32 requests are answered at a time");
  const std::string text =
      "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nCache-Control: no-store\r\n"
      "Retry-After: 1\r\nServer: pgsidecar\r\nContent-Type: application/json\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n" + body;
  error_code ec;
  std::array<char, 4096> unread;
  socket.non_blocking(true, ec);
  socket.write_some(asio::buffer(text), ec);
  socket.shutdown(tcp::socket::shutdown_send, ec);
  socket.read_some(asio::buffer(unread), ec);
}

asio::awaitable<void> Server::Impl::serve(std::shared_ptr<Impl> self, std::shared_ptr<Session> session) {
  // Whatever ends this, the connection no longer counts.
  struct Leave {
    std::list<std::shared_ptr<Session>>& sessions;
    const std::shared_ptr<Session>& session;
    ~Leave() { sessions.remove(session); }
  };
  const Leave leave{self->sessions_, session};
  auto& stream = session->stream;
  beast::flat_buffer buffer(kHeaderLimit + kBodyLimit + 1024);
  bool keep_alive = true, unread = false;
  while (keep_alive && !stopped_) {
    http::request_parser<http::string_body> parser;
    parser.header_limit(kHeaderLimit);
    parser.body_limit(kBodyLimit);
    session->state = Session::State::Reading;
    session->since = std::chrono::steady_clock::now();
    stream.expires_after(kRequestTime);
    error_code ec;
    co_await http::async_read_header(stream, buffer, parser, asio::redirect_error(asio::use_awaitable, ec));
    if (!ec && !parser.is_done() && parser.get().version() > 10 && beast::iequals(parser.get()[http::field::expect], "100-continue")) {
      const auto go_on = asio::buffer(kContinue);
      co_await asio::async_write(stream, go_on, asio::redirect_error(asio::use_awaitable, ec));
    }
    if (!ec) co_await http::async_read(stream, buffer, parser, asio::redirect_error(asio::use_awaitable, ec));
    Answer reply;
    bool head = false;
    unsigned version = 11;
    if (!ec) {
      session->state = Session::State::Answering;
      Request& request = parser.get();
      strip_authority(request);
      head = request.method() == http::verb::head;
      version = request.version();
      // Where a body ends that has another coding last can't be known (RFC 9112, section 6.1).
      const bool endless = request.count(http::field::transfer_encoding) > 0 && !request.chunked();
      keep_alive = request.keep_alive() && !endless;
      try {
        if (endless)
          reply = failure(400, "the request's Transfer-Encoding isn't chunked");
        else
          reply = co_await answer(*session, request);
      } catch (const std::exception&) {
        reply = failure(500, "internal error");
      }
    } else {
      keep_alive = false;
      unread = true;
      if (ec == http::error::header_limit || ec == http::error::buffer_overflow)
        reply = failure(431, "the request's header is too large", "at most 8 KB are read");
      else if (ec == http::error::body_limit)
        reply = failure(413, "the request's body is too large", "at most 16 KB are read");
      else if (ec.category() == http::make_error_code(http::error::bad_method).category() && ec != http::error::end_of_stream &&
               ec != http::error::partial_message)
        reply = failure(400, "not an HTTP request: " + ec.message());
      else
        break;
    }
    keep_alive = keep_alive && !stopped_;
    if (reply.stream && !head) {
      co_await this->stream(*session);
      break;
    }
    session->state = Session::State::Writing;
    session->since = std::chrono::steady_clock::now();
    co_await write(*session, reply, version, head, keep_alive, ec);
    if (ec) break;
  }
  session->state = Session::State::Reading;
  if (unread) co_await linger(*session);
  error_code ignored;
  stream.socket().shutdown(tcp::socket::shutdown_both, ignored);
  stream.close();
}

asio::awaitable<void> Server::Impl::write(Session& session, const Answer& answer, unsigned version, bool head, bool keep_alive,
                                          error_code& ec) {
  const auto fill = [&](auto& response) {
    response.version(version);
    response.result(answer.status);
    response.set(http::field::server, kServer);
    response.set(http::field::content_type, answer.type);
    response.set(http::field::cache_control, "no-store");
    response.set("X-Content-Type-Options", "nosniff");
    for (const auto& [name, value] : answer.headers) response.set(name, value);
    if (answer.allow) response.set(http::field::allow, answer.allow);
    if (answer.bearer) response.set(http::field::www_authenticate, "Bearer");
    response.keep_alive(keep_alive);
    if (answer.status != 304 && !answer.stream) response.content_length(answer.body.size());
  };
  session.stream.expires_after(kRequestTime);
  if (head) {
    http::response<http::empty_body> response;
    fill(response);
    co_await http::async_write(session.stream, response, asio::redirect_error(asio::use_awaitable, ec));
  } else {
    http::response<http::string_body> response;
    fill(response);
    response.body() = answer.body;
    co_await http::async_write(session.stream, response, asio::redirect_error(asio::use_awaitable, ec));
  }
}

asio::awaitable<void> Server::Impl::linger(Session& session) {
  error_code ec;
  session.stream.socket().shutdown(tcp::socket::shutdown_send, ec);
  std::array<char, 2048> scratch;
  const auto buffer = asio::buffer(scratch);
  session.stream.expires_after(kLingerTime);
  while (!ec) co_await session.stream.async_read_some(buffer, asio::redirect_error(asio::use_awaitable, ec));
}

asio::awaitable<void> Server::Impl::stream(Session& session) {
  session.state = Session::State::Streaming;
  if (callbacks_.wake) asio::post(control_, callbacks_.wake);  // once it is among the readers
  co_await stream_.serve(session.stream);
}

std::chrono::seconds Server::Impl::publish(const Sample& sample) {
  if (stopped_ || stream_.empty()) return Monitor::kNever;
  if (sample.snapshot) {
    recheck(*sample.snapshot);
    stream_.publish("sample", sample_json(*sample.snapshot, sample.process, callbacks_.active_alerts(), sample.at));
  } else {
    stream_.publish("silent", kSilent);
  }
  return 1s;
}

void Server::Impl::ask(Question question, const std::shared_ptr<Wait>& wait) {
  auto& fetch = fetches_[static_cast<std::size_t>(question)];
  const bool probe = question == Question::Probe;
  const auto now = std::chrono::steady_clock::now();
  fetch.waits.push_back(wait);
  const auto limit = probe ? kProbeTime : kSnapshotTime;
  if (fetch.number != 0 && now - fetch.asked < limit) return;
  std::erase_if(fetch.waits, [](const auto& weak) { return weak.expired(); });
  const auto number = next_number_++;
  fetch.number = number;
  fetch.asked = now;
  SnapshotReceiver receive = [weak = weak_from_this(), question, number](const SnapshotPtr& snapshot) {
    if (const auto self = weak.lock()) self->answered(question, number, snapshot);
  };
  using Detail = pool::Snapshot::Detail;
  switch (question) {
    case Question::Probe: return callbacks_.probe(std::move(receive));
    case Question::Rows: return callbacks_.snapshot(Detail::Rows, std::move(receive));
    case Question::Statements: return callbacks_.snapshot(Detail::Statements, std::move(receive));
    case Question::Memory: return callbacks_.snapshot(Detail::Memory, std::move(receive));
    default: return callbacks_.snapshot(Detail::None, std::move(receive));
  }
}

// Whoever takes an unready proxy's traffic away takes the connects away too that would show the database to be back: it is
// looked for while somebody asks. The answer counts for the next request, so that none waits for a database that is silent.
void Server::Impl::recheck(const pool::Snapshot& snapshot) {
  const auto now = std::chrono::steady_clock::now();
  const bool away = snapshot.database == pool::Snapshot::Database::Down || !snapshot.loginRefused.empty();
  if (!away || snapshot.draining || !callbacks_.probe) return;
  if (rechecked_.time_since_epoch().count() != 0 && now - rechecked_ < kRecheckTime) return;
  rechecked_ = now;
  ask(Question::Probe, std::make_shared<Wait>(control_));
}

void Server::Impl::answered(Question question, std::uint64_t number, const SnapshotPtr& snapshot) {
  auto& fetch = fetches_[static_cast<std::size_t>(question)];
  if (fetch.number == number) fetch.number = 0;
  for (const auto& weak : std::exchange(fetch.waits, {}))
    if (const auto wait = weak.lock()) wait->finish(snapshot);
}

asio::awaitable<SnapshotPtr> Server::Impl::fetch(Question question) {
  const bool probe = question == Question::Probe;
  if (stopped_ || (probe ? !callbacks_.probe : !callbacks_.snapshot)) co_return nullptr;
  const auto wait = std::make_shared<Wait>(control_);
  wait->timer.expires_after(probe ? std::chrono::milliseconds(kProbeTime) : std::chrono::milliseconds(kSnapshotTime));
  ask(question, wait);
  if (!wait->answered) {
    error_code ec;
    co_await wait->timer.async_wait(asio::redirect_error(asio::use_awaitable, ec));
  }
  co_return std::move(wait->snapshot);
}

std::optional<Answer> Server::Impl::refuse(const Session& session, const Request& request) const {
  if (request.count(http::field::host) > 1) return failure(400, "more than one Host header");
  Caller caller;
  caller.peer = session.peer;
  caller.local = session.local;
  caller.host = view(request[http::field::host]);
  caller.origin = view(request[http::field::origin]);
  caller.fetchSite = view(request["Sec-Fetch-Site"]);
  caller.authorization = view(request[http::field::authorization]);
  const Refusal refusal = refusal_of(settings_, caller);
  if (refusal.status != 0) {
    Answer reply = failure(refusal.status, refusal.error, refusal.hint);
    reply.bearer = refusal.status == 401;
    return reply;
  }
  return std::nullopt;
}

Answer Server::Impl::change(const Endpoint& endpoint) {
  if (stopped_ || !callbacks_.act) return failure(503, "shutting down");
  const char* action = endpoint.route == Route::Reload ? "reload" : endpoint.route == Route::Drain ? "drain" : "quit";
  std::vector<std::string> changes;
  const std::string error = callbacks_.act(action, changes);
  if (!error.empty()) return failure(409, error);
  Json out;
  out.begin('{').field("ok", true).field("action", action);
  if (endpoint.route == Route::Reload) {
    out.key("changes").begin('[');
    for (const std::string& line : changes) out.string(line);
    out.end(']');
  }
  Answer reply;
  reply.body = out.end('}').take();
  return reply;
}

asio::awaitable<Answer> Server::Impl::command(Route route, std::uint64_t id) {
  if (stopped_ || !callbacks_.command) co_return failure(503, "shutting down");
  using Kind = pool::Command::Kind;
  pool::Command command;
  command.kind = route == Route::CancelClient  ? Kind::CancelClient
                 : route == Route::CloseClient ? Kind::CloseClient
                 : route == Route::CloseServer ? Kind::CloseServer
                                               : Kind::ResetStatements;
  command.id = id;
  const auto wait = std::make_shared<Wait>(control_);
  wait->timer.expires_after(kSnapshotTime);
  co_await perform(command, wait);
  if (!wait->answered) co_return failure(503, "the data loop did not answer within 1 s");
  if (!wait->error.empty()) co_return failure(404, wait->error, "the lists of clients and servers have the ids");
  Answer reply;
  reply.body = "{\"ok\":true}\n";
  co_return reply;
}

asio::awaitable<void> Server::Impl::perform(const pool::Command& command, std::shared_ptr<Wait> wait) {
  std::function<void(std::string)> done = [weak = std::weak_ptr(wait)](std::string error) {
    if (const auto waiting = weak.lock()) {
      waiting->error = std::move(error);
      waiting->finish(nullptr);
    }
  };
  callbacks_.command(command, std::move(done));
  error_code ec;
  if (!wait->answered) co_await wait->timer.async_wait(asio::redirect_error(asio::use_awaitable, ec));
}

asio::awaitable<Answer> Server::Impl::stacks(std::string_view query) {
  const auto seconds = number_parameter(query, "seconds", 5, 1, 30);
  if (!seconds) co_return failure(400, "seconds is a number from 1 to 30");
  if (stopped_ || !callbacks_.stacks) co_return failure(503, "shutting down");
  const auto wait = std::make_shared<Wait>(control_);
  wait->timer.expires_after(std::chrono::seconds(*seconds) + kProbeTime);
  std::function<void(std::string, std::string)> done = [weak = std::weak_ptr(wait)](std::string error, std::string folded) {
    if (const auto waiting = weak.lock()) {
      waiting->error = std::move(error);
      waiting->text = std::move(folded);
      waiting->finish(nullptr);
    }
  };
  callbacks_.stacks(std::chrono::seconds(*seconds), std::move(done));
  error_code ec;
  if (!wait->answered) co_await wait->timer.async_wait(asio::redirect_error(asio::use_awaitable, ec));
  if (!wait->answered) co_return failure(503, "the stacks were not sampled in time");
  if (!wait->error.empty()) co_return failure(409, wait->error, "one request at a time");
  Answer reply;
  reply.type = kText;
  reply.body = std::move(wait->text);
  co_return reply;
}

asio::awaitable<Answer> Server::Impl::operate(Route route, std::string_view query) {
  if (stopped_ || !callbacks_.command) co_return failure(503, "shutting down");
  using Kind = pool::Command::Kind;
  const auto given = parameter(query, "database");
  const auto database = decoded(given.value_or(""));
  if (!database || (given && database->empty()) || (!given && !query.empty()))
    co_return failure(400, "takes ?database=NAME, or nothing for all databases");
  pool::Command command;
  command.kind = route == Route::Pause ? Kind::Pause : route == Route::Resume ? Kind::Resume : Kind::Reconnect;
  command.database = *database;
  const auto wait = std::make_shared<Wait>(control_);
  wait->timer.expires_after(kPauseTime);
  co_await perform(command, wait);
  if (!wait->answered)
    co_return failure(503, "not all server connections were released within 30 s",
                      "it stays paused; /api/monitoring/servers has who holds them");
  if (!wait->error.empty()) co_return failure(wait->error.starts_with("no such database") ? 404 : 409, wait->error);
  Answer reply;
  reply.body = "{\"ok\":true,\"action\":\"" +
               std::string(route == Route::Pause    ? "pause"
                           : route == Route::Resume ? "resume"
                                                    : "reconnect") +
               "\"}\n";
  co_return reply;
}

asio::awaitable<Answer> Server::Impl::upgrade() {
  if (stopped_ || !callbacks_.upgrade) co_return failure(503, "shutting down");
  const auto wait = std::make_shared<Wait>(control_);
  wait->timer.expires_after(kUpgradeTime);
  std::function<void(std::string, int)> done = [weak = std::weak_ptr(wait)](std::string error, int pid) {
    if (const auto waiting = weak.lock()) {
      waiting->error = std::move(error);
      waiting->pid = pid;
      waiting->finish(nullptr);
    }
  };
  callbacks_.upgrade(std::move(done));
  error_code ec;
  if (!wait->answered) co_await wait->timer.async_wait(asio::redirect_error(asio::use_awaitable, ec));
  if (!wait->answered) co_return failure(503, "the new process was not ready within 15 s");
  if (!wait->error.empty()) co_return failure(409, wait->error, "this process stays in charge; the log has what the new one said");
  Answer reply;
  reply.body = "{\"ok\":true,\"action\":\"upgrade\",\"pid\":" + std::to_string(wait->pid) + "}\n";
  co_return reply;
}

asio::awaitable<Answer> Server::Impl::answer(const Session& session, const Request& request) {
  const std::string_view target = view(request.target());
  const auto mark = std::min(target.find('?'), target.size());
  const std::string_view query = target.substr(std::min(mark + 1, target.size()));
  std::string_view path = target.substr(0, mark);
  if (path.size() > 1 && path.ends_with('/')) path.remove_suffix(1);
  const auto match = find_endpoint(path);
  if (!match) co_return failure(404, "no such endpoint: " + std::string(path.substr(0, 200)), "GET / lists the endpoints");
  const Endpoint* endpoint = match->endpoint;
  if (endpoint->route == Route::Quit && !settings_.quitquitquit)
    co_return failure(404, "/quitquitquit is off", "admin.quitquitquit: true turns it on");

  const auto method = request.method();
  const bool reads = method == http::verb::get || method == http::verb::head;
  if (endpoint->changes() ? method != http::verb::post : !reads) {
    Answer reply = failure(405, endpoint->changes() ? "only POST changes anything" : "only GET and HEAD here");
    reply.allow = endpoint->changes() ? "POST" : "GET, HEAD";
    co_return reply;
  }
  if (endpoint->changes() || endpoint->names_clients())
    if (auto refusal = refuse(session, request)) co_return std::move(*refusal);
  const Route route = endpoint->route;
  if (route >= Route::CancelClient && route <= Route::ResetQueries) {
    Answer done = co_await command(route, match->id);
    co_return done;
  }
  if (route >= Route::Pause && route <= Route::Reconnect) {
    Answer done = co_await operate(route, query);
    co_return done;
  }
  if (route == Route::Upgrade) {
    Answer done = co_await upgrade();
    co_return done;
  }
  if (endpoint->changes()) co_return change(*endpoint);

  Answer reply;
  const auto now = Clock::now();
  if (route == Route::Index && wants_page(view(request[http::field::accept]))) {
    PageAnswer page = page_answer(view(request[http::field::accept_encoding]), view(request[http::field::if_none_match]));
    reply.status = page.status;
    reply.type = kHtml;
    reply.body = std::move(page.body);
    reply.headers = std::move(page.headers);
    co_return reply;
  }
  if (route == Route::Index) {
    reply.headers = {{"Vary", "Accept"}};
    reply.type = kText;
    reply.body = index_text();
    co_return reply;
  }
  if (route == Route::Stream) {
    if (stopped_ || stream_.full()) co_return failure(503, "too many streams", "at most 8 pages are kept up to date at a time");
    reply.type = kEvents;
    reply.stream = true;
    co_return reply;
  }
  const auto order = parameter(query, "sort").value_or("total");
  const auto limit = number_parameter(query, "limit", 50, 1, pool::kMostStatements);
  if (route == Route::Queries && (!is_statement_order(order) || !limit))
    co_return failure(400, "sort is one of total, mean, wait, errors, calls; limit a number from 1 to 1000");
  if (route == Route::History) {
    const auto window = number_parameter(query, "window", 300, 1, 86400), step = number_parameter(query, "step", 1, 1, 60);
    if (!window || !step) co_return failure(400, "window is a number of seconds from 1 to 86400, step one from 1 to 60");
    reply.body = callbacks_.history(*window, *step);
    co_return reply;
  }
  if (route == Route::Stacks) {
    Answer sampled = co_await stacks(query);
    co_return sampled;
  }
  const auto window = number_parameter(query, "window", 10, 1, Profile::kSeconds);
  if (route == Route::Profile && !window) co_return failure(400, "window is a number of seconds from 1 to 60");
  if (route == Route::Alerts) {
    reply.body = callbacks_.alerts();
    co_return reply;
  }
  if (route == Route::Config) {
    reply.body = config_json(callbacks_.config(), now);
    co_return reply;
  }
  const auto asked = route == Route::ComputeHealth ? parameter(query, "probe") : std::nullopt;
  const bool probe = asked && (asked->empty() || *asked == "1" || *asked == "true");
  const SnapshotPtr snapshot = co_await fetch(probe ? Question::Probe : question_of(route));
  if (!snapshot) {
    if (stopped_) co_return failure(503, "shutting down");
    if (probe) co_return failure(503, "the database was not probed within 10 s");
    Answer dead = failure(503, "the data loop did not answer within 1 s");
    if (route == Route::Live) dead.body = "{\"alive\":false,\"reason\":\"the data loop did not answer within 1 s\"}\n";
    if (route == Route::Ready) dead.body = "{\"ready\":false,\"reason\":\"the data loop did not answer within 1 s\"}\n";
    co_return dead;
  }

  switch (route) {
    case Route::Health:
      recheck(*snapshot);
      if (health_status(*snapshot) == std::string_view("unhealthy")) reply.status = 503;
      reply.body = health_json(*snapshot, read_process(), now);
      break;
    case Route::Live: reply.body = "{\"alive\":true}\n"; break;
    case Route::Ready:
      recheck(*snapshot);
      if (!readiness(*snapshot).ready) reply.status = 503;
      reply.body = ready_json(*snapshot);
      break;
    case Route::Startup:
      if (!snapshot->started) reply.status = 503;
      reply.body = snapshot->started ? "{\"started\":true}\n" : "{\"started\":false,\"reason\":\"not listening yet\"}\n";
      break;
    case Route::PoolStats: reply.body = pool_stats_json(*snapshot, callbacks_.active_alerts(), now); break;
    case Route::Pools: reply.body = pools_json(*snapshot, now); break;
    case Route::Clients: reply.body = clients_json(*snapshot, now); break;
    case Route::Servers: reply.body = servers_json(*snapshot, now); break;
    case Route::Leaks: reply.body = leaks_json(*snapshot, now); break;
    case Route::Queries: reply.body = statements_json(*snapshot, order, *limit, now); break;
    case Route::Profile: reply.body = callbacks_.profile(*snapshot, *window); break;
    case Route::Pins: reply.body = pins_json(*snapshot, now); break;
    case Route::Transparency: reply.body = transparency_json(*snapshot, now); break;
    case Route::ComputeHealth: reply.body = compute_health_json(*snapshot, read_process(), now); break;
    default: {
      const bool open = prefers_open_metrics(view(request[http::field::accept]));
      reply.type = open ? kOpenMetrics : kPrometheus;
      reply.body =
          metrics(*snapshot, read_process(), callbacks_.active_alerts(), labels_, open ? Exposition::OpenMetrics : Exposition::Prometheus);
    }
  }
  co_return reply;
}

Server::Server(asio::io_context& control, const conf::Admin& settings, Callbacks callbacks)
    : impl_(std::make_shared<Impl>(control, settings, std::move(callbacks))) {}
Server::~Server() {
  impl_->stop();
}
void Server::listen(conf::PassedSockets& passed) {
  impl_->listen(passed);
}
void Server::begin() {
  impl_->begin();
}
std::vector<conf::Listening> Server::listening() const {
  return impl_->listening();
}
void Server::set(const conf::Admin& settings) {
  impl_->set(settings);
}
std::uint16_t Server::port() const {
  return impl_->port();
}
std::chrono::seconds Server::publish(const Sample& sample) {
  return impl_->publish(sample);
}
void Server::stop() {
  impl_->stop();
}

}  // namespace pgsidecar::admin
