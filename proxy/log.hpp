// The log: spdlog, written by a thread of its own so that no loop waits for a slow reader; when its queue is full the
// oldest lines go. Text or JSON, one event a line.
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <string_view>
#include <utility>

#include "conf/config.hpp"

namespace pgsidecar::proxy::log {

enum class Level { Debug, Info, Warn, Error };

/// What an event is about: ids as the API has them. In JSON each that is given is a key of its own.
struct About {
  std::uint32_t client = 0;
  std::uint64_t server = 0;
  std::uint32_t pid = 0;  ///< the server process's
  std::uint64_t request = 0;
  std::string_view database = {}, user = {}, application = {}, sqlstate = {};
};

bool shows(Level level);
/// Whether a line is to be written. What clients can bring about is bounded: 20 lines of an event in 10 seconds; the next one comes
/// with how many were left out.
bool admits(Level level, std::string_view event);
void write(Level level, std::string_view event, const About& about, std::string_view message);

/// `event` is a snake_case word that stays what it is (README, "Log events"); the message is for people and may change.
template <class... Args>
void log(Level level, std::string_view event, const About& about, fmt::format_string<Args...> format, Args&&... args) {
  if (admits(level, event)) write(level, event, about, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void debug(std::string_view event, const About& about, fmt::format_string<Args...> format, Args&&... args) {
  log(Level::Debug, event, about, format, std::forward<Args>(args)...);
}
template <class... Args>
void info(std::string_view event, const About& about, fmt::format_string<Args...> format, Args&&... args) {
  log(Level::Info, event, about, format, std::forward<Args>(args)...);
}
template <class... Args>
void warn(std::string_view event, const About& about, fmt::format_string<Args...> format, Args&&... args) {
  log(Level::Warn, event, about, format, std::forward<Args>(args)...);
}
template <class... Args>
void error(std::string_view event, const About& about, fmt::format_string<Args...> format, Args&&... args) {
  log(Level::Error, event, about, format, std::forward<Args>(args)...);
}

void start(const conf::Log& settings);
std::size_t footprint();                    ///< of the queue, which is made at start
void set(const conf::Log& settings);        ///< level and format from now on
void show_more(const conf::Log& settings);  ///< what either level shows
/// Writes what is queued, for at most a second: then nobody reads it, and the process ends with this exit code.
void stop(int exit_code);

}  // namespace pgsidecar::proxy::log
