#include "pool/addresses.hpp"

#include <algorithm>

namespace pgsidecar::pool {

void Addresses::failed(const std::string& address, Time now) {
  if (failures_.size() >= kMost) failures_.clear();
  Failure& failure = failures_[address];
  failure.until = now + std::chrono::seconds(10) * (1u << std::min(failure.times, 4u));
  ++failure.times;
}

bool Addresses::failed_lately(const std::string& address, Time now) const {
  const auto it = failures_.find(address);
  return it != failures_.end() && now < it->second.until;
}

void Addresses::answered(const std::string& host, const std::set<std::string>& addresses, Time now) {
  Name& name = names_[host];
  std::erase_if(name.seen, [&](const auto& one) { return now - one.second >= kTurn; });
  for (const std::string& address : addresses) {
    const auto [it, is_new] = name.seen.try_emplace(address, now);
    if (!is_new && it->second < name.answered) name.in_turn_until = now + kTurn;
    it->second = now;
  }
  name.answered = now;
}

bool Addresses::gone(const std::string& host, const std::string& address, Time now) const {
  const auto name = names_.find(host);
  if (name == names_.end()) return false;
  const auto seen = name->second.seen.find(address);
  if (seen == name->second.seen.end()) return true;
  return seen->second < name->second.answered && now >= name->second.in_turn_until;
}

}  // namespace pgsidecar::pool
