// A lexer for SQL that answers one question: may this text change what a session is? It never guesses: what it can't
// read counts as "may". PostgreSQL documentation, section 4.1 "Lexical Structure".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pgsidecar::protocol {

/// What a text may leave behind in its session. A set of bits; 0 is "nothing that outlives its transaction".
enum Residue : std::uint32_t {
  kNone = 0,
  kSettings = 1u << 0,           ///< SET (not LOCAL), RESET, set_config, SET ROLE, SET SESSION ...
  kPrepared = 1u << 1,           ///< PREPARE, EXECUTE, DEALLOCATE
  kListen = 1u << 2,             ///< LISTEN, UNLISTEN
  kAdvisoryLock = 1u << 3,       ///< pg_advisory_lock and pg_try_advisory_lock families that aren't _xact_
  kTemporary = 1u << 4,          ///< CREATE TEMP ..., SELECT INTO TEMP, pg_temp
  kCursor = 1u << 5,             ///< DECLARE ... WITH HOLD
  kCode = 1u << 6,               ///< DO, CALL: anything may happen
  kDiscard = 1u << 7,            ///< DISCARD
  kBackendPid = 1u << 8,         ///< pg_backend_pid(), unless it only leaves the own session out (`pid <> pg_backend_pid()`)
  kTransaction = 1u << 9,        ///< not residue: BEGIN, START, COMMIT, END, ROLLBACK, ABORT, PREPARE TRANSACTION
  kCustomSetting = 1u << 10,     ///< SET app.x, set_config of such a name or of one not written out: the server can't list these
  kReset = 1u << 11,             ///< RESET, SET ... DEFAULT, DISCARD ALL: what the client brought at its login comes back
  kFunction = 1u << 12,          ///< calls a function that isn't known to be harmless
  kSequenceRead = 1u << 13,      ///< currval, lastval
  kSeed = 1u << 14,              ///< setseed, SET seed
  kLibrary = 1u << 15,           ///< LOAD, dblink_connect: nothing but the connection's end undoes it
  kSequenceWrite = 1u << 16,     ///< not residue by itself: may give currval and lastval another value
  kDrop = 1u << 17,              ///< not residue: DROP, CLOSE; may end what was left before
  kMeaning = 1u << 18,           ///< not residue: sets, be it for the transaction, what decides how a constant in a text is read
  kPrivateStatement = 1u << 19,  ///< not of a text: a statement was prepared after kMeaning in the same transaction
  kChannels = 1u << 20,          ///< not residue: pg_listening_channels, which tells what the session listens to
  kNotify = 1u << 21,            ///< not residue: NOTIFY, pg_notify
  kNewChannel = 1u << 22,        ///< not residue by itself: LISTEN
  kCopy = 1u << 23,              ///< not residue: COPY
  kPath = 1u << 24,              ///< not residue: sets, be it for the transaction, where names are looked up
  kDefinition = 1u << 25,        ///< not residue: CREATE, ALTER, DROP, SELECT INTO: names may mean something else afterwards
  kDatabase = 1u << 26,          ///< not residue: CREATE, ALTER, DROP DATABASE, for which nobody may be connected to it
  kCommit = 1u << 27,            ///< not residue: COMMIT, END, PREPARE TRANSACTION
  kMakesTemporary = 1u << 28,    ///< not residue by itself: CREATE TEMP, for certain
  kUnreadable = 1u << 31,        ///< unterminated quote or comment and the like
};
/// Of no account by themselves.
inline constexpr std::uint32_t kPassive = kTransaction | kSequenceWrite | kDrop | kMeaning | kPath | kChannels | kNotify | kNewChannel |
                                          kCopy | kDefinition | kDatabase | kCommit | kMakesTemporary;

/// The names of what these bits leave behind, as operators are told; nothing for passive ones.
std::vector<std::string> residue_names(std::uint32_t residue);

/// Whether a statement means the same whatever this setting's value: timeouts, costs, custom ones. `name` in lower case.
bool leaves_meaning(std::string_view name);

/// Scans a whole query string (several statements allowed). No allocation. `standard_conforming_strings` false makes
/// backslashes escape in plain quotes. O(size).
std::uint32_t scan_sql(std::string_view sql, bool standard_conforming_strings = true);

/// The database that nobody may be connected to for a text with kDatabase: to be dropped, renamed, moved or copied. Empty: none.
std::string database_left(std::string_view sql);

/// What running the body of a function in SQL or PL/pgSQL may leave behind, as scan_sql. `calls` are the functions that it calls
/// and that aren't known to be harmless, without their schemas; `custom_settings` the ones that it names.
struct BodyScan {
  std::uint32_t residue = 0;  ///< kFunction: of SQL that is put together when it runs; kCustomSetting: not all names are written out
  std::vector<std::string> calls, custom_settings;
};
BodyScan scan_body(std::string_view body);

/// The functions that a text with kFunction calls and that aren't known to be harmless, without their schemas.
std::vector<std::string> called_functions(std::string_view sql);

/// The prepared statements that a text with kPrepared names in EXECUTE, DEALLOCATE and PREPARE, as the server reads the names.
struct PreparedNames {
  std::vector<std::string> names;
  std::vector<std::string> deallocated;  ///< those of DEALLOCATE
  bool closes_all = false;               ///< DEALLOCATE ALL
  bool all = false;                      ///< it may name any: pg_prepared_statements
  bool escaped = false;                  ///< one is written as U&"", which isn't among them
};
PreparedNames prepared_names(std::string_view sql);

/// What in a text needs its session to outlive the transaction, read strictly: a column called `temp` isn't a temporary table.
/// One of kTemporary, kAdvisoryLock, kPrepared, kCursor, kSequenceRead, kBackendPid, kSeed, kLibrary; 0 if there is none.
std::uint32_t needs_session(std::string_view sql, bool standard_conforming_strings = true);

/// What a text with kReset resets if it is a single RESET, SET ... TO DEFAULT or DISCARD ALL, behind BEGIN at most. None: it can't be told.
struct Reset {
  std::string name{};  ///< in lower case; empty: all
  bool local = false;  ///< for the transaction
  bool discard = false;
  bool begins = false;  ///< a transaction, before that
};
std::optional<Reset> reset_of(std::string_view sql, bool standard_conforming_strings = true);

/// The custom settings (`app.x`) that a text sets, in lower case, for a text with kCustomSetting. False: not all of them are
/// written out.
bool custom_setting_names(std::string_view sql, std::vector<std::string>& names, bool standard_conforming_strings = true);

}  // namespace pgsidecar::protocol
