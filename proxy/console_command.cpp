#include "proxy/console_command.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

#include "conf/suggest.hpp"

namespace pgsidecar::proxy {

namespace {

using Kind = ConsoleCommand::Kind;

constexpr std::size_t kMostQuoted = 200;  // of a text in an error

constexpr std::pair<std::string_view, Show> kShows[] = {{"active_sockets", Show::ActiveSockets},
                                                        {"clients", Show::Clients},
                                                        {"config", Show::Config},
                                                        {"databases", Show::Databases},
                                                        {"dns_hosts", Show::DnsHosts},
                                                        {"dns_zones", Show::DnsZones},
                                                        {"fds", Show::Fds},
                                                        {"help", Show::Help},
                                                        {"leaks", Show::Leaks},
                                                        {"lists", Show::Lists},
                                                        {"mem", Show::Mem},
                                                        {"peer_pools", Show::PeerPools},
                                                        {"peers", Show::Peers},
                                                        {"pins", Show::Pins},
                                                        {"pools", Show::Pools},
                                                        {"prepared_statements", Show::PreparedStatements},
                                                        {"servers", Show::Servers},
                                                        {"sockets", Show::Sockets},
                                                        {"state", Show::State},
                                                        {"stats", Show::Stats},
                                                        {"stats_averages", Show::StatsAverages},
                                                        {"stats_totals", Show::StatsTotals},
                                                        {"totals", Show::Totals},
                                                        {"users", Show::Users},
                                                        {"version", Show::Version}};

/// Settings of a PostgreSQL session that drivers set or ask for without a thought. An empty value: they only set it.
constexpr std::pair<std::string_view, std::string_view> kParameters[] = {{"application_name", ""},
                                                                         {"bytea_output", "hex"},
                                                                         {"client_encoding", "UTF8"},
                                                                         {"client_min_messages", "notice"},
                                                                         {"datestyle", "ISO"},
                                                                         {"default_transaction_isolation", "read committed"},
                                                                         {"default_transaction_read_only", "off"},
                                                                         {"extra_float_digits", "2"},
                                                                         {"idle_in_transaction_session_timeout", "0"},
                                                                         {"intervalstyle", "postgres"},
                                                                         {"lock_timeout", "0"},
                                                                         {"search_path", ""},
                                                                         {"standard_conforming_strings", "on"},
                                                                         {"statement_timeout", "0"},
                                                                         {"timezone", "GMT"},
                                                                         {"transaction_isolation", "read committed"},
                                                                         {"transaction_read_only", "off"}};

constexpr std::pair<std::string_view, std::string_view> kNoise[] = {
    {"begin", "BEGIN"},           {"start", "START TRANSACTION"}, {"commit", "COMMIT"},       {"end", "COMMIT"},
    {"rollback", "ROLLBACK"},     {"abort", "ROLLBACK"},          {"discard", "DISCARD ALL"}, {"reset", "RESET"},
    {"deallocate", "DEALLOCATE"}, {"unlisten", "UNLISTEN"},       {"close", "CLOSE CURSOR"}};

struct Verb {
  std::string_view word;
  Kind kind;
  std::string_view tag;
  enum class Argument { None, Maybe, Database, Number } argument;
};
constexpr Verb kVerbs[] = {{"reload", Kind::Reload, "RELOAD", Verb::Argument::None},
                           {"pause", Kind::Pause, "PAUSE", Verb::Argument::Maybe},
                           {"resume", Kind::Resume, "RESUME", Verb::Argument::Maybe},
                           {"reconnect", Kind::Reconnect, "RECONNECT", Verb::Argument::Maybe},
                           {"disable", Kind::Disable, "DISABLE", Verb::Argument::Database},
                           {"enable", Kind::Enable, "ENABLE", Verb::Argument::Database},
                           {"kill", Kind::Kill, "KILL", Verb::Argument::Maybe},
                           {"kill_client", Kind::KillClient, "KILL_CLIENT", Verb::Argument::Number},
                           {"wait_close", Kind::WaitClose, "WAIT_CLOSE", Verb::Argument::Maybe},
                           {"suspend", Kind::Suspend, "SUSPEND", Verb::Argument::None}};

struct Token {
  bool apart;         // from the one before
  std::string text;   // without quotes
  std::string lower;  // of a bare word; empty for what is quoted
};

struct Statement {
  std::vector<Token> tokens;
  std::string_view text;
  bool broken = false;  // a quote or comment without its end
};

bool in_word(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.' || c == '-' || c == '$' ||
         c == '*' || static_cast<unsigned char>(c) >= 0x80;
}

bool is_blank(char c) {
  return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f';
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_blank(text.back())) text.remove_suffix(1);
  return text;
}

class Lexer {
 public:
  explicit Lexer(std::string_view sql) : sql_(sql) {}

