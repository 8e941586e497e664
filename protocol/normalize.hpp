// A statement's text without what differs from call to call: literals and comments out, blanks folded, lists of literals made
// one. For logs and statistics, where texts are counted and secrets must not show.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace pgsidecar::protocol {

/// At most `limit` bytes, cut at a token and marked with "..." if longer. O(size read).
std::string normalize_sql(std::string_view sql, std::size_t limit = 300);

}  // namespace pgsidecar::protocol
