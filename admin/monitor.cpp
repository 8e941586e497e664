#include "admin/monitor.hpp"

#include <algorithm>

namespace pgsidecar::admin {

namespace {

using std::chrono::steady_clock;
constexpr std::chrono::seconds kPeriod{1};

}  // namespace

void Monitor::wake() {
  happened_ = true;
  if (resting_) take();
}

void Monitor::stop() {
  stopped_ = true;
  timer_.cancel();
}

void Monitor::take() {
  if (stopped_) return;
  rested_ = std::exchange(resting_, false);
  happened_ = answered_ = false;
  wait(kPeriod, &Monitor::on_second);
  ask_(
      [this](std::shared_ptr<const pool::Snapshot> snapshot) {
        answered_ = true;
        deliver(std::move(snapshot));
      },
      [this] { wake(); });
}

void Monitor::deliver(std::shared_ptr<const pool::Snapshot> snapshot) {
  if (stopped_) return;
  const Sample sample{std::move(snapshot), read_process(), Clock::now(), rested_};
  std::chrono::seconds needed = kNever;
  for (const Reader& reader : readers_) needed = std::min(needed, reader(sample));
  needed_at_ = steady_clock::now() + needed;
}

void Monitor::on_second() {
  if (!answered_) {  // it isn't asked anew before it has answered
    deliver(nullptr);
    return wait(kPeriod, &Monitor::on_second);
  }
  const auto now = steady_clock::now();
  if (happened_ || needed_at_ <= now + kPeriod) return take();
  resting_ = true;
  wait(needed_at_ - now, &Monitor::take);
}

void Monitor::wait(steady_clock::duration time, void (Monitor::*then)()) {
  timer_.expires_after(time);
  timer_.async_wait([this, then](const boost::system::error_code& ec) {
    if (!ec) (this->*then)();
  });
}

}  // namespace pgsidecar::admin
