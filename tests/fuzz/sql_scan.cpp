// The SQL lexer: what it says must not depend on case, on blanks and comments around the text, on the values of numbers, or on whether
// names are asked for.
#include "protocol/sql_scan.hpp"

#include <algorithm>

#include "fuzz.hpp"
#include "protocol/normalize.hpp"
#include "protocol/sql_memory.hpp"

using namespace pgsidecar::protocol;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  const bool conforming = data[0] & 1;
  const Exact exact(data + 1, size - 1);
  const std::string_view sql = exact.text();
  const std::uint32_t residue = scan_sql(sql, conforming);
  const std::string text(sql);
  std::vector<std::string> names;
  const bool all = custom_setting_names(sql, names, conforming);
  if (!(residue & kUnreadable) && all) {  // else it pins, which is enough
    require(scan_sql("/* x */ " + text, conforming) == residue, "a comment ahead changes nothing");
    require(scan_sql(text + "\n;", conforming) == residue, "an empty statement behind changes nothing");
    require((scan_sql(text + "\n;SET x = 1", conforming) & kSettings) != 0, "a statement behind is seen");
  }
  std::string other;
  for (const char c : text)
    other += c >= '0' && c <= '9' ? std::string(1 + (c & 1), static_cast<char>('0' + ('9' - c))) : std::string(1, c);
  if (same_but_for_numbers(text, other)) {
    require(scan_sql(other, conforming) == residue, "numbers change nothing");
    require(has_numbered_names(text) || fingerprint_sql(text) == fingerprint_sql(other), "nor the fingerprint");
  }
  if (text.find_first_of("$\\\"") == std::string::npos) {  // tags, escapes and quoted names know case
    std::string upper = text;
    std::transform(upper.begin(), upper.end(), upper.begin(), [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 32) : c; });
    require(scan_sql(upper, conforming) == residue, "case changes nothing");
  }
  require((names.empty() && all) || (residue & kCustomSetting), "custom settings are told by both");
  return 0;
}

std::vector<std::string> seeds() {
  return {"1SET a.b = $q$ x $q$; SELECT set_config('c.d', E'\\'', f(\"x\"\"y\", 1.5e3)) /* /* */ */ -- end\n; DO 'x'",
          "1SELECT pg_advisory_xact_lock(1), pg_try_advisory_lock(2)",
          "1set session \"a\".\"b\" to 'x'; RESET ALL; LISTEN x",
          "0SELECT '\\'; SET x = 1; --'",
          "1DECLARE c CURSOR WITH HOLD FOR SELECT 1; CREATE TEMP TABLE t (); LOAD 'x'",
          "1SELECT set_config('a' || '.b', $1, true), set_config('x.y', $1, false)",
          "1PREPARE p AS SELECT 1; EXPLAIN ANALYZE EXECUTE p; DEALLOCATE ALL",
          "1BEGIN; SAVEPOINT a; ROLLBACK TO a; COMMIT PREPARED 'x'; DISCARD ALL",
          "1DO E'log\\10(1)'; DO $$ E'log\\11(1)' $$",
          "1SELECT U&\"d\\0061t\", 1.e5, $$;SET x$$, $1"};
}
