// Why a client keeps its server connection beyond its transactions, and which statements made it so: names and bounded
// records, written by the data loop, copied into snapshots.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace pgsidecar::pool {

enum class PinReason : std::uint8_t {
  AdvisoryLock,
  TemporaryObject,
  PreparedStatement,  ///< made by SQL
  HeldCursor,
  Listening,
  Sequence,    ///< currval and lastval are used, and this session has taken a value
  Unexamined,  ///< the server couldn't be asked
  BackendPid,
  RandomSeed,
  Library,
  CustomSetting,  ///< whose name isn't written out, so that the server can't be asked for it
  Unreadable,     ///< a text too long to be looked at, or not understood
  Meaning,        ///< a statement prepared under the settings of its transaction
  kCount
};
/// Only the client's leaving ends it.
constexpr bool lasts(PinReason reason) {
  return reason >= PinReason::BackendPid;
}
const char* to_string(PinReason reason);
const char* ends(PinReason reason);  ///< what ends such a pin, in words
constexpr std::uint32_t bit(PinReason reason) {
  return 1u << static_cast<unsigned>(reason);
}
template <class F>
void for_each_reason(std::uint32_t reasons, F&& f) {
  for (unsigned i = 0; i < static_cast<unsigned>(PinReason::kCount); ++i)
    if (reasons >> i & 1) f(static_cast<PinReason>(i));
}
using PinCounts = std::array<std::uint64_t, static_cast<std::size_t>(PinReason::kCount)>;

/// A pinned client, as the API shows it.
struct PinSnapshot {
  std::uint32_t client = 0, serverPid = 0;
  std::string database, user, application;
  std::uint32_t reasons = 0;      ///< bits
  std::string detail, statement;  ///< what the server named; the text after which it was found
  std::uint64_t micros = 0;       ///< for how long
};

/// What a statement meant for the session, counted by its normalised text.
struct StatementEffects {
  std::string statement;
  std::uint64_t checked = 0;  ///< the server was asked what the session holds
  std::uint64_t carried = 0;  ///< settings that go with the client
  std::uint64_t pinned = 0;
  std::uint32_t reasons = 0;  ///< of the pins
};

/// What a function of the database's was found to leave in the session that calls it, read from its body.
struct FunctionEffects {
  std::string function;
  std::vector<std::string> leaves;
};

/// The statements that needed more than a plain transaction. Bounded: when full, the least counted makes room.
class Transparency {
 public:
  static constexpr std::size_t kMost = 100;
  void record(std::string_view statement, bool checked, bool carried, std::uint32_t reasons);
  std::vector<StatementEffects> rows() const;  ///< most pinned first, then most counted
  std::uint64_t dropped() const { return dropped_; }
  std::size_t footprint() const;

 private:
  std::map<std::string, StatementEffects, std::less<>> rows_;
  std::uint64_t dropped_ = 0;
};

}  // namespace pgsidecar::pool
