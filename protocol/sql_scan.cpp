#include "protocol/sql_scan.hpp"

#include <array>
#include <cstddef>

#include "protocol/harmless.hpp"

namespace pgsidecar::protocol {

namespace {

constexpr bool is_word_start(unsigned char c) {
  return static_cast<unsigned>(c | 32) - 'a' < 26u || c == '_' || c >= 0x80;
}
constexpr bool is_digit(unsigned char c) {
  return static_cast<unsigned>(c) - '0' < 10u;
}
constexpr bool is_word(unsigned char c) {
  return is_word_start(c) || is_digit(c) || c == '$';
}

/// Compares a word, in any case, with a lower-case one.
bool is(std::string_view word, std::string_view lower) {
  if (word.size() != lower.size()) return false;
  for (std::size_t i = 0; i < word.size(); ++i) {
    const char c = word[i];
    if ((c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c) != lower[i]) return false;
  }
  return true;
}

bool starts(std::string_view word, std::string_view lower) {
  return word.size() >= lower.size() && is(word.substr(0, lower.size()), lower);
}

bool contains(std::string_view word, std::string_view lower) {
  for (std::size_t i = 0; i + lower.size() <= word.size(); ++i)
    if (is(word.substr(i, lower.size()), lower)) return true;
  return false;
}

template <std::size_t N>
bool any(std::string_view word, const std::string_view (&list)[N]) {
  for (const std::string_view one : list)
    if (is(word, one)) return true;
  return false;
}

class Scanner {
 public:
  Scanner(std::string_view sql, bool conforming, BodyScan* found = nullptr, bool body = false)
      : p_(sql.data()), end_(p_ + sql.size()), conforming_(conforming), found_(found), body_(body) {}

  /// After run().
  bool names(std::vector<std::string>& names) {
    names = std::move(names_);
    return written_out_;
  }

  std::uint32_t run() {
    while (step()) {
      if (kind_ == ';') {
        n_ = 0;
        first_ = second_ = {};
        continue;
      }
      if (kind_ != 'w' && kind_ != '"') continue;
      if (body_ && any(word_, {"begin", "then", "else", "loop", "declare"})) {
        n_ = 0;
        first_ = second_ = {};
        continue;
      }
      ++n_;
      if (n_ == 1) first_ = word_;
      if (n_ == 2) second_ = word_;
      if (n_ <= 4 && kind_ == 'w') statement_word();
      if (n_ <= 3 && n_ >= 2 && is(first_, "set") && !is(second_, "local") && peek_past_blanks() == '.') custom_setting();
      if (body_ && n_ == 1 && is(word_, "set") && peek_past_blanks() == '%') residue_ |= kSettings | kCustomSetting, written_out_ = false;
      if (word_.size() >= 4) anywhere();
    }
    return residue_;
  }

 private:
  /// The words that a statement begins with.
  void statement_word() {
    if (n_ == 1) {
      switch (word_[0] | 32) {
        case 's':
          if (any(word_, {"start", "savepoint"})) residue_ |= kTransaction;
          break;
        case 'b':
          if (is(word_, "begin")) residue_ |= kTransaction;
          break;
        case 'c':
          if (is(word_, "commit"))
            residue_ |= kTransaction;
          else if (is(word_, "call"))
            residue_ |= kCode;
          break;
        case 'e':
          if (is(word_, "end"))
            residue_ |= kTransaction;
          else if (is(word_, "execute"))
            residue_ |= kPrepared;
          break;
        case 'r':
          if (any(word_, {"rollback", "release"}))
            residue_ |= kTransaction;
          else if (is(word_, "reset"))
            residue_ |= kSettings | kReset;
          break;
        case 'a':
          if (is(word_, "abort")) residue_ |= kTransaction;
          break;
        case 'd':
          if (is(word_, "deallocate"))
            residue_ |= kPrepared;
          else if (is(word_, "discard"))
            residue_ |= kDiscard | kReset;
          else if (is(word_, "declare"))
            declare_ = true;
          else if (is(word_, "do"))
            residue_ |= kCode;
          break;
        case 'l':
          if (is(word_, "listen"))
            residue_ |= kListen;
          else if (is(word_, "load"))
            residue_ |= kCode | kSession;
          break;
        case 'n':
          if (is(word_, "notify")) residue_ |= kNotify;
          break;
        case 'u':
          if (is(word_, "unlisten")) residue_ |= kListen;
          break;
        default: break;
      }
      return;
    }
    if (n_ == 2) {
      if (is(first_, "set")) {
        if (!any(word_, {"local", "transaction", "constraints"})) residue_ |= kSettings;
      } else if (is(first_, "prepare")) {
        residue_ |= is(word_, "transaction") ? kTransaction : kPrepared;
      }
    }
    if (is(first_, "explain") || is(first_, "create")) {
      if (is(word_, "execute")) residue_ |= kPrepared;
    }
  }

