// The words of a text, for "does it name one of these": every run of characters that identifiers are made of, wherever it stands,
// as a hash. Names in quotes, comments and texts within the text count too, so that nothing is missed; a word may be found that
// isn't meant. A dollar parts words, since it quotes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pgsidecar::protocol {

using Word = std::uint32_t;

namespace detail {

/// The character as it counts for a word; 0: it is part of none. Letters outside ASCII are one, since their bytes depend on
/// the session's encoding.
inline constexpr auto kWordCharacters = [] {
  std::array<unsigned char, 256> table{};
  for (int c = 'a'; c <= 'z'; ++c)
    table[static_cast<std::size_t>(c)] = table[static_cast<std::size_t>(c - 32)] = static_cast<unsigned char>(c);
  for (int c = '0'; c <= '9'; ++c) table[static_cast<std::size_t>(c)] = static_cast<unsigned char>(c);
  for (std::size_t c = 0x80; c < 256; ++c) table[c] = 0x80;
  table['_'] = '_';
  return table;
}();

constexpr std::size_t kNameSize = 63;  // the server cuts names to this

}  // namespace detail

inline constexpr Word kForeignWord = 1;  ///< any with letters outside ASCII

/// Calls f(Word) for each word of the text.
template <class F>
void for_each_word(std::string_view text, F&& f) {
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p != end) {
    unsigned char c = detail::kWordCharacters[static_cast<unsigned char>(*p)];
    if (c == 0) {
      ++p;
      continue;
    }
    Word hash = 2166136261u;  // FNV-1a
    bool foreign = false;
    for (std::size_t size = 0; p != end && (c = detail::kWordCharacters[static_cast<unsigned char>(*p)]) != 0; ++p, ++size) {
      foreign |= c == 0x80;
      if (size < detail::kNameSize) hash = (hash ^ c) * 16777619u;
    }
    f(foreign ? kForeignWord : hash);
  }
}

/// By which word a text must name this: a name that isn't one word goes by the longest word in it. 0: by none.
inline Word word_of_name(std::string_view name) {
  std::size_t best = 0, best_size = 0;
  for (std::size_t i = 0; i < name.size();) {
    std::size_t n = i;
    while (n < name.size() && detail::kWordCharacters[static_cast<unsigned char>(name[n])] != 0) ++n;
    if (n - i > best_size) best = i, best_size = n - i;
    i = std::max(n, i + 1);
  }
  Word word = 0;
  for_each_word(name.substr(best, best_size), [&](Word w) { word = w; });
  return word;
}

}  // namespace pgsidecar::protocol
