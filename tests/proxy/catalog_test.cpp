#include "proxy/catalog.hpp"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "proxy/settings.hpp"

namespace pgsidecar::proxy {
namespace {

using protocol::kAdvisoryLock;
using protocol::kFunction;
using protocol::kSettings;
using std::chrono::seconds;

// A database as the survey's questions see it.
struct Database {
  std::map<std::string, std::string> bodies;                 // of functions in PL/pgSQL
  std::vector<std::pair<std::string, std::string>> hanging;  // (relation, function)
  int asked = 0, written = 1;
  bool failing = false;

  void survey(Catalog& catalog, Catalog::Time now) {
    Survey survey(catalog, now);
    for (std::string sql = survey.next(now); !sql.empty(); sql = survey.next(now)) {
      ASSERT_LT(++asked, 1000);
      if (!failing) answer(survey, sql);
      survey.answered(now, failing);
    }
  }

  void answer(Survey& survey, const std::string& sql) const {
    const auto row = [&](std::string a, std::string b, std::string c, std::string d) {
      std::string fields[4] = {std::move(a), std::move(b), std::move(c), std::move(d)};
      survey.answer(fields);
    };
    const auto about = [&](const std::string& name) { return sql.find("'" + name + "'") != std::string::npos; };
    if (sql.starts_with("SELECT p.proname")) {
      for (const auto& [name, body] : bodies)
        if (about(name)) row(name, "plpgsql", "f", body);
    } else if (sql.find("hung AS") == std::string::npos) {
      for (const auto& [relation, function] : hanging) row(function, "", "", "");
      row("", "written", std::to_string(written), "");
    } else {
      for (const auto& [relation, function] : hanging)
        if (about(function)) row(relation, function, "", "");
    }
  }
};

struct CatalogTest : testing::Test {
  SettingsCache settings;
  Catalog catalog{settings};
  Database database;
  Catalog::Time now{seconds(1000)};
};

TEST_F(CatalogTest, BeforeASurveyEveryTextMayDoAnything) {
  EXPECT_FALSE(catalog.quiet());
  EXPECT_TRUE(catalog.due(now));
  EXPECT_EQ(catalog.residue_of_names("SELECT 1"), kFunction);
}

TEST_F(CatalogTest, WhatLeavesNothingIsQuiet) {
  database.bodies = {{"touch", "BEGIN NEW.updated_at := now(); RETURN NEW; END"}};
  database.hanging = {{"t", "touch"}};
  database.survey(catalog, now);
  EXPECT_TRUE(catalog.quiet());
  EXPECT_EQ(database.asked, 2);  // what hangs, and the body: not on what
}

TEST_F(CatalogTest, NamesOfWhatStatefulFunctionsHangOn) {
  database.bodies = {{"touch", "BEGIN RETURN NEW; END"},
                     {"lock", "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END"},
                     {"outer", "BEGIN PERFORM set_memory(); RETURN NEW; END"},
                     {"set_memory", "BEGIN SET work_mem TO '1MB'; END"}};
  database.hanging = {{"touched", "touch"}, {"locked", "lock"}, {"Set", "outer"}};
  database.survey(catalog, now);
  EXPECT_FALSE(catalog.quiet());
  EXPECT_EQ(catalog.residue_of_names("UPDATE touched SET a = 1"), protocol::kSettings) << "SET is the name of a table";
  EXPECT_EQ(catalog.residue_of_names("TABLE touched"), 0u);
  EXPECT_EQ(catalog.residue_of_names("TABLE locked"), kAdvisoryLock);
}

TEST_F(CatalogTest, ABodyThatNamesSuchALeavesTheSame) {
  database.bodies = {{"lock", "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END"},
                     {"copy", "BEGIN INSERT INTO inner_table VALUES (1); RETURN NEW; END"},
                     {"copy_on", "BEGIN INSERT INTO middle_table VALUES (1); RETURN NEW; END"},
                     {"calls", "BEGIN DELETE FROM outer_table; END"}};
  database.hanging = {{"inner_table", "lock"}, {"middle_table", "copy"}, {"outer_table", "copy_on"}};
  database.survey(catalog, now);
  EXPECT_EQ(catalog.residue_of_names("DELETE FROM outer_table"), kAdvisoryLock);
  Catalog::Names unknown;
  EXPECT_EQ(catalog.residue_of_calls({"calls"}, now, unknown), kFunction);
  auto inquiry = catalog.inquire(unknown, now);
  EXPECT_EQ(inquiry.names, std::vector<std::string>{"calls"});
  catalog.answer(inquiry, "calls", "plpgsql", false, database.bodies["calls"]);
  catalog.answered(inquiry, now, false);
  EXPECT_EQ(catalog.residue_of_calls(unknown, now, unknown) & ~protocol::kPassive, kAdvisoryLock);
}

TEST_F(CatalogTest, WhatHangsOnNothingCountsEverywhere) {
  database.bodies = {{"check", "BEGIN PERFORM pg_advisory_lock(1); RETURN true; END"}};
  database.hanging = {{"", "check"}};
  database.survey(catalog, now);
  EXPECT_EQ(catalog.residue_of_names("SELECT 1"), kAdvisoryLock);
}

TEST_F(CatalogTest, AStatementsJudgementIsKeptUntilSomethingChanges) {
  database.bodies = {{"lock", "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END"}};
  database.survey(catalog, now);
  protocol::Statement statement;
  statement.sql = "TABLE t";
  EXPECT_EQ(catalog.residue_of_names(statement), 0u);
  database.hanging = {{"t", "lock"}};
  EXPECT_FALSE(catalog.due(now + seconds(29)));
  EXPECT_TRUE(catalog.due(now + seconds(30)));
  database.survey(catalog, now + seconds(30));
  EXPECT_EQ(catalog.residue_of_names(statement), kAdvisoryLock);
  Catalog other(settings);
  EXPECT_EQ(other.residue_of_names(statement), kFunction);
}

TEST_F(CatalogTest, ABodyIsReadAnewByTheNextSurvey) {
  database.bodies = {{"f", "BEGIN RETURN NEW; END"}};
  database.hanging = {{"t", "f"}};
  database.survey(catalog, now);
  database.bodies["f"] = "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END";
  database.survey(catalog, now + seconds(30));
  EXPECT_EQ(catalog.residue_of_names("TABLE t"), kAdvisoryLock);
  Catalog::Names unknown;
  EXPECT_EQ(catalog.residue_of_calls({"f"}, now + seconds(30), unknown), kAdvisoryLock);
  EXPECT_TRUE(unknown.empty());
  database.bodies["f"] = "BEGIN RETURN NEW; END";
  database.survey(catalog, now + seconds(60));
  EXPECT_TRUE(catalog.quiet());
}

TEST_F(CatalogTest, WhatComesToLightLate) {
  database.bodies = {{"f", "BEGIN RETURN NEW; END"}, {"lock", "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END"}};
  database.hanging = {{"t", "f"}, {"u", "lock"}};
  database.survey(catalog, now);
  EXPECT_FALSE(catalog.take_late()) << "nothing went before";
  database.survey(catalog, now + seconds(30));
  EXPECT_FALSE(catalog.take_late()) << "nothing is new";
  database.hanging.emplace_back("t", "lock");
  database.survey(catalog, now + seconds(60));
  EXPECT_TRUE(catalog.take_late()) << "a trigger";
  EXPECT_FALSE(catalog.take_late());
  database.bodies["f"] = "BEGIN LISTEN c; RETURN NEW; END";
  database.survey(catalog, now + seconds(90));
  EXPECT_TRUE(catalog.take_late()) << "a body";
  catalog.forget();
  database.hanging.emplace_back("v", "lock");
  database.survey(catalog, now + seconds(90));
  EXPECT_FALSE(catalog.take_late()) << "sessions were looked at meanwhile";
}

TEST_F(CatalogTest, AChangeMeanwhileMakesASurveyWorthless) {
  Survey survey(catalog, now);
  survey.next(now);
  catalog.forget();
  survey.answered(now, false);
  EXPECT_EQ(survey.next(now), "");
  EXPECT_FALSE(catalog.quiet());
  EXPECT_TRUE(catalog.due(now));
}

TEST_F(CatalogTest, WhatWasWrittenBetweenSurveysIsTold) {
  const auto told = [&] {
    database.survey(catalog, now += seconds(90));
    return catalog.take_rewritten();
  };
  EXPECT_FALSE(told()) << "nothing was known before";
  EXPECT_FALSE(told());
  ++database.written;
  EXPECT_TRUE(told());
  EXPECT_FALSE(told());
}

TEST_F(CatalogTest, WhatWasNamedBeforeASurveyIsJudgedByIt) {
  database.bodies = {{"seed", "BEGIN PERFORM setseed(0.5); RETURN NEW; END"}};
  database.hanging = {{"t", "seed"}};
  std::vector<protocol::Word> words;
  protocol::for_each_word("INSERT INTO t VALUES (1)", [&](protocol::Word word) { words.push_back(word); });
  Survey survey(catalog, now);
  std::string sql = survey.next(now);
  catalog.forget();
  for (; !sql.empty(); sql = survey.next(now)) {
    database.answer(survey, sql);
    survey.answered(now, false);
  }
  EXPECT_FALSE(catalog.surveyed());
  EXPECT_EQ(survey.residue_of(words), protocol::kSeed);
  EXPECT_EQ(survey.residue_of({}), 0u);
  database.survey(catalog, now);
  EXPECT_EQ(catalog.residue_of_names(words), protocol::kSeed);
}

TEST_F(CatalogTest, EachConnectionAsksForWhatItsClientCalled) {
  database.survey(catalog, now);
  Catalog::Names first, second;
  catalog.residue_of_calls({"f", "g"}, now, first);
  catalog.residue_of_calls({"f"}, now, second);
  auto inquiry = catalog.inquire(first, now);
  catalog.answer(inquiry, "f", "plpgsql", false, "BEGIN PERFORM setseed(0.5); END");
  catalog.answered(inquiry, now, false);
  EXPECT_TRUE(catalog.inquire(second, now).names.empty());
  EXPECT_EQ(catalog.residue_of_calls(second, now, first), protocol::kSeed);
}

TEST_F(CatalogTest, FailuresAreTriedAgainSoon) {
  database.survey(catalog, now);
  EXPECT_TRUE(catalog.quiet());
  database.failing = true;
  database.survey(catalog, now + seconds(30));
  EXPECT_EQ(catalog.residue_of_names("SELECT 1"), kFunction);
  EXPECT_FALSE(catalog.due(now + seconds(31)));
  EXPECT_TRUE(catalog.due(now + seconds(35)));
  database.failing = false;
  database.survey(catalog, now + seconds(35));
  EXPECT_TRUE(catalog.quiet());
}

TEST_F(CatalogTest, TooMuchIsUnknown) {
  database.bodies = {{"lock", "BEGIN PERFORM pg_advisory_lock(1); RETURN NEW; END"}};
  for (int i = 0; i < 10001; ++i) database.hanging.emplace_back("t" + std::to_string(i), "lock");
  database.survey(catalog, now);
  EXPECT_EQ(catalog.residue_of_names("SELECT 1"), kFunction);
  EXPECT_LE(database.asked, 3);
}

TEST_F(CatalogTest, WhatIsToldIsBounded) {
  Catalog::Names unknown;
  for (int i = 0; i < 300; ++i) {
    const std::string name = (i % 2 ? "locks" : "plain") + std::to_string(1000 + i);
    catalog.residue_of_calls({name}, now, unknown);
    auto inquiry = catalog.inquire({name}, now);
    catalog.answer(inquiry, name, "plpgsql", false, i % 2 ? "BEGIN PERFORM pg_advisory_lock(1); PERFORM setseed(0); END" : "BEGIN END");
    catalog.answered(inquiry, now, false);
  }
  const auto effects = catalog.effects();
  ASSERT_EQ(effects.size(), 100u);
  EXPECT_EQ(effects.front().function, "locks1001");
  EXPECT_EQ(effects.back().function, "locks1199");
  EXPECT_EQ(effects.front().leaves, (std::vector<std::string>{"advisory_lock", "random_seed"}));
}

TEST_F(CatalogTest, FunctionsThatCannotBeRead) {
  const struct {
    const char* language;
    bool extension;
    const char* body;
    std::uint32_t residue;
  } rows[] = {{"c", true, "x", 0},
              {"c", false, "x", kFunction},
              {"plpython3u", false, "pass", kFunction},
              {"sql", false, "", kFunction},
              {"plpgsql", false, "BEGIN END", 0}};
  for (const auto& row : rows) {
    Catalog one(settings);
    Catalog::Names unknown;
    one.residue_of_calls({"f"}, now, unknown);
    auto inquiry = one.inquire(unknown, now);
    one.answer(inquiry, "f", row.language, row.extension, row.body);
    one.answered(inquiry, now, false);
    EXPECT_EQ(one.residue_of_calls({"f"}, now, unknown), row.residue) << row.language;
    EXPECT_EQ(one.residue_of_calls({"f"}, now + seconds(61), unknown), kFunction) << "good for a minute";
  }
}

}  // namespace
}  // namespace pgsidecar::proxy
