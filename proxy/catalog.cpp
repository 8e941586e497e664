#include "proxy/catalog.hpp"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>

#include "protocol/footprint.hpp"
#include "proxy/log.hpp"
#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kMostKnown = 10000, kMostWanted = 500, kMostHanging = 10000, kMostTold = 100;
constexpr int kMostRounds = 100, kMostFailures = 3;

std::uint64_t new_version() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

// PostgreSQL documentation, chapter 53. Names are searched for in pg_catalog alone and nothing is converted, whatever the
// session's settings are; they come back when the query ends.
//
// fn: functions that may do anything. odd: how pg_catalog's functions that leave something behind look in stored expressions,
// for which no dependency is recorded. part: what a function or such an expression is part of. hung: the relation that it hangs
// on; 0: none, as of operators, casts and types; NULL: it runs when called by name. edge: naming one relation runs what hangs on
// the other. called: functions whose calls don't look like calls, or like calls of others.
constexpr const char* kWith = R"(SET LOCAL search_path TO pg_catalog, pg_temp; SET LOCAL client_encoding TO 'SQL_ASCII';
SET LOCAL statement_timeout TO 0;
WITH RECURSIVE fn AS (
  SELECT p.oid, p.proname::text AS name, l.lanname AS language, p.pronargs, p.proargtypes[0] AS argument FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
  WHERE p.oid >= 16384 AND (l.lanname NOT IN ('c', 'internal') OR NOT EXISTS (
    SELECT FROM pg_depend AS d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e'))
), odd AS (
  SELECT ':funcid (' || string_agg(oid::text, '|') || ') ' AS pattern FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace
  AND proname ~ '^(set_config|setseed|currval|lastval|pg_backend_pid|pg_(try_)?advisory_(un)?lock.*|(query|schema|database)_to_xml.*|ts_stat)$'
), part (classid, objid, name, body) AS (
  SELECT d.classid, d.objid, f.name, '' FROM fn AS f JOIN pg_depend AS d ON d.refclassid = 'pg_proc'::regclass AND d.refobjid = f.oid
  UNION ALL SELECT 'pg_attrdef'::regclass, oid, 'default ' || oid, 'SELECT ' || pg_get_expr(adbin, adrelid)
    FROM pg_attrdef, odd WHERE adbin::text ~ pattern
  UNION ALL SELECT 'pg_rewrite'::regclass, oid, 'rule ' || oid, pg_get_ruledef(oid)
    FROM pg_rewrite, odd WHERE oid >= 16384 AND (ev_action::text ~ pattern OR ev_qual::text ~ pattern)
  UNION ALL SELECT 'pg_constraint'::regclass, oid, 'constraint ' || oid, 'SELECT ' || pg_get_constraintdef(oid)
    FROM pg_constraint, odd WHERE oid >= 16384 AND conbin::text ~ pattern
  UNION ALL SELECT 'pg_policy'::regclass, oid, 'policy ' || oid,
    'SELECT ' || COALESCE(pg_get_expr(polqual, polrelid), '') || ',' || COALESCE(pg_get_expr(polwithcheck, polrelid), '')
    FROM pg_policy, odd WHERE polqual::text ~ pattern OR polwithcheck::text ~ pattern
  UNION ALL SELECT 'pg_trigger'::regclass, oid, 'trigger ' || oid, pg_get_triggerdef(oid) FROM pg_trigger, odd WHERE tgqual::text ~ pattern
), called AS (
  SELECT name FROM fn WHERE name IN (SELECT word FROM pg_get_keywords())
    OR EXISTS (SELECT FROM pg_proc AS s WHERE s.proname = fn.name::name AND s.pronamespace = 'pg_catalog'::regnamespace)
    OR pronargs = 1 AND EXISTS (SELECT FROM pg_type AS t WHERE t.oid = argument AND t.typtype IN ('c', 'd', 'p'))
))";

constexpr const char* kFunctions = R"(
SELECT DISTINCT name, '', '', body FROM part WHERE classid <> 'pg_proc'::regclass
UNION SELECT name, '', '', '' FROM called
UNION SELECT '', 'plans', '', '' FROM fn WHERE language NOT IN ('c', 'internal', 'sql')
UNION SELECT '', 'inlines', '', '' FROM fn JOIN pg_proc AS p ON p.oid = fn.oid WHERE language = 'sql' AND strpos(prosrc, '''') > 0
UNION SELECT '', 'written', sum(pg_stat_get_tuples_inserted(c) + pg_stat_get_tuples_updated(c) + pg_stat_get_tuples_deleted(c))::text, ''
  FROM unnest('{pg_class,pg_attribute,pg_proc,pg_type,pg_operator,pg_cast,pg_namespace,pg_collation}'::regclass[]) AS c LIMIT )";

constexpr const char* kRelations = R"(, hung AS (
  SELECT CASE classid
      WHEN 'pg_trigger'::regclass THEN (SELECT tgrelid FROM pg_trigger WHERE oid = objid AND tgenabled <> 'D')
      WHEN 'pg_rewrite'::regclass THEN (SELECT ev_class FROM pg_rewrite WHERE oid = objid AND ev_enabled <> 'D')
      WHEN 'pg_attrdef'::regclass THEN (SELECT adrelid FROM pg_attrdef WHERE oid = objid)
      WHEN 'pg_constraint'::regclass THEN (SELECT conrelid FROM pg_constraint WHERE oid = objid)
      WHEN 'pg_policy'::regclass THEN (SELECT polrelid FROM pg_policy WHERE oid = objid)
      WHEN 'pg_statistic_ext'::regclass THEN (SELECT stxrelid FROM pg_statistic_ext WHERE oid = objid)
      WHEN 'pg_class'::regclass THEN COALESCE((SELECT indrelid FROM pg_index WHERE indexrelid = objid), objid)
      WHEN 'pg_proc'::regclass THEN NULL
      WHEN 'pg_event_trigger'::regclass THEN NULL
      ELSE 0 END AS rel, name
  FROM part WHERE name = ANY ((SELECT names FROM wanted)::text[])
), edge (named, rel) AS (
  SELECT w.ev_class, d.refobjid FROM pg_rewrite AS w JOIN pg_depend AS d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
    WHERE w.oid >= 16384 AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> w.ev_class
  UNION SELECT p.polrelid, d.refobjid FROM pg_policy AS p JOIN pg_depend AS d ON d.classid = 'pg_policy'::regclass AND d.objid = p.oid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid <> p.polrelid
  UNION SELECT confrelid, conrelid FROM pg_constraint AS c WHERE contype = 'f' AND (confdeltype NOT IN ('a', 'r')
    OR confupdtype NOT IN ('a', 'r') OR EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.conrelid AND t.tgtype & 32 <> 0))
  UNION SELECT inhparent, inhrelid FROM pg_inherits
), reach AS (
  SELECT rel, name FROM hung WHERE rel <> 0 UNION SELECT e.named, r.name FROM reach AS r JOIN edge AS e ON e.rel = r.rel
)
SELECT c.relname::text, r.name, '', '' FROM reach AS r JOIN pg_class AS c ON c.oid = r.rel
UNION SELECT '', name, '', '' FROM hung WHERE rel = 0
UNION SELECT word, name, '', '' FROM part JOIN pg_event_trigger AS e ON classid = 'pg_event_trigger'::regclass AND e.oid = objid
  AND evtenabled <> 'D', unnest(ARRAY['create', 'alter', 'drop', 'comment', 'grant', 'revoke', 'security', 'import', 'refresh', 'reindex',
  'reassign']) AS word WHERE name = ANY ((SELECT names FROM wanted)::text[])
UNION SELECT name, name, '', '' FROM called WHERE name = ANY ((SELECT names FROM wanted)::text[]) LIMIT )";

const protocol::Word kDefining[] = {protocol::word_of_name("create"), protocol::word_of_name("alter"), protocol::word_of_name("drop")};

void want(Catalog::Names& names, const std::string& name) {
  if (names.size() < kMostWanted && std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
}

template <class Words>
std::uint32_t residue_of_words(const std::vector<protocol::Word>& words, const Words& known, std::uint32_t everywhere) {
  std::uint32_t residue = everywhere;
  for (const protocol::Word word : words)
    if (const auto it = known.find(word); it != known.end()) residue |= it->second;
  return residue;
}

std::string list(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ",") + literal(name);
  return out;
}

}  // namespace

std::uint32_t Catalog::residue_of_calls(const Names& names, Time now, Names& unknown) const {
  std::uint32_t residue = 0;
  std::vector<const Known*> visited;
  for (const std::string& name : names) residue |= walk(name, now - kGood, visited, unknown);
  if (!surveyed_)
    for (const std::string& name : names) want(unknown, name);  // what their bodies name isn't known
  return residue;
}

std::uint32_t Catalog::walk(const std::string& name, Time since, std::vector<const Known*>& visited, Names& unknown) const {
  const auto it = known_.find(name);
  if (it == known_.end() || it->second.learned < since) {
    want(unknown, name);
    return protocol::kFunction;
  }
  return walk(it->second, since, visited, unknown);
}

std::uint32_t Catalog::walk(const Known& known, Time since, std::vector<const Known*>& visited, Names& unknown) const {
  if (std::find(visited.begin(), visited.end(), &known) != visited.end()) return 0;
  visited.push_back(&known);
  std::uint32_t residue = known.residue;
  if (!words_.empty()) {
    for (const protocol::Word word : known.words)
      if (const auto named = words_.find(word); named != words_.end()) residue |= named->second;
  }
  for (const std::string& called : known.calls) residue |= walk(called, since, visited, unknown);
  return residue;
}

std::uint32_t Catalog::residue_of_names(std::string_view sql) const {
  std::uint32_t residue = everywhere_;
  if (words_.empty()) return residue;
  protocol::for_each_word(sql, [&](protocol::Word word) {
    if (const auto it = words_.find(word); it != words_.end()) residue |= it->second;
  });
  return residue;
}

std::uint32_t Catalog::residue_of_names(const std::vector<protocol::Word>& words) const {
  return residue_of_words(words, words_, everywhere_);
}

std::uint32_t Catalog::residue_of_names(const protocol::Statement& statement) const {
  if (statement.names_version != version_) {
    statement.names_version = version_;
    statement.names_residue = residue_of_names(statement.sql);
  }
  return statement.names_residue;
}

std::vector<pool::FunctionEffects> Catalog::effects() const {
  std::map<std::string_view, std::uint32_t> found;
  for (const auto& [name, known] : known_) {
    if ((known.residue & ~protocol::kPassive) == 0) continue;
    found.emplace(name, known.residue);
    if (found.size() > kMostTold) found.erase(std::prev(found.end()));
  }
  std::vector<pool::FunctionEffects> effects;
  effects.reserve(found.size());
  for (const auto& [name, residue] : found) effects.push_back({std::string(name), protocol::residue_names(residue)});
  return effects;
}

std::size_t Catalog::footprint() const {
  std::size_t bytes = protocol::footprint_of_slots(known_) + protocol::footprint_of_slots(words_);
  for (const auto& [name, known] : known_)
    bytes += protocol::footprint(name) + protocol::footprint(known.calls) + protocol::footprint(known.words);
  return bytes;
}

Catalog::Inquiry Catalog::inquire(const Names& unknown, Time now) const {
  return older(unknown, now - kGood);
}

Catalog::Inquiry Catalog::older(const Names& names, Time since) const {
  Inquiry inquiry;
  for (const std::string& name : names)
    if (const auto it = known_.find(name); it == known_.end() || it->second.learned < since) inquiry.names.push_back(name);
  return inquiry;
}

std::string Catalog::question(const Inquiry& inquiry) {
  // What an aggregate calls stands in a body, and so does that a function has texts read in its own way.
  return "SELECT p.proname, CASE WHEN a.aggfnoid IS NULL THEN l.lanname ELSE 'sql' END, EXISTS (SELECT FROM pg_catalog.pg_depend AS d "
         "WHERE d.classid OPERATOR(pg_catalog.=) p.tableoid"
         " AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'), CASE WHEN a.aggfnoid IS NULL THEN p.prosrc "
         "ELSE"
         " 'SELECT ' OPERATOR(pg_catalog.||) pg_catalog.array_to_string(ARRAY[a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggmtransfn,"
         " a.aggminvtransfn, a.aggmfinalfn]::pg_catalog.regproc[], '(),') OPERATOR(pg_catalog.||) '()' END OPERATOR(pg_catalog.||)"
         " CASE WHEN p.prosrc OPERATOR(pg_catalog.<>) '' AND p.pronargdefaults OPERATOR(pg_catalog.>) 0"
         " THEN ';SELECT ' OPERATOR(pg_catalog.||) pg_catalog.pg_get_function_arguments(p.oid) ELSE '' END OPERATOR(pg_catalog.||)"
         " CASE WHEN p.prosrc OPERATOR(pg_catalog.<>) '' AND EXISTS (SELECT FROM pg_catalog.unnest(p.proconfig) AS c"
         " WHERE pg_catalog.lower(pg_catalog.split_part(c, '=', 1)) OPERATOR(pg_catalog.=) ANY (ARRAY[" +
         list(reading_settings()) +
         "])) THEN ';SET LOCAL datestyle TO ISO' ELSE '' END"
         " FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_language AS l ON l.oid OPERATOR(pg_catalog.=) p.prolang"
         " LEFT JOIN pg_catalog.pg_aggregate AS a ON a.aggfnoid OPERATOR(pg_catalog.=) p.oid"
         " WHERE p.proname OPERATOR(pg_catalog.=) ANY (ARRAY[" +
         list(inquiry.names) + "]::pg_catalog.name[]) AND p.pronamespace OPERATOR(pg_catalog.<>) 'pg_catalog'::pg_catalog.regnamespace";
}

void Catalog::answer(Inquiry& inquiry, const std::string& name, std::string_view language, bool extension, std::string_view body) {
  Known& known = inquiry.found[name];
  if (language == "c" || language == "internal") {
    if (!extension) known.residue |= protocol::kFunction;
    return;
  }
  // A body of BEGIN ATOMIC isn't text.
  if ((language != "sql" && language != "plpgsql") || body.empty()) {
    known.residue |= protocol::kFunction;
    return;
  }
  protocol::BodyScan found = protocol::scan_body(body);
  known.residue |= found.residue;
  known.calls.insert(known.calls.end(), found.calls.begin(), found.calls.end());
  protocol::for_each_word(body, [&](protocol::Word word) {
    known.words.push_back(word);
    const bool defines = std::ranges::find(kDefining, word) != std::end(kDefining);  // SQL that is put together when it runs
    if (defines && found.residue & protocol::kFunction) known.residue |= protocol::kDefinition;
  });
  std::sort(known.words.begin(), known.words.end());
  known.words.erase(std::unique(known.words.begin(), known.words.end()), known.words.end());
  // Those that are too many to be asked for can't be carried.
  if (!settings_.learn(found.custom_settings)) known.residue |= protocol::kCustomSetting;
}

void Catalog::answered(Inquiry& inquiry, Time now, bool failed) {
  if (known_.size() > kMostKnown) known_.clear();
  for (const std::string& name : inquiry.names) {
    Known known = std::move(inquiry.found[name]);
    known.learned = now;
    if (failed) known.residue |= protocol::kFunction;
    if (const auto it = known_.find(name); it != known_.end() && (known.residue & ~it->second.residue) != 0) late_ = true;
    known_.insert_or_assign(name, std::move(known));
  }
}

void Catalog::unknown() {
  words_.clear();
  everywhere_ = protocol::kFunction;
  keeps_plans_ = inlines_ = true;
  version_ = new_version();
}

void Catalog::forget() {
  known_.clear();
  surveyed_ = false;
  ++changes_;
  due_ = {};
  unknown();
}

Survey::Survey(Catalog& catalog, Time now) : catalog_(catalog), begun_(now), changes_(catalog.changes_) {
  if (catalog.surveyed_ || catalog.failing_) catalog.due_ = now + Catalog::kRetry;  // others don't, meanwhile
}

std::string Survey::next(Time now) {
  if (failed_) {
    // Something that was just dropped may have made the server fail.
    if (++failures_ == kMostFailures) return give_up(now, Catalog::kRetry, "the server can't tell");
    failed_ = false;
    rounds_ = 0;
    functions_.clear(), stateful_.clear(), hanging_.clear(), wanted_.clear();
    expressions_ = {};
  }
  if (functions_.size() > kMostHanging || hanging_.size() > kMostHanging || ++rounds_ > kMostRounds)
    return give_up(now, Catalog::kSurveyEvery, "there is too much");
  if (rounds_ == 1) return std::string(kWith) + kFunctions + std::to_string(kMostHanging + 1);
  auto stateful = reckon();
  if (rounds_ == 2) {
    // What clients call is looked up again too, so that it is known when they call it next.
    for (const auto& [name, known] : catalog_.known_) want(wanted_, name);
  }
  inquiry_ = catalog_.older(std::exchange(wanted_, {}), begun_);
  if (!inquiry_.names.empty()) return Catalog::question(inquiry_);
  if (stateful != stateful_) {
    stateful_ = std::move(stateful);
    hanging_.clear();
    asks_relations_ = true;
    return std::string(kWith) + ", wanted AS (SELECT ARRAY[" + list(stateful_) + "] AS names)" + kRelations +
           std::to_string(kMostHanging + 1);
  }
  if (catalog_.changes_ != changes_) return {};
  if (catalog_.failing_) log::info("catalog_known", {}, "what hangs on tables and types is known again");
  if (catalog_.surveyed_) {
    catalog_.late_ |= (everywhere_ & ~catalog_.everywhere_) != 0;
    for (const auto& [word, residue] : words_) {
      const auto before = catalog_.words_.find(word);
      catalog_.late_ |= (residue & ~(before == catalog_.words_.end() ? 0 : before->second)) != 0;
    }
  }
  catalog_.surveyed_ = true;
  catalog_.keeps_plans_ = keeps_plans_;
  catalog_.inlines_ = inlines_;
  catalog_.failing_ = false;
  catalog_.due_ = now + Catalog::kSurveyEvery;
  if (words_ != catalog_.words_ || everywhere_ != catalog_.everywhere_) {
    catalog_.words_ = words_;
    catalog_.everywhere_ = everywhere_;
    catalog_.version_ = new_version();
  }
  return {};
}

void Survey::answer(std::string (&field)[4]) {
  if (asks_relations_) {
    hanging_.push_back({protocol::word_of_name(field[0]), std::move(field[1])});
  } else if (rounds_ == 1 && field[1] == "written") {
    if (!catalog_.rows_written_.empty()) catalog_.rewritten_ |= catalog_.rows_written_ != field[2];
    catalog_.rows_written_ = std::move(field[2]);
  } else if (rounds_ == 1 && field[1] == "plans") {
    keeps_plans_ = true;
  } else if (rounds_ == 1 && field[1] == "inlines") {
    inlines_ = true;
  } else if (rounds_ == 1) {
    if (!field[3].empty()) catalog_.answer(expressions_, field[0], "sql", false, field[3]);
    functions_.push_back(std::move(field[0]));
  } else {
    catalog_.answer(inquiry_, field[0], field[1], field[2] == "t", field[3]);
  }
}

void Survey::answered(Time now, bool failed) {
  failed_ |= failed;
  asks_relations_ = false;
  if (!failed) catalog_.answered(inquiry_, now, false);
  inquiry_ = {};
}

std::uint32_t Survey::residue_of(const std::vector<protocol::Word>& words) const {
  return residue_of_words(words, words_, everywhere_);
}

std::vector<std::string> Survey::reckon() {
  words_.clear();
  everywhere_ = 0;
  std::swap(catalog_.words_, words_);  // a function's body is a text that may name things too
  const auto residue_of = [&](const std::string& function) {
    std::vector<const Catalog::Known*> visited;
    const auto expression = expressions_.found.find(function);
    const std::uint32_t residue = expression == expressions_.found.end() ? catalog_.walk(function, begun_, visited, wanted_)
                                                                         : catalog_.walk(expression->second, begun_, visited, wanted_);
    return residue & (~protocol::kPassive | protocol::kMeaning | protocol::kPath);
  };
  for (bool more = true; more;) {
    more = false;
    for (const Hanging& hanging : hanging_) {
      const std::uint32_t residue = residue_of(hanging.function);
      if (residue == 0) continue;
      std::uint32_t& known = hanging.word == 0 ? everywhere_ : catalog_.words_[hanging.word];
      more |= (known | residue) != known;
      known |= residue;
    }
  }
  std::vector<std::string> stateful;
  for (const std::string& function : functions_)
    if (residue_of(function) != 0) stateful.push_back(function);
  std::swap(catalog_.words_, words_);
  return stateful;
}

std::string Survey::give_up(Time now, Time::duration retry, const char* why) {
  if (!catalog_.failing_)
    log::warn("catalog_unknown", {}, "what hangs on tables and types isn't known, so that every transaction is looked at: {}", why);
  catalog_.failing_ = true;
  catalog_.surveyed_ = false;
  catalog_.due_ = now + retry;
  catalog_.unknown();
  return {};
}

}  // namespace pgsidecar::proxy
