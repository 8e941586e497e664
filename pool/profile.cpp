#include "pool/profile.hpp"

namespace pgsidecar::pool {

const char* to_string(Phase phase) {
  switch (phase) {
    case Phase::Receive: return "receive";
    case Phase::Send: return "send";
    case Phase::Tls: return "tls";
    case Phase::Wait: return "wait";
    default: return "decide";
  }
}

namespace {

std::int64_t second_of(Lag::Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::seconds>(t.time_since_epoch()).count();
}

}  // namespace

void Lag::record(Clock::time_point due, Clock::time_point ran) {
  const auto late = std::chrono::duration_cast<std::chrono::microseconds>(ran - due).count();
  const auto micros = static_cast<std::uint64_t>(std::max<std::int64_t>(0, late));
  ++count_;
  sum_ += micros;
  max_ = std::max(max_, micros);
  const std::int64_t number = second_of(ran);
  Second& second = seconds_[static_cast<std::size_t>(number) % kSeconds];
  if (second.number != number) second = {number, 0};
  second.worst = std::max(second.worst, micros);
}

std::uint64_t Lag::worst_micros(Clock::time_point now, std::chrono::seconds window) const {
  const std::int64_t last = second_of(now), first = last - window.count();
  std::uint64_t worst = 0;
  for (const Second& second : seconds_)
    if (second.number >= first && second.number <= last) worst = std::max(worst, second.worst);
  return worst;
}

}  // namespace pgsidecar::pool
