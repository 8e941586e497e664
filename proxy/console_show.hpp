// The SQL console's tables: a snapshot as PgBouncer 1.25 would show it, and pgsidecar's own. Pure; called by console.cpp on the
// data loop. Columns have PgBouncer's names, order, types and meanings.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "conf/config.hpp"
#include "pool/stats.hpp"
#include "proxy/console_command.hpp"

namespace pgsidecar::proxy {

/// The version of PgBouncer whose console this is.
inline constexpr std::string_view kConsoleVersion = "1.25.0";

/// PostgreSQL's numbers of the types.
enum class ColumnType : std::uint32_t { Bytea = 17, Int8 = 20, Int4 = 23, Text = 25, Numeric = 1700 };

struct Column {
  std::string_view name;
  ColumnType type = ColumnType::Text;
};
using Columns = std::vector<Column>;
using Cell = std::optional<std::string>;  ///< as text; none: NULL

struct Table {
  Columns columns;
  std::vector<std::vector<Cell>> rows;
};

/// The sums of a database that SHOW STATS has, in its order.
enum class Sum : std::uint8_t {
  Assignments,
  Transactions,
  Queries,
  Received,
  Sent,
  TransactionTime,
  QueryTime,
  WaitTime,
  ClientParses,
  ServerParses,
  Binds,
  kCount
};
struct Sums : std::array<std::uint64_t, static_cast<std::size_t>(Sum::kCount)> {
  Sums() { fill(0); }
  std::uint64_t& operator[](Sum s) { return array::operator[](static_cast<std::size_t>(s)); }
  std::uint64_t operator[](Sum s) const { return array::operator[](static_cast<std::size_t>(s)); }
  void add(const pool::PoolCounters& counters);
};
using SumsByDatabase = std::map<std::string, Sums, std::less<>>;

/// What averages are taken from: the sums at two moments at least a minute apart, as PgBouncer does with its stats_period. Nothing
/// wakes an idle proxy for them: whoever is awake calls due() and take(), so that after a rest an average is over the rest too.
class Averages {
 public:
  static constexpr std::chrono::seconds kPeriod{60};

  explicit Averages(pool::Time start) : older_at_(start), newer_at_(start) {}
  bool due(pool::Time now) const { return now - newer_at_ >= kPeriod; }
  void take(SumsByDatabase sums, pool::Time now);
  /// Those that `now` is compared with: one to two periods old.
  const SumsByDatabase& before() const { return older_; }
  pool::Time since() const { return older_at_; }

 private:
  SumsByDatabase older_, newer_;
  pool::Time older_at_, newer_at_;
};

struct ShowInput {
  const pool::Snapshot& snapshot;  ///< with rows
  const conf::Config& config;
  const Averages& averages;
  pool::Time now;
  std::chrono::system_clock::time_point clock;
  /// Sizes of the objects of a client, a server connection and a pool, for SHOW MEM.
  std::size_t client_size = 0, server_size = 0, pool_size = 0;
};

/// Empty for Help, which is a notice.
Columns console_columns(Show what);
Table console_table(Show what, const ShowInput& input);
std::string console_help();
std::string console_version();
/// `value` in the binary format of its column.
std::string to_binary(const Column& column, const std::string& value);

}  // namespace pgsidecar::proxy
