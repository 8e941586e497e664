#include "proxy/residue.hpp"

#include "proxy/settings.hpp"

namespace pgsidecar::proxy {

using pool::PinReason;

namespace {

constexpr const char* kResidueSql =
    "SELECT 's', name, setting FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'"
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
    " UNION ALL SELECT 'n', c, '' FROM pg_catalog.pg_listening_channels() AS c"
    " UNION ALL SELECT 'r', pg_catalog.current_setting('role'), session_user::pg_catalog.text";

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
    case 's': settings[lower(row[1])] = row[2]; break;
    case 'r':
      if (row[1] != "none") settings["role"] = row[1];
      if (row[2] != login_user) settings["session_authorization"] = row[2];
      break;
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
  std::string sql = kResidueSql;
  for (const std::string& name : custom_names) {
    const std::string value = "pg_catalog.current_setting(" + literal(name) + ",true)";
    sql += " UNION ALL SELECT 's'," + literal(name) + "," + value + " WHERE " + value + " OPERATOR(pg_catalog.<>) ''";
  }
  if (sequences) sql += "; SELECT 'q', pg_catalog.lastval()::pg_catalog.text, ''";
  return sql;
}

}  // namespace pgsidecar::proxy
