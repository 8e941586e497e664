#include "proxy/console.hpp"

#include <algorithm>
#include <utility>

namespace pgsidecar::proxy {

using Kind = ConsoleCommand::Kind;
using protocol::Backend;
using protocol::Writer;

namespace {

Columns columns_of(const ConsoleCommand& command) {
  if (command.kind == Kind::Show) return console_columns(command.show);
  if (command.kind == Kind::Parameter) return {{command.name}};
  return {};
}

/// The format of a column: 0 text, 1 binary. One format is for all.
std::uint16_t format_of(const std::vector<std::uint16_t>& formats, std::size_t column) {
  if (formats.empty()) return 0;
  return formats.size() == 1 ? formats[0] : formats[std::min(column, formats.size() - 1)];
}

std::uint16_t size_of(ColumnType type) {
  switch (type) {
    case ColumnType::Int4: return 4;
    case ColumnType::Int8: return 8;
    default: return 0xffff;
  }
}

void write_description(std::string& out, const Columns& columns, const std::vector<std::uint16_t>& formats) {
  Writer writer(out);
  if (columns.empty()) {
    writer.begin(Backend::NoData).end();
    return;
  }
  writer.begin(Backend::RowDescription).u16(static_cast<std::uint16_t>(columns.size()));
  for (std::size_t i = 0; i < columns.size(); ++i)
    writer.cstring(columns[i].name)
        .u32(0)
        .u16(0)
        .u32(static_cast<std::uint32_t>(columns[i].type))
        .u16(size_of(columns[i].type))
        .u32(0xffffffff)
        .u16(format_of(formats, i));
  writer.end();
}

void write_row(std::string& out, const Columns& columns, const std::vector<Cell>& row, const std::vector<std::uint16_t>& formats) {
  Writer writer(out);
  writer.begin(Backend::DataRow).u16(static_cast<std::uint16_t>(row.size()));
  for (std::size_t i = 0; i < row.size(); ++i) {
    if (!row[i]) {
      writer.u32(0xffffffff);
      continue;
    }
    const std::string value = format_of(formats, i) == 1 ? to_binary(columns[i], *row[i]) : *row[i];
    writer.u32(static_cast<std::uint32_t>(value.size())).bytes(value);
  }
  writer.end();
}

void write_complete(std::string& out, std::string_view tag) {
  Writer(out).begin(Backend::CommandComplete).cstring(tag).end();
}

void write_help(std::string& out) {
  Writer(out)
      .begin(Backend::NoticeResponse)
      .u8('S')
      .cstring("NOTICE")
      .u8('V')
      .cstring("NOTICE")
      .u8('C')
      .cstring("00000")
      .u8('M')
      .cstring("Console usage")
      .u8('D')
      .cstring(console_help())
      .u8(0)
      .end();
}

/// What is answered without the host: nothing, or a row.
bool answer_itself(const ConsoleCommand& command, std::string& out) {
  switch (command.kind) {
    case Kind::Empty: Writer(out).begin(Backend::EmptyQueryResponse).end(); return true;
    case Kind::SetIgnored: protocol::write_notice(out, "00000", "SET ignored"); [[fallthrough]];
    case Kind::Noise: write_complete(out, command.tag); return true;
    case Kind::Show:
      if (command.show != Show::Help) return false;
      write_help(out);
      write_complete(out, command.tag);
      return true;
    default: return false;
  }
}

std::string_view sqlstate_of(std::string_view error) {
  if (error.starts_with("no such database")) return "3D000";
  if (error.starts_with("SET failed")) return "22023";
  return "55000";
}

}  // namespace

void Console::greet(std::string& out) const {
  const std::string version = std::string(kConsoleVersion) + "/bouncer";
  const std::pair<std::string_view, std::string_view> parameters[] = {{"server_version", version},
                                                                      {"client_encoding", "UTF8"},
                                                                      {"server_encoding", "UTF8"},
                                                                      {"DateStyle", "ISO"},
                                                                      {"TimeZone", "GMT"},
                                                                      {"integer_datetimes", "on"},
                                                                      {"standard_conforming_strings", "on"},
                                                                      {"is_superuser", role_ == ConsoleRole::Admin ? "on" : "off"}};
  for (const auto& [name, value] : parameters) protocol::write_parameter_status(out, name, value);
}

void Console::fail(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint) {
  protocol::write_error(out, protocol::Severity::Error, sqlstate, message, {}, hint);
  queue_.clear();
  discarding_ = !simple_;
}

bool Console::refuse(const ConsoleCommand& command, std::string& out) {
  if (command.kind == Kind::Invalid) return fail(out, "42601", command.error), true;
  if (command.kind == Kind::Suspend)
    return fail(out, "0A000", "SUSPEND is not supported by pgsidecar", "PAUSE closes the server connections and lets clients wait."), true;
  if (command.needs_admin() && role_ != ConsoleRole::Admin)
    return fail(out, "42501", "admin access needed", "admin.users must name \"" + user_ + "\"."), true;
  return false;
}

void Console::run(const ConsoleCommand& command, std::string& out) {
  if (refuse(command, out) || answer_itself(command, out)) return;
  if (command.kind == Kind::Show || command.kind == Kind::Parameter) {
    Table table{columns_of(command), {{command.value}}};
    if (command.kind == Kind::Show) table = host_.table(command.show);
    write_description(out, table.columns, {});
    for (const auto& row : table.rows) write_row(out, table.columns, row, {});
    return write_complete(out, command.tag);
  }
  tag_ = command.tag;
  waiting_ = true;
  host_.perform(command, [this](std::string error) { finish(std::move(error)); });
}

void Console::finish(std::string error, std::string_view sqlstate) {
  if (!waiting_) return;
  waiting_ = false;
  result_.emplace();
  if (error.empty()) return;
  result_->sqlstate = sqlstate.empty() ? sqlstate_of(error) : sqlstate;
  result_->message = std::move(error);
}

void Console::advance(std::string& out) {
  if (waiting_) return;
  if (const auto result = std::exchange(result_, std::nullopt)) {
    if (result->message.empty())
      write_complete(out, tag_);
    else
      fail(out, result->sqlstate, result->message);
    return;
  }
  if (!simple_) return;
  if (queue_.empty()) {
    simple_ = false;
    return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  }
  const ConsoleCommand command = std::move(queue_.front());
  queue_.pop_front();
  run(command, out);
}

void Console::receive(char type, protocol::Bytes body, std::string& out) {
  protocol::Reader in(body);
  if (type == 'S') {
    discarding_ = false;
    portals_.clear();
    return protocol::write_ready_for_query(out, protocol::TxStatus::Idle);
  }
  if (discarding_) return;
  switch (type) {
    case 'Q': {
      const std::string_view sql = in.cstring();
      simple_ = true;
      statements_.erase(std::string());
      portals_.clear();
      if (!in.done()) return fail(out, "08P01", "invalid message format");
      for (auto& command : parse_console(sql)) queue_.push_back(std::move(command));
      if (queue_.empty()) queue_.emplace_back().kind = Kind::Empty;
      return;
    }
    case 'P': return on_parse(in, out);
    case 'B': return on_bind(in, out);
    case 'D': return on_describe(in, out);
    case 'E': return on_execute(in, out);
    case 'C': return on_close(in, out);
    case 'F':
      simple_ = true;  // ends with ReadyForQuery
      return fail(out, "0A000", "function calls are not supported by the console");
    default: return;  // Flush: all that there is has been sent; the rest of a COPY that there wasn't
  }
}

// --- the extended protocol

void Console::on_parse(protocol::Reader& in, std::string& out) {
  const std::string name(in.cstring());
  auto commands = parse_console(in.cstring());
  if (!in.ok()) return fail(out, "08P01", "invalid message format");
  if (commands.size() > 1) return fail(out, "42601", "cannot insert multiple commands into a prepared statement");
  if (!name.empty() && statements_.contains(name)) return fail(out, "42P05", "prepared statement \"" + name + "\" already exists");
  if (statements_.size() >= kMostNames && !name.empty()) return fail(out, "53000", "too many prepared statements");
  ConsoleCommand command;
  command.kind = Kind::Empty;
  if (!commands.empty()) command = std::move(commands.front());
  if (refuse(command, out)) return;
  statements_[name] = std::move(command);
  Writer(out).begin(Backend::ParseComplete).end();
}

void Console::on_bind(protocol::Reader& in, std::string& out) {
  const std::string portal(in.cstring()), name(in.cstring());
  const std::uint16_t parameter_formats = in.u16();
  in.bytes(std::size_t{parameter_formats} * 2);
  const std::uint16_t parameters = in.u16();
  if (in.ok() && parameters > 0) return fail(out, "08P01", "bind message supplies parameters, but commands of the console take none");
  std::vector<std::uint16_t> formats(in.ok() ? std::min<std::size_t>(in.u16(), in.left() / 2) : 0);
  for (auto& format : formats) format = in.u16();
  if (!in.done()) return fail(out, "08P01", "invalid message format");
  const auto statement = statements_.find(name);
  if (statement == statements_.end()) return fail(out, "26000", "prepared statement \"" + name + "\" does not exist");
  const std::size_t columns = columns_of(statement->second).size();
  if (std::any_of(formats.begin(), formats.end(), [](std::uint16_t f) { return f > 1; }) ||
      (formats.size() > 1 && formats.size() != columns))
    return fail(out, "08P01", "bind message has other result formats than the query has columns");
  if (portals_.size() >= kMostNames && !portals_.contains(portal)) return fail(out, "53000", "too many portals");
  portals_[portal] = {statement->second, std::move(formats), std::nullopt, 0};
  Writer(out).begin(Backend::BindComplete).end();
}

void Console::on_describe(protocol::Reader& in, std::string& out) {
  const char what = static_cast<char>(in.u8());
  const std::string_view name = in.cstring();
  if (!in.done() || (what != 'S' && what != 'P')) return fail(out, "08P01", "invalid message format");
  if (what == 'P') {
    const auto portal = portals_.find(name);
    if (portal == portals_.end()) return fail(out, "34000", "portal \"" + std::string(name) + "\" does not exist");
    return write_description(out, columns_of(portal->second.command), portal->second.formats);
  }
  const auto statement = statements_.find(name);
  if (statement == statements_.end()) return fail(out, "26000", "prepared statement \"" + std::string(name) + "\" does not exist");
  Writer(out).begin(Backend::ParameterDescription).u16(0).end();
  write_description(out, columns_of(statement->second), {});
}

void Console::on_execute(protocol::Reader& in, std::string& out) {
  const std::string_view name = in.cstring();
  const std::uint32_t most = in.u32();
  if (!in.done()) return fail(out, "08P01", "invalid message format");
  const auto found = portals_.find(name);
  if (found == portals_.end()) return fail(out, "34000", "portal \"" + std::string(name) + "\" does not exist");
  Portal& portal = found->second;
  const ConsoleCommand& command = portal.command;
  if ((command.kind != Kind::Show || command.show == Show::Help) && command.kind != Kind::Parameter) return run(command, out);
  if (!portal.table) {
    portal.table = Table{columns_of(command), {{command.value}}};
    if (command.kind == Kind::Show) portal.table = host_.table(command.show);
  }
  const auto& rows = portal.table->rows;
  const std::size_t end = most == 0 ? rows.size() : std::min<std::size_t>(rows.size(), portal.next_row + most);
  for (; portal.next_row < end; ++portal.next_row) write_row(out, portal.table->columns, rows[portal.next_row], portal.formats);
  if (portal.next_row < rows.size())
    Writer(out).begin(Backend::PortalSuspended).end();
  else
    write_complete(out, command.tag);
}

void Console::on_close(protocol::Reader& in, std::string& out) {
  const char what = static_cast<char>(in.u8());
  const std::string name(in.cstring());
  if (!in.done() || (what != 'S' && what != 'P')) return fail(out, "08P01", "invalid message format");
  if (what == 'S')
    statements_.erase(name);
  else
    portals_.erase(name);
  Writer(out).begin(Backend::CloseComplete).end();
}

}  // namespace pgsidecar::proxy
