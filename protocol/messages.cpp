#include "protocol/messages.hpp"

#include <algorithm>
#include <boost/container_hash/hash.hpp>
#include <utility>

namespace pgsidecar::protocol {

std::optional<ErrorFields> parse_error(Bytes body) {
  Reader reader(body);
  ErrorFields fields;
  while (reader.ok() && reader.left() > 0) {
    const char code = static_cast<char>(reader.u8());
    if (code == 0) break;
    const std::string_view value = reader.cstring();
    switch (code) {
      case 'S':
        if (fields.severity.empty()) fields.severity = value;
        break;
      case 'V': fields.severity = value; break;  // never translated
      case 'C': fields.sqlstate = value; break;
      case 'M': fields.message = value; break;
      case 'D': fields.detail = value; break;
      case 'H': fields.hint = value; break;
      case 'R': fields.routine = value; break;
      default: break;
    }
  }
  if (!reader.done()) return std::nullopt;
  if (fields.sqlstate.size() != 5) fields.sqlstate = "XX000";
  return fields;
}

namespace {

void write_report(std::string& out, Backend type, std::string_view severity, std::string_view sqlstate, std::string_view message,
                  std::string_view detail, std::string_view hint, std::string_view routine = {}) {
  Writer writer(out);
  writer.begin(type).u8('S').cstring(severity).u8('V').cstring(severity).u8('C').cstring(sqlstate).u8('M').cstring(message);
  if (!detail.empty()) writer.u8('D').cstring(detail);
  if (!hint.empty()) writer.u8('H').cstring(hint);
  if (!routine.empty()) writer.u8('R').cstring(routine);
  writer.u8(0).end();
}

}  // namespace

void write_error(std::string& out, Severity severity, std::string_view sqlstate, std::string_view message, std::string_view detail,
                 std::string_view hint) {
  write_report(out, Backend::ErrorResponse, severity == Severity::Fatal ? "FATAL" : "ERROR", sqlstate, message, detail, hint);
}

void write_error(std::string& out, Severity severity, const ErrorFields& fields) {
  write_report(out, Backend::ErrorResponse, severity == Severity::Fatal ? "FATAL" : "ERROR", fields.sqlstate, fields.message, fields.detail,
               fields.hint, fields.routine);
}

void write_error_with(std::string& out, Bytes body, std::string_view message) {
  Reader reader(body);
  Writer writer(out);
  writer.begin(Backend::ErrorResponse);
  while (const std::uint8_t field = reader.u8()) {
    const std::string_view value = reader.cstring();
    writer.u8(field).cstring(field == 'M' ? message : value);
  }
  writer.u8(0).end();
}

void write_notice(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint) {
  write_report(out, Backend::NoticeResponse, "NOTICE", sqlstate, message, {}, hint);
}

void write_warning(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint) {
  write_report(out, Backend::NoticeResponse, "WARNING", sqlstate, message, {}, hint);
}

std::string_view Startup::get(std::string_view name) const {
  const auto last = std::find_if(parameters.rbegin(), parameters.rend(), [name](const auto& one) { return one.first == name; });
  return last == parameters.rend() ? std::string_view() : std::string_view(last->second);
}

std::uint32_t shape_of(Backend type, Bytes body, std::uint32_t before) {
  std::size_t seed = before;
  Reader reader(body);
  boost::hash_combine(seed, static_cast<char>(type));
  if (type == Backend::ParameterDescription) {
    boost::hash_combine(seed, std::string_view(reinterpret_cast<const char*>(body.data()), body.size()));
  } else if (type == Backend::RowDescription) {
    for (std::uint32_t columns = reader.u16(); columns > 0 && reader.ok(); --columns) {
      boost::hash_combine(seed, reader.cstring());
      reader.bytes(6);  // where it comes from: table and column
      boost::hash_combine(seed, reader.u32());
      reader.bytes(2);  // the type's size
      boost::hash_combine(seed, reader.u32());
      reader.bytes(2);  // the format
    }
  } else if (type != Backend::NoData) {
    return 0;
  }
  return std::max<std::uint32_t>(static_cast<std::uint32_t>(seed ^ seed >> 32), 1);
}

std::optional<Startup> parse_startup(Bytes body) {
  Reader reader(body);
  Startup startup;
  startup.version = reader.u32();
  for (;;) {
    const std::string_view name = reader.cstring();
    if (!reader.ok()) return std::nullopt;
    if (name.empty()) break;
    const std::string_view value = reader.cstring();
    if (!reader.ok()) return std::nullopt;
    startup.parameters.emplace_back(name, value);
  }
  if (!reader.done()) return std::nullopt;
  return startup;
}

void write_startup(std::string& out, const Startup& startup) {
  Writer writer(out);
  writer.begin_untyped().u32(startup.version);
  for (const auto& [name, value] : startup.parameters) writer.cstring(name).cstring(value);
  writer.u8(0).end();
}

void write_ready_for_query(std::string& out, TxStatus status) {
  Writer(out).begin(Backend::ReadyForQuery).u8(static_cast<std::uint8_t>(status)).end();
}

void write_parameter_status(std::string& out, std::string_view name, std::string_view value) {
  Writer(out).begin(Backend::ParameterStatus).cstring(name).cstring(value).end();
}

void write_backend_key_data(std::string& out, std::uint32_t pid, std::string_view key) {
  Writer(out).begin(Backend::BackendKeyData).u32(pid).bytes(key).end();
}

void write_query(std::string& out, std::string_view sql) {
  Writer(out).begin(Frontend::Query).cstring(sql).end();
}

void write_terminate(std::string& out) {
  Writer(out).begin(Frontend::Terminate).end();
}

void write_cancel_request(std::string& out, std::uint32_t pid, std::string_view key) {
  Writer(out).begin_untyped().u32(kCancelRequest).u32(pid).bytes(key).end();
}

void write_negotiate_protocol_version(std::string& out, std::uint32_t version, const std::vector<std::string>& options) {
  Writer writer(out);
  writer.begin(Backend::NegotiateProtocolVersion).u32(version).u32(static_cast<std::uint32_t>(options.size()));
  for (const std::string& option : options) writer.cstring(option);
  writer.end();
}

namespace {

/// The server's command-line switches that a client may bring, and what they set. PostgreSQL documentation, reference of postgres.
struct Switch {
  char letter;
  const char* setting;
  const char* value;  // null: the switch's argument
};
constexpr Switch kSwitches[] = {{'B', "shared_buffers", nullptr},
                                {'e', "datestyle", "euro"},
                                {'F', "fsync", "false"},
                                {'h', "listen_addresses", nullptr},
                                {'i', "listen_addresses", "*"},
                                {'k', "unix_socket_directories", nullptr},
                                {'l', "ssl", "true"},
                                {'N', "max_connections", nullptr},
                                {'O', "allow_system_table_mods", "true"},
                                {'P', "ignore_system_indexes", "true"},
                                {'p', "port", nullptr},
                                {'S', "work_mem", nullptr},
                                {'s', "log_statement_stats", "true"},
                                {'W', "post_auth_delay", nullptr}};

/// The others that it takes (process_postgres_switches).
constexpr std::string_view kOtherSwitches = "CDETbdfjnrtv";

/// Which of its computes a client of Neon's wants; its proxy takes that out of the options.
bool is_neons(std::string_view word) {
  return word.starts_with("endpoint=") || word.starts_with("project=") || (word.starts_with("neon_") && word.find(':') != word.npos);
}

}  // namespace

std::optional<std::vector<std::pair<std::string, std::string>>> parse_options(std::string_view options, std::string& complaint) {
  std::vector<std::string> words;
  for (std::size_t i = 0; i < options.size();) {
    const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\v' || c == '\f'; };
    if (blank(options[i])) {
      ++i;
      continue;
    }
    std::string word;
    while (i < options.size() && !blank(options[i])) {
      if (options[i] == '\\' && ++i == options.size()) break;
      word += options[i++];
    }
    words.push_back(std::move(word));
  }
  std::vector<std::pair<std::string, std::string>> settings;
  const auto refused = [&](const std::string& word) {
    complaint = "invalid command-line argument for server process: " + word;
    return std::nullopt;
  };
  const auto assign = [&](const char* before, std::string_view text) {
    const std::size_t equals = text.find('=');
    if (equals == std::string_view::npos) complaint = before + std::string(text) + " requires a value";
    if (equals == std::string_view::npos || equals == 0) return false;
    std::string name(text.substr(0, equals));
    std::replace(name.begin(), name.end(), '-', '_');  // as the server does
    settings.emplace_back(std::move(name), text.substr(equals + 1));
    return true;
  };
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::string_view word = words[i];
    if (word.starts_with("--")) {
      if (!assign("--", word.substr(2))) return std::nullopt;
      continue;
    }
    if (is_neons(word)) continue;
    if (word.size() < 2 || word[0] != '-') return refused(words[i]);
    for (word.remove_prefix(1); !word.empty();) {  // as getopt does: letters in a row, the last of them with an argument
      const char letter = word[0];
      word.remove_prefix(1);
      const auto known = std::find_if(std::begin(kSwitches), std::end(kSwitches), [=](const Switch& s) { return s.letter == letter; });
      if (kOtherSwitches.find(letter) != kOtherSwitches.npos) return std::nullopt;
      if (letter != 'c' && known == std::end(kSwitches)) return refused(words[i]);
      if (letter != 'c' && known->value) {
        settings.emplace_back(known->setting, known->value);
        continue;
      }
      if (word.empty()) {
        if (++i == words.size()) return refused(words.back());
        word = words[i];
      }
      const std::string_view argument = std::exchange(word, {});
      if (letter != 'c')
        settings.emplace_back(known->setting, argument);
      else if (!assign("-c ", argument))
        return std::nullopt;
    }
  }
  return settings;
}

}  // namespace pgsidecar::protocol
