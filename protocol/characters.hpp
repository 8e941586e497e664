// What characters are to SQL's lexical structure (PostgreSQL documentation, section 4.1). Letters outside ASCII are one, since their
// bytes depend on the session's encoding.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace pgsidecar::protocol {

enum CharClass : std::uint8_t { kOther = 0, kBlank = 1, kDigit = 2, kWord = 4, kLetter = 8, kSymbol = 16 };

inline constexpr std::array<std::uint8_t, 256> kClasses = [] {
  std::array<std::uint8_t, 256> table{};
  for (const char c : {' ', '\t', '\r', '\n', '\v', '\f'}) table[static_cast<unsigned char>(c)] = kBlank;
  for (unsigned c = 'a'; c <= 'z'; ++c) table[c] = table[c - 32] = kWord | kLetter;
  for (unsigned c = '0'; c <= '9'; ++c) table[c] = kWord | kDigit;
  for (unsigned c = 0x80; c < 256; ++c) table[c] = kWord | kLetter;
  table['_'] = kWord | kLetter;
  table['$'] = kWord;
  for (const char c : {'(', ')', ',', ';', '.', '=', '<', '>', '*', '+', ':', '[', ']'}) table[static_cast<unsigned char>(c)] = kSymbol;
  return table;
}();

/// As many bytes as Word has, as they lie.
template <class Word>
Word load(const char* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

constexpr bool is(char c, CharClass what) {
  return (kClasses[static_cast<unsigned char>(c)] & what) != 0;
}

}  // namespace pgsidecar::protocol
