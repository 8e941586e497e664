// The table of the configuration's keys: path, how a text becomes its value and back. It alone drives YAML, environment,
// `check`, the comparison at a reload and the suggestions for unknown keys.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "conf/config.hpp"

namespace pgsidecar::conf {

template <class Section>
struct Key {
  std::string_view path;                                  ///< "pool.max"; within PoolSettings "max"
  std::function<void(Section&, const std::string&)> set;  ///< throws std::invalid_argument saying what is expected
  std::function<std::string(const Section&)> get;
  bool needs_restart = false;
};

const std::vector<Key<Config>>& config_keys();  ///< all but upstream, databases, users and alerts.webhooks
const std::vector<Key<PoolSettings>>& pool_keys();
const std::vector<Key<Webhook>>& webhook_keys();
const std::vector<Key<Upstream>>& upstream_keys();  ///< all but url, libpq's keywords and passwordCommand

/// The system gives the one's address to nobody else; `*` is every address.
bool collide(const Listen& one, const Listen& other);

/// "pool.idleTimeoutMillis" -> "PGSIDECAR_POOL_IDLE_TIMEOUT_MILLIS".
std::string environment_name(std::string_view path);

}  // namespace pgsidecar::conf
