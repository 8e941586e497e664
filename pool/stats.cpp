#include "pool/stats.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

namespace pgsidecar::pool {

// Values below kSteps have a bucket each; above, the kBits bits after the leading one choose among the buckets of their power of two.
template <unsigned kBits, class Count>
std::size_t LogHistogram<kBits, Count>::index(std::uint64_t micros) {
  if (micros < kSteps) return static_cast<std::size_t>(micros);
  const unsigned exponent = static_cast<unsigned>(std::bit_width(micros)) - 1;
  const std::size_t i = (exponent - kBits + 1) * kSteps + ((micros >> (exponent - kBits)) & (kSteps - 1));
  return std::min(i, kBuckets - 1);
}

template <unsigned kBits, class Count>
std::uint64_t LogHistogram<kBits, Count>::upper(std::size_t index) {
  if (index < kSteps) return index;
  const std::size_t shift = index / kSteps - 1;
  return ((std::uint64_t{kSteps} + index % kSteps + 1) << shift) - 1;
}

template <unsigned kBits, class Count>
double LogHistogram<kBits, Count>::quantile(double q) const {
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

template <unsigned kBits, class Count>
std::uint64_t LogHistogram<kBits, Count>::count_at_most(std::uint64_t micros) const {
  if (micros >= max_) return count_;
  std::uint64_t n = 0;
  for (std::size_t i = 0, last = index(micros); i <= last; ++i) n += counts_[i];
  return n;
}

template <unsigned kBits, class Count>
void LogHistogram<kBits, Count>::merge(const LogHistogram& other) {
  for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
  count_ += other.count_;
  sum_ += other.sum_;
  max_ = std::max(max_, other.max_);
}

template <unsigned kBits, class Count>
LogHistogram<kBits, Count> LogHistogram<kBits, Count>::since(const LogHistogram& earlier) const {
  LogHistogram out;
  std::size_t last = 0;
  for (std::size_t i = 0; i < kBuckets; ++i) {
    out.counts_[i] = counts_[i] - earlier.counts_[i];
    if (out.counts_[i] != 0) last = i;
  }
  out.count_ = count_ - earlier.count_;
  out.sum_ = sum_ - earlier.sum_;
  if (out.count_ > 0) out.max_ = max_ > earlier.max_ ? max_ : upper(last);
  return out;
}

template class LogHistogram<4, std::uint64_t>;
template class LogHistogram<3, std::uint32_t>;

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
    case CloseReason::Surplus: return "surplus";
    case CloseReason::Login: return "login";
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
    case RejectReason::Tls: return "tls";
    case RejectReason::Unsupported: return "unsupported";
    case RejectReason::Server: return "server";
    case RejectReason::Disabled: return "disabled";
    case RejectReason::kCount: break;
  }
  return "unknown";
}

}  // namespace pgsidecar::pool
