#include "pool/stats.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pgsidecar::pool {

// Values below 16 have a bucket each; above, the four bits after the leading one choose among 16 buckets of
// their power of two. What is longer than 2^36 microseconds (19 hours) counts in the last bucket.
std::size_t Histogram::index(std::uint64_t micros) {
  if (micros < 16) return static_cast<std::size_t>(micros);
  const unsigned exponent = static_cast<unsigned>(std::bit_width(micros)) - 1;
  const std::size_t i = (exponent - 3u) * std::size_t{16} + ((micros >> (exponent - 4)) & 15u);
  return std::min(i, kBuckets - 1);
}

std::uint64_t Histogram::upper(std::size_t index) {
  if (index < 16) return index;
  const std::size_t shift = index / 16 - 1;
  return ((std::uint64_t{16} + index % 16 + 1) << shift) - 1;
}

double Histogram::quantile(double q) const {
  // The buckets' own sum, so that a rank always ends in a bucket.
  std::uint64_t total = 0;
  for (const auto n : counts_) total += n;
  if (total == 0) return 0;
  if (q >= 1) return static_cast<double>(max_);
  const double rank = std::max(1.0, std::ceil(std::max(q, 0.0) * static_cast<double>(total)));

  double before = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    const double n = static_cast<double>(counts_[i]);
    if (before + n < rank) {
      before += n;
      continue;
    }
    if (i + 1 == kBuckets) break;  // no upper end
    const double low = i == 0 ? 0 : static_cast<double>(upper(i - 1) + 1);
    const auto high = static_cast<double>(upper(i));
    const double share = (rank - before - 0.5) / n;
    return std::min(low + (high - low) * share, static_cast<double>(max_));
  }
  return static_cast<double>(max_);
}

std::uint64_t Histogram::count_at_most(std::uint64_t micros) const {
  if (micros >= max_) return count_;
  std::uint64_t n = 0;
  for (std::size_t i = 0, last = index(micros); i <= last; ++i) n += counts_[i];
  return n;
}

void Histogram::merge(const Histogram& other) {
  for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
  count_ += other.count_;
  sum_ += other.sum_;
  max_ = std::max(max_, other.max_);
}

const char* to_string(CloseReason reason) {
  switch (reason) {
    case CloseReason::Idle: return "idle";
    case CloseReason::MaxUses: return "max_uses";
    case CloseReason::Lifetime: return "lifetime";
    case CloseReason::Error: return "error";
    case CloseReason::AdminShutdown: return "admin_shutdown";
    case CloseReason::Tls: return "tls";
    case CloseReason::Broken: return "broken";
    case CloseReason::Reload: return "reload";
    case CloseReason::Drain: return "drain";
    case CloseReason::kCount: break;
  }
  return "unknown";
}

const char* to_string(RejectReason reason) {
  switch (reason) {
    case RejectReason::MaxClients: return "max_clients";
    case RejectReason::Auth: return "auth";
    case RejectReason::Timeout: return "timeout";
    case RejectReason::Draining: return "draining";
    case RejectReason::Protocol: return "protocol";
    case RejectReason::UnknownDatabase: return "unknown_database";
    case RejectReason::kCount: break;
  }
  return "unknown";
}

}  // namespace pgsidecar::pool
