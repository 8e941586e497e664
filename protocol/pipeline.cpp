#include "protocol/pipeline.hpp"

namespace pgsidecar::protocol {

bool Pipeline::push(const Owed& owed) {
  if (owed.request == Request::Sync) {
    // In COPY the server ignores Sync. Whether it still is in COPY can't be known here, so the Sync waits if a failure would need it: of
    // the data before it, or, as long as there is none, of what the server does ahead of reading.
    if (copy_in_ && !copy_ended_) {
      held_sync_ = front()->request == Request::Execute;
      return false;
    }
    unsynced_ = failed_ = false;
    append(owed);
    return true;
  }
  if (owed.request == Request::CopyEnd) {
    copy_ended_ = true;
    held_sync_ = false;
    if (!empty() && !failed_) append(owed);
    return false;
  }
  if (failed_) return false;
  copy_data_ = false;
  unsynced_ = !ends_with_ready(owed.request);
  append(owed);
  return true;
}

std::optional<Owed> Pipeline::take_injection() {
  if (!injects()) return std::nullopt;
  const Owed owed = ring_.front();
  pop();
  return owed;
}

bool Pipeline::take_held_sync() {
  if (!held_sync_ || copy_in_) return false;
  return std::exchange(held_sync_, false);
}

// The server reads what follows the request that began a COPY in COPY mode: Syncs sent ahead, up to the client's CopyDone
// or CopyFail, are ignored there.
void Pipeline::begin_copy_in() {
  copy_in_ = true;
  copy_ended_ = false;
  std::size_t kept = ring_.begin() + 1, i = kept;
  for (; i != ring_.end() && (ring_[i].request == Request::Sync || ring_[i].verdict == Verdict::Inject); ++i) {
    if (ring_[i].request == Request::Sync)
      count(ring_[i], -1);
    else
      ring_[kept++] = ring_[i];  // what is injected isn't on its way to the server
  }
  copy_ended_ = i != ring_.end() && ring_[i].request == Request::CopyEnd;
  if (kept == i) return;
  count(ring_.front(), -1);
  ring_.front().ready_behind = false;  // with the Sync that was to tell it
  count(ring_.front(), 1);
  for (; i != ring_.end(); ++i) ring_[kept++] = ring_[i];
  ring_.truncate(kept);
  unsynced_ = false;
  for (std::size_t j = ring_.begin(); j != ring_.end(); ++j) {
    const Request request = ring_[j].request;
    if (request != Request::CopyEnd) unsynced_ = !ends_with_ready(request);
  }
}

}  // namespace pgsidecar::protocol
