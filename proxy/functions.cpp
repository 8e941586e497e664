#include "proxy/functions.hpp"

#include <algorithm>
#include <utility>

#include "protocol/sql_scan.hpp"
#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

namespace {

constexpr std::size_t kMostKnown = 10000, kMostWanted = 100;
constexpr std::chrono::seconds kGood{60};

}  // namespace

std::uint32_t Functions::residue_of(const std::vector<std::string>& names, Time now) {
  std::uint32_t residue = 0;
  std::vector<const Known*> visited;
  for (const std::string& name : names) residue |= walk(name, now, visited);
  return residue;
}

std::uint32_t Functions::walk(const std::string& name, Time now, std::vector<const Known*>& visited) {
  const auto it = known_.find(name);
  if (it == known_.end() || now >= it->second.until) {
    if (wanted_.size() < kMostWanted && std::find(wanted_.begin(), wanted_.end(), name) == wanted_.end()) wanted_.push_back(name);
    return protocol::kFunction;
  }
  const Known& known = it->second;
  if (std::find(visited.begin(), visited.end(), &known) != visited.end()) return 0;
  visited.push_back(&known);
  std::uint32_t residue = known.residue;
  for (const std::string& called : known.calls) residue |= walk(called, now, visited);
  return residue;
}

std::vector<std::string> Functions::take_wanted(Time now) {
  std::erase_if(wanted_, [&](const std::string& name) {
    const auto it = known_.find(name);
    return it != known_.end() && now < it->second.until;
  });
  if (known_.size() > kMostKnown) known_.clear();
  for (const std::string& name : wanted_) known_[name] = {};
  return std::exchange(wanted_, {});
}

std::string Functions::question(const std::vector<std::string>& wanted) {
  std::string names;
  for (const std::string& name : wanted) names += (names.empty() ? "" : ",") + literal(name);
  return "SELECT p.proname, l.lanname, EXISTS (SELECT FROM pg_catalog.pg_depend AS d WHERE d.classid OPERATOR(pg_catalog.=) p.tableoid"
         " AND d.objid OPERATOR(pg_catalog.=) p.oid AND d.deptype OPERATOR(pg_catalog.=) 'e'), p.prosrc"
         " FROM pg_catalog.pg_proc AS p JOIN pg_catalog.pg_language AS l ON l.oid OPERATOR(pg_catalog.=) p.prolang"
         " WHERE p.proname OPERATOR(pg_catalog.=) ANY (ARRAY[" +
         names + "]::pg_catalog.name[]) AND p.pronamespace OPERATOR(pg_catalog.<>) 'pg_catalog'::pg_catalog.regnamespace";
}

std::vector<std::string> Functions::answer(const std::string& name, std::string_view language, bool extension, std::string_view body) {
  Known& known = known_[name];
  if (language == "c" || language == "internal") {
    if (!extension) known.residue |= protocol::kFunction;
    return {};
  }
  // A body of BEGIN ATOMIC isn't text.
  if ((language != "sql" && language != "plpgsql") || body.empty()) {
    known.residue |= protocol::kFunction;
    return {};
  }
  protocol::BodyScan found = protocol::scan_body(body);
  known.residue |= found.residue;
  known.calls.insert(known.calls.end(), found.calls.begin(), found.calls.end());
  return std::move(found.custom_settings);
}

std::uint32_t Functions::answered(const std::vector<std::string>& names, Time now, bool failed) {
  for (const std::string& name : names) {
    Known& known = known_[name];
    known.until = now + kGood;
    if (failed) known.residue |= protocol::kFunction;
  }
  return residue_of(names, now);
}

void Functions::forget() {
  known_.clear();
}

}  // namespace pgsidecar::proxy
