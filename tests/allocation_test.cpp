// The relay in steady state allocates nothing: a Worker on its own loop relays queries between a scripted server and
// clients, and what the loop's thread takes from malloc between two marks is counted. operator new comes by malloc too.
#include <dlfcn.h>
#include <execinfo.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <cerrno>
#include <cstdlib>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "protocol/messages.hpp"
#include "proxy/worker.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kCounts = false;  // the sanitizers have their own malloc
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kCounts = false;
#else
#define PGSIDECAR_COUNTS 1
constexpr bool kCounts = true;
#endif
#else
#define PGSIDECAR_COUNTS 1
constexpr bool kCounts = true;
#endif

namespace {

thread_local bool t_counted = false;  // this thread is the data loop
std::atomic<std::uint64_t> g_allocations{0};
std::atomic<bool> g_marked{false};
constexpr int kFrames = 16;
void* g_first[kFrames];  // where the first one after the mark came from
std::atomic<int> g_first_size{0};

[[maybe_unused]] void count() {
  if (!t_counted) return;
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (!g_marked.load(std::memory_order_acquire) || g_first_size.load() != 0) return;
  t_counted = false;  // backtrace may allocate
  g_first_size = backtrace(g_first, kFrames);
  t_counted = true;
}

}  // namespace

#ifdef PGSIDECAR_COUNTS
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

void* malloc(std::size_t size) {
  count();
  return __libc_malloc(size);
}
void* calloc(std::size_t n, std::size_t size) {
  count();
  return __libc_calloc(n, size);
}
void* realloc(void* p, std::size_t size) {
  count();
  return __libc_realloc(p, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) {
  count();
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
  count();
  *out = __libc_memalign(alignment, size);
  return *out ? 0 : ENOMEM;
}
}
#endif

