// What a pool knows of its upstream's addresses: which are tried last because they have failed lately, and which its hosts' names no
// longer have. Decides only; an address is any text that tells it from others, time is an argument.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <set>
#include <string>

#include "pool/stats.hpp"

namespace pgsidecar::pool {

class Addresses {
 public:
  /// Nobody answers there, or not as target_session_attrs asks.
  void failed(const std::string& address, Time now);
  void worked(const std::string& address) { failures_.erase(address); }
  bool failed_lately(const std::string& address, Time now) const;

  /// What a host's name was found to have.
  void answered(const std::string& host, const std::set<std::string>& addresses, Time now);
  /// The name has other addresses now. One that has a few of many in turn is known by those that come back: theirs count on.
  bool gone(const std::string& host, const std::string& address, Time now) const;

 private:
  struct Failure {
    Time until{};
    std::uint32_t times = 0;
  };
  struct Name {
    std::map<std::string, Time> seen;  ///< last
    Time answered{}, in_turn_until{};
  };
  static constexpr std::chrono::minutes kTurn{10};
  static constexpr std::size_t kMost = 1000;

  std::map<std::string, Failure> failures_;
  std::map<std::string, Name> names_;
};

}  // namespace pgsidecar::pool
