// What differs between two configurations, by the paths of the keys. Values may be secrets: they aren't told.
#include "conf/load.hpp"
#include "conf/schema.hpp"

namespace pgsidecar::conf {

namespace {

using ByPath = std::map<std::string, std::string>;

template <class Section>
void add_keys(ByPath& values, const std::string& above, const std::vector<Key<Section>>& keys, const Section& section) {
  for (const auto& key : keys) values[above + std::string(key.path)] = key.get(section);
}

ByPath values_of(const Database& database) {
  const Upstream& upstream = database.upstream;
  ByPath values{{"upstream.url", upstream.url}, {"upstream.dbname", upstream.dbname}};
  for (const auto& [name, value] : upstream.keys) values["upstream." + name] = value;
  for (const std::string& word : upstream.passwordCommand) values["upstream.passwordCommand"] += word + '\0';
  add_keys(values, "upstream.", upstream_keys(), upstream);
  add_keys(values, "pool.", pool_keys(), database.pool);
  return values;
}

ByPath values_of(const User& user) {
  ByPath values;
  if (user.password) values["password"] = *user.password;
  for (const auto& [name, value] : user.pool) values["pool." + name] = value;
  return values;
}

const std::string* value_at(const ByPath& values, const std::string& path) {
  const auto it = values.find(path);
  return it == values.end() ? nullptr : &it->second;
}

bool equal_at(const ByPath& one, const ByPath& other, const std::string& path) {
  const std::string *a = value_at(one, path), *b = value_at(other, path);
  return a && b ? *a == *b : a == b;
}

std::vector<std::string> differing(const ByPath& before, const ByPath& after) {
  ByPath all = before;
  all.insert(after.begin(), after.end());
  std::vector<std::string> paths;
  for (const auto& [path, value] : all)
    if (!equal_at(before, after, path)) paths.push_back(path);
  return paths;
}

/// What a section takes from the global ones, before and after, is told of those.
struct Inherited {
  ByPath before, after;
};

template <class Section>
void compare_sections(const std::string& name, const std::map<std::string, Section>& before, const std::map<std::string, Section>& after,
                      const Inherited& inherited, std::vector<std::string>& changed) {
  std::map<std::string, Section> all = before;
  all.insert(after.begin(), after.end());
  for (const auto& [section, ignored] : all) {
    const std::string path = name + "." + section;
    const auto was = before.find(section), is = after.find(section);
    if (was == before.end() || is == after.end()) {
      changed.push_back(path);
      continue;
    }
    const ByPath then = values_of(was->second), now = values_of(is->second);
    for (const std::string& key : differing(then, now))
      if (!equal_at(then, inherited.before, key) || !equal_at(now, inherited.after, key)) changed.push_back(path + "." + key);
  }
}

}  // namespace

Changes compare(const Config& before, const Config& after) {
  Changes changes;
  for (const auto& key : config_keys())
    if (key.get(before) != key.get(after)) (key.needs_restart ? changes.needRestart : changes.applied).emplace_back(key.path);
  const Inherited global{values_of(Database{{}, before.upstream, before.pool}), values_of(Database{{}, after.upstream, after.pool})};
  for (const std::string& path : differing(global.before, global.after))
    if (path.starts_with("upstream.")) changes.applied.push_back(path);
  compare_sections("databases", before.databases, after.databases, global, changes.applied);
  compare_sections("users", before.users, after.users, {}, changes.applied);
  if (before.alerts.webhooks != after.alerts.webhooks) changes.applied.emplace_back("alerts.webhooks");
  return changes;
}

void keep_until_restart(Config& loaded, const Config& in_use) {
  for (const auto& key : config_keys())
    if (key.needs_restart && key.get(loaded) != key.get(in_use)) key.set(loaded, key.get(in_use));
}

}  // namespace pgsidecar::conf
