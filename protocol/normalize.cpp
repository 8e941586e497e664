#include "protocol/normalize.hpp"

#include <algorithm>

#include "protocol/characters.hpp"

namespace pgsidecar::protocol {

namespace {

constexpr std::string_view kEllipsis = "...";

std::size_t quoted(std::string_view s, std::size_t from, char quote, bool escapes) {
  for (std::size_t i = from; i < s.size(); ++i) {
    if (escapes && s[i] == '\\')
      ++i;
    else if (s[i] == quote) {
      if (i + 1 >= s.size() || s[i + 1] != quote) return i + 1;
      ++i;
    }
  }
  return s.size();
}

struct Token {
  enum class Kind : std::uint8_t { Blank, Literal, Parameter, Other };
  Kind kind = Kind::Other;
  std::size_t size = 0;
  bool is_value() const { return kind == Kind::Literal || kind == Kind::Parameter; }
};

/// Up to 7 bytes, not none, as a number that tells texts of one length apart. Copies of a fixed size need no call.
std::uint64_t short_word(std::string_view s) {
  const std::size_t n = s.size();
  if (n >= 4) return std::uint64_t{load<std::uint32_t>(s.data())} << 32 | load<std::uint32_t>(s.data() + n - 4);
  const auto byte = [&](std::size_t i) { return std::uint64_t{static_cast<unsigned char>(s[i])}; };
  return byte(0) << 16 | byte(n / 2) << 8 | byte(n - 1);
}

std::size_t past_word(std::string_view s, std::size_t from) {
  while (from < s.size() && is(s[from], kWord)) ++from;
  return from;
}

/// A token that has a rule of its own: quoted texts, numbers, comments, parameters.
[[gnu::noinline]] Token special_token(std::string_view s) {
  using Kind = Token::Kind;
  const char c = s[0];
  const char next = s.size() > 1 ? s[1] : '\0';
  if (is(c, kDigit)) {
    std::size_t i = 1;
    while (i < s.size() && (is(s[i], kWord) || s[i] == '.' || ((s[i] == '+' || s[i] == '-') && (s[i - 1] | 32) == 'e' && s[1] != 'x'))) ++i;
    return {Kind::Literal, i};
  }
  if (c == '$') {
    if (is(next, kDigit)) return {Kind::Parameter, past_word(s, 1)};
    const std::size_t tag_end = s.find('$', 1);
    if (tag_end == std::string_view::npos || past_word(s, 1) < tag_end) return {Kind::Other, 1};
    const std::string_view tag = s.substr(0, tag_end + 1);
    const std::size_t close = s.find(tag, tag_end + 1);
    return {Kind::Literal, close == std::string_view::npos ? s.size() : close + tag.size()};
  }
  if (c == '\'') return {Kind::Literal, quoted(s, 1, '\'', false)};
  if (c == '"') return {Kind::Other, quoted(s, 1, '"', false)};
  if (c == '-' && next == '-') return {Kind::Blank, std::min(s.find_first_of("\r\n"), s.size())};
  if (c == '/' && next == '*') {
    std::size_t i = 2;
    for (int depth = 1; i < s.size() && depth > 0; ++i) {
      if (s.substr(i, 2) == "/*")
        ++depth, ++i;
      else if (s.substr(i, 2) == "*/")
        --depth, ++i;
    }
    return {Kind::Blank, std::min(i, s.size())};
  }
  if (next == '\'' && std::string_view("eEbBxXnN").find(c) != std::string_view::npos)
    return {Kind::Literal, quoted(s, 2, '\'', c == 'e' || c == 'E')};
  return {Kind::Other, is(c, kLetter) ? past_word(s, 1) : 1};
}

/// The token at the front. Neither empty input nor a blank is given.
Token token(std::string_view s) {
  using Kind = Token::Kind;
  if (is(s[0], kLetter) && (s.size() == 1 || s[1] != '\'')) return {Kind::Other, past_word(s, 1)};
  if (is(s[0], kSymbol)) return {Kind::Other, 1};
  return special_token(s);
}

std::size_t blanks(std::string_view s) {
  std::size_t at = 0;
  while (at < s.size()) {
    if (is(s[at], kBlank)) {
      ++at;
    } else if (s[at] == '-' || s[at] == '/') {
      const Token comment = special_token(s.substr(at));
      if (comment.kind != Token::Kind::Blank) break;
      at += comment.size;
    } else {
      break;
    }
  }
  return at;
}

/// How far a list of values goes on: ", value" any number of times.
std::size_t more_values(std::string_view s) {
  std::size_t end = 0;
  for (;;) {
    std::size_t at = end + blanks(s.substr(end));
    if (at >= s.size() || s[at] != ',') return end;
    ++at;
    at += blanks(s.substr(at));
    if (at >= s.size()) return end;
    const Token t = token(s.substr(at));
    if (!t.is_value()) return end;
    end = at + t.size;
  }
}

/// How far a list of rows of values goes on: ", (values)" any number of times.
std::size_t more_rows(std::string_view s) {
  std::size_t end = 0;
  for (;;) {
    std::size_t at = end + blanks(s.substr(end));
    if (at >= s.size() || s[at] != ',') return end;
    ++at;
    at += blanks(s.substr(at));
    if (at >= s.size() || s[at] != '(') return end;
    ++at;
    at += blanks(s.substr(at));
    if (at >= s.size()) return end;
    const Token t = token(s.substr(at));
    if (!t.is_value()) return end;
    at += t.size;
    at += more_values(s.substr(at));
    at += blanks(s.substr(at));
    if (at >= s.size() || s[at] != ')') return end;
    end = at + 1;
  }
}

/// Gives the normalised text piece by piece to `sink(gap, piece)`: whether a blank goes before it. Until it returns false.
template <class Sink>
void normalize(std::string_view sql, Sink&& sink) {
  bool gap = false, first = true, row = false;  // row: in parentheses that hold values only
  char before = '\0';
  for (;;) {
    if (const std::size_t blank = blanks(sql)) {
      gap = !first;
      sql.remove_prefix(blank);
    }
    if (sql.empty()) return;
    const Token t = token(sql);
    const std::string_view text = sql.substr(0, t.size);
    sql.remove_prefix(t.size);
    if (!sink(gap, t.kind == Token::Kind::Literal ? std::string_view("?") : text)) return;
    gap = first = false;
    if (t.is_value()) {
      row = before == '(';
      if (const std::size_t more = more_values(sql)) {
        sql.remove_prefix(more);
        if (!sink(false, ", ...")) return;
      }
    } else if (text == ")" && row) {
      row = false;
      if (const std::size_t more = more_rows(sql)) {
        sql.remove_prefix(more);
        if (!sink(false, ", ...")) return;
      }
    } else {
      row = false;
    }
    before = text.back();
  }
}

}  // namespace

std::string normalize_sql(std::string_view sql, std::size_t limit) {
  std::string out;
  normalize(sql, [&](bool gap, std::string_view text) {
    if (out.size() + gap + text.size() + kEllipsis.size() > limit) {
      out += kEllipsis;
      return false;
    }
    if (gap) out += ' ';
    out += text;
    return true;
  });
  return out;
}

std::uint64_t fingerprint_sql(std::string_view sql) {
  constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;
  std::uint64_t hash = kMultiplier;
  const auto mix = [&](std::uint64_t word) {
    hash = (hash ^ word) * kMultiplier;
    hash ^= hash >> 29;
  };
  normalize(sql, [&](bool gap, std::string_view text) {
    mix(text.size() * 2 + gap);
    std::string_view rest = text;
    for (; rest.size() >= 8; rest.remove_prefix(8)) mix(load<std::uint64_t>(rest.data()));
    if (!rest.empty()) mix(short_word(rest));
    return true;
  });
  return hash;
}

bool has_numbered_names(std::string_view sql) {
  bool found = false;
  if (sql.find('"') == std::string_view::npos) return false;
  normalize(sql, [&](bool, std::string_view text) {
    for (std::size_t i = 1; text[0] == '"' && i < text.size(); ++i) found |= is(text[i], kDigit) && !is(text[i - 1], kWord);
    return !found;
  });
  return found;
}

namespace {

/// key='value' or key:value, and more of them behind commas: sqlcommenter's and marginalia's form. Any other text may hold a secret.
bool are_tags(std::string_view text) {
  const auto skip = [&](auto&& goes_on) {
    std::size_t n = 0;
    while (n < text.size() && goes_on(text[n])) n += text[n] == '\\' && n + 1 < text.size() ? 2 : 1;
    text.remove_prefix(n);
    return n;
  };
  const auto take = [&](char c) {
    const bool there = text.starts_with(c);
    text.remove_prefix(there);
    return there;
  };
  const auto is_blank = [](char c) { return is(c, kBlank); };
  do {
    skip(is_blank);
    if (skip([](char c) { return is(c, kWord) || c == '-' || c == '.' || c == '%'; }) == 0) return false;
    if (take('=')) {
      if (!take('\'')) return false;
      skip([](char c) { return c != '\''; });
      if (!take('\'')) return false;
    } else if (!take(':') || skip([](char c) { return !is(c, kBlank) && c != ',' && c != '\'' && c != '"'; }) == 0) {
      return false;
    }
    skip(is_blank);
  } while (take(','));
  return text.empty();
}

/// The comment at the text's end, or else at its start, without its delimiters.
std::string_view outer_comment(std::string_view sql) {
  while (!sql.empty() && (is(sql.back(), kBlank) || sql.back() == ';' || sql.back() == '\0')) sql.remove_suffix(1);
  if (sql.size() >= 4 && sql.ends_with("*/")) {
    const std::size_t begin = sql.rfind("/*", sql.size() - 4);
    if (begin != std::string_view::npos) return sql.substr(begin + 2, sql.size() - begin - 4);
  }
  while (!sql.empty() && is(sql.front(), kBlank)) sql.remove_prefix(1);
  if (!sql.starts_with("/*")) return {};
  const std::size_t end = sql.find("*/", 2);
  return end == std::string_view::npos ? std::string_view() : sql.substr(2, end - 2);
}

}  // namespace

std::string_view comment_tags(std::string_view sql) {
  const std::string_view comment = outer_comment(sql);
  return are_tags(comment) ? comment : std::string_view();
}

}  // namespace pgsidecar::protocol
