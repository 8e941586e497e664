// A client session that is a session of the SQL console: what it shows and has done is the Worker's. Made by client_login.cpp.
#pragma once

#include <memory>
#include <string>

#include "proxy/console.hpp"

namespace pgsidecar::proxy {

class ClientSession;
class Worker;

class ClientConsole : public ConsoleHost {
 public:
  ClientConsole(Worker& worker, ClientSession& client, ConsoleRole role, std::string user, std::string its_database)
      : session(*this, role, std::move(user)), database(std::move(its_database)), worker_(worker), client_(client) {}

  Table table(Show what) override;
  void perform(const ConsoleCommand& command, std::function<void(std::string error)> done) override;

  Console session;
  const std::string database;

 private:
  Worker& worker_;
  ClientSession& client_;
};

}  // namespace pgsidecar::proxy
