#include "proxy/log.hpp"

#include <spdlog/async.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <cstdlib>
#include <future>
#include <memory>
#include <thread>

#include "conf/utf8.hpp"

namespace pgsidecar::proxy::log {

namespace {

constexpr std::size_t kQueue = 1024;

/// The message on one line: what clients call themselves can't make a second one, nor end a JSON string.
class OneLine : public spdlog::custom_flag_formatter {
 public:
  explicit OneLine(bool json) : json_(json) {}
  void format(const spdlog::details::log_msg& message, const std::tm&, spdlog::memory_buf_t& out) override {
    for (const char c : conf::to_utf8({message.payload.data(), message.payload.size()})) {
      const auto u = static_cast<unsigned char>(c);
      if (json_ && (c == '"' || c == '\\')) out.push_back('\\');
      if (u >= 0x20 && u != 0x7f)
        out.push_back(c);
      else
        fmt::format_to(std::back_inserter(out), "\\u{:04x}", u);
    }
  }
  std::unique_ptr<custom_flag_formatter> clone() const override { return std::make_unique<OneLine>(json_); }

 private:
  const bool json_;
};

}  // namespace

void start(const conf::Log& settings) {
  if (!spdlog::thread_pool()) spdlog::init_thread_pool(kQueue, 1);
  auto logger = std::make_shared<spdlog::async_logger>("", std::make_shared<spdlog::sinks::stdout_sink_mt>(), spdlog::thread_pool(),
                                                       spdlog::async_overflow_policy::overrun_oldest);
  logger->set_level(spdlog::level::from_str(settings.level));
  logger->flush_on(spdlog::level::info);
  auto formatter = std::make_unique<spdlog::pattern_formatter>(spdlog::pattern_time_type::utc);
  const bool json = settings.format == conf::LogFormat::Json;
  formatter->add_flag<OneLine>('*', json).set_pattern(json ? R"({"time":"%Y-%m-%dT%H:%M:%S.%eZ","level":"%l","message":"%*"})"
                                                           : "%Y-%m-%dT%H:%M:%S.%eZ %l %*");
  logger->set_formatter(std::move(formatter));
  spdlog::set_default_logger(std::move(logger));
}

void stop(int exit_code) {
  auto done = std::make_shared<std::promise<void>>();
  std::thread([done] {
    spdlog::shutdown();
    done->set_value();
  }).detach();
  if (done->get_future().wait_for(std::chrono::seconds(1)) != std::future_status::ready) std::_Exit(exit_code);
}

}  // namespace pgsidecar::proxy::log