namespace pgsidecar::proxy {
namespace {

using protocol::Backend;
using protocol::Frontend;
using protocol::Writer;

constexpr int kQueries = kCounts ? 10'000 : 500, kWarmUp = kCounts ? 1'000 : 100;

// --- blocking sockets, for the server's and the clients' threads

bool write_all(int fd, const std::string& bytes) {
  for (std::size_t at = 0; at < bytes.size();) {
    const ssize_t n = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (n <= 0) return false;
    at += static_cast<std::size_t>(n);
  }
  return true;
}

bool read_some(int fd, std::string& in) {
  pollfd wait{fd, POLLIN, 0};
  if (::poll(&wait, 1, 10'000) != 1) return false;  // nothing in a test takes this long
  char buffer[8192];
  const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
  if (n <= 0) return false;
  in.append(buffer, static_cast<std::size_t>(n));
  return true;
}

/// The size of the message that `in` begins with; 0 if it isn't whole.
std::size_t whole(const std::string& in) {
  if (in.size() < protocol::kHeaderSize) return 0;
  const std::size_t total = protocol::load_u32(reinterpret_cast<const std::uint8_t*>(in.data()) + 1) + std::size_t{1};
  return in.size() < total ? 0 : total;
}

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path.copy(address.sun_path, sizeof address.sun_path - 1);
  return address;
}

// --- the server

std::atomic<bool> g_server_sleeps{false};

void answer(char type, std::string& out) {
  const auto row = [&] { Writer(out).begin(Backend::DataRow).u16(1).u32(1).u8('1').end(); };
  const auto description = [&] {
    Writer(out).begin(Backend::RowDescription).u16(1).cstring("x").u32(0).u16(0).u32(25).u16(65535).u32(0).u16(0).end();
  };
  const auto complete = [&] { Writer(out).begin(Backend::CommandComplete).cstring("SELECT 1").end(); };
  switch (type) {
    case 'Q':
      description(), row(), complete();
      return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
    case 'P': Writer(out).begin(Backend::ParseComplete).end(); return;
    case 'B': Writer(out).begin(Backend::BindComplete).end(); return;
    case 'D': return description();
    case 'E': return row(), complete();
    case 'C': Writer(out).begin(Backend::CloseComplete).end(); return;
    case 'S': return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
    default: return;
  }
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
    while (write_all(fd, out)) {
      out.clear();
      bool over = !read_some(fd, in);
      while (g_server_sleeps) ::usleep(100);
      while (const std::size_t total = whole(in)) {
        over |= in[0] == 'X';
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
  explicit Client(const std::string& path) : fd_(::socket(AF_UNIX, SOCK_STREAM, 0)) {
    const sockaddr_un address = address_of(path);
    if (::connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) throw std::runtime_error("cannot connect");
    protocol::Startup startup;
    startup.parameters = {{"user", "u"}, {"database", "d"}};
    std::string hello;
    protocol::write_startup(hello, startup);
    write_all(fd_, hello);
    EXPECT_TRUE(read_ready());
  }
  ~Client() { ::close(fd_); }
  Client(const Client&) = delete;

  void send(const std::string& bytes) { EXPECT_TRUE(write_all(fd_, bytes)); }
  /// Reads up to ReadyForQuery. False: an error, or the end.
  bool read_ready() {
    bool ok = true;
    for (;;) {
      while (const std::size_t total = whole(in_)) {
        const char type = in_[0];
        if (type == 'E') ADD_FAILURE() << in_.substr(5, total - 5), ok = false;
        in_.erase(0, total);
        if (type == 'Z') return ok;
      }
      if (!read_some(fd_, in_)) return false;
    }
  }

 private:
  int fd_;
  std::string in_;
};

// --- the proxy between them

class Proxy {
 public:
  explicit Proxy(std::uint32_t max) {
    std::string pattern = "/tmp/pgsidecar-alloc-XXXXXX";
    directory_ = ::mkdtemp(pattern.data());
    server_ = std::make_unique<ScriptedServer>(directory_ + "/.s.PGSQL.1");
    auto config = std::make_shared<conf::Config>();
    config->listen = {{conf::Listen::Kind::Unix, {}, 2, directory_}};
    config->upstream.url = "host=" + directory_ + " port=1 user=u dbname=d";
    config->auth.method = conf::AuthMethod::Trust;
    config->pool.max = max;
    config->pool.min = 0;
    config->pool.maxUses = 0;  // a new connection may allocate
    control_thread_ = std::thread([this] { control_loop_.run(); });
    control_ = std::make_unique<Control>(control_loop_, data_loop_, [](std::string_view) { return std::nullopt; });
    worker_ = std::make_unique<Worker>(data_loop_, *control_, config);
    // Statements have been coming and going for a long time: their numbers are long.
    for (int i = 0; i < 100'000; ++i) worker_->statements.intern(std::to_string(i));
    worker_->on_stopped = [this](int) { data_loop_.stop(); };
    worker_->listen();
    data_thread_ = std::thread([this] {
      t_counted = true;
      data_loop_.run();
      t_counted = false;
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

std::string simple_query() {
  std::string out;
  protocol::write_query(out, "SELECT some_columns FROM a_table WHERE id = 42");
  return out;
}

std::string parse(std::string_view name) {
  std::string out;
  Writer(out).begin(Frontend::Parse).cstring(name).cstring("SELECT $1::text").u16(0).end();
  Writer(out).begin(Frontend::Sync).end();
  return out;
}

std::string execute(std::string_view name) {
  std::string out;
  Writer(out).begin(Frontend::Bind).cstring("").cstring(name).u16(0).u16(1).u32(1).u8('x').u16(0).end();
  Writer(out).begin(Frontend::Describe).u8('P').cstring("").end();
  Writer(out).begin(Frontend::Execute).cstring("").u32(0).end();
  Writer(out).begin(Frontend::Sync).end();
  return out;
}

/// Runs `round` until `queries` are done, of which it does `each`, once to warm up and once counted.
template <class Round>
void expect_no_allocations(Proxy& proxy, int each, Round&& round) {
  const std::uint64_t relayed = proxy.queries();  // asking disturbs Asio's cache of operations, so not at the mark
  for (int done = 0; done < kWarmUp; done += each) ASSERT_TRUE(round());
  g_first_size = 0;
  g_marked = true;
  const std::uint64_t before = g_allocations;
  for (int done = 0; done < kQueries; done += each) ASSERT_TRUE(round());
  const std::uint64_t after = g_allocations;
  g_marked = false;
  EXPECT_EQ(proxy.queries() - relayed, static_cast<std::uint64_t>(kWarmUp + kQueries));
  if (!kCounts) return;
  EXPECT_GT(before, 0u);  // the hook works
  EXPECT_EQ(after - before, 0u) << "in " << kQueries << " queries";
  if (after != before) ::backtrace_symbols_fd(g_first, g_first_size, 2);
}

TEST(Allocation, SimpleQueries) {
  Proxy proxy(1);
  Client client(proxy.path());
  const std::string query = simple_query();
  expect_no_allocations(proxy, 1, [&] {
    client.send(query);
    return client.read_ready();
  });
}

TEST(Allocation, NamedStatements) {
  Proxy proxy(1);
  Client client(proxy.path());
  client.send(parse("the_clients_name_of_it"));
  ASSERT_TRUE(client.read_ready());
  const std::string query = execute("the_clients_name_of_it");
  expect_no_allocations(proxy, 1, [&] {
    client.send(query);
    return client.read_ready();
  });
}

/// Several clients' queries at once: most of them wait.
void share(std::size_t clients, std::uint32_t servers, const std::string& query, const std::string& prepare) {
  Proxy proxy(servers);
  std::vector<std::unique_ptr<Client>> all;
  for (std::size_t i = 0; i < clients; ++i) {
    all.push_back(std::make_unique<Client>(proxy.path()));
    if (prepare.empty()) continue;
    all.back()->send(prepare);
    ASSERT_TRUE(all.back()->read_ready());
  }
  // Each client has waited with a query of its own, whatever the timing will be.
  for (std::size_t first = 0; first < clients; ++first) {
    g_server_sleeps = true;
    for (std::size_t i = 0; i < clients; ++i) all[(first + i) % clients]->send(query);
    const auto all_wait = [&] {
      const pool::PoolSnapshot now = proxy.snapshot();
      return now.clientsWaiting + servers == clients && now.serversActive == servers;
    };
    for (int i = 0; i < 5000 && !all_wait(); ++i) ::usleep(1000);
    EXPECT_TRUE(all_wait());
    g_server_sleeps = false;
    for (auto& client : all) ASSERT_TRUE(client->read_ready());
  }
  expect_no_allocations(proxy, static_cast<int>(clients), [&] {
    for (auto& client : all) client->send(query);
    bool ok = true;
    for (auto& client : all) ok &= client->read_ready();
    return ok;
  });
}

TEST(Allocation, WaitingWithSimpleQueries) { share(20, 2, simple_query(), {}); }

TEST(Allocation, WaitingWithNamedStatements) { share(20, 2, execute("s1"), parse("s1")); }

}  // namespace
}  // namespace pgsidecar::proxy

int main(int argc, char** argv) {
  void* warm[1];
  backtrace(warm, 1);  // loads libgcc now
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