  /// Words that count wherever they stand.
  void anywhere() {
    switch (word_[0] | 32) {
      case 's':
        if (is(word_, "set_config"))
          set_config();
        else if (is(word_, "setseed"))
          residue_ |= kSession;
        break;
      case 'p':
        if (starts(word_, "pg_temp"))
          residue_ |= kTemporary;
        else if (is(word_, "pg_backend_pid"))
          residue_ |= kSession;
        else if (is(word_, "pg_notify"))
          residue_ |= kNotify;
        else if (is(word_, "pg_listening_channels"))
          residue_ |= kChannels;
        else if (starts(word_, "pg_advisory_") || starts(word_, "pg_try_advisory_")) {
          if (!contains(word_, "xact")) residue_ |= kAdvisoryLock;
        }
        break;
      case 't':
        if (any(word_, {"temp", "temporary"})) residue_ |= kTemporary;
        break;
      case 'c':
        if (is(word_, "currval")) residue_ |= kSession;
        break;
      case 'l':
        if (is(word_, "lastval"))
          residue_ |= kSession;
        else if (is(word_, "local") && is(second_, "time") && is(first_, "set"))
          residue_ |= kReset;
        break;
      case 'd':
        if (any(word_, {"dblink_connect", "dblink_connect_u"}))
          residue_ |= kSession;
        else if (is(word_, "default") && is(first_, "set"))
          residue_ |= kReset;
        break;
      case 'e':
        if (is(word_, "execute") && (is(first_, "explain") || is(first_, "create"))) residue_ |= kPrepared;
        if (body_ && is(word_, "execute")) residue_ |= kFunction;
        break;
      case 'h':
        if (is(word_, "hold") && declare_) residue_ |= kCursor;
        break;
      default: break;
    }
  }

  /// The next token, looked at for calls.
  bool step() {
    const char previous = kind_;
    if (!next()) return false;
    const bool after_word = previous == 'w' || previous == '"';
    if (kind_ == '(' && after_word) call();
    if (kind_ == 'w' || kind_ == '"') {
      schema_ = previous == '.' ? name_ : std::string_view();
      if (previous != '.') lead_ = after_word ? name_ : std::string_view();
      name_ = word_;
      name_quoted_ = kind_ == '"';
    }
    return true;
  }

  /// A name and a parenthesis: a call, unless the word before the name says that it is a table, an alias or a new name.
  void call() {
    if (any(lead_, {"into", "table", "as", "with", "recursive", "references", "index", "exists", "copy", "analyze", "vacuum", "execute"}))
      return;
    if (is(first_, "create") && any(lead_, {"on", "view", "function", "procedure", "aggregate", "type"})) return;
    // These are dealt with by themselves, wherever they stand.
    if (starts(name_, "pg_advisory_") || starts(name_, "pg_try_advisory_") ||
        any(name_, {"set_config", "currval", "lastval", "setseed", "pg_backend_pid", "pg_listening_channels"}))
      return;
    if (name_.size() <= 40 && (schema_.empty() || is(schema_, "pg_catalog"))) {
      char lower[40];
      for (std::size_t i = 0; i < name_.size(); ++i) {
        const char c = name_[i];
        lower[i] = !name_quoted_ && c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
      }
      if (is_harmless({lower, name_.size()})) return;
    }
    if (found_)
      found_->calls.push_back(name_quoted_ ? std::string(name_) : lower(name_));
    else
      residue_ |= kFunction;
  }

