// What the data loop has done elsewhere, so that it never waits: reading secrets, CA bundles, DNS, deriving keys, running the program
// that gives a password. Runs on the control loop; answers are posted back to the data loop.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/thread_pool.hpp>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "conf/config.hpp"
#include "conf/load.hpp"
#include "protocol/scram.hpp"
#include "proxy/password_command.hpp"
#include "proxy/resolver.hpp"
#include "proxy/tls.hpp"
#include "proxy/transport.hpp"

namespace pgsidecar::proxy {

/// An address to try and the host that it belongs to.
struct Target {
  boost::asio::generic::stream_protocol::endpoint endpoint;
  conf::Host host;                                                      ///< with the password that a program gave
  std::optional<PasswordCommands::Clock::time_point> password_since{};  ///< of such a password
};

/// Everything a connect needs, resolved now.
struct Upstream {
  conf::ConnectParams params;
  std::vector<Target> targets;
  std::shared_ptr<SSL_CTX> tls;  ///< null with sslmode=disable
  std::chrono::steady_clock::duration passwords_took{};
  std::string error;  ///< why there is nothing to connect to; then the rest is empty
};

class Control {
 public:
  Control(boost::asio::io_context& control, boost::asio::io_context& data, conf::Environment env)
      : control_(control), data_(data), env_(std::move(env)), resolver_(control), passwords_(control) {}

  using Done = std::function<void(std::shared_ptr<const Upstream>)>;
  /// Called on the data loop; `done` is called there too.
  void resolve(conf::Upstream upstream, Done done);

  /// Called on the data loop; `done` is called there too. It may take seconds, in which the control loop goes on.
  void derive(protocol::ScramDerivation from, std::function<void(const protocol::ScramKeys&)> done);

  /// Called on the data loop: the server has refused what upstream.passwordCommand gave, so that the next resolve() asks for another.
  void forget_password(std::string password);
  void forget_passwords();

  boost::asio::io_context& loop() { return control_; }
  const conf::Environment& environment() const { return env_; }

 private:
  struct Lookup;
  void look_up_next(std::shared_ptr<Lookup> lookup);
  void ask_password(std::shared_ptr<Lookup> lookup, conf::Host host);
  void look_up_addresses(std::shared_ptr<Lookup> lookup, Target target);
  void finish(std::shared_ptr<Lookup> lookup);
  std::shared_ptr<SSL_CTX> context(const conf::ConnectParams& params);

  boost::asio::io_context& control_;
  boost::asio::io_context& data_;
  conf::Environment env_;
  Resolver resolver_;
  PasswordCommands passwords_;
  std::optional<boost::asio::thread_pool> deriver_;           // since the first derivation
  std::map<std::string, std::shared_ptr<SSL_CTX>> contexts_;  // by what makes them differ; control loop only
};

}  // namespace pgsidecar::proxy
