// A Worker on its own loop between a scripted server and clients on blocking sockets, all in this process.
#pragma once

#include <gtest/gtest.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "protocol/messages.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy::test {

using protocol::Backend;
using protocol::Writer;

inline thread_local bool on_data_thread = false;  ///< this thread is a data loop

// --- blocking sockets, for the server's and the clients' threads

/// The next login's or the next answer's bytes pause here until they have been read, or end here; negative: neither.
inline std::atomic<long> g_split_login{-1}, g_cut_login{-1}, g_split_answer{-1}, g_cut_answer{-1};

inline bool write_all(int fd, const std::string& bytes) {
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t n = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (n <= 0) return false;
    at += static_cast<std::size_t>(n);
  }
  return true;
}

inline bool read_some(int fd, std::string& in) {
  pollfd wait{fd, POLLIN, 0};
  if (::poll(&wait, 1, 10'000) != 1) return false;  // nothing in a test takes this long
  char buffer[8192];
  const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
  if (n <= 0) return false;
  in.append(buffer, static_cast<std::size_t>(n));
  return true;
}

/// Waits until the peer has read all.
inline void drained(int fd) {
  int left = 1;
  for (int i = 0; i < 10'000 && left > 0; ++i) {
    if (::ioctl(fd, SIOCOUTQ, &left) != 0) return;
    if (left > 0) ::usleep(20);
  }
}

/// Writes with a pause or an end at a place. False: ended, or broken.
inline bool say(int fd, const std::string& bytes, std::atomic<long>& split, std::atomic<long>& cut) {
  if (bytes.empty()) return true;
  const long end = cut.exchange(-1), pause = split.exchange(-1);
  if (end >= 0 && end < static_cast<long>(bytes.size())) {
    write_all(fd, bytes.substr(0, static_cast<std::size_t>(end)));
    return false;
  }
  if (pause <= 0 || pause >= static_cast<long>(bytes.size())) return write_all(fd, bytes);
  const auto at = static_cast<std::size_t>(pause);
  if (!write_all(fd, bytes.substr(0, at))) return false;
  drained(fd);
  return write_all(fd, bytes.substr(at));
}

/// The size of the message that `in` begins with; 0 if it isn't whole.
inline std::size_t whole(const std::string& in) {
  if (in.size() < protocol::kHeaderSize) return 0;
  const std::size_t total = protocol::load_u32(reinterpret_cast<const std::uint8_t*>(in.data()) + 1) + std::size_t{1};
  return in.size() < total ? 0 : total;
}

inline sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

// --- the server

inline std::atomic<bool> g_server_sleeps{false};

inline void answer(char type, std::string& out) {
  const auto row = [&] { Writer(out).begin(Backend::DataRow).u16(1).u32(1).u8('1').end(); };
  const auto description = [&] {
    Writer(out).begin(Backend::RowDescription).u16(1).cstring("x").u32(0).u16(0).u32(25).u16(65535).u32(0).u16(0).end();
  };
  const auto complete = [&] { Writer(out).begin(Backend::CommandComplete).cstring("SELECT 1").end(); };
  switch (type) {
    case 'Q': description(), row(), complete(); return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
    case 'P': Writer(out).begin(Backend::ParseComplete).end(); return;
    case 'B': Writer(out).begin(Backend::BindComplete).end(); return;
    case 'D': return description();
    case 'E': return row(), complete();
    case 'C': Writer(out).begin(Backend::CloseComplete).end(); return;
    case 'S': return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
    default: return;
  }
}

/// The answer to what the proxy asks of its own accord.
inline std::string nothing() {
  std::string out;
  Writer(out).begin(Backend::CommandComplete).cstring("SELECT 0").end();
  protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  return out;
}

class ScriptedServer {
 public:
  explicit ScriptedServer(const std::string& path) : listener_(::socket(AF_UNIX, SOCK_STREAM, 0)) {
    const sockaddr_un address = address_of(path);
    if (::bind(listener_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 || ::listen(listener_, 16) != 0)
      throw std::runtime_error("cannot listen");
    thread_ = std::thread([this] {
      for (int fd; (fd = ::accept(listener_, nullptr, nullptr)) >= 0;) connections_.emplace_back([fd] { serve(fd); });
    });
  }
  ~ScriptedServer() {
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    for (auto& connection : connections_) connection.join();
    ::close(listener_);
  }

 private:
  static void serve(int fd) {
    std::string in, out;
    while (in.size() < 4 || in.size() < protocol::load_u32(reinterpret_cast<const std::uint8_t*>(in.data())))
      if (!read_some(fd, in)) return void(::close(fd));
    in.clear();
    Writer(out).begin(Backend::Authentication).u32(0).end();
    protocol::write_parameter_status(out, "server_version", "15.0");
    protocol::write_backend_key_data(out, 1, "key4");
    protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
    if (!say(fd, out, g_split_login, g_cut_login)) return void(::close(fd));
    out.clear();
    while (say(fd, out, g_split_answer, g_cut_answer)) {
      out.clear();
      bool over = !read_some(fd, in);
      while (g_server_sleeps) ::usleep(100);
      while (const std::size_t total = whole(in)) {
        over |= in[0] == 'X';
        const bool survey = in[0] == 'Q' && in.find("pg_catalog") < total;
        if (survey)
          over |= !write_all(fd, nothing());
        else
          answer(in[0], out);
        in.erase(0, total);
      }
      if (over) break;
    }
    ::close(fd);
  }

  int listener_;
  std::thread thread_;
  std::vector<std::thread> connections_;
};

// --- a client

class Client {
 public:
  static std::string hello() {
    protocol::Startup startup;
    startup.parameters = {{"user", "u"}, {"database", "d"}};
    std::string out;
    protocol::write_startup(out, startup);
    return out;
  }
  /// Logs in, the startup's bytes sent in two parts.
  explicit Client(const std::string& path, std::size_t split = 0) : fd_(::socket(AF_UNIX, SOCK_STREAM, 0)) {
    const sockaddr_un address = address_of(path);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) throw std::runtime_error("cannot connect");
    write_all(fd_, hello().substr(0, split));
    if (split > 0) drained(fd_);
    write_all(fd_, hello().substr(split));
    EXPECT_TRUE(read_ready()) << error_;
  }
  ~Client() { ::close(fd_); }
  Client(const Client&) = delete;

  int fd() const { return fd_; }
  const std::string& error() const { return error_; }  ///< the last one's text
  void send(const std::string& bytes) { EXPECT_TRUE(write_all(fd_, bytes)); }
  /// Reads up to ReadyForQuery. False: an error, or the end.
  bool read_ready() {
    bool ok = true;
    error_.clear();
    for (;;) {
      while (const std::size_t total = whole(in_)) {
        const char type = in_[0];
        if (type == 'E') error_ = in_.substr(5, total - 5), ok = false;
        in_.erase(0, total);
        if (type == 'Z') return ok;
      }
      if (!read_some(fd_, in_)) return ended_ = true, false;
    }
  }
  bool ended() const { return ended_; }  ///< the connection has (or nothing came for long)

 private:
  bool ended_ = false;
  int fd_;
  std::string in_, error_;
};

// --- the proxy between them

class Proxy {
 public:
  explicit Proxy(const conf::PoolSettings& pool) {
    std::string pattern = "/tmp/pgsidecar-test-XXXXXX";
    directory_ = ::mkdtemp(pattern.data());
    server_ = std::make_unique<ScriptedServer>(directory_ + "/.s.PGSQL.1");
    auto config = std::make_shared<conf::Config>();
    config->listen = {{conf::Listen::Kind::Unix, {}, 2, directory_}};
    config->upstream.url = "host=" + directory_ + " port=1 user=u dbname=d";
    config->auth.method = conf::AuthMethod::Trust;
    config->pool = pool;
    control_thread_ = std::thread([this] { control_loop_.run(); });
    control_ = std::make_unique<Control>(control_loop_, data_loop_, [](std::string_view) { return std::nullopt; });
    worker_ = std::make_unique<Worker>(data_loop_, *control_, Prepared(config, control_->environment()));
    // Statements have been coming and going for a long time: their numbers are long.
    for (int i = 0; i < 100'000; ++i) worker_->statements.intern(std::to_string(i));
    worker_->on_stopped = [this](int) { data_loop_.stop(); };
    conf::PassedSockets none;
    worker_->listen(none);
    worker_->begin();
    data_thread_ = std::thread([this] {
      on_data_thread = true;
      data_loop_.run();
      on_data_thread = false;
    });
  }
  ~Proxy() {
    boost::asio::post(data_loop_, [this] { worker_->drain(); });
    data_thread_.join();
    worker_.reset();
    control_work_.reset();
    control_thread_.join();
    server_.reset();
    for (const char* name : {"/.s.PGSQL.1", "/.s.PGSQL.2"}) ::unlink((directory_ + name).c_str());
    ::rmdir(directory_.c_str());
  }
  std::string path() const { return directory_ + "/.s.PGSQL.2"; }
  pool::PoolSnapshot snapshot() {
    std::promise<pool::PoolSnapshot> taken;
    boost::asio::post(data_loop_, [&] { taken.set_value(worker_->snapshot().pools.at(0)); });
    return taken.get_future().get();
  }
  std::uint64_t queries() { return snapshot().counters.queries; }  ///< relayed so far

 private:
  std::string directory_;
  std::unique_ptr<ScriptedServer> server_;
  boost::asio::io_context data_loop_{1}, control_loop_{1};
  boost::asio::executor_work_guard<boost::asio::io_context::executor_type> control_work_{control_loop_.get_executor()};
  std::unique_ptr<Control> control_;
  std::unique_ptr<Worker> worker_;
  std::thread control_thread_, data_thread_;
};

}  // namespace pgsidecar::proxy::test
