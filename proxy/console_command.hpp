// What is typed at the SQL console: PgBouncer's commands, and what drivers say of their own accord. Pure; called by console.cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace pgsidecar::proxy {

/// The tables that SHOW has.
enum class Show : std::uint8_t {
  ActiveSockets,
  Clients,
  Config,
  Databases,
  DnsHosts,
  DnsZones,
  Fds,
  Help,
  Leaks,
  Lists,
  Mem,
  PeerPools,
  Peers,
  Pins,
  Pools,
  PreparedStatements,
  Servers,
  Sockets,
  State,
  Stats,
  StatsAverages,
  StatsTotals,
  Totals,
  Users,
  Version,
};
std::optional<Show> find_show(std::string_view name);  ///< in lower case

struct ConsoleCommand {
  /// Parameter: SHOW of a setting that drivers ask for. Noise: transactions and the like, which mean nothing here.
  enum class Kind : std::uint8_t {
    Invalid,
    Empty,
    Show,
    Parameter,
    Noise,
    SetIgnored,
    Set,
    Reload,
    Pause,
    Resume,
    Reconnect,
    Disable,
    Enable,
    Kill,
    KillClient,
    WaitClose,
    Shutdown,
    Suspend,
  };
  enum class Stop : std::uint8_t { Now, WaitForServers, WaitForClients };

  Kind kind = Kind::Invalid;
  Show show{};
  Stop stop{};
  std::uint64_t id = 0;     ///< KillClient
  std::string name, value;  ///< a database or a key; its value
  std::string tag;          ///< CommandComplete's
  std::string error;        ///< of Invalid

  bool needs_admin() const { return kind >= Kind::Set || (kind == Kind::Show && show == Show::Fds); }
};

/// Each statement of `sql`, empty ones left out. One that can't be read is Invalid, with what is wrong.
std::vector<ConsoleCommand> parse_console(std::string_view sql);

}  // namespace pgsidecar::proxy
