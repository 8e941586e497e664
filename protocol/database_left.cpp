// Which database a text wants for itself. SQL commands CREATE DATABASE, ALTER DATABASE, DROP DATABASE.
#include <algorithm>
#include <vector>

#include "protocol/sql_scan.hpp"

namespace pgsidecar::protocol {

namespace {

constexpr std::size_t kMostWords = 64;

/// A text's words as the server reads them: in lower case, or as quoted. What stands between them is left out.
std::vector<std::string> words_of(std::string_view sql) {
  std::vector<std::string> words;
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; };
  const auto is_word = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '$' || static_cast<unsigned char>(c) >= 0x80;
  };
  for (std::size_t at = 0; at < sql.size() && words.size() < kMostWords;) {
    std::string word;
    if (sql[at] == '"') {
      for (++at; at < sql.size() && (sql[at] != '"' || (at + 1 < sql.size() && sql[at + 1] == '"' && ++at)); ++at) word += sql[at];
      ++at;
    } else {
      for (; at < sql.size() && is_word(lower(sql[at])); ++at) word += lower(sql[at]);
      if (word.empty()) ++at;
    }
    if (!word.empty()) words.push_back(std::move(word));
  }
  return words;
}

}  // namespace

std::string database_left(std::string_view sql) {
  std::vector<std::string> words = words_of(sql);
  if (words.size() < 3 || words[1] != "database") return {};
  words.resize(std::max<std::size_t>(words.size(), 5));
  if (words[0] == "drop") return words[2] == "if" && words[3] == "exists" ? words[4] : words[2];
  if (words[0] == "alter") return words[3] == "rename" || (words[3] == "set" && words[4] == "tablespace") ? words[2] : std::string();
  const auto by = std::find(words.begin() + 3, words.end(), "template");
  return words[0] == "create" && by != words.end() && by + 1 != words.end() ? by[1] : std::string();
}

}  // namespace pgsidecar::protocol
