// Where the loops spend their CPU time: their stacks, sampled for a bounded time by a timer on each thread's own CPU clock. Needs no
// privilege, and costs nothing but while somebody asks; a thread that sleeps isn't woken. Lives on the control loop.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <string>

namespace pgsidecar::proxy {

class StackSampler {
 public:
  static constexpr int kHz = 97;  ///< of CPU time; no divisor of anybody's period
  static constexpr std::chrono::seconds kMost{30};
  static constexpr std::size_t kThreads = 2, kFrames = 64;  ///< at most 3 MB are kept, while it samples

  explicit StackSampler(boost::asio::io_context& control);
  ~StackSampler();
  StackSampler(const StackSampler&) = delete;
  StackSampler& operator=(const StackSampler&) = delete;

  /// The calling thread is to be sampled, as number 0 or 1. Before sample().
  void add(std::size_t number, std::string name);

  /// `done` gets folded stacks (a line for each: frames from the outermost on, joined by ';', a space, how often), or an error.
  /// One at a time.
  using Done = std::function<void(std::string error, std::string folded)>;
  void sample(std::chrono::seconds time, Done done);

 private:
  struct Thread;
  void end();

  boost::asio::steady_timer timer_;
  std::unique_ptr<Thread> threads_[kThreads];
  Done done_;
};

}  // namespace pgsidecar::proxy
