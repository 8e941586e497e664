#include "protocol/sql_scan.hpp"

#include <algorithm>
#include <cstddef>

#include "protocol/characters.hpp"
#include "protocol/harmless.hpp"

namespace pgsidecar::protocol {

namespace {

constexpr bool is_word_start(unsigned char c) {
  return is(static_cast<char>(c), kLetter);
}
constexpr bool is_digit(unsigned char c) {
  return is(static_cast<char>(c), kDigit);
}
constexpr bool is_word(unsigned char c) {
  return is(static_cast<char>(c), kWord);
}
constexpr bool is_blank(char c) {
  return is(c, kBlank);
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

constexpr std::string_view kMeaningless[] = {"application_name",       "client_min_messages",
                                             "commit_delay",           "cursor_tuple_fraction",
                                             "debug_print_plan",       "effective_cache_size",
                                             "hash_mem_multiplier",    "lo_compat_privileges",
                                             "maintenance_work_mem",   "plan_cache_mode",
                                             "random_page_cost",       "seq_page_cost",
                                             "synchronous_commit",     "temp_buffers",
                                             "transaction_isolation",  "transaction_read_only",
                                             "transaction_deferrable", "session_replication_role",
                                             "row_security",           "work_mem"};
constexpr std::string_view kMeaninglessFamilies[] = {"cpu_",          "default_transaction_",
                                                     "effective_",    "enable_",
                                                     "from_collapse", "geqo",
                                                     "idle_",         "jit",
                                                     "join_collapse", "log_",
                                                     "max_",          "min_parallel",
                                                     "parallel_",     "statement_timeout",
                                                     "lock_timeout",  "stats_",
                                                     "tcp_",          "track_",
                                                     "vacuum_",       "wal_"};
constexpr int kMostDepth = 8;

class Scanner {
 public:
  Scanner(std::string_view sql, bool conforming, BodyScan* found = nullptr, bool body = false, PreparedNames* prepared = nullptr)
      : p_(sql.data()), end_(p_ + sql.size()), conforming_(conforming), found_(found), prepared_(prepared), body_(body) {}

  /// After run().
  bool names(std::vector<std::string>& names) {
    names = std::move(names_);
    return written_out_;
  }

  Scanner& strict() {
    strict_ = true;
    return *this;
  }
  std::uint32_t needs() const { return needs_ & (~needs_ + 1); }

  std::optional<Reset> reset() {
    std::string text;
    bool ended = false, begun = false;
    while (next()) {
      if (kind_ == ';') {
        const bool begins = text.starts_with("begin") || text.starts_with("start");
        ended |= !begins && !text.empty();
        begun |= begins;
        if (begins) text.clear();
        continue;
      }
      if (ended || (kind_ != 'w' && kind_ != '.' && kind_ != '=')) return std::nullopt;
      text += (text.empty() ? "" : " ") + (kind_ == 'w' ? lower(word_) : std::string(1, kind_));
    }
    if (literals_ > 0 || residue_ & kUnreadable) return std::nullopt;
    auto reset = reset_by(std::move(text));
    if (reset) reset->begins = begun;
    return reset;
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
      if (prepared_) prepared_word();
      if (strict_) strictly();
      if (n_ == 2 || (n_ == 3 && any(second_, {"local", "session"}))) meaning_of_setting();
      if (n_ <= 4 && kind_ == 'w') statement_word();
      if (n_ >= 2 && is(first_, "set")) setting_name();
      if (body_ && n_ == 1 && is(word_, "set") && peek_past_blanks() == '%') residue_ |= kSettings | kCustomSetting, written_out_ = false;
      if (word_.size() >= 4) anywhere();
    }
    return residue_;
  }

 private:
  /// What the word is where it stands.
  void strictly() {
    if (any(word_, {"temp", "temporary"}) && ((n_ <= 4 && is(first_, "create")) || is(lead_, "into"))) needs_ |= kTemporary;
    if (starts(word_, "pg_temp") && peek_past_blanks() == '.') needs_ |= kTemporary;
    if (declare_ && is(word_, "hold") && is(lead_, "with")) needs_ |= kCursor;
    if (n_ == 1 && is(word_, "load")) needs_ |= kLibrary;
    if (n_ == 2 && is(first_, "prepare") && !is(word_, "transaction")) needs_ |= kPrepared;
    if (peek_past_blanks() != '(') return;
    const bool lock = starts(word_, "pg_advisory_lock") || starts(word_, "pg_try_advisory_lock");
    if (lock) needs_ |= kAdvisoryLock;
    if (any(word_, {"currval", "lastval"})) needs_ |= kSequenceRead;
    if (is(word_, "setseed")) needs_ |= kSeed;
    if (is(word_, "pg_backend_pid") && !unequal_) needs_ |= kBackendPid;
    if (any(word_, {"dblink_connect", "dblink_connect_u"})) needs_ |= kLibrary;
  }

  /// The word is one of CREATE [OR REPLACE | LOCAL | GLOBAL] TEMP, run by itself.
  bool makes() const {
    if (body_ || kind_ != 'w' || !is(first_, "create")) return false;
    return n_ == 2 || (n_ == 3 && any(second_, {"local", "global"})) || (n_ == 4 && is(second_, "or"));
  }

  /// Of one statement's words, parted by a blank.
  static std::optional<Reset> reset_by(std::string text) {
    const auto take_first = [&](std::string_view words) {
      const bool has = text.starts_with(words);
      if (has) text.erase(0, words.size());
      return has;
    };
    const auto take_last = [&](std::string_view words) {
      const bool has = text.ends_with(words);
      if (has) text.erase(text.size() - words.size());
      return has;
    };
    if (text == "discard all") return Reset{.discard = true};
    if (text == "reset all") return Reset{};
    Reset reset;
    if (take_first("set ")) {
      reset.local = take_first("local ");
      if (!reset.local) take_first("session ");
      const bool zone = text == "time zone local" || text == "time zone default";
      if (zone) text = "time zone";
      if (!zone && !take_last(" to default") && !take_last(" = default")) return std::nullopt;
    } else if (!take_first("reset ")) {
      return std::nullopt;
    }
    if (text == "time zone") text = "timezone";
    for (std::size_t dot = 0; (dot = text.find(" . ")) != std::string::npos;) text.replace(dot, 3, ".");
    if (text.find(' ') != std::string::npos) return std::nullopt;
    reset.name = std::move(text);
    return reset;
  }

  /// EXECUTE, DEALLOCATE [PREPARE] or PREPARE and a name.
  void prepared_word() {
    if (awaits_name_ && !(is(first_, "deallocate") && n_ == 2 && kind_ == 'w' && is(word_, "prepare"))) {
      awaits_name_ = false;
      if (is(first_, "deallocate") && kind_ == 'w' && is(word_, "all")) {
        prepared_->closes_all = true;
        return;
      }
      if (kind_ == 'w' && is(word_, "u") && peek(0) == '&' && peek(1) == '"') {
        prepared_->escaped = true;
        return;
      }
      std::string name = kind_ == '"' ? std::string(word_) : lower(word_);
      if (kind_ == '"')
        for (std::size_t at = 0; (at = name.find("\"\"", at)) != std::string::npos; ++at) name.erase(at, 1);
      if (is(first_, "deallocate")) prepared_->deallocated.push_back(name);
      prepared_->names.push_back(std::move(name));
      return;
    }
    if (kind_ != 'w') return;
    if (is(word_, "execute") || (n_ == 1 && any(word_, {"deallocate", "prepare"}))) awaits_name_ = true;
    if (starts(word_, "pg_prepared_statement")) prepared_->all = true;
  }

  /// The words that a statement begins with.
  void statement_word() {
    if (n_ == 1) {
      switch (word_[0] | 32) {
        case 's':
          if (is(word_, "start")) residue_ |= kTransaction;
          break;
        case 'b':
          if (is(word_, "begin")) residue_ |= kTransaction;
          break;
        case 'c':
          if (is(word_, "commit"))
            residue_ |= kTransaction | kCommit;
          else if (is(word_, "close"))
            residue_ |= kDrop;
          else if (is(word_, "call"))
            residue_ |= kCode;
          else if (is(word_, "copy"))
            residue_ |= kCopy;
          else if (is(word_, "create"))
            residue_ |= kDefinition;
          break;
        case 'e':
          if (is(word_, "end"))
            residue_ |= kTransaction | kCommit;
          else if (is(word_, "execute"))
            residue_ |= kPrepared;
          break;
        case 'r':
          if (is(word_, "rollback"))
            residue_ |= kTransaction;
          else if (is(word_, "reset"))
            residue_ |= kSettings | kReset;
          break;
        case 'a':
          if (is(word_, "abort"))
            residue_ |= kTransaction;
          else if (is(word_, "alter"))
            residue_ |= kDefinition;
          break;
        case 'd':
          if (is(word_, "deallocate"))
            residue_ |= kPrepared;
          else if (is(word_, "discard"))
            residue_ |= kDiscard;
          else if (is(word_, "declare"))
            declare_ = true;
          else if (is(word_, "do"))
            residue_ |= kCode;
          else if (is(word_, "drop"))
            residue_ |= kDrop | kDefinition;
          break;
        case 'l':
          if (is(word_, "listen"))
            residue_ |= kListen | kNewChannel;
          else if (is(word_, "load"))
            residue_ |= kLibrary;
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
        residue_ |= is(word_, "transaction") ? kTransaction | kCommit : kPrepared;
      } else if (is(first_, "discard") && is(word_, "all")) {
        residue_ |= kReset | kMeaning | kPath;
      } else if (is(word_, "database") && any(first_, {"create", "alter", "drop"})) {
        residue_ |= kDatabase;
      }
    }
    if (is(first_, "explain") || is(first_, "create")) {
      if (is(word_, "execute")) residue_ |= kPrepared;
    }
  }

  static bool sets_path(std::string_view setting) { return any(setting, {"search_path", "role", "session_authorization"}); }

  /// Of SET [LOCAL | SESSION] name, RESET name.
  void meaning_of_setting() {
    if (!any(first_, {"set", "reset"})) return;
    if (is(word_, "seed")) residue_ |= kSeed;
    if (peek_past_blanks() == '.' || any(word_, {"local", "session", "transaction", "constraints", "characteristics"})) return;
    if (sets_path(word_) || any(word_, {"schema", "authorization", "all"})) residue_ |= kPath;
    if (any(word_, {"schema", "authorization"}) || sets_path(word_)) return;
    if (!leaves_meaning(lower(word_))) residue_ |= kMeaning;
  }

  /// Words that count wherever they stand.
  void anywhere() {
    switch (word_[0] | 32) {
      case 's':
        if (is(word_, "set_config"))
          set_config();
        else if (is(word_, "setseed"))
          residue_ |= kSeed;
        else if (is(word_, "setval"))
          residue_ |= kSequenceWrite;
        break;
      case 'p':
        if (starts(word_, "pg_temp"))
          residue_ |= kTemporary;
        else if (is(word_, "pg_settings")) {
          if (updates_) residue_ |= kSettings | kMeaning | kPath;  // its rule calls set_config
        } else if (is(word_, "pg_backend_pid")) {
          if (!unequal_) residue_ |= kBackendPid;
        } else if (starts(word_, "pg_prepared_statement"))
          residue_ |= kPrepared;
        else if (is(word_, "pg_notify"))
          residue_ |= kNotify;
        else if (is(word_, "pg_listening_channels"))
          residue_ |= kChannels;
        else if (starts(word_, "pg_advisory_") || starts(word_, "pg_try_advisory_")) {
          if (!contains(word_, "xact")) residue_ |= kAdvisoryLock;
        }
        break;
      case 't':
        if (any(word_, {"temp", "temporary"}) && !is(first_, "discard")) residue_ |= kTemporary | (makes() ? kMakesTemporary : kNone);
        break;
      case 'c':
        if (is(word_, "currval"))
          residue_ |= kSequenceRead;
        else if (is(word_, "copy"))
          residue_ |= kSequenceWrite;
        break;
      case 'i':
        if (is(word_, "insert"))
          residue_ |= kSequenceWrite;
        else if (is(word_, "into") && is(first_, "select") && !body_)
          residue_ |= kDefinition;
        break;
      case 'm':
        if (is(word_, "merge")) residue_ |= kSequenceWrite;
        break;
      case 'n':
        if (is(word_, "nextval")) residue_ |= kSequenceWrite;
        break;
      case 'u':
        if (is(word_, "update")) residue_ |= kSequenceWrite, updates_ = true;
        break;
      case 'l':
        if (is(word_, "lastval"))
          residue_ |= kSequenceRead;
        else if (is(word_, "local") && is(second_, "time") && is(first_, "set"))
          residue_ |= kReset;
        break;
      case 'd':
        if (any(word_, {"dblink_connect", "dblink_connect_u"}))
          residue_ |= kLibrary;
        else if (is(word_, "delete"))
          residue_ |= kSequenceWrite;
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
    const char before = previous_, previous = previous_ = kind_;
    if (!next()) return false;
    if (kind_ == 'w') unequal_ = (previous == '>' && before == '<') || (previous == '=' && before == '!');
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
    if (is(first_, "create") && any(lead_, {"view", "function", "procedure", "aggregate", "type"})) return;
    if (is(first_, "create") && is(lead_, "on") && any(second_, {"index", "unique", "trigger", "policy", "rule", "statistics"})) return;
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

  static std::string undoubled(std::string_view literal) {
    std::string out;
    for (std::size_t i = 0; i < literal.size(); ++i) {
      out += literal[i];
      if (literal[i] == '\'') ++i;
    }
    return out;
  }

  /// The text that E'' stands for. Numbered characters are taken for what can't be read.
  std::string unescaped(std::string_view literal) {
    std::string out;
    for (std::size_t i = 0; i < literal.size(); ++i) {
      char c = literal[i];
      if (c == '\\' && i + 1 < literal.size()) {
        c = literal[++i];
        if (is_digit(static_cast<unsigned char>(c)) || (c | 32) == 'x' || (c | 32) == 'u') residue_ |= kUnreadable;
        if (std::string_view("bfnrt").find(c) != std::string_view::npos) c = ' ';
      } else if (c == '\'') {
        ++i;
      }
      out += c;
    }
    return out;
  }

  /// A text within the text that may be run: the body of DO, what a function's EXECUTE is given.
  void inner(std::string_view text) {
    if (!body_ && !is(first_, "do")) return;
    if (depth_ == kMostDepth) {
      residue_ |= kSettings | kCustomSetting | kFunction;
      written_out_ = false;
      return;
    }
    Scanner scanner(text, conforming_, found_, true, prepared_);
    scanner.strict_ = strict_;
    scanner.depth_ = depth_ + 1;
    residue_ |= scanner.run() & ~(kTransaction | kCommit | kUnreadable);
    needs_ |= scanner.needs_;
    names_.insert(names_.end(), scanner.names_.begin(), scanner.names_.end());
    written_out_ &= scanner.written_out_;
  }

  /// The words after SET.
  void setting_name() {
    const bool quoted = kind_ == '"';
    if (n_ == 2 && quoted) residue_ |= kSettings;
    if (n_ == 2 && is(word_, "names")) {
      const auto c = peek_past_blanks();
      if (c == ';' || c == '\0') residue_ |= kReset;
    }
    if (n_ > 3 || (n_ == 3 && !is(second_, "session")) || (n_ == 2 && !quoted && is(word_, "local"))) return;
    if ((quoted && word_.find('.') != std::string_view::npos) || peek_past_blanks() == '.') custom_setting();
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

  /// Passes blanks and comments. False: a comment has no end.
  bool pass_blanks() {
    for (;;) {
      if (p_ != end_ && is_blank(*p_)) {
        ++p_;
      } else if (peek(0) == '-' && peek(1) == '-') {
        while (p_ != end_ && *p_ != '\n' && *p_ != '\r') ++p_;
      } else if (peek(0) == '/' && peek(1) == '*') {
        if (!comment()) return false;
      } else {
        return true;
      }
    }
  }

  unsigned char peek_past_blanks() {
    const char* const here = p_;
    pass_blanks();
    const unsigned char c = peek(0);
    p_ = here;
    return c;
  }

  /// set_config(name, value, is_local): harmless if the last argument is `true`; the name counts if it is one literal.
  void set_config() {
    if (calls_ == kMostDepth || !step() || kind_ != '(') {
      residue_ |= kSettings | kCustomSetting;
      written_out_ = false;
      return;
    }
    ++calls_;
    int depth = 1, tokens = 0, argument = 1;
    bool plain_name = false, local = false, cast = true;
    std::string_view written;
    literals_ = 0;
    while (depth > 0 && step()) {
      if (kind_ == '(' || kind_ == '[') ++depth;
      if (kind_ == ')' || kind_ == ']') --depth;
      const bool ends = depth == 0 || (depth == 1 && kind_ == ',');
      if (!ends) {
        ++tokens;
        cast &= kind_ == (tokens <= 2 ? ':' : 'w');
        local = tokens == 1 && kind_ == 'w' && is(word_, "true");
        if (kind_ == 'w' && word_.size() >= 4) anywhere();
        continue;
      }
      if (argument == 1 && literals_ == 1 && (tokens == 0 || (tokens == 3 && cast))) {
        written = literal_;
        plain_name = literal_.find('.') == std::string_view::npos;
        if (is(written, "seed")) residue_ |= kSeed;
      }
      if (argument == 1 && (written.empty() || sets_path(written))) residue_ |= kPath;
      if (argument == 1 && !sets_path(written) && !leaves_meaning(lower(written))) residue_ |= kMeaning;
      if (depth == 0 && argument == 3 && tokens == 1 && local) return void(--calls_);
      if (depth > 0) ++argument, tokens = 0, local = false;
    }
    --calls_;
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
      while (p_ != end_ && is_blank(*p_)) ++p_;
      if ((peek(0) == '-' || peek(0) == '/') && !pass_blanks()) return false;
      if (p_ == end_) return false;
      const auto c = static_cast<unsigned char>(*p_);
      if (is_word_start(c)) {
        const char* const begin = p_;
        const char* p = p_ + 1;
        while (p != end_ && is_word(static_cast<unsigned char>(*p))) ++p;
        p_ = p;
        word_ = {begin, static_cast<std::size_t>(p - begin)};
        kind_ = 'w';
        if (word_.size() > 1) return true;
        if ((*begin | 32) == 'e' && peek(0) == '\'') {
          if (!escaped()) return false;
          continue;
        }
        if ((*begin | 32) == 'u' && peek(0) == '&' && peek(1) == '"') residue_ |= kUnreadable;  // its escapes may spell any name
        return true;
      }
      if (c == '\'') {
        const char* begin = p_ + 1;
        if (!quoted('\'', !conforming_)) return false;
        literal_ = {begin, static_cast<std::size_t>(p_ - 1 - begin)};
        ++literals_;
        if (is(first_, "do") || body_) inner(conforming_ ? undoubled(literal_) : unescaped(literal_));
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
      if (is_digit(c)) {
        // Not the letter of E'', and no dollar: what follows may quote.
        while (p_ != end_ && *p_ != '$' && (is_word(static_cast<unsigned char>(*p_)) || *p_ == '.') &&
               !((*p_ | 32) == 'e' && peek(1) == '\''))
          ++p_;
        ++literals_;
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

  /// Passes E'', which goes on behind a newline; p_ is at its opening quote.
  bool escaped() {
    literals_ += 2;  // its escapes aren't read
    for (;;) {
      const char* const begin = p_ + 1;
      if (!quoted('\'', true)) return false;
      if (is(first_, "do") || body_) inner(unescaped({begin, static_cast<std::size_t>(p_ - 1 - begin)}));
      const char* p = p_;
      bool newline = false;
      for (; p != end_; ++p) {
        if (*p == '-' && p + 1 != end_ && p[1] == '-')
          while (p != end_ && *p != '\n' && *p != '\r') ++p;
        if (p == end_ || !is_blank(*p)) break;
        newline |= *p == '\n' || *p == '\r';
      }
      if (!newline || p == end_ || *p != '\'') return true;
      p_ = p;
    }
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
  bool conforming_, declare_ = false, updates_ = false;
  char kind_ = 0;
  BodyScan* found_;
  PreparedNames* prepared_;
  bool awaits_name_ = false, strict_ = false;
  bool body_;      // of a function
  int depth_ = 0;  // of texts within texts
  int calls_ = 0;  // of set_config in set_config's arguments
  bool written_out_ = true;
  std::vector<std::string> names_;  // of custom settings
  int literals_ = 0;
  std::string_view literal_;  // the last plain one
  int n_ = 0;                 // words of this statement so far
  std::string_view word_, first_, second_;
  std::string_view name_, schema_, lead_;       // the last word, what stands before its dot, the word before both
  bool name_quoted_ = false, unequal_ = false;  // the word's operator before it is <> or !=
  char previous_ = 0;
  std::uint32_t residue_ = 0, needs_ = 0;
};

}  // namespace

bool leaves_meaning(std::string_view name) {
  if (name.find('.') != std::string_view::npos) return true;
  return any(name, kMeaningless) ||
         std::ranges::any_of(kMeaninglessFamilies, [&](std::string_view family) { return name.starts_with(family); });
}

std::uint32_t scan_sql(std::string_view sql, bool standard_conforming_strings) {
  return Scanner(sql, standard_conforming_strings).run();
}

BodyScan scan_body(std::string_view body) {
  BodyScan found;
  Scanner scanner(body, true, &found, true);
  found.residue = scanner.run() & ~(kTransaction | kCommit);
  if (scanner.names(found.custom_settings))
    found.residue = found.residue & kCustomSetting ? (found.residue & ~kCustomSetting) | kSettings : found.residue;
  return found;
}

std::uint32_t needs_session(std::string_view sql, bool standard_conforming_strings) {
  Scanner scanner(sql, standard_conforming_strings);
  scanner.strict().run();
  return scanner.needs();
}

PreparedNames prepared_names(std::string_view sql) {
  PreparedNames named;
  Scanner(sql, true, nullptr, false, &named).run();
  return named;
}

std::vector<std::string> residue_names(std::uint32_t residue) {
  constexpr struct {
    std::uint32_t bits;
    const char* name;
  } kNames[] = {{kSettings | kReset, "settings"},
                {kCustomSetting, "custom_setting"},
                {kPrepared, "prepared_statement"},
                {kListen, "listening"},
                {kAdvisoryLock, "advisory_lock"},
                {kTemporary, "temporary_object"},
                {kCursor, "held_cursor"},
                {kSequenceRead, "sequence"},
                {kBackendPid, "backend_pid"},
                {kSeed, "random_seed"},
                {kLibrary, "library"},
                {kCode | kFunction | kDiscard | kUnreadable, "unknown"}};
  std::vector<std::string> names;
  for (const auto& one : kNames)
    if (residue & one.bits) names.emplace_back(one.name);
  return names;
}

std::vector<std::string> called_functions(std::string_view sql) {
  BodyScan found;
  Scanner(sql, true, &found).run();
  return std::move(found.calls);
}

std::optional<Reset> reset_of(std::string_view sql, bool standard_conforming_strings) {
  return Scanner(sql, standard_conforming_strings).reset();
}

bool custom_setting_names(std::string_view sql, std::vector<std::string>& names, bool standard_conforming_strings) {
  Scanner scanner(sql, standard_conforming_strings);
  scanner.run();
  return scanner.names(names);
}

}  // namespace pgsidecar::protocol
