// The pipeline against a model of PostgreSQL: clients send what they like when they like, the model answers as a server would,
// errors and COPY included, and each reply must find the request that it belongs to. First, rubbish.
#include "protocol/pipeline.hpp"

#include <deque>

#include "fuzz.hpp"

using namespace pgsidecar::protocol;

namespace {

void check(const Pipeline& pipeline) {
  std::size_t n = 0, of_clients = 0, readies = 0;
  pipeline.for_each([&](const Owed& owed) {
    ++n;
    of_clients += owed.owner != kProxy;
    readies += owed.owner != kProxy && ends_with_ready(owed.request) && owed.verdict == Verdict::Forward && !owed.ready_behind;
  });
  require(n == pipeline.size() && pipeline.empty() == (n == 0), "sizes agree");
  require(of_clients == pipeline.owed_to_clients() && readies == pipeline.readies_owed(), "what clients are owed is counted");
  require(pipeline.empty() == (pipeline.front() == nullptr), "the front is there");
  if (pipeline.front()) require(pipeline.front()->request != Request::CopyEnd, "nothing is owed for the end of a COPY");
  if (pipeline.releasable())
    require(pipeline.empty() && !pipeline.unsynced() && pipeline.status() == TxStatus::Idle, "released when clean");
}

void rubbish(Choices& choices) {
  Pipeline pipeline;
  std::uint64_t pushed = 0, popped = 0;
  while (choices.more()) {
    const std::size_t before = pipeline.size();
    switch (choices.below(8)) {
      case 0:
      case 1:
      case 2: {
        Owed owed{static_cast<Request>(choices.below(9)), static_cast<Verdict>(choices.below(3)), choices.below(3), 0};
        owed.note = ++pushed;
        owed.ready_behind = owed.request == Request::Query && pushed % 2 == 0;
        pipeline.push(owed);
        require(pipeline.size() <= before + 1, "one request is one entry");
        break;
      }
      case 3: pipeline.take_injection(); break;
      case 4: pipeline.take_held_sync(); break;
      default: {
        const auto type = static_cast<Backend>("12CDEGHIKNRSTVWZcdnst3A"[choices.below(23)]);
        const Owed front = pipeline.front() ? *pipeline.front() : Owed{};
        std::uint64_t last = 0;
        const auto reply = pipeline.receive(type, static_cast<TxStatus>("ITE"[choices.below(3)]), [&](const Owed& owed) {
          require(owed.note > last, "dropped in order");
          last = owed.note;
          ++popped;
        });
        require(!reply || before > 0, "nothing is said without being asked");
        if (reply) require(reply->owed.note == front.note, "a reply is the front's");
        if (!reply) require(pipeline.size() == before, "what can't be said changes nothing");
        break;
      }
    }
    check(pipeline);
  }
}

/// What a request is going to do at the server.
enum class Fate : std::uint8_t { Works, Fails, Copies, CopiesAndFails };

struct Sent {
  Request request;
  Fate fate;
  std::uint64_t note;
  bool describes_statement = false, data = false, copy_fails = false;
};

/// PostgreSQL 15: tcop/postgres.c and commands/copyfrom*.c, as far as messages go.
class Server {
 public:
  struct Reply {
    char type, status;
    std::uint64_t note;
  };
  std::deque<Sent> wire;
  std::deque<Reply> replies;