  /// A text within the text that may be run: the body of DO, what a function's EXECUTE is given.
  void inner(std::string_view text) {
    if (!body_ && !is(first_, "do")) return;
    Scanner scanner(text, conforming_, found_, true);
    residue_ |= scanner.run() & ~(kTransaction | kUnreadable);
    names_.insert(names_.end(), scanner.names_.begin(), scanner.names_.end());
    written_out_ &= scanner.written_out_;
  }

  /// SET name.name: p_ is before the dot.
  void custom_setting() {
    residue_ |= kCustomSetting;
    std::string name = lower(word_);
    while (peek_past_blanks() == '.') {
      next();  // the dot
      if (!next() || (kind_ != 'w' && kind_ != '"')) return void(written_out_ = false);
      name += '.' + lower(word_);
    }
    names_.push_back(std::move(name));
  }

  static std::string lower(std::string_view word) {
    std::string out(word);
    for (char& c : out)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    return out;
  }

  unsigned char peek_past_blanks() const {
    const char* p = p_;
    while (p != end_ && (*p == ' ' || (*p >= '\t' && *p <= '\r'))) ++p;
    return p == end_ ? '\0' : static_cast<unsigned char>(*p);
  }

  /// set_config(name, value, is_local): harmless if the last argument is `true`; the name counts if it is one literal.
  void set_config() {
    if (!step() || kind_ != '(') {
      residue_ |= kSettings | kCustomSetting;
      written_out_ = false;
      return;
    }
    int depth = 1, tokens = 0, argument = 1;
    bool plain_name = false, local = false;
    std::string_view written;
    literals_ = 0;
    while (depth > 0 && step()) {
      if (kind_ == '(' || kind_ == '[') ++depth;
      if (kind_ == ')' || kind_ == ']') --depth;
      const bool ends = depth == 0 || (depth == 1 && kind_ == ',');
      if (!ends) {
        ++tokens;
        local = tokens == 1 && kind_ == 'w' && is(word_, "true");
        continue;
      }
      if (argument == 1 && tokens == 0 && literals_ == 1) {
        written = literal_;
        plain_name = literal_.find('.') == std::string_view::npos;
      }
      if (depth == 0 && argument == 3 && tokens == 1 && local) return;
      if (depth > 0) ++argument, tokens = 0, local = false;
    }
    residue_ |= plain_name && depth == 0 ? kSettings : kSettings | kCustomSetting;
    if (plain_name) return;
    if (written.empty() || written.find('\'') != std::string_view::npos)
      written_out_ = false;
    else
      names_.push_back(lower(written));
  }

  /// The next token: 'w' word, '"' quoted identifier, ';', or another character. False at the end.
  bool next() {
    for (;;) {
      if (p_ == end_) return false;
      const auto c = static_cast<unsigned char>(*p_);
      if (c == ' ' || (c >= '\t' && c <= '\r')) {
        ++p_;
        continue;
      }
      if (c == '-' && peek(1) == '-') {
        while (p_ != end_ && *p_ != '\n' && *p_ != '\r') ++p_;
        continue;
      }
      if (c == '/' && peek(1) == '*') {
        if (!comment()) return false;
        continue;
      }
      if (c == '\'') {
        const char* begin = p_ + 1;
        if (!quoted('\'', !conforming_)) return false;
        literal_ = {begin, static_cast<std::size_t>(p_ - 1 - begin)};
        ++literals_;
        inner(literal_);
        continue;
      }
      if (c == '$' && !is_digit(peek(1))) {
        if (dollar()) continue;
        if (p_ == end_) return false;
      }
      if (c == '"') {
        const char* begin = p_ + 1;
        if (!quoted('"', false)) return false;
        word_ = {begin, static_cast<std::size_t>(p_ - 1 - begin)};
        kind_ = '"';
        return true;
      }
      if (is_word_start(c)) {
        const char* begin = p_;
        while (p_ != end_ && is_word(static_cast<unsigned char>(*p_))) ++p_;
        word_ = {begin, static_cast<std::size_t>(p_ - begin)};
        if (p_ != end_ && *p_ == '\'' && word_.size() == 1 && (*begin | 32) == 'e') {
          if (!quoted('\'', true)) return false;
          literals_ += 2;  // its escapes aren't read
          continue;
        }
        if (word_.size() == 1 && (*begin | 32) == 'u' && peek(0) == '&' && peek(1) == '"') {
          residue_ |= kUnreadable;  // its escapes may spell any name
        }
        kind_ = 'w';
        return true;
      }
      if (is_digit(c)) {
        while (p_ != end_ && (is_word(static_cast<unsigned char>(*p_)) || *p_ == '.')) ++p_;
        continue;
      }
      ++p_;
      kind_ = static_cast<char>(c);
      return true;
    }
  }

