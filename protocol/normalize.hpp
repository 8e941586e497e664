// A statement's text without what differs from call to call: literals and comments out, blanks folded, lists of values (IN, VALUES,
// rows of VALUES) made one. For logs and statistics, where texts are counted and secrets must not show.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pgsidecar::protocol {

/// At most `limit` bytes, cut at a token and marked with "..." if longer. O(size read).
std::string normalize_sql(std::string_view sql, std::size_t limit = 300);

/// The same for texts whose normalised texts are the same. Allocates nothing; not stable between versions.
std::uint64_t fingerprint_sql(std::string_view sql);

/// Whether a quoted name in it has a number as a word of its own ("area 51"), so that texts with other numbers have other fingerprints.
bool has_numbered_names(std::string_view sql);

/// What the comment at the text's end, or else at its start, says without its delimiters, if that is tracers' tags: key='value' or
/// key:value, and more behind commas (sqlcommenter, marginalia). Empty: there are none. A view into `sql`.
std::string_view comment_tags(std::string_view sql);

}  // namespace pgsidecar::protocol
