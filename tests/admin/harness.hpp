// The real server on a thread of its own with a snapshot that the test sets, and a raw client on blocking
// sockets.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "admin/monitor.hpp"
#include "admin/server.hpp"

namespace pgsidecar::admin::test {

namespace asio = boost::asio;
using asio::ip::tcp;
using namespace std::chrono_literals;

inline pool::PoolSnapshot sample_pool(std::string database, std::string user) {
  pool::PoolSnapshot p;
  p.database = std::move(database);
  p.user = std::move(user);
  p.mode = "transaction";
  p.max = 15;
  p.min = 2;
  p.idleTimeoutMillis = 20000;
  p.connectionTimeoutMillis = 5000;
  p.maxUses = 5000;
  p.clientsActive = 6;
  p.clientsIdle = 40;
  p.clientsWaiting = 3;
  p.serversActive = 6;
  p.serversIdle = 2;
  p.serversLogin = 1;
  p.serversReset = 1;
  p.serversClosing = 1;
  p.pinned = 1;
  p.oldestWaitMicros = 12500;
  p.preparedStatements = 7;
  p.counters.queries = 1000;
  p.counters.transactions = 900;
  p.counters.clientBytesReceived = 4096;
  p.counters.closed[static_cast<std::size_t>(pool::CloseReason::MaxUses)] = 4;
  for (std::uint64_t i = 1; i <= 1000; ++i) {
    p.counters.wait.record(i * 10);
    p.counters.query.record(i * 100);
    p.counters.transaction.record(i * 200);
  }
  p.counters.connect.record(30000);
  return p;
}

inline pool::Snapshot sample() {
  pool::Snapshot s;
  s.started = true;
  s.uptimeMicros = 61500000;
  s.maxClients = 1000;
  s.clients = 49;
  s.database = pool::Snapshot::Database::Up;
  s.databaseLatencyMicros = 1250;
  s.databaseSeenMicrosAgo = 3000000;
  s.databaseVersion = "16.4";
  s.upstreams["db.example.com:5432"] = {s.database, s.databaseLatencyMicros};
  s.errorsByClass["42"] = 5;
  s.rejected[0] = 2;
  s.pools.push_back(sample_pool("app", "alice"));
  return s;
}

struct Response {
  int status = 0;  // 0: none
  std::string head, body;

  bool has(std::string_view line) const { return head.find("\r\n" + std::string(line) + "\r\n") != std::string::npos; }
};

class Connection {
 public:
  explicit Connection(std::uint16_t port, asio::ip::address address = asio::ip::address_v4::loopback()) : socket_(io_) {
    socket_.connect({address, port});
  }
  void send(std::string_view text) { ::send(socket_.native_handle(), text.data(), text.size(), MSG_NOSIGNAL); }
  void send_some(std::string_view text) { ::send(socket_.native_handle(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT); }

  // One answer; status 0 if the peer closed (`closed`) or `limit` passed before it was complete.
  Response read(bool head = false, std::chrono::milliseconds limit = 15s) {
    Response r;
    const auto deadline = std::chrono::steady_clock::now() + limit;
    for (;;) {
      const auto end = buffer_.find("\r\n\r\n");
      if (end != std::string::npos) {
        const auto at = buffer_.find("Content-Length: ");
        const std::size_t length = head || at > end ? 0 : std::stoul(buffer_.substr(at + 16));
        if (buffer_.size() >= end + 4 + length) {
          r.head = buffer_.substr(0, end + 4);
          r.body = buffer_.substr(end + 4, length);
          r.status = std::stoi(r.head.substr(9, 3));
          buffer_.erase(0, end + 4 + length);
          return r;
        }
      }
      if (!more(deadline)) return r;
    }
  }
  // All up to and with `end`; empty if the peer closed or `limit` passed before.
  std::string read_until(std::string_view end, std::chrono::milliseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    std::size_t at;
    while ((at = buffer_.find(end)) == std::string::npos)
      if (!more(deadline)) return {};
    std::string text = buffer_.substr(0, at + end.size());
    buffer_.erase(0, text.size());
    return text;
  }
  bool closes_within(std::chrono::milliseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    while (more(deadline)) buffer_.clear();
    return closed;
  }
  bool closed = false;

 private:
  bool more(std::chrono::steady_clock::time_point deadline) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd p{socket_.native_handle(), POLLIN, 0};
    if (::poll(&p, 1, std::max(0, static_cast<int>(left.count()))) <= 0) return false;
    std::array<char, 65536> chunk;
    const auto n = ::recv(socket_.native_handle(), chunk.data(), chunk.size(), 0);
    if (n <= 0) {
      closed = true;
      return false;
    }
    buffer_.append(chunk.data(), static_cast<std::size_t>(n));
    return true;
  }

