#include "proxy/log.hpp"

// The words of `log.level`.
#define SPDLOG_LEVEL_NAMES \
  { "trace", "debug", "info", "warn", "error", "critical", "off" }
#include <spdlog/async.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "conf/utf8.hpp"

namespace pgsidecar::proxy::log {

namespace {

constexpr std::size_t kQueue = 1024;

constexpr char kSeparator = '\x1e';  // in what the logger is given: event, JSON of the keys, message

/// On one line: what clients call themselves can't make a second one, nor end a JSON string.
template <class Out>
void append_escaped(Out& out, std::string_view text, bool json) {
  for (const char c : conf::to_utf8(text)) {
    const auto u = static_cast<unsigned char>(c);
    if (json && (c == '"' || c == '\\')) out.push_back('\\');
    if (u >= 0x20 && u != 0x7f)
      out.push_back(c);
    else
      fmt::format_to(std::back_inserter(out), "\\u{:04x}", u);
  }
}

class EventFormatter : public spdlog::custom_flag_formatter {
 public:
  explicit EventFormatter(bool json) : json_(json) {}
  void format(const spdlog::details::log_msg& message, const std::tm&, spdlog::memory_buf_t& out) override {
    const std::string_view all(message.payload.data(), message.payload.size());
    const auto event = all.find(kSeparator), keys = all.find(kSeparator, event + 1);
    const std::string_view text = all.substr(keys + 1);
    if (!json_) {
      fmt::format_to(std::back_inserter(out), "[{}] ", all.substr(0, event));
      return append_escaped(out, text, false);
    }
    fmt::format_to(std::back_inserter(out), "\"event\":\"{}\",{}\"message\":\"", all.substr(0, event),
                   all.substr(event + 1, keys - event - 1));
    append_escaped(out, text, true);
    out.push_back('"');
  }
  std::unique_ptr<custom_flag_formatter> clone() const override { return std::make_unique<EventFormatter>(json_); }

 private:
  const bool json_;
};

spdlog::level::level_enum level_of(Level level) {
  switch (level) {
    case Level::Debug: return spdlog::level::debug;
    case Level::Info: return spdlog::level::info;
    case Level::Warn: return spdlog::level::warn;
    case Level::Error: break;
  }
  return spdlog::level::err;
}

void append_key(std::string& out, const char* name, std::uint64_t value) {
  if (value != 0) out += "\"" + std::string(name) + "\":" + std::to_string(value) + ",";
}

void append_key(std::string& out, const char* name, std::string_view value) {
  if (value.empty()) return;
  out += "\"" + std::string(name) + "\":\"";
  append_escaped(out, value, true);
  out += "\",";
}

/// Of lines that the queue had no room for, when it has some again.
void tell_overrun() {
  static std::atomic<std::size_t> told{0};
  const auto queue = spdlog::thread_pool();
  if (!queue || queue->overrun_counter() == told || queue->queue_size() > kQueue / 2) return;
  const std::size_t all = queue->overrun_counter();
  if (const std::size_t lines = all - told.exchange(all); lines > 0)
    spdlog::warn("events_left_out{0}{0}{1} lines were not shown, since nobody read the log", kSeparator, lines);
}

}  // namespace

bool shows(Level level) {
  return spdlog::should_log(level_of(level));
}

bool admits(Level level, std::string_view event) {
  if (!shows(level)) return false;
  // Those of operators are a record of what was done.
  static constexpr std::array<std::string_view, 4> kUnbounded{"console_command", "operator", "reload", "setting"};
  if (level == Level::Debug || std::find(kUnbounded.begin(), kUnbounded.end(), event) != kUnbounded.end()) return true;
  constexpr std::uint64_t kMost = 20;
  struct Window {
    std::chrono::steady_clock::time_point begun{};
    std::uint64_t lines = 0;
  };
  static std::mutex mutex;
  static std::map<std::string, Window, std::less<>> windows;
  std::uint64_t left_out = 0;
  bool admitted = false;
  {
    const std::lock_guard lock(mutex);
    auto it = windows.find(event);
    if (it == windows.end()) it = windows.emplace(event, Window()).first;
    Window& window = it->second;
    const auto now = std::chrono::steady_clock::now();
    if (now - window.begun >= std::chrono::seconds(10)) {
      left_out = window.lines - std::min(window.lines, kMost);
      window = {now, 0};
    }
    admitted = ++window.lines <= kMost;
  }
  if (left_out > 0) write(Level::Warn, "events_left_out", {}, fmt::format("{} more lines {} were not shown", left_out, event));
  return admitted;
}

void write(Level level, std::string_view event, const About& about, std::string_view message) {
  std::string line(event);
  line += kSeparator;
  append_key(line, "client", about.client);
  append_key(line, "server", about.server);
  append_key(line, "pid", about.pid);
  append_key(line, "request", about.request);
  append_key(line, "database", about.database);
  append_key(line, "user", about.user);
  append_key(line, "application", about.application);
  append_key(line, "sqlstate", about.sqlstate);
  line += kSeparator;
  line += message;
  try {
    tell_overrun();
    spdlog::log(level_of(level), std::string_view(line));
  } catch (const spdlog::spdlog_ex&) {  // stop() has ended the queue
  }
}

void start(const conf::Log& settings) {
  if (!spdlog::thread_pool()) spdlog::init_thread_pool(kQueue, 1);
  auto logger = std::make_shared<spdlog::async_logger>("", std::make_shared<spdlog::sinks::stdout_sink_mt>(), spdlog::thread_pool(),
                                                       spdlog::async_overflow_policy::overrun_oldest);
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  set(settings);
}

void set(const conf::Log& settings) {
  auto formatter = std::make_unique<spdlog::pattern_formatter>(spdlog::pattern_time_type::utc);
  const bool json = settings.format == conf::LogFormat::Json;
  formatter->add_flag<EventFormatter>('*', json).set_pattern(json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l",%*})"
                                                                  : "%Y-%m-%dT%H:%M:%S.%eZ %l %*");
  spdlog::set_formatter(std::move(formatter));
  spdlog::set_level(spdlog::level::from_str(settings.level));
}

void show_more(const conf::Log& settings) {
  spdlog::set_level(std::min(spdlog::level::from_str(settings.level), spdlog::get_level()));
}

std::size_t footprint() {
  return spdlog::thread_pool() ? (kQueue + 1) * sizeof(spdlog::details::async_msg) : 0;
}

void stop(int exit_code) {
  auto done = std::make_shared<std::promise<void>>();
  std::thread([done] {
    spdlog::details::registry::instance().set_tp(nullptr);  // ends the queue and not the logger, which others may be using
    done->set_value();
  }).detach();
  if (done->get_future().wait_for(std::chrono::seconds(1)) != std::future_status::ready) std::_Exit(exit_code);
}

}  // namespace pgsidecar::proxy::log