  void step() {
    const Sent message = wire.front();
    wire.pop_front();
    if (copying_) return in_copy(message);
    if (message.data || message.request == Request::CopyEnd) return;  // the rest of a COPY that failed
    if (skipping_ && message.request != Request::Sync) return;
    const bool fails = message.fate == Fate::Fails;
    switch (message.request) {
      case Request::Query:
        if (message.fate == Fate::Copies || message.fate == Fate::CopiesAndFails) return begin_copy(message);
        say(fails ? "E" : message.note % 5 == 0 ? "I" : "TDDC", message.note);
        return say("Z", message.note);
      case Request::FunctionCall: say(fails ? "E" : "V", message.note); return say("Z", message.note);
      case Request::Sync:
        if (fails && !skipping_) say("E", message.note);  // at the commit
        skipping_ = false;
        return say("Z", message.note);
      case Request::Parse: return extended("1", message);
      case Request::Bind: return extended("2", message);
      case Request::Close: return extended("3", message);
      case Request::Describe:
        return extended(message.describes_statement ? (message.note % 2 ? "tT" : "tn") : message.note % 2 ? "T" : "n", message);
      case Request::Execute:
        if (message.fate == Fate::Copies || message.fate == Fate::CopiesAndFails) return begin_copy(message);
        return extended(message.note % 4 == 0 ? "I" : message.note % 4 == 1 ? "DDs" : message.note % 4 == 2 ? "HddcC" : "DC", message);
      case Request::CopyEnd: return;
    }
  }

 private:
  void say(const char* types, std::uint64_t note) {
    for (; *types; ++types) replies.push_back({*types, "ITE"[note % 3], note});
  }
  void fail(std::uint64_t note, bool simple) {
    say("E", note);
    if (simple)
      say("Z", note);
    else
      skipping_ = true;
  }
  void extended(const char* types, const Sent& message) {
    if (message.fate == Fate::Fails) return fail(message.note, false);
    say(types, message.note);
  }
  void begin_copy(const Sent& message) {
    say("G", message.note);
    copying_ = message;
  }
  void in_copy(const Sent& message) {
    const Sent copy = *copying_;
    const bool simple = copy.request == Request::Query;
    if (message.data) {
      if (copy.fate != Fate::CopiesAndFails) return;
    } else if (message.request == Request::Sync) {
      return;
    } else if (message.request == Request::CopyEnd && !message.copy_fails && copy.fate == Fate::Copies) {
      copying_.reset();
      say("C", copy.note);
      if (simple) say("Z", copy.note);
      return;
    }
    copying_.reset();
    fail(copy.note, simple);  // bad data, CopyFail, or a message that has no place in COPY
  }

  std::optional<Sent> copying_;
  bool skipping_ = false;
};

class Conversation {
 public:
  void play(Choices& choices) {
    while (choices.more() && sent_ < 300) {
      switch (choices.below(4)) {
        case 0:
        case 1: send(choices); break;
        case 2:
          if (!server_.wire.empty()) server_.step();
          break;
        default: hear(); break;
      }
      check(pipeline_);
    }
    // The end: whatever is under way is brought to its Sync.
    for (int i = 0; i < 3; ++i) {
      settle();
      if (copy_is_open_) copy_end(true);
      push({Request::Sync, Fate::Works, 0});
    }
    settle();
    require(pipeline_.empty() && !pipeline_.unsynced() && !pipeline_.failed() && !pipeline_.copy_in(), "after a Sync nothing is owed");
  }

 private:
  void settle() {
    do {
      while (!server_.wire.empty()) server_.step();
      while (!server_.replies.empty()) hear();
    } while (!server_.wire.empty());
  }

  void push(Sent message, Verdict verdict = Verdict::Forward) {
    message.note = ++sent_;
    const bool owed = pipeline_.push({message.request, verdict, kProxy + 1 + sent_ % 3, message.note});
    if (verdict == Verdict::Inject) return;
    if (message.request == Request::Sync && !owed) return void(held_ = true);
    server_.wire.push_back(message);
  }

  void copy_end(bool fails) {
    Sent message{Request::CopyEnd, Fate::Works, 0};
    message.copy_fails = fails;
    copy_is_open_ = held_ = false;
    push(message);
  }

