#include "proxy/settings.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::proxy {
namespace {

protocol::Startup startup(std::vector<std::pair<std::string, std::string>> parameters) {
  protocol::Startup s;
  s.parameters = std::move(parameters);
  return s;
}

TEST(Settings, EqualSettingsAreOneObject) {
  SettingsCache cache;
  EXPECT_EQ(cache.intern({{"a", "1"}}), cache.intern({{"a", "1"}}));
  EXPECT_NE(cache.intern({{"a", "1"}}), cache.intern({}));
}

TEST(Settings, ASearchPathMayMakeThingsTemporary) {
  SettingsCache cache;
  EXPECT_FALSE(cache.intern({{"search_path", "public"}})->temporary);
  EXPECT_TRUE(cache.intern({{"search_path", "pg_temp, public"}})->temporary);
}

TEST(Settings, OfAStartup) {
  std::map<std::string, std::string> values;
  std::string complaint;
  EXPECT_TRUE(settings_of(
      startup({{"user", "u"}, {"database", "d"}, {"options", "-c a=1 -cb=2 --c-d=x\\ y"}, {"DateStyle", "ISO"}, {"_pq_.x", "1"}}), values,
      complaint));
  EXPECT_EQ(values, (std::map<std::string, std::string>{{"a", "1"}, {"b", "2"}, {"c_d", "x y"}, {"datestyle", "ISO"}}));
  EXPECT_FALSE(settings_of(startup({{"options", "-E"}}), values, complaint));
  EXPECT_FALSE(complaint.empty());
}

TEST(Settings, SqlIsTheDifference) {
  Settings have, want;
  have.values = {{"keep", "1"}, {"change", "a"}, {"gone.x", "1"}};
  want.values = {{"keep", "1"}, {"change", "it's"}, {"new", "back\\slash"}};
  using Statements = std::vector<std::string>;
  EXPECT_EQ(settings_statements(have.values, want.values),
            (Statements{"RESET \"gone\".\"x\"",
                        "SELECT pg_catalog.set_config('change','it''s',false),pg_catalog.set_config('new', E'back\\\\slash',false)"}));
  EXPECT_EQ(settings_statements(want.values, want.values), Statements{});
}

TEST(Settings, ARoleIsPutOnLastAndOffFirst) {
  using Statements = std::vector<std::string>;
  const std::string a = "SELECT pg_catalog.set_config('a','1',false)", role = "SELECT pg_catalog.set_config('role','r',false)",
                    user = "SELECT pg_catalog.set_config('session_authorization','u',false)";
  EXPECT_EQ(settings_statements({}, {{"a", "1"}, {"role", "r"}, {"session_authorization", "u"}}), (Statements{a, user, role}));
  EXPECT_EQ(settings_statements({{"role", "r"}}, {{"role", "r"}, {"a", "1"}}), (Statements{"RESET ROLE", a, role}));
  EXPECT_EQ(settings_statements({{"role", "r"}}, {{"session_authorization", "u"}}), (Statements{"RESET ROLE", user}));
  EXPECT_EQ(settings_statements({{"session_authorization", "u"}, {"role", "r"}}, {{"session_authorization", "u"}}),
            (Statements{"RESET ROLE"}));
  EXPECT_EQ(settings_statements({{"session_authorization", "u"}, {"role", "r"}}, {}),
            (Statements{"RESET ROLE", "RESET SESSION AUTHORIZATION"}));
}

TEST(Settings, WhatDecidesATextsMeaning) {
  SettingsCache cache;
  EXPECT_EQ(cache.intern({{"app.x", "1"}, {"statement_timeout", "5"}})->meaning, cache.intern({})->meaning);
  EXPECT_NE(cache.intern({{"datestyle", "ISO"}})->meaning, cache.intern({})->meaning);
}

TEST(Settings, WhatEachTransactionSetsAnewIsNotCarried) {
  SettingsCache cache;
  EXPECT_EQ(cache.intern({{"transaction_isolation", "serializable"}, {"work_mem", "1MB"}}), cache.intern({{"work_mem", "1MB"}}));
}

TEST(Settings, CustomNamesAreBounded) {
  SettingsCache cache;
  EXPECT_FALSE(cache.learn({"plpgsql.variable_conflict"})) << "a library checks it where it is loaded";
  for (int i = 0; i < 64; ++i) EXPECT_TRUE(cache.learn({"app.x" + std::to_string(i)}));
  EXPECT_TRUE(cache.learn({"app.x0"}));
  EXPECT_FALSE(cache.learn({"app.y"}));
}

}  // namespace
}  // namespace pgsidecar::proxy
