// The nearest of the words that were possible, for messages about one that isn't.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace pgsidecar::conf {

/// Levenshtein's distance. O(a * b).
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0]++;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

/// ` (did you mean "x"?)`, or nothing if no word is near.
inline std::string did_you_mean(std::string_view word, const std::vector<std::string_view>& known) {
  std::string_view best;
  std::size_t nearest = word.size() / 2 + 2;
  for (const std::string_view one : known)
    if (const std::size_t distance = edit_distance(word, one); distance < nearest) nearest = distance, best = one;
  return best.empty() ? std::string() : " (did you mean \"" + std::string(best) + "\"?)";
}

}  // namespace pgsidecar::conf
