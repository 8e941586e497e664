// When to look: a sample of the whole proxy once a second for those who follow it (history, alerts, the page's stream), and none
// while nothing happens. Knows nothing of what they do with it. Lives on the control loop; proxy/main.cpp creates it.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "admin/render.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

struct Sample {
  std::shared_ptr<const pool::Snapshot> snapshot;  ///< none: the data loop did not answer within a second
  Process process;
  Clock::time_point at;
  bool rested = false;  ///< between the sample before and this one nothing happened
};

class Monitor {
 public:
  /// Returns after how long it needs another one even if nothing happens.
  using Reader = std::function<std::chrono::seconds(const Sample&)>;
  static constexpr std::chrono::seconds kNever = std::chrono::hours(24 * 365);
  /// Gets a snapshot, and has `happened` called once when anything happens after it was taken; both on the control loop.
  using Ask = std::function<void(std::function<void(std::shared_ptr<const pool::Snapshot>)> done, std::function<void()> happened)>;

  Monitor(boost::asio::io_context& control, Ask ask) : ask_(std::move(ask)), timer_(control) {}
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

  void add(Reader reader) { readers_.push_back(std::move(reader)); }
  void start() { take(); }
  /// Something needs samples from now on.
  void wake();
  bool resting() const { return resting_; }
  /// Nothing is called any more.
  void stop();

 private:
  void take();
  void deliver(std::shared_ptr<const pool::Snapshot> snapshot);
  void on_second();
  void wait(std::chrono::steady_clock::duration time, void (Monitor::*then)());

  const Ask ask_;
  boost::asio::steady_timer timer_;
  std::vector<Reader> readers_;
  bool answered_ = false, happened_ = false, resting_ = false, rested_ = false, stopped_ = false;
  std::chrono::steady_clock::time_point needed_at_{};
};

}  // namespace pgsidecar::admin
