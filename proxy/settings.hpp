// A client's session settings as one interned value: equal settings are the same object, so that "does this server
// connection have what this client needs" is one comparison of pointers. Applied by set_config, whose values are the
// server's own flattened texts. PostgreSQL documentation, sections 20.1 and 9.27.1.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "protocol/messages.hpp"

namespace pgsidecar::proxy {

struct Settings {
  std::map<std::string, std::string> values;   ///< names in lower case
  std::map<std::string, std::string> welcome;  ///< ParameterStatus of a session with these; empty: not tried yet
  bool temporary = false;                      ///< what is created may be temporary without being called so
};
using SettingsRef = std::shared_ptr<Settings>;

class SettingsCache {
 public:
  SettingsRef intern(std::map<std::string, std::string> values);
  /// What a session is told is known without asking if it differs from a known one in its application_name alone.
  void derive_welcome(Settings& settings);
  void forget_welcomes();
  /// The custom settings that clients of this pool have set: pg_settings doesn't list them, so they are asked for by name.
  /// False: there are too many.
  bool learn(const std::vector<std::string>& names);
  const std::vector<std::string>& custom_names() const { return custom_names_; }

 private:
  std::map<std::map<std::string, std::string>, SettingsRef> known_;
  std::vector<std::string> custom_names_;
};

/// What of a StartupMessage are settings (user, database, replication and `_pq_.` aren't). False: `options` holds
/// something else than settings, named in `complaint`.
bool settings_of(const protocol::Startup& startup, std::map<std::string, std::string>& values, std::string& complaint);

/// SQL that turns a session with `have` into one with `want`.
std::string settings_sql(const Settings& have, const Settings& want);

/// SQL that gives a session those of `login` again that have no value of its own, after a RESET.
std::string restore_sql(const Settings& login);

/// SQL that asks the server what a session holds: rows (kind, name, value). Kinds: s setting, l advisory lock,
/// t temporary object, p SQL-prepared statement, c holdable cursor, n channel listened to, r role or authorization.
std::string residue_name(char kind);  ///< a kind in words, for a pin's reason
std::string lower(std::string_view name);
std::string literal(std::string_view text);  ///< an SQL string constant
std::string residue_sql(const std::vector<std::string>& custom_names);

}  // namespace pgsidecar::proxy
