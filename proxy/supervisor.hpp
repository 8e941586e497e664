// The process's life: the data loop and the control loop with its thread, signals, reload, drain, the online restart, the admin port.
// Joined to admin by callbacks, which main.cpp makes.
#pragma once

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "conf/load.hpp"
#include "proxy/control.hpp"
#include "proxy/file_watch.hpp"
#include "proxy/launch.hpp"
#include "proxy/notify.hpp"
#include "proxy/stacks.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

/// Keeps what the process is told until a Supervisor takes it: process 1 would never hear of it.
void hold_signals();

class Supervisor {
 public:
  Supervisor(std::string config_path, std::shared_ptr<const conf::Config> config, conf::Environment env, Program program);

  boost::asio::io_context& control_loop() { return control_loop_; }

  /// Copies the statistics on the data loop and hands them over on the control loop.
  using SnapshotDone = std::function<void(std::shared_ptr<const pool::Snapshot>)>;
  void snapshot(pool::Snapshot::Detail detail, SnapshotDone done);
  void probe(SnapshotDone done);
  /// A snapshot without details; `happened` is called once, on the control loop, when anything happens after it was taken.
  void watch(SnapshotDone done, std::function<void()> happened);
  /// Reload from the same file: empty, and what it has changed a line each, or why nothing was changed. On the control loop.
  std::string reload(std::vector<std::string>* lines = nullptr);
  std::function<void()> on_reloaded;  ///< on the control loop; config() is the new one
  void drain();
  /// Has the data loop do it; `done` gets empty or why it couldn't, on the control loop.
  void command(const pool::Command& command, std::function<void(std::string error)> done);
  /// What the loops do, sampled; on the control loop.
  void stacks(std::chrono::seconds time, StackSampler::Done done) { stacks_.sample(time, std::move(done)); }
  const conf::Config& config() const { return *config_; }  ///< on the control loop
  /// Starts the binary anew and hands the sockets over. `done` gets an error or the new process's id. On the control loop.
  using UpgradeDone = std::function<void(std::string error, int pid)>;
  void upgrade(UpgradeDone done);
  std::function<std::vector<conf::Listening>()> other_sockets;  ///< that are handed over too
  void status(const std::string& line) { notifier_.status(line); }

  /// Listens, then runs until stopped. `listening` is called once clients are accepted, `stopping` when they aren't any more and at the
  /// end. Returns the exit code.
  int run(conf::PassedSockets& passed, std::function<void()> listening, std::function<void()> stopping);

 private:
  void wait_signal();
  void shut_down();
  void listen(conf::PassedSockets& passed, std::function<void()> listening);
  void become_main();
  void launch_with(std::vector<conf::Listening> sockets);
  void finish_upgrade(const std::string& error, int pid);
  /// For the console: RELOAD, SET, SHUTDOWN. On the control loop.
  std::string request(const ConsoleCommand& command);
  std::string set(const std::string& key, const std::string& value);

  std::string config_path_;
  std::shared_ptr<const conf::Config> config_;  // control loop's view
  conf::Environment env_;
  boost::asio::io_context data_loop_{BOOST_ASIO_CONCURRENCY_HINT_UNSAFE_IO};
  boost::asio::io_context control_loop_{1};
  Control control_;
  Worker worker_;
  pool::Lag control_lag_;
  StackSampler stacks_{control_loop_};
  boost::asio::signal_set signals_;
  FileWatch files_;                      // of the configuration
  std::set<std::string> changed_files_;  // since it was last loaded
  Program program_;
  Notifier notifier_;
  std::function<void()> stopping_;
  UpgradeDone upgrade_done_;  // one is under way
  int successor_ = 0;         // the process that has taken over
  int starting_ = 0;          // the one that is about to
  bool signalled_ = false;
  int exit_code_ = 0;
};

}  // namespace pgsidecar::proxy
