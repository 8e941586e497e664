// The admin port: health, statistics and metrics for anyone who reaches it, changes for callers on loopback
// or with the token. Decides who may do what and how long a request may take; what the numbers look like is
// render.hpp's, what an action does is the callbacks'. Lives on the control loop only; proxy/main.cpp creates
// it.
#pragma once

#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "admin/alerts.hpp"
#include "admin/monitor.hpp"
#include "conf/config.hpp"
#include "conf/listen.hpp"
#include "pool/stats.hpp"

namespace pgsidecar::admin {

class Server {
 public:
  using SnapshotReceiver = std::function<void(std::shared_ptr<const pool::Snapshot>)>;

  /// Called on the control loop; the receivers they are given must be called back there, at once or later.
  struct Callbacks {
    std::function<void(pool::Snapshot::Detail, SnapshotReceiver)> snapshot;
    std::function<void(SnapshotReceiver)> probe;  ///< asks the database first
    /// reload, drain or quit; returns empty on success, then with what a reload has changed, or an error text.
    std::function<std::string(std::string_view action, std::vector<std::string>& changes)> act;
    /// Has a new process take over; `done` gets why none has, or which.
    std::function<void(std::function<void(std::string error, int pid)> done)> upgrade;
    /// Done on the data loop; `done` gets empty or why it couldn't be, on the control loop.
    std::function<void(const pool::Command&, std::function<void(std::string error)> done)> command;
    std::function<std::string(std::uint32_t window, std::uint32_t step)> history;     ///< a document
    std::function<std::string(const pool::Snapshot&, std::uint32_t window)> profile;  ///< a document; of a snapshot with memory
    /// Samples stacks for so long; `done` gets an error or what was found, on the control loop.
    std::function<void(std::chrono::seconds, std::function<void(std::string error, std::string folded)> done)> stacks;
    std::function<std::string()> alerts;  ///< a document
    std::function<std::vector<Alert>()> active_alerts;
    std::function<std::string()> config;  ///< YAML, redacted
    std::function<void()> wake;           ///< samples are needed: publish() is to be called
  };

  Server(boost::asio::io_context& control, const conf::Admin& settings, Callbacks callbacks);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// Opens what `listen` says and takes what was passed on for the admin port. Does nothing if the port is off. Throws
  /// std::runtime_error with a text that names the key if it can't listen.
  void listen(conf::PassedSockets& passed);
  /// Accepts connections.
  void begin();
  std::vector<conf::Listening> listening() const;  ///< the sockets
  /// All but the port counts from now on.
  void set(const conf::Admin& settings);
  /// The port listened on; 0 before listen().
  std::uint16_t port() const;
  /// Tells those who read the stream. Returns when the next sample is needed, as Monitor::Reader does.
  std::chrono::seconds publish(const Sample& sample);
  /// Closes the listener and idle connections. A request in progress still gets its answer; callbacks aren't
  /// called again.
  void stop();

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace pgsidecar::admin
