#include "pool/pins.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::pool {
namespace {

TEST(Pins, EachReasonHasAName) {
  for_each_reason(~0u, [](PinReason reason) {
    EXPECT_STRNE(to_string(reason), "unknown");
    EXPECT_FALSE(std::string(ends(reason)).empty());
  });
}

TEST(Transparency, TheLeastCountedMakesRoom) {
  Transparency seen;
  for (std::size_t i = 0; i < Transparency::kMost; ++i) {
    seen.record("s" + std::to_string(i), true, false, 0);
    if (i != 7) seen.record("s" + std::to_string(i), true, true, 0);
  }
  seen.record("new", false, false, bit(PinReason::Library));
  EXPECT_EQ(seen.dropped(), 1u);
  const auto rows = seen.rows();
  ASSERT_EQ(rows.size(), Transparency::kMost);
  EXPECT_EQ(rows[0].statement, "new");
  EXPECT_EQ(rows[0].reasons, bit(PinReason::Library));
  for (const auto& row : rows) EXPECT_NE(row.statement, "s7");
  EXPECT_EQ(rows[1].checked, 2u);
  EXPECT_EQ(rows[1].carried, 1u);
}

}  // namespace
}  // namespace pgsidecar::pool
