// The relay in steady state allocates nothing: a Worker on its own loop relays queries between a scripted server and
// clients, and what the loop's thread takes from malloc between two marks is counted. operator new comes by malloc too.
#include <dlfcn.h>
#include <execinfo.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <vector>

#include "proxy/harness.hpp"

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

using pgsidecar::proxy::test::on_data_thread;
std::atomic<std::uint64_t> g_allocations{0};
std::atomic<bool> g_marked{false};
constexpr int kFrames = 16;
void* g_first[kFrames];  // where the first one after the mark came from
std::atomic<int> g_first_size{0};

[[maybe_unused]] void count() {
  if (!on_data_thread) return;
  g_allocations.fetch_add(1, std::memory_order_relaxed);
  if (!g_marked.load(std::memory_order_acquire) || g_first_size.load() != 0) return;
  on_data_thread = false;  // backtrace may allocate
  g_first_size = backtrace(g_first, kFrames);
  on_data_thread = true;
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

using namespace test;
using protocol::Frontend;
using protocol::Writer;

constexpr int kQueries = kCounts ? 10'000 : 500, kWarmUp = kCounts ? 1'000 : 100;

conf::PoolSettings settings(std::uint32_t max) {
  conf::PoolSettings pool;
  pool.max = max;
  pool.min = 0;
  pool.maxUses = 0;  // a new connection may allocate
  return pool;
}

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
  Proxy proxy(settings(1));
  Client client(proxy.path());
  const std::string query = simple_query();
  expect_no_allocations(proxy, 1, [&] {
    client.send(query);
    return client.read_ready();
  });
}

TEST(Allocation, NamedStatements) {
  Proxy proxy(settings(1));
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
  Proxy proxy(settings(servers));
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

TEST(Allocation, WaitingWithSimpleQueries) {
  share(20, 2, simple_query(), {});
}

TEST(Allocation, WaitingWithNamedStatements) {
  share(20, 2, execute("s1"), parse("s1"));
}

}  // namespace
}  // namespace pgsidecar::proxy

int main(int argc, char** argv) {
  void* warm[1];
  backtrace(warm, 1);  // loads libgcc now
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
