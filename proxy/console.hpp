// A session of the SQL console: simple and extended queries, without a server connection. Decides what each message is answered
// with; tables and deeds are its host's, sockets and the login the client session's. One deed at a time: while one is under way
// nothing more is read.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "protocol/messages.hpp"
#include "proxy/console_command.hpp"
#include "proxy/console_show.hpp"

namespace pgsidecar::proxy {

/// What a console shows and has done.
class ConsoleHost {
 public:
  virtual ~ConsoleHost() = default;
  virtual Table table(Show what) = 0;
  /// `done` gets empty or why it couldn't be, at once or later.
  virtual void perform(const ConsoleCommand& command, std::function<void(std::string error)> done) = 0;
};

enum class ConsoleRole : std::uint8_t { Stats, Admin };

class Console {
 public:
  static constexpr std::uint32_t kMaxMessage = 32 * 1024;
  static constexpr std::size_t kMostNames = 100;  ///< prepared statements, and portals

  Console(ConsoleHost& host, ConsoleRole role, std::string user) : host_(host), role_(role), user_(std::move(user)) {}
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  const std::string& user() const { return user_; }
  /// ParameterStatus of all that a session is told.
  void greet(std::string& out) const;
  /// Takes a message that isn't Terminate. Only while idle().
  void receive(char type, protocol::Bytes body, std::string& out);
  bool idle() const { return !waiting_ && !result_ && !simple_; }
  /// There is more to answer of what was received: advance() does the next step.
  bool has_work() const { return result_ || (simple_ && !waiting_); }
  void advance(std::string& out);
  bool waiting() const { return waiting_; }  ///< for the host
  void finish(std::string error, std::string_view sqlstate = {});

 private:
  struct Portal {
    ConsoleCommand command;
    std::vector<std::uint16_t> formats;
    std::optional<Table> table;  ///< while rows of it are left
    std::size_t next_row = 0;
  };

  void run(const ConsoleCommand& command, std::string& out);
  void fail(std::string& out, std::string_view sqlstate, std::string_view message, std::string_view hint = {});
  bool refuse(const ConsoleCommand& command, std::string& out);
  void on_parse(protocol::Reader& in, std::string& out);
  void on_bind(protocol::Reader& in, std::string& out);
  void on_describe(protocol::Reader& in, std::string& out);
  void on_execute(protocol::Reader& in, std::string& out);
  void on_close(protocol::Reader& in, std::string& out);

  ConsoleHost& host_;
  const ConsoleRole role_;
  const std::string user_;
  std::deque<ConsoleCommand> queue_;  // of the Query that is being answered
  bool simple_ = false;               // a Query is
  bool waiting_ = false, discarding_ = false;
  std::optional<protocol::ErrorFields> result_;  // of what was waited for; no message: it is done
  std::string tag_;                              // what is told then
  std::map<std::string, ConsoleCommand, std::less<>> statements_;
  std::map<std::string, Portal, std::less<>> portals_;
};

}  // namespace pgsidecar::proxy
