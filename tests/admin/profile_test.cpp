#include "admin/profile.hpp"

#include <gtest/gtest.h>

#include <boost/json.hpp>

#include "harness.hpp"

namespace pgsidecar::admin {
namespace {

namespace json = boost::json;
using namespace std::chrono_literals;
using pool::Phase;

// A proxy that is asked for more each second.
class ProfileTest : public ::testing::Test {
 protected:
  const pool::Time begin_{1000s};
  Profile profile_;
  pool::Snapshot snapshot_;

  ProfileTest() { snapshot_.pools.resize(1); }
  /// What so many transactions cost.
  void run(std::uint64_t transactions) {
    auto& counters = snapshot_.pools[0].counters;
    counters.transactions += transactions;
    counters.clientBytesReceived += 40 * transactions;
    counters.serverBytesSent += 50 * transactions;
    snapshot_.loop.turns += 2 * transactions;
    snapshot_.loop.receives += 2 * transactions;
    snapshot_.loop.sends += 2 * transactions;
    snapshot_.loop.waits += 2 * transactions;
    snapshot_.loop.sampled += transactions / 30;
    snapshot_.loop.nanos[static_cast<std::size_t>(Phase::Receive)] += transactions / 30 * 3000;
    snapshot_.loop.nanos[static_cast<std::size_t>(Phase::Decide)] += transactions / 30 * 1000;
    snapshot_.dataLoop.usage.userMicros += 5 * transactions;
    snapshot_.dataLoop.usage.systemMicros += 15 * transactions;
    snapshot_.dataLoop.usage.wakeups += transactions;
  }
  void add(std::chrono::seconds at, bool rested = false) {
    snapshot_.takenAt = begin_ + at;
    snapshot_.uptimeMicros = static_cast<std::uint64_t>(std::chrono::microseconds(at).count());
    profile_.add({std::make_shared<pool::Snapshot>(snapshot_), {}, {}, rested});
  }
  json::value ask(std::uint32_t window, std::chrono::seconds at) {
    snapshot_.takenAt = begin_ + at;
    snapshot_.uptimeMicros = static_cast<std::uint64_t>(std::chrono::microseconds(at).count());
    return json::parse(profile_.json(snapshot_, window, 1000, {}));
  }
  static double number(const json::value& document, std::string_view path) { return document.at_pointer(path).to_number<double>(); }
};

TEST_F(ProfileTest, WhatATransactionCostsInTheWindow) {
  add(0s);
  for (int second = 1; second <= 20; ++second) {
    run(second <= 10 ? 100 : 3000);
    add(std::chrono::seconds(second));
  }
  const auto document = ask(10, 20s);
  EXPECT_EQ(number(document, "/seconds"), 10);
  EXPECT_EQ(number(document, "/transactions"), 30000);
  EXPECT_EQ(number(document, "/perTransaction/cpuMicros"), 20);
  EXPECT_EQ(number(document, "/perTransaction/turns"), 2);
  EXPECT_EQ(number(document, "/perTransaction/systemCalls"), 7) << "two receives, sends and waits, and a wake-up";
  EXPECT_EQ(number(document, "/perTransaction/bytesFromClients"), 40);
  EXPECT_EQ(number(document, "/perTransaction/bytesToServers"), 50);
  EXPECT_EQ(number(document, "/loops/data/utilization"), 0.06);
  EXPECT_EQ(number(document, "/turns/perSecond"), 6000);
  EXPECT_EQ(number(document, "/turns/timed"), 1000);
  EXPECT_EQ(number(document, "/turns/microsPerTurn"), 4);
  EXPECT_EQ(number(document, "/turns/phases/receive/share"), 0.75);
  EXPECT_EQ(number(document, "/turns/phases/decide/microsPerTurn"), 1);
  EXPECT_EQ(number(document, "/turns/phases/tls/share"), 0);
  EXPECT_EQ(number(ask(60, 20s), "/transactions"), 31000) << "as far as it is known";
}

TEST_F(ProfileTest, WithoutAnythingThereIsNoRatio) {
  add(0s);
  const auto document = ask(10, 10s);
  EXPECT_EQ(number(document, "/loops/data/utilization"), 0);
  for (const char* path : {"/perTransaction/cpuMicros", "/turns/microsPerTurn", "/turns/phases/send/share", "/timers/microsPerRun",
                           "/tlsHandshakes/clients/msEach"})
    EXPECT_TRUE(document.at_pointer(path).is_null()) << path;
}

TEST_F(ProfileTest, BeforeThereIsAPointItIsAboutAllTheTime) {
  run(300);
  const auto document = ask(10, 5s);
  EXPECT_EQ(number(document, "/seconds"), 5);
  EXPECT_EQ(number(document, "/transactions"), 300);
}

TEST_F(ProfileTest, ARestIsNoPartOfTheLoadAfterIt) {
  run(1000);
  add(1s);
  run(10);
  add(1000s, true);
  for (int second = 1001; second <= 1003; ++second) {
    run(1000);
    add(std::chrono::seconds(second));
  }
  const auto document = ask(10, 1003s);
  EXPECT_EQ(number(document, "/seconds"), 4) << "from when it woke up";
  EXPECT_EQ(number(document, "/transactions"), 3010);
}

TEST_F(ProfileTest, IsBounded) {
  for (int second = 0; second < 1000; ++second) {
    run(1);
    add(std::chrono::seconds(second));
  }
  EXPECT_EQ(number(ask(60, 999s), "/seconds"), 60);
}

TEST_F(ProfileTest, LagAndHandshakes) {
  snapshot_.dataLoop.lag.record(begin_, begin_ + 1500ms);
  snapshot_.loop.serverHandshakes = {2, 2, 0, 8'000'000};
  const auto document = ask(10, 30s);
  EXPECT_EQ(number(document, "/loops/data/lagMs/worst"), 1500);
  EXPECT_EQ(number(document, "/loops/control/lagMs/worst"), 0);
  EXPECT_EQ(number(document, "/tlsHandshakes/servers/resumed"), 2);
  EXPECT_EQ(number(document, "/tlsHandshakes/servers/msEach"), 2);
  EXPECT_EQ(number(ask(10, 120s), "/loops/data/lagMs/worst"), 0);
  EXPECT_EQ(number(ask(10, 120s), "/loops/data/lagMs/worstSinceStart"), 1500);
}

TEST_F(ProfileTest, OwnersAndTheRestAreTheHeap) {
  snapshot_.memory.clients = 2000;
  snapshot_.memory.servers = 3000;
  const auto memory = ask(10, 1s).at("memory");
  double sum = 0;
  for (const auto& [name, bytes] : memory.at("owners").as_object()) sum += bytes.to_number<double>();
  EXPECT_EQ(number(memory, "/owners/history"), 1000);
  EXPECT_EQ(number(memory, "/owners/clients"), 2000);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they have their own malloc, which tells nothing
  EXPECT_EQ(sum, number(memory, "/heapBytes"));
#endif
}

TEST(ProfileRoute, WindowAndWhoMayAskForStacks) {
  test::AdminServer server;
  EXPECT_EQ(server.get("/api/monitoring/profile").body, "window 10");
  EXPECT_EQ(server.get("/api/monitoring/profile?window=60").body, "window 60");
  for (const char* wrong : {"0", "61", "x", "-1"})
    EXPECT_EQ(server.get("/api/monitoring/profile?window=" + std::string(wrong)).status, 400);
  const auto stacks = server.get("/api/monitoring/profile/stacks?seconds=3");
  EXPECT_EQ(stacks.body, "data;main 3\n");
  EXPECT_TRUE(stacks.has("Content-Type: text/plain; charset=utf-8"));
  for (const char* wrong : {"0", "31", "x"})
    EXPECT_EQ(server.get("/api/monitoring/profile/stacks?seconds=" + std::string(wrong)).status, 400);
  EXPECT_EQ(server.get("/api/monitoring/profile/stacks?seconds=30").status, 409) << "the harness says that it is busy";
  EXPECT_EQ(server.request("GET", "/api/monitoring/profile/stacks", "Host: evil.example\r\n").status, 403);
  EXPECT_EQ(server.request("GET", "/api/monitoring/profile", "Host: evil.example\r\n").status, 200) << "it names nobody";
}

}  // namespace
}  // namespace pgsidecar::admin
