#include "protocol/normalize.hpp"

#include <cctype>

namespace pgsidecar::protocol {

namespace {

constexpr std::string_view kEllipsis = "...";

bool is_word(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || static_cast<unsigned char>(c) >= 0x80;
}

/// Where the token at the front ends. `literal`: it stands for a value. Empty input isn't given.
std::size_t token(std::string_view s, bool& literal, bool& blank) {
  const auto to = [&](std::size_t at) { return at == std::string_view::npos ? s.size() : at; };
  const auto quoted = [&](std::size_t from, char quote, bool escapes) {
    for (std::size_t i = from; i < s.size(); ++i) {
      if (escapes && s[i] == '\\')
        ++i;
      else if (s[i] == quote) {
        if (i + 1 >= s.size() || s[i + 1] != quote) return i + 1;
        ++i;
      }
    }
    return s.size();
  };
  const char c = s[0];
  if (std::isspace(static_cast<unsigned char>(c))) {
    blank = true;
    return to(s.find_first_not_of(" \t\r\n\v\f"));
  }
  if (s.starts_with("--")) {
    blank = true;
    return to(s.find_first_of("\r\n"));
  }
  if (s.starts_with("/*")) {
    blank = true;
    std::size_t i = 2;
    for (int depth = 1; i < s.size() && depth > 0; ++i) {
      if (s.substr(i, 2) == "/*")
        ++depth, ++i;
      else if (s.substr(i, 2) == "*/")
        --depth, ++i;
    }
    return i;
  }
  if (c == '"') return quoted(1, '"', false);
  if (c == '\'') {
    literal = true;
    return quoted(1, '\'', false);
  }
  if (s.size() > 1 && s[1] == '\'' && std::string_view("eEbBxXnN").find(c) != std::string_view::npos) {
    literal = true;
    return quoted(2, '\'', c == 'e' || c == 'E');
  }
  if (c == '$' && (s.size() < 2 || !std::isdigit(static_cast<unsigned char>(s[1])))) {
    const std::size_t tag_end = s.find('$', 1);
    if (tag_end == std::string_view::npos) return 1;
    for (std::size_t i = 1; i < tag_end; ++i)
      if (!is_word(s[i])) return 1;
    literal = true;
    const std::string_view tag = s.substr(0, tag_end + 1);
    const std::size_t close = s.find(tag, tag_end + 1);
    return close == std::string_view::npos ? s.size() : close + tag.size();
  }
  if (std::isdigit(static_cast<unsigned char>(c))) {
    literal = true;
    std::size_t i = 1;
    while (i < s.size() && (is_word(s[i]) || s[i] == '.')) ++i;
    return i;
  }
  std::size_t i = 1;
  if (is_word(c))
    while (i < s.size() && is_word(s[i])) ++i;
  return i;
}

}  // namespace

std::string normalize_sql(std::string_view sql, std::size_t limit) {
  std::string out;
  bool gap = false;
  while (!sql.empty()) {
    bool literal = false, blank = false;
    const std::size_t size = token(sql, literal, blank);
    const std::string_view text = literal ? std::string_view("?") : sql.substr(0, size);
    sql.remove_prefix(size);
    if (blank) {
      gap = !out.empty();
      continue;
    }
    if (out.size() + gap + text.size() + kEllipsis.size() > limit) return out += kEllipsis;
    if (literal && (out.ends_with("?,") || out.ends_with("?, "))) {  // one stands for a list of them
      out.resize(out.rfind('?') + 1);
      gap = false;
      continue;
    }
    if (gap) out += ' ';
    gap = false;
    out += text;
  }
  return out;
}

}  // namespace pgsidecar::protocol
