#include "proxy/residue.hpp"

#include <charconv>
#include <optional>
#include <utility>

#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

using pool::PinReason;

namespace {

/// Of an SQL text: its bytes in the database's encoding, whatever the client's is, in hexadecimal digits.
std::string bytes_of(const std::string& text) {
  return "pg_catalog.encode(pg_catalog.convert_to(" + text + ", pg_catalog.getdatabaseencoding()), 'hex')";
}

/// What the server doesn't list: the role and the custom settings. What a RESET would make of one, here for this query alone, is what it
/// is by default. From then on the role is nobody's, who may see all that the session has set.
std::string hidden_settings(const std::vector<std::string>& custom_names) {
  std::string names = "('role')";
  for (const std::string& name : custom_names) names += ",(" + literal(name) + ")";
  return "SELECT CASE WHEN v OPERATOR(pg_catalog.=) d THEN 'd' ELSE 's' END, n, " + bytes_of("v") +
         " FROM (SELECT n, pg_catalog.current_setting(n, true) AS v FROM (VALUES " + names +
         ") AS names (n) OFFSET 0) AS has, LATERAL (SELECT CASE WHEN v OPERATOR(pg_catalog.=) '' OR n OPERATOR(pg_catalog.=) 'role'"
         " THEN pg_catalog.set_config(n, NULL, true) END AS d OFFSET 0) AS usual WHERE v IS NOT NULL"
         " UNION ALL SELECT 'u', pg_catalog.set_config('role', 'none', true), " +
         bytes_of("session_user::pg_catalog.text");
}

constexpr const char* kOthers =
    " UNION ALL SELECT 'l', pg_catalog.concat_ws(',', classid, objid), '' FROM pg_catalog.pg_locks"
    " WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()"
    " UNION ALL (SELECT 't', relname::pg_catalog.text, '' FROM pg_catalog.pg_class"
    " WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL (SELECT 't', proname::pg_catalog.text, '' FROM pg_catalog.pg_proc"
    " WHERE pronamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL (SELECT 't', typname::pg_catalog.text, '' FROM pg_catalog.pg_type"
    " WHERE typnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() LIMIT 1)"
    " UNION ALL SELECT 'p', name, from_sql::pg_catalog.text FROM pg_catalog.pg_prepared_statements"
    " WHERE NOT pg_catalog.starts_with(name, 'pgsidecar_')"
    " UNION ALL SELECT 'c', name, '' FROM pg_catalog.pg_cursors WHERE is_holdable"
    " UNION ALL SELECT 'n', c, '' FROM pg_catalog.pg_listening_channels() AS c";

/// None: it isn't hexadecimal.
std::optional<std::string> from_hex(std::string_view digits) {
  std::string out(digits.size() / 2, '\0');
  const char* at = digits.data();
  for (char& c : out) {
    std::uint8_t byte = 0;
    if (std::from_chars(at, at + 2, byte, 16).ptr != at + 2) return std::nullopt;
    c = static_cast<char>(byte);
    at += 2;
  }
  return digits.size() % 2 == 0 ? std::optional(std::move(out)) : std::nullopt;
}

std::string in_words(char kind) {
  switch (kind) {
    case 'l': return "advisory lock ";
    case 't': return "temporary object ";
    case 'p': return "prepared statement ";
    case 'c': return "cursor ";
    default: return "";
  }
}

}  // namespace

void Residue::add(const ResidueRow& row, std::string_view login_user) {
  const char kind = row[0].empty() ? '\0' : row[0][0];
  const auto pin = [&](PinReason reason) {
    reasons |= pool::bit(reason);
    const std::string what = in_words(kind) + row[1];
    const bool told = (", " + detail + ", ").find(", " + what + ", ") != std::string::npos;  // a table's row type has its name
    if (detail.size() < kMostDetail && !told) detail += (detail.empty() ? "" : ", ") + what;
  };
  switch (kind) {
    case 's':
    case 'r':
    case 'd':
    case 'u': {
      auto value = from_hex(row[2]);
      if (!value)
        failed = true;
      else if (kind != 'u')
        (kind == 'd' ? defaults : settings)[lower(row[1])] = std::move(*value);
      else if (*value != login_user)
        settings["session_authorization"] = std::move(*value);
      if (kind == 'r') as_reset.insert(lower(row[1]));
      break;
    }
    case 'l': pin(PinReason::AdvisoryLock); break;
    case 't': pin(PinReason::TemporaryObject); break;
    case 'p':
      if (row[2] == "true")
        pin(PinReason::PreparedStatement);
      else
        prepared.push_back(row[1]);
      break;
    case 'c': pin(PinReason::HeldCursor); break;
    case 'n': channels.insert(row[1]); break;
    case 'q': reasons |= pool::bit(PinReason::Sequence); break;
    default: failed = true;
  }
}

std::string residue_sql(const std::vector<std::string>& custom_names, bool sequences) {
  std::string sql = hidden_settings(custom_names) +
                    " UNION ALL SELECT CASE WHEN setting OPERATOR(pg_catalog.=) reset_val THEN 'r' ELSE 's' END, name, " +
                    bytes_of("setting") + " FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'" + kOthers;
  if (sequences) sql += "; SELECT 'q', pg_catalog.lastval()::pg_catalog.text, ''";
  return sql;
}

}  // namespace pgsidecar::proxy
