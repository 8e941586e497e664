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

/// The nearest of the known words, or of what follows their last dot, which may be a part of the word or the word one of it; empty if none
/// is so near that it may have been meant. Capitals and underscores don't count.
inline std::string_view nearest(std::string_view word, const std::vector<std::string_view>& known) {
  const auto plain = [](std::string_view text) {
    std::string out;
    for (const char c : text)
      if (c != '_') out += c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
    return out;
  };
  const std::string wanted = plain(word);
  const std::size_t dot = wanted.rfind('.') + 1;
  const std::string_view section = std::string_view(wanted).substr(0, dot), name = std::string_view(wanted).substr(dot);
  std::string_view best;
  std::size_t least = std::min<std::size_t>({name.size() / 4 + 2, wanted.size(), 4});
  const auto is_part = [](std::string_view a, std::string_view b) {
    return (a.size() >= 4 && b.find(a) != b.npos) || (b.size() >= 3 && (a.starts_with(b) || a.ends_with(b)));
  };
  const auto consider = [&](std::string_view one, std::size_t distance) {
    if (distance < least) least = distance, best = one;
  };
  for (const std::string_view one : known) {
    const std::string whole = plain(one);
    const std::string_view last = std::string_view(whole).substr(whole.rfind('.') + 1);
    if (name == last || (name.size() >= 4 && (whole.starts_with(wanted) || last.starts_with(wanted))))
      consider(one, 1);
    else if (whole.size() == section.size() + last.size() && whole.starts_with(section) && is_part(name, last))
      consider(one, 2);
    for (const std::string_view part : {std::string_view(whole), last})
      if (std::max(wanted.size(), part.size()) - std::min(wanted.size(), part.size()) < least) consider(one, edit_distance(wanted, part));
  }
  return best;
}

/// ` (did you mean "x"?)`, or nothing if no word is near.
inline std::string did_you_mean(std::string_view word, const std::vector<std::string_view>& known) {
  const std::string_view best = nearest(word, known);
  return best.empty() ? std::string() : " (did you mean \"" + std::string(best) + "\"?)";
}

}  // namespace pgsidecar::conf