  asio::io_context io_;
  tcp::socket socket_;
  std::string buffer_;
};

inline conf::Admin settings() {
  conf::Admin admin;
  admin.listen.host = "127.0.0.1";
  admin.listen.port = 0;
  return admin;
}

class AdminServer {
 public:
  explicit AdminServer(const conf::Admin& admin = settings()) : server_(control_, admin, callbacks()) {
    conf::PassedSockets none;
    server_.listen(none);
    server_.begin();
    monitor_.add([this](const Sample& sample) { return server_.publish(sample); });
    monitor_.start();
    thread_ = std::thread([this] { control_.run(); });
  }
  ~AdminServer() {
    stop();
    held_.clear();
    work_.reset();
    thread_.join();
  }
  AdminServer(const AdminServer&) = delete;
  AdminServer& operator=(const AdminServer&) = delete;

  std::uint16_t port() const { return server_.port(); }
  template <class F>
  void on_control(F f) {
    std::promise<void> done;
    asio::post(control_, [&] {
      f();
      done.set_value();
    });
    done.get_future().wait();
  }
  template <class F>
  void edit(F f) {
    on_control([&] { f(snapshot_); });
  }
  // From now on snapshots aren't answered; release() answers those that were asked for.
  void hold() {
    on_control([this] { holding_ = true; });
  }
  void release() {
    on_control([this] {
      holding_ = false;
      for (const auto& receiver : std::exchange(held_, {})) receiver(std::make_shared<pool::Snapshot>(snapshot_));
    });
  }
  std::size_t held() {
    std::size_t n = 0;
    on_control([&] { n = held_.size(); });
    return n;
  }
  void stop() {
    on_control([this] {
      server_.stop();
      monitor_.stop();
    });
  }
  std::vector<std::string> actions() {
    std::vector<std::string> copy;
    on_control([&] { copy = actions_; });
    return copy;
  }
  void refuse_actions(std::string error) {
    on_control([&] { action_error_ = std::move(error); });
  }
  // How often a snapshot was asked for.
  int snapshots() {
    int n = 0;
    on_control([&] { n = snapshots_; });
    return n;
  }
  int probes() {
    int n = 0;
    on_control([&] { n = probes_; });
    return n;
  }

  Response request(std::string_view method, std::string_view path, std::string_view headers = "Host: localhost\r\n") {
    Connection connection(port());
    connection.send(std::string(method) + " " + std::string(path) + " HTTP/1.1\r\n" + std::string(headers) + "Connection: close\r\n\r\n");
    return connection.read(method == "HEAD");
  }
  Response get(std::string_view path) { return request("GET", path); }
  Response post(std::string_view path) { return request("POST", path, "Host: localhost\r\nContent-Length: 0\r\n"); }

 private:
  void take(Server::SnapshotReceiver receiver) {
    ++snapshots_;
    if (holding_)
      held_.push_back(std::move(receiver));
    else
      receiver(std::make_shared<pool::Snapshot>(snapshot_));
  }
  Server::Callbacks callbacks() {
    Server::Callbacks c;
    c.snapshot = [this](pool::Snapshot::Detail, Server::SnapshotReceiver receiver) { take(std::move(receiver)); };
    c.probe = [this](Server::SnapshotReceiver receiver) {
      ++probes_;
      asio::post(control_, [this, receiver = std::move(receiver)] {
        auto probed = std::make_shared<pool::Snapshot>(snapshot_);
        probed->databaseProbed = true;
        receiver(std::move(probed));
      });
    };
    c.act = [this](std::string_view action, std::vector<std::string>& changes) {
      actions_.emplace_back(action);
      changes.emplace_back("pool.max changed");
      return action_error_;
    };
    c.command = [this](const pool::Command& command, const std::function<void(std::string)>& done) {
      actions_.push_back(std::to_string(static_cast<int>(command.kind)) + ":" + std::to_string(command.id));
      done(action_error_);
    };
    c.history = [](std::uint32_t window, std::uint32_t step) { return std::to_string(window) + "/" + std::to_string(step); };
    c.profile = [](const pool::Snapshot&, std::uint32_t window) { return "window " + std::to_string(window); };
    c.stacks = [](std::chrono::seconds time, const std::function<void(std::string, std::string)>& done) {
      time == 30s ? done("stacks are being sampled already", {}) : done({}, "data;main " + std::to_string(time.count()) + "\n");
    };
    c.alerts = [] { return std::string("{\"active\":[]}"); };
    c.active_alerts = [] { return std::vector<Alert>(); };
    c.config = [] { return std::string("pool:\n  max: 15\n"); };
    c.wake = [this] { monitor_.wake(); };
    return c;
  }

  asio::io_context control_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_{control_.get_executor()};
  pool::Snapshot snapshot_ = sample();
  bool holding_ = false;
  int snapshots_ = 0, probes_ = 0;
  std::vector<Server::SnapshotReceiver> held_;
  std::vector<std::string> actions_;
  std::string action_error_;
  Server server_;
  Monitor monitor_{control_, [this](Server::SnapshotReceiver done, const std::function<void()>&) { take(std::move(done)); }};
  std::thread thread_;
};

}  // namespace pgsidecar::admin::test
