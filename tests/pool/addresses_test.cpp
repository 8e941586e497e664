#include "pool/addresses.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::pool {
namespace {

using namespace std::chrono_literals;

struct AddressesTest : testing::Test {
  Time now = Time{} + 1h;
  Addresses addresses;
  bool gone(const char* address) const { return addresses.gone("db", address, now); }
  void answer(const std::set<std::string>& found) { addresses.answered("db", found, now); }
};

TEST_F(AddressesTest, OneThatFailedIsLastForLongerEachTime) {
  for (const auto pause : {10s, 20s, 40s, 80s, 160s, 160s}) {
    addresses.failed("a", now);
    EXPECT_TRUE(addresses.failed_lately("a", now + pause - 1s)) << pause.count();
    EXPECT_FALSE(addresses.failed_lately("a", now + pause)) << pause.count();
  }
  EXPECT_FALSE(addresses.failed_lately("b", now));
  addresses.worked("a");
  EXPECT_FALSE(addresses.failed_lately("a", now));
  addresses.failed("a", now);
  EXPECT_FALSE(addresses.failed_lately("a", now + 10s));
}

TEST_F(AddressesTest, ANameThatMoves) {
  EXPECT_FALSE(gone("a")) << "nothing is known";
  answer({"a"});
  EXPECT_FALSE(gone("a"));
  now += 30s;
  answer({"b"});
  EXPECT_TRUE(gone("a"));
  EXPECT_FALSE(gone("b"));
  EXPECT_FALSE(addresses.gone("other", "a", now)) << "a host that couldn't be looked up";
  now += 1h;
  answer({"b"});
  EXPECT_TRUE(gone("a"));
  EXPECT_FALSE(gone("b"));
}

TEST_F(AddressesTest, ANameThatGainsAndLosesOne) {
  answer({"a", "b"});
  answer({"a", "b", "c"});
  EXPECT_FALSE(gone("a") || gone("b") || gone("c"));
  now += 30s;
  answer({"a", "c"});
  EXPECT_TRUE(gone("b"));
  EXPECT_FALSE(gone("a") || gone("c"));
}

TEST_F(AddressesTest, ANameThatHasSomeOfManyInTurn) {
  answer({"a"});
  now += 30s;
  answer({"b"});
  EXPECT_TRUE(gone("a"));
  now += 30s;
  answer({"a"});
  EXPECT_FALSE(gone("b")) << "a came back: it goes round";
  now += 30s;
  answer({"c"});
  EXPECT_FALSE(gone("a") || gone("b"));
  for (int i = 0; i < 19; ++i) {
    now += 30s;
    answer({i % 2 ? "a" : "c"});
  }
  EXPECT_FALSE(gone("a") || gone("c"));
  now += 30s;
  answer({"a"});
  EXPECT_TRUE(gone("b")) << "not seen for ten minutes";
}

TEST_F(AddressesTest, AFailbackLaterThanThatIsAMoveAgain) {
  answer({"a"});
  now += 30s;
  answer({"b"});
  now += 11min;
  answer({"b"});
  now += 30s;
  answer({"a"});
  EXPECT_TRUE(gone("b"));
}

}  // namespace
}  // namespace pgsidecar::pool
