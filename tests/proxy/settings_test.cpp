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
  EXPECT_EQ(
      settings_sql(have, want),
      "RESET \"gone\".\"x\";SELECT pg_catalog.set_config('change','it''s',false),pg_catalog.set_config('new', E'back\\\\slash',false)");
  EXPECT_EQ(settings_sql(want, want), "");
}

}  // namespace
}  // namespace pgsidecar::proxy
