// The sockets that clients connect to: opened, or passed on by systemd or by the process whose place this one takes, and passed on to
// the next.
#pragma once

#include <boost/asio/io_context.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "conf/listen.hpp"
#include "proxy/transport.hpp"

namespace pgsidecar::proxy {

class Ports {
 public:
  /// `accepted` gets each client, `peer` being its address or "unix socket". False: it has enough for now, until more().
  Ports(boost::asio::io_context& loop, std::function<bool(Socket socket, std::string peer)> accepted);

  std::optional<KeepAlive> keep_alive;  ///< of clients on other machines; none: the system's

  /// Throws std::runtime_error naming the address and the key to change.
  void open(const std::vector<conf::Listen>& listen, conf::PassedSockets& passed);
  std::vector<conf::Listening> sockets() const;
  void accept();   ///< from now on, or again after suspend()
  void suspend();  ///< who connects waits, or goes to another process that has the sockets
  void more();
  void close(bool unlink);
  /// Who has connected and isn't accepted yet would be reset if the sockets were closed now.
  bool somebody_knocks() const;

 private:
  struct Port {
    conf::Listening socket;
    std::function<void()> accept, cancel, close;
  };
  conf::Listening open_unix(const conf::Listen& where, conf::PassedSockets& passed);
  void add(const conf::Listening& socket);
  template <class Acceptor>
  void add(const conf::Listening& socket, const typename Acceptor::protocol_type& protocol);
  template <class Acceptor>
  void accept(std::shared_ptr<Acceptor> acceptor);

  boost::asio::io_context& loop_;
  std::function<bool(Socket socket, std::string peer)> accepted_;
  std::vector<Port> ports_;
  bool accepting_ = false;
  std::vector<std::function<void()>> enough_;  // those that accept again after more()
};

}  // namespace pgsidecar::proxy
