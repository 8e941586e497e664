// Passwords that a program gives (upstream.passwordCommand): cloud providers' tokens, which live for minutes, or what a vault has.
// Decides when the program is run: once for all who ask meanwhile, and again when what it gave is too old or the server has refused
// it. Never waits for it: its output is looked at every few milliseconds. Used by Control, on the control loop alone.
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace pgsidecar::proxy {

class PasswordCommands {
 public:
  using Clock = std::chrono::steady_clock;

  /// What to run, and for whose login: the program finds that in PGHOST, PGPORT and PGUSER.
  struct Command {
    std::vector<std::string> argv;  ///< not empty
    std::string host;
    unsigned port = 0;
    std::string user;
    std::chrono::milliseconds timeout{};
    std::chrono::seconds cache{};  ///< how long the password is given to those who ask later; 0: not at all
  };
  struct Answer {
    std::string password, error;  ///< one of them; an error names the program and holds the first line that it said on stderr
    Clock::time_point since{};    ///< when the program was started that gave it
  };
  using Done = std::function<void(const Answer&)>;

  explicit PasswordCommands(boost::asio::io_context& control);
  ~PasswordCommands();  ///< ends what is running

  void get(const Command& command, Done done);  ///< `done` is called at once if the password is known
  void forget(const std::string& password);     ///< the server has refused it
  void forget_all();

 private:
  class Run;
  struct Entry {
    Answer known;
    Clock::time_point until{};
    std::chrono::seconds cache{};
    std::unique_ptr<Run> run;
    std::vector<Done> waiting;
  };
  void look();
  void look_later();

  boost::asio::steady_timer timer_;
  bool looking_ = false;
  std::map<std::vector<std::string>, Entry> entries_;  // by what makes the password another
};

}  // namespace pgsidecar::proxy