  void send(Choices& choices) {
    const std::uint8_t what = choices.next();
    const auto fate = static_cast<Fate>(std::min<int>(choices.next() % 8, 3));
    // A Sync that was sent into a COPY which another request is about to break: what comes behind is not known to be right.
    if (held_ && !copy_is_open_) return;
    if (copy_is_open_) {  // the client knows that it is in COPY, or has sent a simple query that begins one
      if (what % 4 == 0) return copy_end(what % 8 == 0);
      if (what % 4 == 1 && !simple_copy_) return push({Request::Sync, Fate::Works, 0});
      Sent data{Request::Query, Fate::Works, 0};
      data.data = true;
      pipeline_.note_copy_data();
      server_.wire.push_back(data);
      return;
    }
    static constexpr Request kRequests[] = {Request::Query,   Request::Parse, Request::Bind, Request::Describe,
                                            Request::Execute, Request::Close, Request::Sync, Request::FunctionCall};
    Sent message{kRequests[what % 8], fate, 0};
    message.describes_statement = what & 8;
    const bool copies = fate == Fate::Copies || fate == Fate::CopiesAndFails;
    if (message.request == Request::Query && copies && pipeline_.unsynced()) message.fate = Fate::Works;
    const bool can_inject = message.request == Request::Parse || message.request == Request::Close;
    if (can_inject && (what & 16) && !pipeline_.failed()) return push(message, Verdict::Inject);
    push(message, what & 32 ? Verdict::Skip : Verdict::Forward);
    if (message.request == Request::Query && (message.fate == Fate::Copies || message.fate == Fate::CopiesAndFails)) {
      // Nothing but COPY's messages makes sense behind it.
      simple_copy_ = copy_is_open_ = true;
      copy_ = sent_;
    } else if (message.request == Request::Execute && copies && (what & 64)) {
      // Sent blindly, as psql's \bind would: data and the end, behind Syncs or not.
      if (what & 128) push({Request::Sync, Fate::Works, 0});
      copy_end(choices.below(2));
      push({Request::Sync, Fate::Works, 0});
    }
  }

  void hear() {
    while (const auto injected = pipeline_.take_injection()) check(pipeline_);
    if (server_.replies.empty()) return;
    const Server::Reply said = server_.replies.front();
    server_.replies.pop_front();
    const auto reply = pipeline_.receive(static_cast<Backend>(said.type), static_cast<TxStatus>(said.status), [](const Owed&) {});
    require(reply.has_value(), "what the server may say is known");
    require(reply->owed.note == said.note, "a reply belongs to its request");
    if (said.type == 'G' && said.note > copy_) {  // else a simple query's COPY is open already
      copy_is_open_ = !ended_blindly();
      simple_copy_ = false;
      copy_ = said.note;
    }
    if (said.type == 'E' || said.type == 'C') held_ = false;
    if ((said.type == 'E' || said.type == 'Z') && said.note == copy_) copy_is_open_ = false;
    if (said.type == 'Z') require(pipeline_.status() == static_cast<TxStatus>(said.status), "the status is the last one told");
    while (pipeline_.take_injection()) check(pipeline_);
    if (pipeline_.take_held_sync()) push({Request::Sync, Fate::Works, 0});
    check(pipeline_);
  }

  /// The end of the COPY that just began has been sent already, or something that ends it by an error.
  bool ended_blindly() const {
    bool ended = false;
    pipeline_.for_each([&](const Owed& owed) { ended |= owed.note != pipeline_.front()->note && owed.verdict != Verdict::Inject; });
    return ended;
  }

  Pipeline pipeline_;
  Server server_;
  std::uint64_t sent_ = 0, copy_ = 0;
  bool copy_is_open_ = false, simple_copy_ = false, held_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Choices choices(data, size);
  if (choices.below(4) == 0)
    rubbish(choices);
  else
    Conversation().play(choices);
  return 0;
}

std::vector<std::string> seeds() {
  std::vector<std::string> all;
  unsigned x = 1;
  for (int seed = 0; seed < 12; ++seed) {
    std::string s(1, static_cast<char>(seed % 4));
    for (int i = 0; i < 120; ++i) {
      x = x * 1664525 + 1013904223;
      s.push_back(static_cast<char>(x >> 24));
    }
    all.push_back(s);
  }
  return all;
}
