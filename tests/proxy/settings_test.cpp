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
  std::string sqlstate, complaint;
  const auto asked = settings_of(startup({{"user", "u"},
                                          {"DateStyle", "DMY"},
                                          {"options", "-c ignored=1"},
                                          {"options", "-c a=1 -cb=2 --c-d=x\\ y -c datestyle=SQL"},
                                          {"TimeZone", "UTC"},
                                          {"timezone", "GMT"},
                                          {"_pq_.x", "1"}}),
                                 sqlstate, complaint);
  ASSERT_TRUE(asked);
  EXPECT_EQ(asked->values, (Values{{"a", "1"}, {"b", "2"}, {"c_d", "x y"}, {"timezone", "GMT"}}));
  EXPECT_EQ(asked->date_styles, (std::vector<std::string>{"SQL", "DMY"}));
  EXPECT_FALSE(settings_of(startup({{"options", "-E"}}), sqlstate, complaint));
  EXPECT_EQ(sqlstate, "0A000");
  EXPECT_FALSE(complaint.empty());
}

TEST(Settings, AnApplicationNameIsText) {
  std::string sqlstate, complaint;
  const auto taken = [&](std::string name) {
    return settings_of(startup({{"Application_Name", std::move(name)}, {"app.x", "\xe9"}}), sqlstate, complaint)->values;
  };
  EXPECT_EQ(taken("caf\xe9 \x01"), (Values{{"application_name", "caf? \x01"}, {"app.x", "\xe9"}}));
  EXPECT_EQ(taken("caf\xc3\xa9\xe9"), (Values{{"application_name", "caf???"}, {"app.x", "\xe9"}}));
  EXPECT_EQ(taken("caf\xc3\xa9"), (Values{{"application_name", "caf\xc3\xa9"}, {"app.x", "\xe9"}}));
}

TEST(Settings, WhatALoginsDateStyleMeansIsForgottenWithTheServersDefaults) {
  SettingsCache cache;
  EXPECT_EQ(cache.date_style({"ISO"}), nullptr);
  cache.learn_date_style({"ISO"}, "ISO, MDY");
  ASSERT_TRUE(cache.date_style({"ISO"}));
  EXPECT_EQ(*cache.date_style({"ISO"}), "ISO, MDY");
  EXPECT_EQ(cache.date_style({"SQL", "ISO"}), nullptr);
  cache.forget_welcomes();
  EXPECT_EQ(cache.date_style({"ISO"}), nullptr);
}

TEST(Settings, ADateStyleThatTheServerHasNotHeard) {
  SettingsCache cache;
  const struct {
    const char *asked, *told, *is;
  } rows[] = {{"german", "German, DMY", "German, DMY"},
              {"German", "ISO, MDY", "German"},
              {"European", "ISO, DMY", "ISO, DMY"},
              {"European", "ISO, MDY", "European"},
              {"us", "ISO, MDY", "ISO, MDY"},
              {"", "SQL, YMD", "SQL, YMD"},
              {"POSTGRESQL", "Postgres, MDY", "Postgres, MDY"}};
  for (const auto& row : rows) {
    cache.learn_date_style({row.asked}, row.told);
    EXPECT_EQ(*cache.date_style({row.asked}), row.is) << row.asked;
  }
  std::string sqlstate, complaint;
  EXPECT_EQ(settings_of(startup({{"DateStyle", "dmy, sql"}}), sqlstate, complaint)->values, (Values{{"datestyle", "dmy, sql"}}));
  EXPECT_EQ(settings_of(startup({{"datestyle", "sql, dmy"}, {"DateStyle", "ISO"}}), sqlstate, complaint)->date_styles,
            (std::vector<std::string>{"sql, dmy", "ISO"}));
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

TEST(Settings, OtherThanAsciiIsWrittenInTheDatabasesEncoding) {
  const std::string bytes = "pg_catalog.convert_from(pg_catalog.decode('835c27','hex'),pg_catalog.getdatabaseencoding())";
  EXPECT_EQ(settings_statements({}, {{"a", "\x83\\'"}}),
            (std::vector<std::string>{"SELECT pg_catalog.set_config('a'," + bytes + ",false)"}));
  EXPECT_EQ(settings_statements({{"\x83\\'", "1"}}, {}),
            (std::vector<std::string>{"SELECT pg_catalog.set_config(" + bytes + ",NULL,false)"}));
  SettingsCache cache;
  EXPECT_FALSE(cache.learn({"app.\xc3\xa9"}));
}

TEST(Settings, WhatComesBackAfterAReset) {
  using Statements = std::vector<std::string>;
  const Values login{{"app.a", "it's"}, {"role", "r"}, {"search_path", "One , \"T\"\"w,o\", $user"}, {"work_mem", "1MB"}};
  const std::string a = R"(SET "app"."a" TO 'it''s')", path = R"(SET "search_path" TO 'one','T"w,o','$user')",
                    mem = R"(SET "work_mem" TO '1MB')",
                    listed = R"(SELECT pg_catalog.set_config('search_path','One , "T""w,o", $user',false))";
  EXPECT_EQ(restore_statements(login, protocol::Reset{}, true), (Statements{a, path, mem}));
  EXPECT_EQ(restore_statements(login, protocol::Reset{}, false), (Statements{a, listed, mem})) << "to the letter";
  EXPECT_EQ(restore_statements(login, protocol::Reset{.name = "search_path", .begins = true}, false), (Statements{path}));
  EXPECT_EQ(restore_statements(login, protocol::Reset{.name = "role"}, false), (Statements{R"(SET "role" TO 'r')"}));
  EXPECT_EQ(restore_statements(login, protocol::Reset{.name = "work_mem", .local = true}, true),
            (Statements{R"(SET LOCAL "work_mem" TO '1MB')"}));
  EXPECT_EQ(restore_statements(login, protocol::Reset{.name = "datestyle"}, true), Statements{});
  EXPECT_EQ(restore_statements(login, protocol::Reset{.discard = true}, false), restore_statements(login, {}, false))
      << "and maybe the role";
  EXPECT_EQ(restore_statements({}, {}, false), Statements{});
  for (const char* unreadable : {"", "a,", "a b", "\"a", "\"\"", ",a", "\xc3\xa9"})
    EXPECT_TRUE(restore_statements({{"search_path", unreadable}}, protocol::Reset{}, true).at(0).starts_with("SELECT ")) << unreadable;
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
