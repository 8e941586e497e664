#include "admin/page.hpp"

#include <algorithm>
#include <boost/beast/zlib/inflate_stream.hpp>

#include "admin/access.hpp"

namespace pgsidecar::admin {
namespace {

namespace zlib = boost::beast::zlib;

constexpr std::size_t kGzipHeader = 10, kGzipTrailer = 8;  // RFC 1952; build.py adds no optional field

// For the rare browser, or tool, that takes no gzip.
std::string uncompressed() {
  std::string_view deflated = kPage.gzip;
  deflated.remove_prefix(kGzipHeader);
  deflated.remove_suffix(kGzipTrailer);
  std::string html(kPage.size, '\0');
  zlib::inflate_stream inflater;
  zlib::z_params z;
  z.next_in = deflated.data();
  z.avail_in = deflated.size();
  z.next_out = html.data();
  z.avail_out = html.size();
  boost::beast::error_code ec;
  inflater.write(z, zlib::Flush::sync, ec);
  return html;
}

// Weak comparison: it is the same page however it is compressed.
bool matches(std::string_view ifNoneMatch, std::string_view etag) {
  return ifNoneMatch == "*" || ifNoneMatch.find(etag) != std::string_view::npos;
}

}  // namespace

bool wants_page(std::string_view accept) {
  const double html = quality(accept, "text/html");
  return html > 0 && html >= quality(accept, "text/plain");
}

PageAnswer page_answer(std::string_view acceptEncoding, std::string_view ifNoneMatch) {
  PageAnswer answer;
  answer.headers = {{"Cache-Control", "no-cache"},
                    {"ETag", kPage.etag},
                    {"Vary", "Accept, Accept-Encoding"},
                    {"Content-Security-Policy", kPage.policy},
                    {"Referrer-Policy", "no-referrer"}};
  if (matches(ifNoneMatch, kPage.etag)) {
    answer.status = 304;
  } else if (quality(acceptEncoding, "gzip") > 0) {
    answer.headers.emplace_back("Content-Encoding", "gzip");
    answer.body = kPage.gzip;
  } else {
    answer.body = uncompressed();
  }
  return answer;
}

}  // namespace pgsidecar::admin
