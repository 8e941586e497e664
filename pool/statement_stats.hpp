// What each statement cost, by its normalised text: how often, how long, and for whom its time was spent. The data loop records;
// a copy for whoever asks is made there too. Bounded: at most kMost statements, the heaviest by time staying (space-saving: Metwally,
// Agrawal, El Abbadi, "Efficient Computation of Frequent and Top-k Elements in Data Streams", 2005).
#pragma once

#include <array>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "pool/stats.hpp"

namespace pgsidecar::pool {

/// One execution, as it ended. Times in microseconds.
struct Execution {
  std::uint64_t wait = 0;    ///< for a server connection
  std::uint64_t server = 0;  ///< from sending to the last answer, the client's reading left out
  std::uint64_t client = 0;  ///< in which the client didn't take what was there for it
  std::uint64_t rows = 0, bytes = 0;
  std::string_view sqlstate;  ///< empty: it went well
  std::string_view tags;      ///< of its comment
  std::uint64_t total() const { return wait + server + client; }
};

/// Which record an execution counts for. Of one whose record has made room since, nothing is recorded.
using StatementHandle = std::uint64_t;
inline constexpr StatementHandle kNoStatement = 0;

class StatementStats {
 public:
  static constexpr std::size_t kMost = kMostStatements;  ///< records, of at most about 3.5 KB each
  static constexpr std::size_t kMostText = 1024;         ///< bytes of a text
  static constexpr std::size_t kMostTags = 256;

  /// The record of a statement in a pool (numbered from 1). `sql` is read only if there is none yet. Allocates nothing for one that is
  /// known.
  StatementHandle find(std::uint32_t pool, std::uint64_t fingerprint, std::string_view sql, Time now);
  void record(StatementHandle handle, const Execution& execution, Time now);
  /// The client has taken so long to read what was there for it, after the execution was recorded.
  void add_client_time(StatementHandle handle, std::uint64_t micros);
  void add_left_idle(StatementHandle handle);
  /// The normalised text; empty if the record has made room.
  std::string_view text(StatementHandle handle) const;
  void reset(Time now);

  struct Report {
    std::vector<std::pair<std::uint32_t, StatementRow>> rows;  ///< with the pool's number
    std::uint64_t evicted = 0;
    Time since{};
  };
  Report report() const;
  std::size_t footprint() const;
  explicit StatementStats(Time now) : since_(now) {}

 private:
  struct Record {
    StatementRow row;
    std::uint64_t fingerprint = 0;
    std::uint32_t pool = 0, generation = 1;
  };
  using Key = std::pair<std::uint32_t, std::uint64_t>;
  Record* at(StatementHandle handle);
  std::size_t make_room();

  std::vector<Record> records_;
  std::vector<std::uint64_t> weights_;  // microseconds spent, of records_; a newcomer takes over that of whom it displaces
  boost::unordered_flat_map<Key, std::uint32_t> index_;
  std::array<std::uint32_t, 64> recent_{};  // slots by the low bits of a fingerprint: where to look first
  std::size_t hand_ = 0;                    // so that of equal weights not the same always goes
  std::uint64_t evicted_ = 0, next_id_ = 1;
  Time since_;
};

}  // namespace pgsidecar::pool
