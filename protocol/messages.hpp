// Views on the messages that the proxy reads and builders for those it sends. Builders append to a string.
// PostgreSQL documentation, section 55.7 "Message Formats", 55.8 "Error and Notice Message Fields".
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "protocol/wire.hpp"

namespace pgsidecar::protocol {

/// ErrorResponse or NoticeResponse; absent fields are empty.
struct ErrorFields {
  std::string severity, sqlstate, message, detail, hint;
  std::string routine = {};  ///< of the server's source
};
/// Reads a body (without header); nullopt if malformed. A missing SQLSTATE reads as "XX000".
std::optional<ErrorFields> parse_error(Bytes body);

enum class Severity { Error, Fatal };
void write_error(std::string& out, Severity severity, std::string_view sqlstate, std::string_view message, std::string_view detail = {},
                 std::string_view hint = {});
void write_error(std::string& out, Severity severity, const ErrorFields& fields);
/// Another message, and all else as in `body`, an ErrorResponse's.
void write_error_with(std::string& out, Bytes body, std::string_view message);
void write_notice(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint = {});
void write_warning(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint = {});

/// A number for what a message says of a statement's parameters or columns (their names, types and modifiers), 0 if it is none
/// of ParameterDescription, RowDescription and NoData. `seed`: that of the message before.
std::uint32_t shape_of(Backend type, Bytes body, std::uint32_t seed);

/// A StartupMessage: version and parameters in order (user, database and options among them).
struct Startup {
  std::uint32_t version = kProtocol30;
  std::vector<std::pair<std::string, std::string>> parameters;
  std::string_view get(std::string_view name) const;  ///< the last of that name, as the server has it; empty if absent
};
/// Reads the body after the length (the code included); nullopt if malformed.
std::optional<Startup> parse_startup(Bytes body);
void write_startup(std::string& out, const Startup& startup);

void write_ready_for_query(std::string& out, TxStatus status);
void write_parameter_status(std::string& out, std::string_view name, std::string_view value);
void write_backend_key_data(std::string& out, std::uint32_t pid, std::string_view key);
void write_query(std::string& out, std::string_view sql);
void write_terminate(std::string& out);
void write_cancel_request(std::string& out, std::uint32_t pid, std::string_view key);
/// NegotiateProtocolVersion: the newest minor version served and the `_pq_.` options not understood.
void write_negotiate_protocol_version(std::string& out, std::uint32_t version, const std::vector<std::string>& options);

/// Splits `options` of a startup into settings: `-c name=value`, `-cname=value`, `--name=value`; backslash escapes
/// blanks. What names a compute of Neon's is left out, as its proxy does. nullopt if it holds anything else: `complaint` is then what the
/// server says of it (with 42601); empty: it is one of the switches that the server takes besides.
std::optional<std::vector<std::pair<std::string, std::string>>> parse_options(std::string_view options, std::string& complaint);

}  // namespace pgsidecar::protocol
