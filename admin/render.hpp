// What the admin port shows: a snapshot and the process's own numbers as JSON (camelCase) and as Prometheus
// series. Decides names, units and health's verdicts; holds no state but which label sets have been shown.
// Called by server.cpp. The JSON documents are in json.cpp, PgBouncer's series in pgbouncer_metrics.cpp, the rest in render.cpp.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "conf/utf8.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

struct Alert;  // alerts.hpp

/// This process as the kernel sees it.
struct Process {
  int pid = 0;
  std::uint64_t residentBytes = 0, virtualBytes = 0;
  std::optional<std::uint64_t> memoryLimitBytes;  ///< the cgroup's, if there is one
  double cpuUserSeconds = 0, cpuSystemSeconds = 0;
  double startTimeSeconds = 0;  ///< since the epoch
  std::uint64_t maxFds = 0;
};
Process read_process();
std::uint64_t count_open_files();  ///< takes its time if they are many

using Clock = std::chrono::system_clock;

/// Ready: listening, not draining, and the database of upstream.url isn't known to be down. Not having heard of it is no reason.
struct Readiness {
  bool ready = false;
  std::string reason;  ///< empty if ready
};
Readiness readiness(const pool::Snapshot& snapshot);

/// unhealthy: not started, or the database of upstream.url is down; degraded: draining, another one is down, or a pool's last
/// connect failed; else healthy.
const char* health_status(const pool::Snapshot& snapshot);

std::string health_json(const pool::Snapshot& snapshot, const Process& process, Clock::time_point now);
std::string ready_json(const pool::Snapshot& snapshot);
std::string pool_stats_json(const pool::Snapshot& snapshot, const std::vector<Alert>& active, Clock::time_point now);
std::string compute_health_json(const pool::Snapshot& snapshot, const Process& process, Clock::time_point now);
/// health and pool-stats in one document on one line, for the page.
std::string sample_json(const pool::Snapshot& snapshot, const Process& process, const std::vector<Alert>& active, Clock::time_point now);
/// The pinned clients: why, after which statement, since when, what ends it.
std::string pins_json(const pool::Snapshot& snapshot, Clock::time_point now);
/// What the statements of each pool meant for their sessions, and whether transaction mode suits them.
std::string transparency_json(const pool::Snapshot& snapshot, Clock::time_point now);
/// The documents of a snapshot with rows: who is connected, and which transactions are left idle.
std::string clients_json(const pool::Snapshot& snapshot, Clock::time_point now);
std::string servers_json(const pool::Snapshot& snapshot, Clock::time_point now);
std::string leaks_json(const pool::Snapshot& snapshot, Clock::time_point now);
/// The pools alone, as in pool-stats.
std::string pools_json(const pool::Snapshot& snapshot, Clock::time_point now);
/// Of a snapshot with statements: the first `limit` by total, mean, wait, errors or calls.
std::string statements_json(const pool::Snapshot& snapshot, std::string_view order, std::size_t limit, Clock::time_point now);
bool is_statement_order(std::string_view order);
std::string config_json(std::string_view redacted_yaml, Clock::time_point now);
/// `hint` says what to do; left out if empty.
std::string error_json(std::string_view error, std::string_view hint = {});

/// Bounds the label sets: the first 64 (database, user) keep their names, all further pools are summed as
/// "other".
class LabelSets {
 public:
  static constexpr std::size_t kLimit = 64;
  bool admit(const std::string& database, const std::string& user);
  bool admit(const std::string& database);  ///< for series by database alone; counted apart

 private:
  std::set<std::pair<std::string, std::string>> pools_;
  std::set<std::string> databases_;
};

using conf::to_utf8;  // names come from clients; JSON and the exposition must stay valid
/// The shortest text that reads back as `value`; 0 for what isn't finite.
std::string number(double value);
double seconds(std::uint64_t micros);

extern const char* const kCommit;  ///< that this was built from; made by CMake

enum class Exposition { Prometheus, OpenMetrics };  ///< text 0.0.4, OpenMetrics 1.0
std::string metrics(const pool::Snapshot& snapshot, const Process& process, const std::vector<Alert>& active, LabelSets& labels,
                    Exposition format);

}  // namespace pgsidecar::admin
