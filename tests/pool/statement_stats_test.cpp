#include "pool/statement_stats.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "protocol/normalize.hpp"

namespace pgsidecar::pool {
namespace {

constexpr Time kStart = Time(std::chrono::seconds(100));

StatementHandle find(StatementStats& stats, const std::string& sql, std::uint32_t pool = 1, Time now = kStart) {
  return stats.find(pool, protocol::fingerprint_sql(sql), sql, now);
}

const StatementRow& row(const StatementStats::Report& report, const std::string& text) {
  const auto it = std::find_if(report.rows.begin(), report.rows.end(), [&](const auto& r) { return r.second.text == text; });
  if (it == report.rows.end()) throw std::runtime_error("no row: " + text);
  return it->second;
}

TEST(StatementStats, CountsByNormalisedTextAndPool) {
  StatementStats stats(kStart);
  EXPECT_EQ(find(stats, "SELECT 1"), find(stats, "SELECT  2"));
  EXPECT_NE(find(stats, "SELECT 1"), find(stats, "SELECT 1", 2));
  const auto later = kStart + std::chrono::seconds(5);
  stats.record(find(stats, "SELECT 1"), {1000, 2000, 500, 3, 77, "", "app='a'"}, kStart);
  stats.record(find(stats, "SELECT 2"), {0, 1000, 0, 1, 23, "", ""}, later);
  const auto report = stats.report();
  ASSERT_EQ(report.rows.size(), 1u);
  const StatementRow& r = report.rows[0].second;
  EXPECT_EQ(report.rows[0].first, 1u);
  EXPECT_EQ(r.text, "SELECT ?");
  EXPECT_EQ(r.calls, 2u);
  EXPECT_EQ(r.rows, 4u);
  EXPECT_EQ(r.bytes, 100u);
  EXPECT_EQ(r.waitMicros, 1000u);
  EXPECT_EQ(r.serverMicros, 3000u);
  EXPECT_EQ(r.clientMicros, 500u);
  EXPECT_EQ(r.tags, "app='a'");
  EXPECT_EQ(r.time.max_micros(), 3500u);
  EXPECT_EQ(r.first, kStart);
  EXPECT_EQ(r.last, later);
}

TEST(StatementStats, ErrorsAreToldBySqlstateUpToABound) {
  StatementStats stats(kStart);
  const auto handle = find(stats, "SELECT 1");
  for (int i = 0; i < 12; ++i) {
    std::string sqlstate = "23500";
    sqlstate[4] = static_cast<char>('A' + i);
    stats.record(handle, {0, 1, 0, 0, 0, sqlstate, ""}, kStart);
    stats.record(handle, {0, 1, 0, 0, 0, "23505", ""}, kStart);
  }
  const auto report = stats.report();
  const StatementRow& r = report.rows.at(0).second;
  EXPECT_EQ(r.errorCount, 24u);
  std::uint64_t told = 0;
  for (const auto& error : r.errors) {
    EXPECT_GT(error.count, 0u);
    if (std::string_view(error.sqlstate.data(), 5) == "23505") {
      EXPECT_EQ(error.count, 12u);
    }
    told += error.count;
  }
  EXPECT_EQ(told, 12u + StatementRow::kErrors - 1);
}

TEST(StatementStats, TheHeaviestStayAndTheNumberIsBounded) {
  StatementStats stats(kStart);
  for (int i = 0; i < 20; ++i) stats.record(find(stats, "SELECT heavy" + std::to_string(i)), {0, 1'000'000, 0, 0, 0, "", ""}, kStart);
  for (int i = 0; i < 20'000; ++i) {
    stats.record(find(stats, "SELECT light" + std::to_string(i)), {0, 10, 0, 0, 0, "", ""}, kStart);
    if (i % 100 == 0) stats.record(find(stats, "SELECT often"), {0, 5000, 0, 0, 0, "", ""}, kStart);
  }
  const auto report = stats.report();
  EXPECT_EQ(report.rows.size(), StatementStats::kMost);
  EXPECT_EQ(report.evicted, 20'021u - StatementStats::kMost);
  for (int i = 0; i < 20; ++i) EXPECT_EQ(row(report, "SELECT heavy" + std::to_string(i)).calls, 1u);
  EXPECT_EQ(row(report, "SELECT often").calls, 200u);
}

TEST(StatementStats, AHandleOfARecordThatMadeRoomFindsNothing) {
  StatementStats stats(kStart);
  const auto old = find(stats, "SELECT old");
  for (std::size_t i = 0; i < StatementStats::kMost; ++i)
    stats.record(find(stats, "SELECT x" + std::to_string(i)), {0, 5, 0, 0, 0, "", ""}, kStart);
  EXPECT_EQ(stats.text(old), "");
  stats.record(old, {0, 5, 0, 0, 0, "", ""}, kStart);
  stats.add_client_time(old, 7);
  stats.add_left_idle(old);
  stats.record(kNoStatement, {}, kStart);
  for (const auto& [pool, r] : stats.report().rows) {
    EXPECT_LE(r.calls, 1u);
    EXPECT_EQ(r.clientMicros, 0u);
  }
}

TEST(StatementStats, ResetForgetsAndGoesOn) {
  StatementStats stats(kStart);
  const auto old = find(stats, "SELECT a");
  stats.record(old, {0, 5, 0, 0, 0, "", ""}, kStart);
  stats.reset(kStart + std::chrono::seconds(1));
  stats.record(old, {0, 5, 0, 0, 0, "", ""}, kStart);
  EXPECT_TRUE(stats.report().rows.empty());
  EXPECT_EQ(stats.report().since, kStart + std::chrono::seconds(1));
  stats.record(find(stats, "SELECT a"), {0, 5, 0, 0, 0, "", ""}, kStart);
  EXPECT_EQ(stats.report().rows.size(), 1u);
}

TEST(StatementStats, TextsAndTagsAreBounded) {
  StatementStats stats(kStart);
  std::string sql = "SELECT a";
  for (int i = 0; i < 1000; ++i) sql += " + b" + std::to_string(i);
  stats.record(find(stats, sql), {0, 1, 0, 0, 0, "", std::string(5000, 'x')}, kStart);
  const auto report = stats.report();
  EXPECT_LE(report.rows.at(0).second.text.size(), StatementStats::kMostText);
  EXPECT_EQ(report.rows.at(0).second.tags.size(), StatementStats::kMostTags);
}

TEST(StatementStats, ItsFootprintIsBounded) {
  StatementStats stats(kStart);
  std::size_t most = 0;
  for (std::size_t i = 0; i < 2 * StatementStats::kMost; ++i) {
    // Long texts with long comments, as bad as it gets.
    const std::string sql = "SELECT c" + std::to_string(i) + std::string(2 * StatementStats::kMostText, 'x');
    stats.record(find(stats, sql), {1, 1, 1, 1, 1, "", std::string(1000, 't')}, kStart);
    most = std::max(most, stats.footprint());
  }
  EXPECT_GT(most, StatementStats::kMost * StatementStats::kMostText);
  EXPECT_LT(most, StatementStats::kMost * 4000);
}

TEST(Histogram, WhatWasRecordedSince) {
  Histogram h;
  for (int i = 0; i < 100; ++i) h.record(10'000);
  const Histogram before = h;
  EXPECT_EQ(h.since(before).count(), 0u);
  EXPECT_EQ(h.since(before).quantile(0.5), 0);
  for (int i = 0; i < 10; ++i) h.record(100);
  const Histogram recent = h.since(before);
  EXPECT_EQ(recent.count(), 10u);
  EXPECT_EQ(recent.sum_micros(), 1000u);
  EXPECT_NEAR(recent.quantile(0.99), 100, 7);
  EXPECT_NEAR(static_cast<double>(recent.max_micros()), 100, 7);
}

}  // namespace
}  // namespace pgsidecar::pool
