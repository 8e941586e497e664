// A client's session settings as one interned value: equal settings are the same object, so that "does this server
// connection have what this client needs" is one comparison of pointers. Applied by set_config, whose values are the
// server's own flattened texts. PostgreSQL documentation, sections 20.1 and 9.27.1.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "protocol/messages.hpp"
#include "protocol/sql_scan.hpp"

namespace pgsidecar::proxy {

/// Those settings that decide what a statement's text means: DateStyle, search_path... A statement is prepared under them.
struct Meaning {
  std::map<std::string, std::string> values;
};

struct Settings {
  /// Names in lower case, role and session_authorization among them; values in the database's encoding.
  std::map<std::string, std::string> values;
  std::shared_ptr<const Meaning> meaning;
  std::map<std::string, std::string> welcome;  ///< ParameterStatus of a session with these; empty: not tried yet
  std::uint64_t number = 0;                    ///< no others have it
  bool temporary = false;                      ///< what is created may be temporary without being called so
};
using SettingsRef = std::shared_ptr<Settings>;

class SettingsCache {
 public:
  SettingsRef intern(std::map<std::string, std::string> values);
  /// What a session is told is known without asking if it differs from a known one in its application_name alone.
  void derive_welcome(Settings& settings);
  /// The server's own defaults may have changed.
  void forget_welcomes();
  /// What a session that has `own` settings was told.
  void saw_parameters(const std::map<std::string, std::string>& own, const std::map<std::string, std::string>& told);
  /// What the server makes of a login's DateStyle; null: only a login can tell.
  const std::string* date_style(const std::vector<std::string>& asked) const;
  void learn_date_style(const std::vector<std::string>& asked, const std::string& told);
  /// The custom settings that clients of this pool have set: pg_settings doesn't list them, so they are asked for by name.
  /// False: there are too many.
  bool learn(const std::vector<std::string>& names);
  const std::vector<std::string>& custom_names() const { return custom_names_; }
  std::size_t footprint() const;

 private:
  std::map<std::map<std::string, std::string>, SettingsRef> known_;
  std::map<std::map<std::string, std::string>, std::shared_ptr<const Meaning>> meanings_;
  std::vector<std::string> custom_names_;
  std::map<std::vector<std::string>, std::string> date_styles_;
};

using Values = std::map<std::string, std::string>;

/// What a client asks for at its login.
struct StartupSettings {
  Values values;  ///< names in lower case
  /// Of DateStyle, in their order, unless there is one that names both a style and an order of the fields. What is left out is as the one
  /// before it or the server's configuration file has it, whatever is set for the role or the database (sections 20.11.2 and 20.1.3).
  std::vector<std::string> date_styles;
};

/// What of a StartupMessage are settings (user, database, replication and `_pq_.` aren't). None: `options` holds
/// something else than settings: `sqlstate` and `complaint` say what.
std::optional<StartupSettings> settings_of(const protocol::Startup& startup, std::string& sqlstate, std::string& complaint);

/// Statements that turn a session with `have` into one with `want`.
std::vector<std::string> settings_statements(const Values& have, const Values& want);

std::vector<std::string> reading_settings();              ///< on which it depends how constants are read, or written by functions
bool read_alike(const Values& one, const Values& other);  ///< constants are
/// Of two meanings: what functions plan under them is the same.
bool plans_alike(const Values& one, const Values& other);
/// A statement that has texts read as `meaning` says, whatever the transaction has set meanwhile. `path`: names are looked up by it too.
std::string reading_statement(const Values& meaning, bool path);

/// Statements that give a session those of `login` again that a reset has taken from it. No reset: it isn't known which. In a transaction
/// they take no snapshot, as far as possible.
std::vector<std::string> restore_statements(const Values& login, const std::optional<protocol::Reset>& reset, bool in_transaction);

/// Of the parameters that a server reports, those that a session has of its own, or by default.
bool is_sessions(std::string_view parameter);
/// Of their values; never 0.
std::uint32_t fingerprint_of(const std::map<std::string, std::string>& parameters);

std::string lower(std::string_view name);
std::string identifier(std::string_view name);  ///< in quotes
std::string literal(std::string_view text);     ///< an SQL string constant; of ASCII, since others mean what the client's encoding says

}  // namespace pgsidecar::proxy
