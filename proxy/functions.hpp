// What is known of a database's own functions: what calling one may leave behind in the session, read from its body. Asked for
// when a function is first called; good for a minute, or until the proxy sees one being made. A function whose body can't be
// read (another language, SQL put together when it runs) has the session looked at after every call.
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "protocol/statements.hpp"

namespace pgsidecar::proxy {

class Functions {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// The residue of calling these and all that they call. With kFunction if it isn't known; then they will be asked for.
  std::uint32_t residue_of(const std::vector<std::string>& names, Time now);
  /// What is to be asked for; the caller does, in one go.
  std::vector<std::string> take_wanted(Time now);
  /// SQL that asks: rows (name, language, owned by an extension, body).
  static std::string question(const std::vector<std::string>& names);
  /// Returns the custom settings that it sets, to be learned.
  std::vector<std::string> answer(const std::string& name, std::string_view language, bool extension, std::string_view body);
  /// All rows have come: what was asked for and has none is no function. `failed`: not all. Returns residue_of the names.
  std::uint32_t answered(const std::vector<std::string>& names, Time now, bool failed);
  void forget();  ///< a function was made or changed

 private:
  struct Known {
    std::uint32_t residue = 0;
    std::vector<std::string> calls;
    Time until{};
  };
  std::uint32_t walk(const std::string& name, Time now, std::vector<const Known*>& visited);

  protocol::StringMap<Known> known_;
  std::vector<std::string> wanted_;
};

}  // namespace pgsidecar::proxy
