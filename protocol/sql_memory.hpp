// What a text leaves behind and its fingerprint, remembered for texts that come again with other numbers: neither depends on the value
// of a number, so that reading such a text is comparing it. Driven by texts without parameters, of which applications have few kinds.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace pgsidecar::protocol {

struct SqlReading {
  std::uint32_t residue = 0;      ///< scan_sql
  std::uint64_t fingerprint = 0;  ///< fingerprint_sql
};

/// Whether two texts are the same but for the values of numbers: words of digits alone, and none behind a backslash, which may be taken
/// away where the text is code within a text. O(size).
bool same_but_for_numbers(std::string_view a, std::string_view b);

class SqlMemory {
 public:
  /// Allocates only when a text is remembered that is longer than those before in its place.
  SqlReading read(std::string_view sql, bool standard_conforming_strings);

  std::size_t footprint() const;  ///< in bytes, of the heap

  static constexpr std::size_t kLongest = 4096;  ///< bytes of a text that is remembered

 private:
  struct Known {
    std::uint64_t hash = 0;  ///< of the text without its digits; 0: there is none
    std::string text;
    bool conforming = true;
    SqlReading reading;
  };
  static constexpr std::size_t kWays = 4;
  std::array<std::array<Known, kWays>, 64> known_;  // by the hash; of those with one place the last that came is first
};

}  // namespace pgsidecar::protocol
