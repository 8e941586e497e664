// The page at `/`: one self-contained HTML file that page/build.py makes of the sources in page/ and embeds compressed. Decides who is
// given it, and how; what it shows it asks of the admin port by itself. Called by server.cpp.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pgsidecar::admin {

/// What page/build.py has made.
struct EmbeddedPage {
  std::string_view gzip;
  std::size_t size;         ///< uncompressed
  std::string_view etag;    ///< quoted
  std::string_view policy;  ///< Content-Security-Policy: nothing runs but the scripts and styles whose hashes it has
};
extern const EmbeddedPage kPage;

/// Whether an Accept header asks for HTML by name: a browser's does, curl's and a scraper's don't.
bool wants_page(std::string_view accept);

using Headers = std::vector<std::pair<std::string_view, std::string_view>>;

struct PageAnswer {
  unsigned status = 200;  ///< or 304, without a body
  std::string body;
  Headers headers;  ///< all but Content-Type
};
/// The page for a request with these headers; empty: not sent.
PageAnswer page_answer(std::string_view acceptEncoding, std::string_view ifNoneMatch);

}  // namespace pgsidecar::admin
