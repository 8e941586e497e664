// The documents that name clients and statements: who is connected, what the statements cost, which transactions leak.
#include <algorithm>
#include <array>

#include "admin/json.hpp"
#include "admin/render.hpp"

namespace pgsidecar::admin {

using pool::Snapshot;
using pool::StatementRow;

namespace {

template <class T>
void id_or_null(Json& json, std::string_view name, T id) {
  if (id == 0)
    json.null(name);
  else
    json.field(name, std::uint64_t{id});
}

std::uint64_t total_micros(const StatementRow& row) {
  return row.waitMicros + row.serverMicros + row.clientMicros;
}

struct Order {
  std::string_view name;
  double (*weight)(const StatementRow&);
};
constexpr Order kOrders[] = {
    {"total", [](const StatementRow& r) { return static_cast<double>(total_micros(r)); }},
    {"mean", [](const StatementRow& r) { return static_cast<double>(total_micros(r)) / static_cast<double>(r.calls); }},
    {"wait", [](const StatementRow& r) { return static_cast<double>(r.waitMicros); }},
    {"errors", [](const StatementRow& r) { return static_cast<double>(r.errorCount); }},
    {"calls", [](const StatementRow& r) { return static_cast<double>(r.calls); }}};

void write_statement(Json& json, const StatementRow& row, Clock::time_point now) {
  const auto ago = [&](std::uint64_t micros) { return iso8601(now - std::chrono::microseconds(micros)); };
  json.begin('{').field("id", row.id).field("database", row.database).field("user", row.user);
  json.field("statement", row.text).field("calls", row.calls).field("errorCount", row.errorCount).key("errors").begin('{');
  for (const auto& error : row.errors)
    if (error.count > 0) json.field(std::string_view(error.sqlstate.data(), error.sqlstate.size()), error.count);
  json.end('}').field("rows", row.rows).field("bytes", row.bytes);
  json.field("totalMs", millis(total_micros(row))).field("waitMs", millis(row.waitMicros));
  json.field("serverMs", millis(row.serverMicros)).field("clientMs", millis(row.clientMicros));
  json.field("meanMs", millis(static_cast<double>(total_micros(row)) / static_cast<double>(row.calls)));
  json.field("p50Ms", millis(row.time.quantile(0.50))).field("p95Ms", millis(row.time.quantile(0.95)));
  json.field("p99Ms", millis(row.time.quantile(0.99))).field("maxMs", millis(row.time.max_micros()));
  json.field("firstSeen", ago(row.firstMicrosAgo)).field("lastSeen", ago(row.lastMicrosAgo));
  json.field("leftIdle", row.leftIdle).field("tags", row.tags).end('}');
}

}  // namespace

std::string clients_json(const Snapshot& s, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("clients").begin('[');
  for (const auto& c : s.clientRows) {
    json.begin('{').field("id", std::uint64_t{c.id}).field("database", c.database).field("user", c.user);
    json.field("application", c.application).field("peer", c.peer).field("tls", c.tls).field("state", c.state);
    json.field("stateSeconds", seconds(c.stateMicros)).field("connectedSeconds", seconds(c.connectedMicros));
    if (c.transactionMicros == 0)
      json.null("transactionSeconds");
    else
      json.field("transactionSeconds", seconds(c.transactionMicros));
    id_or_null(json, "server", c.server);
    id_or_null(json, "serverPid", c.serverPid);
    id_or_null(json, "request", c.request);
    json.field("statement", c.statement).key("pinned").begin('[');
    pool::for_each_reason(c.pinReasons, [&](pool::PinReason reason) { json.string(pool::to_string(reason)); });
    json.end(']').field("preparedStatements", c.preparedStatements).end('}');
  }
  json.end(']').end('}');
  return json.take();
}

std::string servers_json(const Snapshot& s, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).key("servers").begin('[');
  for (const auto& v : s.serverRows) {
    json.begin('{').field("id", v.id).field("pid", std::uint64_t{v.pid}).field("database", v.database).field("user", v.user);
    json.field("address", v.address).field("local", v.local).field("tls", v.tls).field("state", v.state);
    json.field("stateSeconds", seconds(v.stateMicros)).field("connectedSeconds", seconds(v.connectedMicros));
    json.field("uses", std::uint64_t{v.uses});
    id_or_null(json, "maxUses", v.useLimit);
    id_or_null(json, "client", v.client);
    json.field("application", v.application).field("statement", v.statement);
    json.field("preparedStatements", v.preparedStatements).end('}');
  }
  json.end(']').end('}');
  return json.take();
}

std::string leaks_json(const Snapshot& s, Clock::time_point now) {
  std::uint64_t total = 0;
  for (const auto& p : s.pools) total += p.counters.leaks;
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).field("total", total).key("leaks").begin('[');
  for (const auto& l : s.leaks) {
    json.begin('{').field("client", std::uint64_t{l.client}).field("application", l.application).field("peer", l.peer);
    json.field("database", l.database).field("user", l.user).field("serverPid", std::uint64_t{l.serverPid});
    json.field("ageSeconds", seconds(l.ageMicros)).field("idleSeconds", seconds(l.idleMicros));
    json.field("firstStatement", l.firstStatement).field("lastStatement", l.lastStatement).field("request", l.request).end('}');
  }
  json.end(']').end('}');
  return json.take();
}

bool is_statement_order(std::string_view order) {
  return std::any_of(std::begin(kOrders), std::end(kOrders), [&](const Order& o) { return o.name == order; });
}

std::string statements_json(const Snapshot& s, std::string_view order, std::size_t limit, Clock::time_point now) {
  const Order& by = *std::find_if(std::begin(kOrders), std::end(kOrders) - 1, [&](const Order& o) { return o.name == order; });
  std::vector<const StatementRow*> rows;
  for (const auto& row : s.statements) rows.push_back(&row);
  std::sort(rows.begin(), rows.end(), [&](const auto* a, const auto* b) { return by.weight(*a) > by.weight(*b); });
  if (rows.size() > limit) rows.resize(limit);
  Json json;
  json.begin('{').field("timestamp", iso8601(now));
  json.field("since", iso8601(now - std::chrono::microseconds(s.statementsMicros)));
  json.field("tracked", static_cast<std::uint64_t>(s.statements.size())).field("limit", std::uint64_t{pool::kMostStatements});
  json.field("evicted", s.statementsEvicted).key("queries").begin('[');
  for (const auto* row : rows) write_statement(json, *row, now);
  json.end(']').end('}');
  return json.take();
}

std::string config_json(std::string_view redacted_yaml, Clock::time_point now) {
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).field("yaml", redacted_yaml).end('}');
  return json.take();
}

}  // namespace pgsidecar::admin
