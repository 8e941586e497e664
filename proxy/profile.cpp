// Who holds the memory, reckoned when asked: sizes and capacities, no walk through what a client can
// make long. Part of Worker, ClientSession and ServerConnection.
#include "protocol/footprint.hpp"
#include "proxy/client_console.hpp"
#include "proxy/worker.hpp"

namespace pgsidecar::proxy {

using protocol::footprint;
using protocol::footprint_of_nodes;
using protocol::footprint_of_slots;

namespace {

// OpenSSL takes, as measured with 3.0 on both sides of a TLS 1.3 connection that has moved bytes; counting its calls of malloc would
// cost more than all the rest, since it makes dozens for each record.
constexpr std::size_t kTlsOfClient = 17 * 1024, kTlsOfServer = 58 * 1024;

std::size_t footprint_of(const Channel& channel) {
  if (!channel.transport.is_tls()) return channel.footprint();
  return channel.footprint() + (SSL_is_server(channel.transport.ssl()) ? kTlsOfClient : kTlsOfServer);
}

}  // namespace

std::size_t ClientSession::footprint() const {
  std::size_t bytes = sizeof *this + protocol::kNode + footprint_of(channel_) + statements.footprint() +
                      (unanswered_ ? sizeof *unanswered_ + unanswered_->pending.footprint() + unanswered_->deallocations.footprint() : 0);
  if (console_) bytes += sizeof *console_;
  if (subscriber_) bytes += sizeof *subscriber_;
  return bytes;
}

std::size_t ServerConnection::footprint() const {
  std::size_t bytes = sizeof *this + protocol::kNode + footprint_of_nodes(parameters_) + statements.footprint();
  bytes += protocol::footprint(running.portals) + protocol::footprint(adopted_) + footprint_of_nodes(unclosed_);
  return bytes + (channel_ ? footprint_of(*channel_) : 0);
}

pool::MemoryOwners Worker::memory() const {
  pool::MemoryOwners owners;
  owners.clients = footprint_of_slots(clients_);
  for (const auto& [id, client] : clients_) owners.clients += client->footprint();
  owners.statements = statements.footprint() + sql_memory.footprint();
  owners.statistics = statement_stats.footprint();
  for (const auto& [key, entry] : pools_) {
    owners.statistics += sizeof *entry + entry->transparency.footprint();
    owners.settings += entry->settings.footprint();
    owners.catalog += entry->catalog.footprint();
    owners.servers += footprint_of_slots(entry->servers);
    for (const auto& [id, server] : entry->servers) owners.servers += server->footprint();
  }
  owners.log = log::footprint();
  return owners;
}

}  // namespace pgsidecar::proxy
