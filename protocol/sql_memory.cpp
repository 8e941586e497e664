#include "protocol/sql_memory.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "protocol/characters.hpp"
#include "protocol/footprint.hpp"
#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"

namespace pgsidecar::protocol {

namespace {

/// Up to 8 bytes, the missing ones 0.
std::uint64_t load_some(const char* from, const char* end) {
  if (end - from >= 8) return load<std::uint64_t>(from);
  std::uint64_t word = 0;
  std::memcpy(&word, from, static_cast<std::size_t>(end - from));
  return word;
}

constexpr std::uint64_t each(std::uint8_t byte) {
  return byte * 0x0101010101010101u;
}

/// The highest bit of each byte that is a digit.
std::uint64_t digits(std::uint64_t word) {
  const std::uint64_t value = word ^ each('0');  // 0 to 9 for a digit
  return ~(((value & each(0x7f)) + each(0x7f - 9)) | value) & each(0x80);
}

const char* past_digits(const char* p, const char* end) {
  while (p != end && is(*p, kDigit)) ++p;
  return p;
}

/// The same for texts that are the same but for digits; never 0.
std::uint64_t hash_without_digits(std::string_view sql) {
  std::uint64_t hash = 0;
  const auto mix = [&](std::uint64_t word) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 32;
  };
  const char* p = sql.data();
  const char* const end = p + sql.size();
  while (p != end) {
    const std::uint64_t word = load_some(p, end);
    const int before = std::countr_zero(digits(word)) / 8;  // a digit; 8: there is none
    mix(before == 8 ? word : word & ((std::uint64_t{1} << 8 * before) - 1));
    p = end - p <= before ? end : past_digits(p + before, end);
  }
  return hash | 1;
}

}  // namespace

bool same_but_for_numbers(std::string_view a, std::string_view b) {
  const char *p = a.data(), *q = b.data();
  const char* const p_end = p + a.size();
  const char* const q_end = q + b.size();
  for (;;) {
    while (p_end - p >= 8 && q_end - q >= 8 && load<std::uint64_t>(p) == load<std::uint64_t>(q)) p += 8, q += 8;
    while (p != p_end && q != q_end && *p == *q) ++p, ++q;
    if (p == p_end && q == q_end) return true;
    // Each goes on in a number or has just ended it. The texts are the same from that number's first digit to here.
    const char* begin = p;
    while (begin != a.data() && is(begin[-1], kDigit)) --begin;
    if (begin != a.data() && (is(begin[-1], kWord) || begin[-1] == '\\')) return false;
    const char* const p_past = past_digits(p, p_end);
    const char* const q_past = past_digits(q, q_end);
    if (begin == p && (p_past == p || q_past == q)) return false;
    if (p_past == p && q_past == q) return false;
    p = p_past, q = q_past;
    if ((p != p_end && is(*p, kWord)) || (q != q_end && is(*q, kWord))) return false;
  }
}

SqlReading SqlMemory::read(std::string_view sql, bool standard_conforming_strings) {
  const auto read_anew = [&] { return SqlReading{scan_sql(sql, standard_conforming_strings), fingerprint_sql(sql)}; };
  if (sql.empty() || sql.size() > kLongest) return read_anew();
  const std::uint64_t hash = hash_without_digits(sql);
  auto& place = known_[(hash >> 1) % known_.size()];
  for (const Known& known : place)
    if (known.hash == hash && known.conforming == standard_conforming_strings && same_but_for_numbers(known.text, sql))
      return known.reading;
  const SqlReading reading = read_anew();
  if (has_numbered_names(sql)) return reading;
  std::rotate(place.begin(), place.end() - 1, place.end());
  Known& known = place.front();
  known.hash = hash;
  known.text = sql;
  known.conforming = standard_conforming_strings;
  return known.reading = reading;
}

std::size_t SqlMemory::footprint() const {
  std::size_t bytes = 0;
  for (const auto& place : known_)
    for (const Known& known : place) bytes += protocol::footprint(known.text);
  return bytes;
}

}  // namespace pgsidecar::protocol
