// The admin port's endpoints: paths, what each is for, and who may ask. Pure; called by server.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace pgsidecar::admin {

enum class Route {
  Index,
  Health,
  Live,
  Ready,
  Startup,
  PoolStats,
  ComputeHealth,
  Pools,
  History,
  Alerts,
  Profile,
  Stream,
  Clients,
  Servers,
  Queries,
  Leaks,
  Pins,
  Transparency,
  Stacks,
  Config,
  Metrics,
  Reload,
  Drain,
  Upgrade,
  Pause,
  Resume,
  Reconnect,
  CancelClient,
  CloseClient,
  CloseServer,
  ResetQueries,
  Quit
};

struct Endpoint {
  std::string_view path;  ///< "{id}" stands for a number
  Route route;
  std::string_view about;  ///< for the index; empty: an alias

  bool changes() const { return route >= Route::Reload; }
  /// For callers on loopback or with the token only.
  bool names_clients() const { return route >= Route::Clients && route <= Route::Config; }
};

std::span<const Endpoint> endpoints();

struct Match {
  const Endpoint* endpoint = nullptr;
  std::uint64_t id = 0;
};
/// nullopt: there is no such endpoint.
std::optional<Match> find_endpoint(std::string_view path);

/// A parameter of a query string such as "a=1&b=2"; nullopt: it isn't there. Percent-encoding is left as it is.
std::optional<std::string_view> parameter(std::string_view query, std::string_view name);
/// With %XX and + decoded; nullopt: malformed.
std::optional<std::string> decoded(std::string_view value);
/// The same as a number within bounds; `otherwise` if it isn't there, nullopt if it is none.
std::optional<std::uint32_t> number_parameter(std::string_view query, std::string_view name, std::uint32_t otherwise, std::uint32_t min,
                                              std::uint32_t max);

/// What a text client gets at "/".
std::string index_text();

}  // namespace pgsidecar::admin
