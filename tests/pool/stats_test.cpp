#include "pool/stats.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace pgsidecar::pool {
namespace {

TEST(Histogram, EmptyIsZero) {
  const Histogram h;
  EXPECT_EQ(h.quantile(0.5), 0);
  EXPECT_EQ(h.count_at_most(1000), 0u);
  EXPECT_EQ(h.count(), 0u);
  EXPECT_EQ(h.max_micros(), 0u);
}

TEST(Histogram, OneValueIsEveryQuantile) {
  for (const std::uint64_t v : {0ull, 1ull, 15ull, 16ull, 17ull, 999ull, 1000ull, 1ull << 35, 1ull << 40}) {
    Histogram h;
    h.record(v);
    const auto exact = static_cast<double>(v);
    for (const double q : {0.0, 0.5, 0.99, 1.0}) EXPECT_NEAR(h.quantile(q), exact, exact * 0.0625) << v << " " << q;
    EXPECT_EQ(h.max_micros(), v);
    EXPECT_EQ(h.sum_micros(), v);
  }
}

TEST(Histogram, QuantilesAreWithinABucketOfTheExactOnes) {
  std::mt19937_64 random(7);
  std::lognormal_distribution<double> durations(7, 2.5);
  std::vector<std::uint64_t> all;
  Histogram h;
  for (int i = 0; i < 20000; ++i) {
    const auto v = static_cast<std::uint64_t>(durations(random));
    all.push_back(v);
    h.record(v);
  }
  std::sort(all.begin(), all.end());
  double last = 0;
  for (const double q : {0.01, 0.25, 0.5, 0.9, 0.95, 0.99, 0.999}) {
    const auto exact = static_cast<double>(all[static_cast<std::size_t>(q * static_cast<double>(all.size()))]);
    EXPECT_NEAR(h.quantile(q), exact, exact * 0.0625 + 1) << q;
    EXPECT_GE(h.quantile(q), last);
    last = h.quantile(q);
  }
  EXPECT_EQ(h.quantile(1), static_cast<double>(all.back()));
}

TEST(Histogram, CountAtMostIncludesTheBoundAndGrows) {
  Histogram h;
  for (std::uint64_t v = 0; v <= 5000; ++v) h.record(v);
  std::uint64_t last = 0;
  for (const std::uint64_t bound : {0u, 1u, 15u, 16u, 100u, 250u, 1000u, 2500u, 5000u, 1000000u}) {
    const auto n = h.count_at_most(bound);
    EXPECT_GE(n, std::min<std::uint64_t>(bound + 1, 5001)) << bound;
    EXPECT_LE(static_cast<double>(n), static_cast<double>(bound) * 1.0625 + 1) << bound;
    EXPECT_GE(n, last);
    last = n;
  }
  EXPECT_EQ(h.count_at_most(5000), h.count());
}

TEST(Histogram, TheLastBucketTakesWhatIsLonger) {
  Histogram h;
  h.record(~std::uint64_t{0});
  h.record(std::uint64_t{1} << 36);
  EXPECT_EQ(h.count_at_most(~std::uint64_t{0}), 2u);
  EXPECT_EQ(h.count_at_most(1000), 0u);
  EXPECT_GT(h.quantile(0.5), 1e10);
}

TEST(Histogram, MergeIsTheSameAsRecordingBoth) {
  Histogram a, b, both;
  for (std::uint64_t v = 1; v < 3000; v += 7) {
    a.record(v);
    both.record(v);
  }
  for (std::uint64_t v = 1000; v < 900000; v += 501) {
    b.record(v);
    both.record(v);
  }
  a.merge(b);
  EXPECT_EQ(a.count(), both.count());
  EXPECT_EQ(a.sum_micros(), both.sum_micros());
  EXPECT_EQ(a.max_micros(), both.max_micros());
  for (const double q : {0.1, 0.5, 0.95}) EXPECT_EQ(a.quantile(q), both.quantile(q));
}

template <class Reason>
void expect_label_names() {
  std::set<std::string> names;
  for (std::size_t i = 0; i < static_cast<std::size_t>(Reason::kCount); ++i) {
    const std::string name = to_string(static_cast<Reason>(i));
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz_"), std::string::npos) << name;
    EXPECT_NE(name, "unknown") << i;
    EXPECT_TRUE(names.insert(name).second) << name;
  }
}

TEST(Reasons, EachHasALabelOfItsOwn) {
  expect_label_names<CloseReason>();
  expect_label_names<RejectReason>();
}

TEST(PoolSnapshot, TotalCountsConnectionsBeingOpenedAndClosed) {
  PoolSnapshot p;
  p.serversActive = 1;
  p.serversIdle = 2;
  p.serversLogin = 4;
  p.serversReset = 8;
  p.serversClosing = 16;
  EXPECT_EQ(p.total(), 31u);
}

}  // namespace
}  // namespace pgsidecar::pool
