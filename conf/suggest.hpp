// The nearest of the words that were possible, for messages about one that isn't.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace pgsidecar::conf {

/// Insertions, deletions, substitutions and swaps of neighbours that make `b` of `a` (optimal string alignment). O(a * b).
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    before.swap(last);
    last.swap(row);
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
    }
  }
  return row[b.size()];
}

/// The nearest of the known words, or of what follows their last dot; empty if none is so near that it may have been meant.
inline std::string_view nearest(std::string_view word, const std::vector<std::string_view>& known) {
  std::string_view best;
  std::size_t least = word.size() / 4 + 2;
  const auto look = [&](std::string_view part, std::string_view one) {
    const bool begun = word.size() >= 4 && part.starts_with(word);
    const std::size_t lengths = std::max(word.size(), part.size()) - std::min(word.size(), part.size());
    if (!begun && lengths >= least) return;
    if (const std::size_t distance = begun ? 1 : edit_distance(word, part); distance < least) least = distance, best = one;
  };
  for (const std::string_view one : known) {
    look(one, one);
    if (const auto dot = one.rfind('.'); dot != one.npos) look(one.substr(dot + 1), one);
  }
  return best;
}

/// ` (did you mean "x"?)`, or nothing if no word is near.
inline std::string did_you_mean(std::string_view word, const std::vector<std::string_view>& known) {
  const std::string_view best = nearest(word, known);
  return best.empty() ? std::string() : " (did you mean \"" + std::string(best) + "\"?)";
}

}  // namespace pgsidecar::conf