  /// The next statement up to its semicolon; nullopt at the end.
  std::optional<Statement> next() {
    if (at_ >= sql_.size()) return std::nullopt;
    Statement s;
    const std::size_t begin = at_;
    std::size_t end = sql_.size();
    while (at_ < sql_.size()) {
      const char c = sql_[at_];
      if (c == ';') {
        end = at_++;
        break;
      }
      if (is_blank(c))
        ++at_;
      else if (sql_.substr(at_).starts_with("--"))
        at_ = std::min(sql_.find('\n', at_), sql_.size());
      else if (sql_.substr(at_).starts_with("/*"))
        skip_comment(s);
      else if (c == '\'' || c == '"')
        quoted(s, c);
      else
        word(s);
    }
    s.text = trimmed(sql_.substr(begin, end - begin));
    return s;
  }

 private:
  void skip_comment(Statement& s) {
    const auto close = sql_.find("*/", at_ + 2);
    s.broken |= close == std::string_view::npos;
    at_ = close == std::string_view::npos ? sql_.size() : close + 2;
  }
  void quoted(Statement& s, char quote) {
    Token token{at_ != end_, {}, {}};
    for (++at_; at_ < sql_.size(); ++at_) {
      if (sql_[at_] == quote && (at_ + 1 >= sql_.size() || sql_[at_ + 1] != quote)) {
        end_ = ++at_;
        s.tokens.push_back(std::move(token));
        return;
      }
      at_ += sql_[at_] == quote;  // doubled
      token.text += sql_[at_];
    }
    s.broken = true;
  }
  void word(Statement& s) {
    const std::size_t begin = at_++;
    if (in_word(sql_[begin]))
      while (at_ < sql_.size() && in_word(sql_[at_]) && !sql_.substr(at_).starts_with("--")) ++at_;
    Token token{begin != end_, {}, {}};
    end_ = at_;
    token.text = token.lower = std::string(sql_.substr(begin, at_ - begin));
    for (char& c : token.lower)
      if (c >= 'A' && c <= 'Z') c = static_cast<char>(c + 32);
    s.tokens.push_back(std::move(token));
  }

