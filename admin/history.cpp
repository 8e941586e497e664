#include "admin/history.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "admin/json.hpp"

namespace pgsidecar::admin {

namespace {

struct Resolution {
  std::uint32_t step, slots;
};
constexpr Resolution kRings[] = {{1, 300}, {10, 360}, {60, 1440}};
constexpr std::array kQuantiles = {0.50, 0.95, 0.99};

std::int64_t epoch_seconds(Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::seconds>(t.time_since_epoch()).count();
}

}  // namespace

History::History() {
  for (const Resolution& r : kRings) rings_.push_back({r.step, std::vector<Step>(r.slots), {}, {}});
}

void History::add(const Sample& taken) {
  if (!taken.snapshot) return;
  const pool::Snapshot& s = *taken.snapshot;
  const Clock::time_point now = taken.at;
  if (taken.rested) rest(now - std::chrono::seconds(1));
  Totals totals;
  Step sample;
  for (const auto& p : s.pools) {
    totals.transactions += p.counters.transactions;
    totals.queries += p.counters.queries;
    totals.wait.merge(p.counters.wait);
    totals.query.merge(p.counters.query);
    sample.waiting += static_cast<float>(p.clientsWaiting);
    sample.active += static_cast<float>(p.serversActive);
    sample.idle += static_cast<float>(p.serversIdle);
    sample.login += static_cast<float>(p.serversLogin);
    sample.other += static_cast<float>(p.serversReset + p.serversClosing);
    sample.max += static_cast<float>(p.max);
  }
  for (const auto& [sqlstate_class, n] : s.errorsByClass) totals.errors += n;
  totals.cpuSeconds = taken.process.cpuUserSeconds + taken.process.cpuSystemSeconds;
  sample.clients = static_cast<float>(s.clients);
  sample.memoryMb = static_cast<float>(megabytes(taken.process.residentBytes));
  if (!last_) {  // what came before isn't this second's
    last_ = totals;
    last_at_ = now - std::chrono::seconds(1);
  }
  // The clock may have been set; a gap isn't counted as time that was seen.
  sample.seconds = std::clamp(std::chrono::duration<float>(now - last_at_).count(), 0.001f, 2.0f);
  sample.transactions = static_cast<float>(totals.transactions - last_->transactions);
  sample.queries = static_cast<float>(totals.queries - last_->queries);
  sample.errors = static_cast<float>(totals.errors - last_->errors);
  sample.cpuSeconds = static_cast<float>(totals.cpuSeconds - last_->cpuSeconds);
  const pool::Histogram wait = totals.wait.since(last_->wait), query = totals.query.since(last_->query);
  for (Ring& ring : rings_) add_to(ring, sample, wait, query, epoch_seconds(now));
  last_step_ = sample;
  last_ = totals;
  last_at_ = now;
}

void History::rest(Clock::time_point until) {
  const std::int64_t begin = epoch_seconds(last_at_) + 1, end = epoch_seconds(until) + 1;
  if (!last_ || begin >= end) return;
  Step nothing = last_step_;
  nothing.transactions = nothing.queries = nothing.errors = nothing.cpuSeconds = 0;
  for (Ring& ring : rings_) {
    const std::int64_t step = ring.step, reach = step * static_cast<std::int64_t>(ring.slots.size());
    for (std::int64_t from = std::max(begin, end - reach); from < end;) {
      const std::int64_t to = std::min(end, (from / step + 1) * step);
      nothing.seconds = static_cast<float>(to - from);
      add_to(ring, nothing, {}, {}, from);
      from = to;
    }
  }
  last_at_ = until;
}

void History::add_to(Ring& ring, const Step& sample, const pool::Histogram& wait, const pool::Histogram& query, std::int64_t second) {
  const std::int64_t number = second / ring.step;
  Step& step = ring.slots[static_cast<std::size_t>(number) % ring.slots.size()];
  if (step.number != number) {
    step = {};
    step.number = number;
    ring.wait = ring.query = {};
  }
  ring.wait.merge(wait);
  ring.query.merge(query);
  step.seconds += sample.seconds;
  step.transactions += sample.transactions;
  step.queries += sample.queries;
  step.errors += sample.errors;
  step.cpuSeconds += sample.cpuSeconds;
  step.memoryMb = sample.memoryMb;
  for (const auto gauge : {&Step::clients, &Step::waiting, &Step::active, &Step::idle, &Step::login, &Step::other, &Step::max})
    step.*gauge = std::max(step.*gauge, sample.*gauge);
  for (std::size_t i = 0; i < kQuantiles.size(); ++i) {
    step.wait[i] = ring.wait.count() == 0 ? -1 : static_cast<float>(millis(ring.wait.quantile(kQuantiles[i])));
    step.query[i] = ring.query.count() == 0 ? -1 : static_cast<float>(millis(ring.query.quantile(kQuantiles[i])));
  }
}

std::string History::json(std::uint32_t window, std::uint32_t step, Clock::time_point now) const {
  const auto reaches = [&](const Ring& r) { return std::uint64_t{r.step} * r.slots.size() >= window && r.step >= step; };
  const auto it = std::find_if(rings_.begin(), rings_.end(), reaches);
  const Ring& ring = it == rings_.end() ? rings_.back() : *it;
  const auto count = std::min<std::size_t>(ring.slots.size(), std::max<std::size_t>(1, window / ring.step));
  const std::int64_t last = epoch_seconds(now) / ring.step;
  const std::int64_t first = last - static_cast<std::int64_t>(count) + 1;
  const auto at = [&](std::int64_t number) -> const Step* {
    const Step& s = ring.slots[static_cast<std::size_t>(number) % ring.slots.size()];
    return s.number == number ? &s : nullptr;
  };
  const auto end_of = [&](std::int64_t number) { return Clock::time_point(std::chrono::seconds((number + 1) * ring.step)); };
  Json json;
  json.begin('{').field("timestamp", iso8601(now)).field("from", iso8601(end_of(first - 1)));
  json.field("step", std::uint64_t{ring.step}).key("t").begin('[');
  for (std::int64_t n = first; n <= last; ++n) json.string(iso8601(end_of(n)));
  json.end(']').key("series").begin('{');
  const auto series = [&](std::string_view name, auto value) {
    json.key(name).begin('[');
    for (std::int64_t n = first; n <= last; ++n) {
      const Step* s = at(n);
      const double v = s ? static_cast<double>(value(*s)) : -1;
      json.raw(v < 0 ? "null" : number(std::round(v * 1000) / 1000));
    }
    json.end(']');
  };
  const auto rate = [&](std::string_view name, float Step::*member) { series(name, [=](const Step& s) { return s.*member / s.seconds; }); };
  const auto gauge = [&](std::string_view name, float Step::*member) { series(name, [=](const Step& s) { return s.*member; }); };
  rate("transactions", &Step::transactions);
  rate("queries", &Step::queries);
  rate("errors", &Step::errors);
  constexpr const char* kNames[] = {"P50Ms", "P95Ms", "P99Ms"};
  for (std::size_t i = 0; i < kQuantiles.size(); ++i) series(std::string("wait") + kNames[i], [=](const Step& s) { return s.wait[i]; });
  for (std::size_t i = 0; i < kQuantiles.size(); ++i) series(std::string("query") + kNames[i], [=](const Step& s) { return s.query[i]; });
  gauge("clients", &Step::clients);
  gauge("clientsWaiting", &Step::waiting);
  gauge("serversActive", &Step::active);
  gauge("serversIdle", &Step::idle);
  gauge("serversLogin", &Step::login);
  gauge("serversOther", &Step::other);
  gauge("max", &Step::max);
  rate("cpu", &Step::cpuSeconds);
  gauge("memoryMb", &Step::memoryMb);
  json.end('}').end('}');
  return json.take();
}

std::size_t History::footprint() const {
  std::size_t bytes = 0;
  for (const Ring& ring : rings_) bytes += sizeof ring + ring.slots.capacity() * sizeof(Step);
  return bytes;
}

}  // namespace pgsidecar::admin
