#include "proxy/gather.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "proxy/channel.hpp"
#include "support.hpp"

namespace pgsidecar::proxy {
namespace {

using test::Pair;

const std::uint8_t* bytes(const std::string& s) {
  return reinterpret_cast<const std::uint8_t*>(s.data());
}

std::string text(Gather& gather) {
  std::string out;
  for (const auto piece : gather.pieces()) out.append(reinterpret_cast<const char*>(piece.data()), piece.size());
  return out;
}

TEST(Gather, PiecesKeepTheirOrder) {
  const std::string read = "abcdefgh";
  using Step = std::function<void(Gather&)>;
  const auto range = [&](std::size_t from, std::size_t n) -> Step { return [&read, from, n](Gather& g) { g.add(bytes(read) + from, n); }; };
  const auto own = [](const char* s) -> Step { return [s](Gather& g) { g.own([s](std::string& out) { out += s; }); }; };
  const struct {
    std::vector<Step> steps;
    std::string text;
    std::size_t pieces;
  } rows[] = {
      {{}, "", 0},
      {{range(0, 0)}, "", 0},
      {{own("")}, "", 0},
      {{range(0, 3)}, "abc", 1},
      {{range(0, 3), range(3, 2)}, "abcde", 1},   // neighbours are one
      {{range(0, 3), range(4, 2)}, "abcef", 2},   // a gap
      {{range(3, 3), range(0, 3)}, "defabc", 2},  // the other way round
      {{range(0, 3), range(0, 3)}, "abcabc", 2},  // twice the same
      {{own("1"), own("2")}, "12", 1},
      {{own("1"), range(0, 1), own("2")}, "1a2", 3},
      {{range(0, 1), own("1"), range(1, 1)}, "a1b", 3},  // neighbours with something between
      {{range(0, 1), own(""), range(1, 1)}, "ab", 1},
      {{range(0, 1), range(5, 0), range(1, 1)}, "ab", 1},
      {{own("1"), range(0, 1), own("2"), own("3"), range(1, 2)}, "1a23bc", 4},
  };
  Gather gather;  // one for all: nothing is left of a turn
  for (const auto& row : rows) {
    for (const Step& step : row.steps) step(gather);
    EXPECT_EQ(gather.size(), row.text.size()) << row.text;
    EXPECT_EQ(gather.empty(), row.text.empty());
    EXPECT_EQ(gather.pieces().size(), row.pieces) << row.text;
    EXPECT_EQ(text(gather), row.text);
    gather.clear();
    EXPECT_TRUE(gather.empty());
    EXPECT_EQ(gather.size(), 0u);
  }
}

TEST(Gather, OwnMessagesMoveWithTheirBuffer) {
  const std::string read = "r";
  Gather gather;
  std::string expected;
  for (int i = 0; i < 1000; ++i) {
    gather.own([&](std::string& out) { out += std::to_string(i); });
    gather.add(bytes(read), 1);
    expected += std::to_string(i) + "r";
  }
  EXPECT_EQ(text(gather), expected);
}

struct Limited {
  explicit Limited(long budget) { test::g_send_budget = budget; }
  ~Limited() { test::g_send_budget = -1; }
};

struct Ends {
  Ends() : channel(std::move(pair.near->socket()), pair.meter) {}
  Pair pair;
  Channel channel;
  std::string arrived() { return test::read_all(*pair.far); }
};

/// Two ranges and two messages of our own, as a Bind with a new name and a skipped Parse ahead.
void fill(Gather& gather, const std::string& read) {
  gather.own([](std::string& out) { out += "<parse>"; });
  gather.add(bytes(read), 4);
  gather.own([](std::string& out) { out += "<name>"; });
  gather.add(bytes(read) + 6, 2);
}
constexpr const char* kFilled = "<parse>abcd<name>gh";

TEST(Channel, WhatTheKernelDoesNotTakeIsKeptAtEveryByte) {
  const std::size_t size = std::string(kFilled).size();
  for (std::size_t taken = 0; taken <= size; ++taken) {
    Ends ends;
    Gather gather;
    {
      std::string read = "abcdefgh";
      fill(gather, read);
      const Limited limited(static_cast<long>(taken));
      EXPECT_TRUE(ends.channel.send(gather, test::scratch()));
      EXPECT_TRUE(gather.empty());
      EXPECT_EQ(ends.channel.queued(), size - taken);
      read.assign(8, '#');  // what was read is not looked at any more
      // More comes behind it, without a system call.
      gather.own([](std::string& out) { out += "more"; });
      const int sends = test::g_sends;
      EXPECT_TRUE(ends.channel.send(gather, test::scratch()));
      if (taken < size) {
        EXPECT_EQ(test::g_sends, sends);
      }
      EXPECT_EQ(ends.channel.queued(), size - taken + 4);
      EXPECT_TRUE(ends.channel.flush(test::scratch()));  // still full
      EXPECT_EQ(ends.channel.queued(), size - taken + 4);
    }
    EXPECT_EQ(ends.arrived(), std::string(kFilled).substr(0, taken));
    EXPECT_TRUE(ends.channel.flush(test::scratch()));
    EXPECT_EQ(ends.channel.queued(), 0u);
    EXPECT_TRUE(ends.channel.unsent.empty());
    EXPECT_EQ(ends.arrived(), std::string(kFilled).substr(taken) + "more");
  }
}

TEST(Channel, TheQueueLeavesByteByByte) {
  Ends ends;
  Gather gather;
  const std::string read = "abcdefgh";
  fill(gather, read);
  std::string all;
  {
    const Limited limited(0);
    ends.channel.send(gather, test::scratch());
  }
  while (ends.channel.queued() > 0) {
    const std::size_t before = ends.channel.queued();
    const Limited limited(1);
    ASSERT_TRUE(ends.channel.flush(test::scratch()));
    ASSERT_EQ(ends.channel.queued(), before - 1);
    all += ends.arrived();
  }
  EXPECT_EQ(all, kFilled);
}

TEST(Channel, ALargeQueueGivesItsMemoryBack) {
  Ends ends;
  Gather gather;
  const std::string read = test::pattern(100'000);
  {
    const Limited limited(0);
    gather.add(bytes(read), read.size());
    EXPECT_TRUE(ends.channel.send(gather, test::scratch()));
  }
  std::string all;
  for (int i = 0; i < 1000 && ends.channel.queued() > 0; ++i) {
    ASSERT_TRUE(ends.channel.flush(test::scratch()));
    all += ends.arrived();
  }
  EXPECT_EQ(all, read);
  EXPECT_LT(ends.channel.unsent.capacity(), 4097u);
}

TEST(Channel, ABrokenConnectionIsTold) {
  Ends ends;
  ends.pair.far->close();
  Gather gather;
  gather.own([](std::string& out) { out += "x"; });
  EXPECT_FALSE(ends.channel.send(gather, test::scratch()));
  ends.channel.unsent = "y";
  ends.channel.unsent_at = 0;
  EXPECT_FALSE(ends.channel.flush(test::scratch()));
}

TEST(Channel, KeepsTheRestAtEverySplit) {
  const std::string fresh = "abcdefgh";
  for (std::size_t n = 0; n <= fresh.size(); ++n) {
    Ends ends;
    ends.channel.keep(test::view(fresh), n);
    EXPECT_EQ(ends.channel.unread, fresh.substr(n));
    if (ends.channel.unread.empty()) continue;
    ends.channel.unread += "ij";
    for (std::size_t m = 0; m <= 2; ++m) {  // now it is a view of its own
      const std::string before = ends.channel.unread;
      ends.channel.keep(test::view(ends.channel.unread), m);
      EXPECT_EQ(ends.channel.unread, before.substr(m));
    }
  }
}

TEST(Channel, KeepsNoMemoryOfALongMessage) {
  Ends ends;
  const std::string fresh = test::pattern(60'000);
  ends.channel.keep(test::view(fresh), 1);
  ends.channel.keep(test::view(ends.channel.unread), fresh.size() - 1);
  EXPECT_TRUE(ends.channel.unread.empty());
  EXPECT_LT(ends.channel.unread.capacity(), 1025u);
}

}  // namespace
}  // namespace pgsidecar::proxy
