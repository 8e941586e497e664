#include "protocol/notifications.hpp"

namespace pgsidecar::protocol {

std::optional<Notification> parse_notification(Bytes body) {
  Reader reader(body);
  Notification notification;
  notification.pid = reader.u32();
  notification.channel = reader.cstring();
  notification.payload = reader.cstring();
  if (!reader.done()) return std::nullopt;
  return notification;
}

void write_notification(std::string& out, const Notification& n) {
  Writer(out).begin(Backend::NotificationResponse).u32(n.pid).cstring(n.channel).cstring(n.payload).end();
}

void Inbox::add(Entries& to, const Notification& n) {
  to.push_back({0, n.pid, std::string(n.channel), std::string(n.payload)});
  bytes_ += sizeof(Entry) + n.channel.size() + n.payload.size();
}

void Inbox::insert(std::string message) {
  bytes_ += sizeof(Entry) + message.size();
  listener_.push_back({0, 0, {}, std::move(message)});
}

void Inbox::write(const Entry& entry, bool own, Pids pids, std::string& out) {
  if (entry.channel.empty())
    out += entry.payload;
  else
    write_notification(out, {own && entry.pid == pids.server ? pids.client : entry.pid, entry.channel, entry.payload});
}

bool Inbox::marked(const Entries& entries, std::uint64_t marker) {
  return marker != 0 && std::any_of(entries.begin(), entries.end(), [&](const Entry& e) { return e.marker == marker; });
}

void Inbox::clear() {
  Entries().swap(listener_);
  Entries().swap(leased_);
  bytes_ = 0;
}

void Inbox::take(std::uint64_t own, Pids pids, std::string& out) {
  for (const Entry& entry : listener_) {
    if (entry.marker != 0)
      own_ |= entry.marker == own;
    else
      write(entry, own_, pids, out);
  }
  for (const Entry& entry : leased_)
    if (entry.marker == 0) write(entry, true, pids, out);
  clear();
}

Channels Inbox::settle(const HandOver& h, Pids pids, std::string& out) {
  // Without its marker on the leased connection, what that one delivered before can't be told from what it delivered since: the
  // client has said UNLISTEN * in the transaction that began the hand-over.
  const bool leased_began = marked(leased_, h.begin);
  const bool began = leased_began || marked(listener_, h.begin) || !h.now.empty();
  Channels after = h.begin == 0 || !began ? h.before : h.now;
  after.insert(h.now.begin(), h.now.end());

  bool begun = false, ended = false;
  auto entry = listener_.begin();
  for (; entry != listener_.end() && !ended; ++entry) {
    if (entry->marker != 0) {
      begun |= entry->marker == h.begin;
      own_ |= entry->marker == h.begin || entry->marker == h.own;
      ended = entry->marker == h.end;
    } else if (!begun || entry->channel.empty() || (!leased_began && h.now.contains(entry->channel))) {
      write(*entry, own_, pids, out);
    }
  }
  bool leased = !leased_began;
  for (const Entry& e : leased_) {
    leased |= e.marker != 0 && e.marker == h.begin;
    if (e.marker != 0 && e.marker == h.end) break;
    if (e.marker == 0 && leased && (leased_began || !h.before.contains(e.channel))) write(e, true, pids, out);
  }
  for (; entry != listener_.end(); ++entry)
    if (entry->marker == 0 && (entry->channel.empty() || after.contains(entry->channel))) write(*entry, false, pids, out);
  clear();
  own_ = false;
  return after;
}

}  // namespace pgsidecar::protocol
