// Text from clients and servers, made fit for the log, JSON and the metrics.
#pragma once

#include <string>
#include <string_view>

namespace pgsidecar::conf {

/// What isn't UTF-8 becomes U+FFFD (RFC 3629).
inline std::string to_utf8(std::string_view in) {
  std::string out;
  out.reserve(in.size());
  for (std::size_t i = 0; i < in.size();) {
    const auto lead = static_cast<unsigned char>(in[i]);
    std::size_t length = lead < 0x80 ? 1 : lead >= 0xC2 && lead < 0xE0 ? 2 : (lead & 0xF0) == 0xE0 ? 3 : 0;
    if (lead >= 0xF0 && lead < 0xF5) length = 4;
    bool valid = length != 0 && i + length <= in.size();
    for (std::size_t k = 1; valid && k < length; ++k) valid = (in[i + k] & 0xC0) == 0x80;
    if (valid && length > 2) {  // overlong forms, surrogates and what lies above U+10FFFF
      const auto second = static_cast<unsigned char>(in[i + 1]);
      valid = !(lead == 0xE0 && second < 0xA0) && !(lead == 0xED && second > 0x9F) && !(lead == 0xF0 && second < 0x90) &&
              !(lead == 0xF4 && second > 0x8F);
    }
    if (valid) {
      out.append(in.substr(i, length));
      i += length;
    } else {
      out += "\xEF\xBF\xBD";
      ++i;
    }
  }
  return out;
}

}  // namespace pgsidecar::conf