  std::string_view sql_;
  std::size_t at_ = 0;
  std::size_t end_ = std::string_view::npos;  // of the last token
};

ConsoleCommand invalid(std::string error) {
  ConsoleCommand command;
  command.error = std::move(error);
  return command;
}

ConsoleCommand unknown(const Statement& s) {
  std::string text(s.text.substr(0, kMostQuoted));
  if (s.text.size() > kMostQuoted) text += "...";
  return invalid("invalid command '" + text + "', use SHOW HELP;");
}

ConsoleCommand plain(Kind kind, std::string_view tag) {
  ConsoleCommand command;
  command.kind = kind;
  command.tag = tag;
  return command;
}

template <class Table>
const auto* find_in(const Table& table, std::string_view word) {
  const auto it = std::find_if(std::begin(table), std::end(table), [&](const auto& row) { return row.first == word; });
  return it == std::end(table) ? nullptr : &*it;
}

ConsoleCommand show(const Statement& s) {
  const auto& t = s.tokens;
  if (t.size() == 4 && t[1].lower == "transaction" && t[2].lower == "isolation") {
    ConsoleCommand command = plain(Kind::Parameter, "SHOW");
    command.name = "transaction_isolation";
    command.value = "read committed";
    return command;
  }
  if (t.size() != 2) return unknown(s);
  if (const auto found = find_show(t[1].lower)) {
    ConsoleCommand command = plain(Kind::Show, "SHOW");
    command.show = *found;
    return command;
  }
  if (const auto* parameter = find_in(kParameters, t[1].lower)) {
    ConsoleCommand command = plain(Kind::Parameter, "SHOW");
    command.name = parameter->first;
    command.value = parameter->second;
    return command;
  }
  ConsoleCommand command = unknown(s);
  std::vector<std::string_view> known;
  for (const auto& [name, what] : kShows) known.push_back(name);
  if (t[0].lower == "show") command.error += conf::did_you_mean(t[1].lower, known);
  return command;
}

ConsoleCommand set(const Statement& s) {
  const auto& t = s.tokens;
  std::size_t at = 1;
  if (t.size() > 2 && (t[1].lower == "session" || t[1].lower == "local")) ++at;
  const std::string& key = t.size() > at ? t[at].lower : std::string();
  if (key == "characteristics" || key == "time" || key == "names" || key == "transaction" || find_in(kParameters, key)) {
    return plain(Kind::SetIgnored, "SET");
  }
  const bool whole = t.size() > at + 2 && (t[at + 1].lower == "=" || t[at + 1].lower == "to");
  if (!whole || std::any_of(t.begin() + static_cast<std::ptrdiff_t>(at) + 3, t.end(), [](const Token& more) { return more.apart; }))
    return invalid("SET takes: SET key = value");
  ConsoleCommand command = plain(Kind::Set, {});
  command.name = t[at].text;
  for (std::size_t i = at + 2; i < t.size(); ++i) command.value += t[i].text;
  command.tag = "SET " + command.name + "=" + command.value;
  return command;
}

ConsoleCommand shutdown(const Statement& s) {
  ConsoleCommand command = plain(Kind::Shutdown, "SHUTDOWN");
  if (s.tokens.size() == 1) return command;
  if (s.tokens.size() == 2 && s.tokens[1].lower == "wait_for_servers")
    command.stop = ConsoleCommand::Stop::WaitForServers;
  else if (s.tokens.size() == 2 && s.tokens[1].lower == "wait_for_clients")
    command.stop = ConsoleCommand::Stop::WaitForClients;
  else
    return unknown(s);
  return command;
}

ConsoleCommand verb(const Verb& verb, const Statement& s) {
  using Argument = Verb::Argument;
  const auto& t = s.tokens;
  ConsoleCommand command = plain(verb.kind, verb.tag);
  if (t.size() > 2 || (t.size() == 2 && verb.argument == Argument::None)) return unknown(s);
  if (t.size() == 2) command.name = t[1].text;
  const bool needed = verb.argument == Argument::Database || (verb.argument == Argument::Maybe && t.size() == 2);
  if (needed && command.name.empty()) return invalid("a database is required");
  if (verb.argument == Argument::Number) {
    const char* end = command.name.data() + command.name.size();
    const auto [stop, ec] = std::from_chars(command.name.data(), end, command.id);
    if (ec != std::errc() || stop != end) return invalid("KILL_CLIENT takes the id of a client, as SHOW CLIENTS has it");
  }
  return command;
}

ConsoleCommand parse(const Statement& s) {
  if (s.broken) return unknown(s);
  const std::string& word = s.tokens.front().lower;
  // As PgBouncer: SELECT is another word for SHOW.
  if (word == "show" || word == "select") return show(s);
  if (word == "set") return set(s);
  if (word == "shutdown") return shutdown(s);
  for (const Verb& one : kVerbs)
    if (one.word == word) return verb(one, s);
  if (const auto* noise = find_in(kNoise, word)) return plain(Kind::Noise, noise->second);
  return unknown(s);
}

}  // namespace

std::optional<Show> find_show(std::string_view name) {
  const auto* found = find_in(kShows, name);
  return found ? std::optional(found->second) : std::nullopt;
}

std::vector<ConsoleCommand> parse_console(std::string_view sql) {
  std::vector<ConsoleCommand> commands;
  Lexer lexer(sql);
  while (const auto statement = lexer.next())
    if (!statement->tokens.empty() || statement->broken) commands.push_back(parse(*statement));
  return commands;
}

}  // namespace pgsidecar::proxy
