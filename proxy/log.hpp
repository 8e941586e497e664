// The log: spdlog, written by a thread of its own so that no loop waits for a slow reader; when its queue is full the
// oldest lines go. Text or JSON, one event a line.
#pragma once

#include <spdlog/spdlog.h>

#include "conf/config.hpp"

namespace pgsidecar::proxy::log {

using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::warn;

void start(const conf::Log& settings);
void stop();  ///< writes what is queued

}  // namespace pgsidecar::proxy::log
