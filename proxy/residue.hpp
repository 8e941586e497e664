// What a transaction has left in its session, as the server says when it is asked: settings go with the client, the rest pins
// it to its server connection. PostgreSQL documentation, chapter 54 "System Views".
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "pool/pins.hpp"
#include "protocol/notifications.hpp"

namespace pgsidecar::proxy {

/// One row of the server's answer: kind, name, value. Kinds: s setting, r one whose value is what a RESET gives it, d one that is as by
/// default, u session user (values of these as bytes in the database's encoding, in hexadecimal digits), l advisory lock, t temporary
/// object, p prepared statement, c holdable cursor, n channel listened to, q a sequence's value.
using ResidueRow = std::string[3];

struct Residue {
  static constexpr std::size_t kMostDetail = 200;  ///< characters, about
  std::map<std::string, std::string> settings;     ///< names in lower case
  std::set<std::string> as_reset;                  ///< of those, what has the value that a RESET gives it
  std::map<std::string, std::string> defaults;     ///< of those that the server doesn't list, what is as it would be after a RESET
  std::uint32_t reasons = 0;                       ///< to pin; bits of pool::PinReason
  std::string detail;                              ///< their names, the first few
  protocol::Channels channels;                     ///< listened to
  std::vector<std::string> prepared;               ///< prepared statements of the client's that exist under its own names
  bool complete = false;                           ///< all but the sequences is answered
  bool failed = false;                             ///< the server couldn't say

  void add(const ResidueRow& row, std::string_view login_user);
};

/// SQL that asks. `custom_names`: custom settings, which the server doesn't list. `sequences`: also whether the session has taken
/// a sequence's value; an error 55000 in the end says that it hasn't.
std::string residue_sql(const std::vector<std::string>& custom_names, bool sequences);

}  // namespace pgsidecar::proxy
