// The other end of the admin port, for the subcommands `healthcheck`, `wait`, `shutdown` and `upgrade`: small
// synchronous requests. Each returns the process's exit code, 0 or 1, and explains a failure on stderr.
#pragma once

#include <chrono>

#include "conf/config.hpp"

namespace pgsidecar::admin {

/// 0 if the pgsidecar at `settings.listen` is alive (GET /health/live).
int healthcheck(const conf::Admin& settings);

/// Asks /health/ready, or with `started` /health/startup, until it says yes or `max` is over.
int wait(const conf::Admin& settings, std::chrono::milliseconds max, bool started);

/// Asks it to end in order: POST /quitquitquit if that is on, else POST /api/admin/drain. Returns when it has
/// agreed, not when it is gone.
int shutdown(const conf::Admin& settings);

/// Asks it to have the binary started anew: POST /api/admin/upgrade. Returns when the new process has taken over, or won't.
int upgrade(const conf::Admin& settings);

}  // namespace pgsidecar::admin
