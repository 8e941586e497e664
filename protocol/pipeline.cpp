#include "protocol/pipeline.hpp"

namespace pgsidecar::protocol {

bool Pipeline::push(Owed owed) {
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
  const Owed owed = at(head_);
  pop();
  return owed;
}

bool Pipeline::take_held_sync() {
  if (!held_sync_ || copy_in_) return false;
  return std::exchange(held_sync_, false);
}

void Pipeline::append(Owed owed) {
  if (size() == ring_.size()) {
    std::vector<Owed> larger(ring_.empty() ? 16 : ring_.size() * 2);
    const std::size_t n = size();
    for (std::size_t i = 0; i < n; ++i) larger[i] = at(head_ + i);
    ring_ = std::move(larger);
    head_ = 0;
    tail_ = n;
  }
  at(tail_++) = owed;
}

// The server reads what follows the request that began a COPY in COPY mode: Syncs sent ahead, up to the client's CopyDone
// or CopyFail, are ignored there.
void Pipeline::begin_copy_in() {
  copy_in_ = true;
  copy_ended_ = false;
  std::size_t kept = head_ + 1, i = head_ + 1;
  for (; i != tail_ && (at(i).request == Request::Sync || at(i).verdict == Verdict::Inject); ++i)
    if (at(i).request != Request::Sync) at(kept++) = at(i);  // what is injected isn't on its way to the server
  copy_ended_ = i != tail_ && at(i).request == Request::CopyEnd;
  if (kept == i) return;
  for (; i != tail_; ++i) at(kept++) = at(i);
  tail_ = kept;
  unsynced_ = false;
  for (std::size_t j = head_; j != tail_; ++j) {
    const Request request = at(j).request;
    if (request != Request::CopyEnd) unsynced_ = !ends_with_ready(request);
  }
}

}  // namespace pgsidecar::protocol
