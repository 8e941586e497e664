#include "admin/routes.hpp"

#include <algorithm>
#include <charconv>

namespace pgsidecar::admin {

namespace {

constexpr std::string_view kId = "{id}";

constexpr Endpoint kEndpoints[] = {
    {"/", Route::Index, "this list; a browser gets the page"},
    {"/health", Route::Health, "everything at a glance; 503 if unhealthy"},
    {"/health/live", Route::Live, "200 as long as the process works, also while draining"},
    {"/health/ready", Route::Ready, "503 while draining or while the database is known to be down"},
    {"/health/startup", Route::Startup, "200 once listening"},
    {"/metrics", Route::Metrics, "Prometheus text, or OpenMetrics if Accept asks"},
    {"/api/monitoring/pool-stats", Route::PoolStats, "the pools: counts, utilization, wait and query times"},
    {"/api/monitoring/pools", Route::Pools, "each pool alone"},
    {"/api/monitoring/compute-health", Route::ComputeHealth, "process and database; ?probe=1 asks the database now"},
    {"/api/monitoring/history", Route::History, "?window=300&step=1, seconds: the last minutes, hours, day"},
    {"/api/monitoring/alerts", Route::Alerts, "what is wrong now and what was lately; how telling the webhooks goes"},
    {"/api/monitoring/profile", Route::Profile, "?window=10, seconds: the loops' load and lag, where turns spend time, who holds memory"},
    {"/api/monitoring/stream", Route::Stream, "health and pool-stats every second, as server-sent events"},
    {"/api/monitoring/clients", Route::Clients, "who is connected, what each does, since when"},
    {"/api/monitoring/servers", Route::Servers, "server connections, and who holds them"},
    {"/api/monitoring/queries", Route::Queries, "statements: ?sort=total|mean|wait|errors|calls&limit=50"},
    {"/api/monitoring/leaks", Route::Leaks, "transactions that are left idle"},
    {"/api/monitoring/pins", Route::Pins, "clients that keep their server connection: why, since when, what ends it"},
    {"/api/monitoring/transparency", Route::Transparency, "which statements were carried, checked or pinned; is transaction mode safe?"},
    {"/api/monitoring/profile/stacks", Route::Stacks, "?seconds=5, at most 30: what the loops' CPU time is spent in, as folded stacks"},
    {"/api/monitoring/config", Route::Config, "the configuration in use, secrets redacted"},
    {"/api/admin/reload", Route::Reload, "reads the configuration again"},
    {"/api/admin/drain", Route::Drain, "finishes what is active, then ends"},
    {"/api/admin/upgrade", Route::Upgrade, "starts the binary anew, which takes over; this process serves the clients that it has"},
    {"/api/admin/pause", Route::Pause, "?database=NAME, or all: closes server connections as they are released, clients wait"},
    {"/api/admin/resume", Route::Resume, "?database=NAME, or all: ends a pause"},
    {"/api/admin/reconnect", Route::Reconnect, "?database=NAME, or all: replaces server connections as they are released"},
    {"/api/admin/clients/{id}/cancel", Route::CancelClient, "cancels what the client has asked for"},
    {"/api/admin/clients/{id}/close", Route::CloseClient, "closes the client's connection (57P01)"},
    {"/api/admin/servers/{id}/close", Route::CloseServer, "closes the server connection; who holds it gets 57P01"},
    {"/api/admin/queries/reset", Route::ResetQueries, "begins the statements' statistics anew"},
    {"/quitquitquit", Route::Quit, "ends the process (if admin.quitquitquit is on)"},
    {"/healthz", Route::Health, {}},
    {"/livez", Route::Live, {}},
    {"/liveness", Route::Live, {}},
    {"/readyz", Route::Ready, {}},
    {"/readiness", Route::Ready, {}},
    {"/startup", Route::Startup, {}}};

template <class Number>
std::optional<Number> whole_number(std::string_view text) {
  Number n{};
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (ec != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return n;
}

}  // namespace

std::span<const Endpoint> endpoints() {
  return kEndpoints;
}

std::optional<Match> find_endpoint(std::string_view path) {
  for (const Endpoint& e : kEndpoints) {
    if (e.path == path) return Match{&e, 0};
    const auto at = e.path.find(kId);
    if (at == std::string_view::npos || !path.starts_with(e.path.substr(0, at))) continue;
    const std::string_view tail = e.path.substr(at + kId.size());
    if (path.size() <= at + tail.size() || !path.ends_with(tail)) continue;
    if (const auto id = whole_number<std::uint64_t>(path.substr(at, path.size() - at - tail.size()))) return Match{&e, *id};
  }
  return std::nullopt;
}

std::optional<std::string_view> parameter(std::string_view query, std::string_view name) {
  while (!query.empty()) {
    const auto end = std::min(query.find('&'), query.size());
    const auto part = query.substr(0, end);
    const auto equals = std::min(part.find('='), part.size());
    if (part.substr(0, equals) == name) return part.substr(std::min(equals + 1, part.size()));
    query.remove_prefix(std::min(end + 1, query.size()));
  }
  return std::nullopt;
}

std::optional<std::string> decoded(std::string_view value) {
  std::string out;
  for (std::size_t i = 0; i < value.size(); ++i) {
    unsigned byte = 0;
    if (value[i] != '%') {
      out += value[i] == '+' ? ' ' : value[i];
      continue;
    }
    const std::string_view digits = value.substr(i + 1, 2);
    const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), byte, 16);
    if (digits.size() != 2 || ec != std::errc() || end != digits.data() + 2) return std::nullopt;
    out += static_cast<char>(byte);
    i += 2;
  }
  return out;
}

std::optional<std::uint32_t> number_parameter(std::string_view query, std::string_view name, std::uint32_t otherwise, std::uint32_t min,
                                              std::uint32_t max) {
  const auto text = parameter(query, name);
  if (!text) return otherwise;
  const auto n = whole_number<std::uint32_t>(*text);
  return n && *n >= min && *n <= max ? n : std::nullopt;
}

std::string index_text() {
  std::string text = "pgsidecar " PGSIDECAR_VERSION "\n\n";
  for (const auto& e : endpoints()) {
    if (e.about.empty()) continue;
    std::string line = e.changes() ? "POST " : "GET  ";
    line += e.path;
    line.resize(std::max<std::size_t>(line.size() + 2, 40), ' ');
    text.append(line).append(e.about).append("\n");
  }
  return text;
}

}  // namespace pgsidecar::admin