  unsigned char peek(std::ptrdiff_t ahead) const { return end_ - p_ > ahead ? static_cast<unsigned char>(p_[ahead]) : '\0'; }

  bool unreadable() {
    residue_ |= kUnreadable;
    p_ = end_;
    return false;
  }

  /// Passes a quoted text; p_ is at its opening quote.
  bool quoted(char quote, bool escapes) {
    for (++p_; p_ != end_; ++p_) {
      if (*p_ == quote) {
        if (peek(1) != static_cast<unsigned char>(quote)) {
          ++p_;
          return true;
        }
        ++p_;
      } else if (escapes && *p_ == '\\' && ++p_ == end_) {
        break;
      }
    }
    return unreadable();
  }

  bool comment() {
    int depth = 0;
    for (; p_ != end_; ++p_) {
      if (*p_ == '/' && peek(1) == '*') {
        ++depth;
        ++p_;
      } else if (*p_ == '*' && peek(1) == '/') {
        ++p_;
        if (--depth == 0) {
          ++p_;
          return true;
        }
      }
    }
    return unreadable();
  }

  /// Passes a dollar-quoted text; false if it is none (p_ unmoved) or has no end (p_ at the end).
  bool dollar() {
    const char* tag_end = p_ + 1;
    while (tag_end != end_ && *tag_end != '$' && is_word(static_cast<unsigned char>(*tag_end))) ++tag_end;
    if (tag_end == end_ || *tag_end != '$') return false;
    const std::string_view tag(p_, static_cast<std::size_t>(tag_end + 1 - p_));
    const std::string_view rest(tag_end + 1, static_cast<std::size_t>(end_ - tag_end - 1));
    const std::size_t at = rest.find(tag);
    if (at == std::string_view::npos) return unreadable();
    p_ = rest.data() + at + tag.size();
    inner(rest.substr(0, at));
    return true;
  }

  const char* p_;
  const char* end_;
  bool conforming_, declare_ = false;
  char kind_ = 0;
  BodyScan* found_;
  bool body_;  // of a function
  bool written_out_ = true;
  std::vector<std::string> names_;  // of custom settings
  int literals_ = 0;
  std::string_view literal_;  // the last plain one
  int n_ = 0;                 // words of this statement so far
  std::string_view word_, first_, second_;
  std::string_view name_, schema_, lead_;  // the last word, what stands before its dot, the word before both
  bool name_quoted_ = false;
  std::uint32_t residue_ = 0;
};

}  // namespace

std::uint32_t scan_sql(std::string_view sql, bool standard_conforming_strings) {
  return Scanner(sql, standard_conforming_strings).run();
}

BodyScan scan_body(std::string_view body) {
  BodyScan found;
  Scanner scanner(body, true, &found, true);
  found.residue = scanner.run() & ~kTransaction;
  if (scanner.names(found.custom_settings))
    found.residue = found.residue & kCustomSetting ? (found.residue & ~kCustomSetting) | kSettings : found.residue;
  return found;
}

std::vector<std::string> called_functions(std::string_view sql) {
  BodyScan found;
  Scanner(sql, true, &found).run();
  return std::move(found.calls);
}

bool custom_setting_names(std::string_view sql, std::vector<std::string>& names, bool standard_conforming_strings) {
  Scanner scanner(sql, standard_conforming_strings);
  scanner.run();
  return scanner.names(names);
}

}  // namespace pgsidecar::protocol
