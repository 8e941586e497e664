#include "protocol/pipeline.hpp"

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

namespace pgsidecar::protocol {
namespace {

constexpr OwnerId kA = 7, kB = 8;

/// Requests and replies as letters: what a client sends, then what the server says.
struct Script {
  Pipeline pipeline;
  std::vector<Owed> dropped;

  bool ask(Request request, Verdict verdict = Verdict::Forward, OwnerId owner = kA, std::uint64_t note = 0) {
    return pipeline.push({request, verdict, owner, note});
  }
  std::optional<Pipeline::Reply> hear(char type, char status = 'I') {
    return pipeline.receive(static_cast<Backend>(type), static_cast<TxStatus>(status),
                            [this](const Owed& owed) { dropped.push_back(owed); });
  }
  bool all(const std::string& replies) {
    for (const char c : replies)
      if (!hear(c)) return false;
    return true;
  }
};

TEST(Pipeline, SimpleQueryEndsAtReadyForQuery) {
  Script s;
  s.ask(Request::Query);
  EXPECT_FALSE(s.pipeline.releasable());
  EXPECT_TRUE(s.all("TDDC"));
  EXPECT_FALSE(s.pipeline.empty());
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, TransactionStatusKeepsTheLease) {
  Script s;
  s.ask(Request::Query);
  EXPECT_TRUE(s.hear('C') && s.hear('Z', 'T'));
  EXPECT_TRUE(s.pipeline.empty());
  EXPECT_FALSE(s.pipeline.releasable());
  s.ask(Request::Query);
  EXPECT_TRUE(s.hear('E') && s.hear('Z', 'E'));
  EXPECT_FALSE(s.pipeline.releasable());
  EXPECT_EQ(s.pipeline.status(), TxStatus::Failed);
}

TEST(Pipeline, ExtendedBatch) {
  Script s;
  for (const Request r : {Request::Parse, Request::Bind, Request::Describe, Request::Execute}) s.ask(r);
  EXPECT_TRUE(s.pipeline.unsynced());
  s.ask(Request::Sync);
  EXPECT_FALSE(s.pipeline.unsynced());
  EXPECT_TRUE(s.all("12TDDDCZ"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, DescribeOfAStatementAnswersTwice) {
  Script s;
  s.ask(Request::Describe);
  s.ask(Request::Sync);
  EXPECT_FALSE(s.hear('t')->completes);
  EXPECT_TRUE(s.hear('n')->completes);
  EXPECT_TRUE(s.all("Z"));
}

TEST(Pipeline, FlushedWithoutSyncIsNotReleasable) {
  Script s;
  s.ask(Request::Parse);
  EXPECT_TRUE(s.all("1"));
  EXPECT_TRUE(s.pipeline.empty());
  EXPECT_FALSE(s.pipeline.releasable());
}

TEST(Pipeline, ASimpleQueryNeedsNoSync) {
  for (const Request simple : {Request::Query, Request::FunctionCall}) {
    Script s;
    s.ask(Request::Parse);
    s.ask(simple);
    EXPECT_FALSE(s.pipeline.unsynced());
    EXPECT_TRUE(s.all(simple == Request::Query ? "1CZ" : "1VZ"));
    EXPECT_TRUE(s.pipeline.releasable());
  }
}

TEST(Pipeline, ASimpleQueryBehindAnErrorIsSkippedToo) {
  Script s;
  s.ask(Request::Parse);
  s.ask(Request::Query);
  EXPECT_TRUE(s.all("E"));
  EXPECT_EQ(s.dropped.size(), 2u);
  EXPECT_TRUE(s.pipeline.failed());
  EXPECT_FALSE(s.pipeline.releasable()) << "the server waits for a Sync";
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, WhatInterruptsACopy) {
  for (const auto& [behind, verdict, interrupts] : {std::tuple{Request::Close, Verdict::Inject, true},
                                                    {Request::Close, Verdict::Forward, false},
                                                    {Request::CopyEnd, Verdict::Forward, false},
                                                    {Request::Sync, Verdict::Forward, false}}) {
    Script s;
    s.ask(Request::Execute);
    s.ask(behind, verdict);
    EXPECT_TRUE(s.all("G"));
    EXPECT_EQ(s.pipeline.copy_interrupted(), interrupts) << "else the server sees it";
  }
}

TEST(Pipeline, AnErrorSkipsUpToSync) {
  Script s;
  s.ask(Request::Parse, Verdict::Forward, kA, 1);
  s.ask(Request::Bind);
  s.ask(Request::Execute);
  s.ask(Request::Sync);
  s.ask(Request::Parse, Verdict::Forward, kA, 2);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("E"));
  ASSERT_EQ(s.dropped.size(), 3u);
  EXPECT_EQ(s.dropped[0].note, 1u);
  EXPECT_TRUE(s.all("Z1Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, AfterAnErrorWithoutSyncNothingIsOwed) {
  Script s;
  s.ask(Request::Parse);
  EXPECT_TRUE(s.all("E"));
  EXPECT_TRUE(s.pipeline.failed());
  EXPECT_FALSE(s.ask(Request::Bind));
  EXPECT_FALSE(s.ask(Request::Query));
  EXPECT_TRUE(s.ask(Request::Sync));
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, AnErrorAtSyncBelongsToSync) {
  Script s;
  s.ask(Request::Execute);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("CEZ"));  // a deferred constraint fails at the commit that Sync is
  EXPECT_TRUE(s.dropped.empty());
}

TEST(Pipeline, InjectionsWaitForTheirTurn) {
  Script s;
  s.ask(Request::Parse);
  s.ask(Request::Parse, Verdict::Inject, kA, 5);
  s.ask(Request::Bind);
  EXPECT_FALSE(s.pipeline.take_injection());
  EXPECT_TRUE(s.all("1"));
  EXPECT_FALSE(s.hear('2'));  // not before the injected reply
  ASSERT_TRUE(s.pipeline.take_injection());
  EXPECT_TRUE(s.all("2"));
}

TEST(Pipeline, SeveralOwnersBehindEachOther) {
  Script s;
  s.ask(Request::Query, Verdict::Skip, kProxy, 9);
  s.ask(Request::Query, Verdict::Forward, kA);
  s.ask(Request::Query, Verdict::Forward, kB);
  EXPECT_EQ(s.hear('C')->owed.owner, kProxy);
  EXPECT_TRUE(s.all("Z"));
  EXPECT_EQ(s.hear('C')->owed.owner, kA);
  EXPECT_TRUE(s.all("Z"));
  EXPECT_EQ(s.hear('E')->owed.owner, kB);
  EXPECT_EQ(s.hear('Z')->owed.owner, kB);
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, CopyInExtendedIgnoresSyncsSentAhead) {
  Script s;
  s.ask(Request::Execute);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("G"));
  EXPECT_TRUE(s.pipeline.copy_in());
  s.ask(Request::CopyEnd);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("CZ"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, CopyInSentBlindlyKeepsTheSyncBehindCopyDone) {
  Script s;
  s.ask(Request::Execute);
  s.ask(Request::CopyEnd);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("GCZ"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, ASyncInCopyIsHeldAndSentIfTheCopyFails) {
  Script s;
  s.ask(Request::Execute);
  EXPECT_TRUE(s.all("G"));
  EXPECT_FALSE(s.ask(Request::Sync));
  EXPECT_FALSE(s.pipeline.take_held_sync());
  EXPECT_TRUE(s.all("E"));
  EXPECT_TRUE(s.pipeline.take_held_sync());
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

// d data, S a Sync; what the server has surely read in COPY isn't sent again.
TEST(Pipeline, ASyncInCopyIsHeldAsLongAsTheServerMayNotHaveReadIt) {
  const struct {
    const char *ahead, *in_copy;
    bool held;
  } rows[] = {{"", "S", true},  {"", "Sd", false},  {"", "SdS", true}, {"", "dS", true},
              {"d", "S", true}, {"", "SdSd", true}, {"d", "dSd", true}};
  for (const auto& row : rows) {
    Script s;
    s.ask(Request::Execute);
    const auto send = [&](const char* what) {
      for (; *what; ++what) *what == 'S' ? void(s.ask(Request::Sync)) : s.pipeline.note_copy_data();
    };
    send(row.ahead);
    EXPECT_TRUE(s.all("G"));
    send(row.in_copy);
    EXPECT_TRUE(s.all("E"));
    EXPECT_EQ(s.pipeline.take_held_sync(), row.held) << row.ahead << 'G' << row.in_copy;
    s.ask(Request::Sync);
    EXPECT_TRUE(s.all("Z"));
  }
}

TEST(Pipeline, CopyInOfASimpleQuery) {
  Script s;
  s.ask(Request::Query);
  EXPECT_TRUE(s.all("G"));
  s.ask(Request::CopyEnd);
  EXPECT_TRUE(s.all("CZ"));
  EXPECT_TRUE(s.pipeline.releasable());
}

// Requests: Q query, P parse, B bind, D describe, X execute, C close, S sync, F function call, e the end of a COPY; in lower case
// skipped (p, b, x, s), and i an injected Close. After `>` what the server says; both may alternate.
TEST(Pipeline, Conversations) {
  const struct {
    const char* what;
    const char* script;
    bool failed = false, unsynced = false, releasable = true;
  } rows[] = {
      {"COPY out", "Q>HdddcCZ"},
      {"COPY out, extended", "PBXS>12HdddcCZ"},
      {"COPY out that fails in the middle", "Q>HdddEZ"},
      {"COPY out that fails in the middle, extended", "PBXS>12HddEZ"},
      {"COPY in", "Q>G<e>CZ"},
      {"COPY in, refused by the server's data check", "Q>GEZ"},
      {"COPY in, the end was on its way", "Q>G<e>EZ"},
      {"COPY in by CopyFail, extended", "PBX>12G<eS>EZ"},
      {"COPY in, the server's error first, then the end and Sync", "PBX>12GE<eS>Z"},
      {"COPY in, everything sent ahead", "PBXeS>12GCZ"},
      {"COPY in, everything sent ahead, fails", "PBXeS>12GEZ"},
      {"COPY in behind an unread Sync", "PBXS>12G<eS>CZ"},
      {"COPY in, refused before it began", "PBXS>12EZ"},
      {"COPY in by a simple query, a Sync sent ahead", "QS>G<e>CZ"},
      {"COPY in by a simple query, Syncs in it", "Q>G<sse>CZ"},
      {"two COPYs in a simple query", "Q>G<e>CG<e>CZ"},
      {"an error and more of a simple query", "QQ>TDEZTDCZ"},
      {"an error in Parse, the rest skipped", "PBDXS>EZ"},
      {"an error in Bind behind a skipped Parse", "pBXS>1EZ"},
      {"an error in a skipped Parse", "pBXS>EZ"},
      {"injections behind each other", "iiPS>1Z"},
      {"an injection behind the error is dropped", "PiiS>EZ"},
      {"an injection before the error stays", "iPS>EZ"},
      {"two batches, an error in the first", "PBXSPBXS>EZ12CZ"},
      {"an error without Sync", "P>E", true, true, false},
      {"an error, Sync sent afterwards", "P>E<S>Z"},
      {"flushed", "PB>12", false, true, false},
      {"a function call", "F>VZ"},
      {"a function call that fails", "F>EZ"},
      {"rows in portions", "BXXS>2DDsDCZ"},
      {"an empty statement", "PBXSQ>12IZIZ"},
      {"a commit that fails at Sync", "XS>CEZ"},
  };
  for (const auto& row : rows) {
    Script s;
    bool server = false;
    for (const char* c = row.script; *c; ++c) {
      if (*c == '>' || *c == '<') {
        server = *c == '>';
        continue;
      }
      while (s.pipeline.take_injection()) continue;
      EXPECT_EQ(s.pipeline.owed_to_clients(), s.pipeline.size()) << row.what << ": " << (c - row.script);
      if (server) {
        ASSERT_TRUE(s.hear(*c)) << row.what << ": " << (c - row.script);
        continue;
      }
      static constexpr std::string_view kLetters = "QPBDXCSFe", kSkipped = "qpbdxcsf";
      if (*c == 'i')
        s.ask(Request::Close, Verdict::Inject);
      else if (const auto at = kLetters.find(*c); at != std::string_view::npos) {
        constexpr Request kRequests[] = {Request::Query, Request::Parse, Request::Bind,         Request::Describe, Request::Execute,
                                         Request::Close, Request::Sync,  Request::FunctionCall, Request::CopyEnd};
        s.ask(kRequests[at]);
      } else {
        constexpr Request kRequests[] = {Request::Query,   Request::Parse, Request::Bind, Request::Describe,
                                         Request::Execute, Request::Close, Request::Sync, Request::FunctionCall};
        s.ask(kRequests[kSkipped.find(*c)], Verdict::Skip);
      }
    }
    while (s.pipeline.take_injection()) continue;
    EXPECT_EQ(s.pipeline.readies_owed(), 0u) << row.what;
    EXPECT_EQ(s.pipeline.failed(), row.failed) << row.what;
    EXPECT_EQ(s.pipeline.unsynced(), row.unsynced) << row.what;
    EXPECT_EQ(s.pipeline.releasable(), row.releasable) << row.what;
    EXPECT_TRUE(s.pipeline.empty()) << row.what;
    EXPECT_FALSE(s.pipeline.copy_in()) << row.what;
  }
}

TEST(Pipeline, ACopyHasNoSuspendedPortal) {
  Script s;
  s.ask(Request::Execute);
  EXPECT_TRUE(s.all("G"));
  EXPECT_FALSE(s.hear('s'));
  EXPECT_FALSE(s.ask(Request::Sync));
}

TEST(Pipeline, AnInjectionDoesNotHideASyncThatCopyIgnores) {
  Script s;
  s.ask(Request::Execute);
  s.ask(Request::Close, Verdict::Inject);  // the server doesn't see it
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("G"));
  EXPECT_TRUE(s.pipeline.unsynced());
  s.ask(Request::CopyEnd);
  s.ask(Request::Sync);
  EXPECT_TRUE(s.all("C"));
  EXPECT_TRUE(s.pipeline.take_injection());
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.releasable());
}

TEST(Pipeline, WhatTheServerCannotSayNow) {
  const struct {
    Request asked;
    std::string wrong;
  } rows[] = {
      {Request::Query, "12nt3V"},    {Request::Parse, "2CZ3DTG"}, {Request::Bind, "1CZDT"}, {Request::Describe, "1C2ZD"},
      {Request::Execute, "1Z2tn3V"}, {Request::Close, "12CZD"},   {Request::Sync, "12CDT"}, {Request::FunctionCall, "1CD"},
  };
  for (const auto& row : rows)
    for (const char c : row.wrong) {
      Script s;
      s.ask(row.asked);
      EXPECT_FALSE(s.hear(c)) << c << " in reply to request " << static_cast<int>(row.asked);
    }
  Script none;
  for (const char c : std::string("12CDTZEGn")) EXPECT_FALSE(none.hear(c)) << c;
}

TEST(Pipeline, WhatClientsAreOwed) {
  Script s;
  s.ask(Request::Query, Verdict::Skip, kProxy);
  for (const Request r : {Request::Parse, Request::Bind, Request::Execute, Request::Sync}) s.ask(r);
  s.ask(Request::Sync, Verdict::Skip, kProxy);
  s.ask(Request::Close, Verdict::Inject);
  s.ask(Request::FunctionCall);
  EXPECT_EQ(s.pipeline.owed_to_clients(), 6u);
  EXPECT_EQ(s.pipeline.readies_owed(), 2u);
  EXPECT_TRUE(s.all("CZ1"));
  EXPECT_EQ(s.pipeline.owed_to_clients(), 5u);
  EXPECT_TRUE(s.all("EZ"));  // skips Bind and Execute
  EXPECT_EQ(s.pipeline.owed_to_clients(), 2u);
  EXPECT_EQ(s.pipeline.readies_owed(), 1u);
  EXPECT_TRUE(s.all("Z"));
  EXPECT_TRUE(s.pipeline.take_injection());
  EXPECT_TRUE(s.all("VZ"));
  EXPECT_EQ(s.pipeline.owed_to_clients(), 0u);
  EXPECT_EQ(s.pipeline.readies_owed(), 0u);
}

// What is in front of a Query may fail, and then the Sync behind it answers for it; a COPY's data takes that Sync away.
TEST(Pipeline, AQueryWhoseReadyForQueryIsThatOfASync) {
  for (const std::string replies : {"1CZZ", "EZ", "1EZZ", "1GCZ", "1GEZ"}) {
    Script s;
    s.ask(Request::Parse, Verdict::Skip);
    s.pipeline.push({Request::Query, Verdict::Forward, kA, 0, true});
    s.ask(Request::Sync);
    EXPECT_EQ(s.pipeline.readies_owed(), 1u) << replies;
    std::size_t told = 0;
    for (const char c : replies) {
      const auto reply = s.hear(c);
      ASSERT_TRUE(reply) << replies;
      told += c == 'Z' && !reply->owed.ready_behind;
      if (c == 'G') s.ask(Request::CopyEnd);
      EXPECT_EQ(s.pipeline.readies_owed() + told, 1u) << replies << ": " << c;
    }
    EXPECT_TRUE(s.pipeline.releasable()) << replies;
  }
}

TEST(Ring, PositionsStay) {
  Ring<std::string> ring;
  for (int i = 0; i < 3000; ++i) {
    ring.push_back(std::to_string(i));
    if (i % 3 == 2) {
      EXPECT_EQ(ring.pop_front(), std::to_string(i / 3));
    }
    EXPECT_EQ(ring[ring.begin()], std::to_string(ring.begin()));
    EXPECT_EQ(ring[ring.end() - 1], std::to_string(i));
  }
  ring.truncate(2000);
  EXPECT_EQ(ring.size(), 1000u);
  const std::size_t full = ring.footprint();
  while (!ring.empty()) ring.pop_front();
  EXPECT_EQ(ring.begin(), 2000u);
  EXPECT_LT(ring.footprint(), full) << "what a burst has taken is given back";
  ring.push_back("again");
  EXPECT_EQ(ring.front(), "again");
}

TEST(Pipeline, TheRingGrowsAndWraps) {
  Script s;
  for (int round = 0; round < 50; ++round) {
    for (int i = 0; i < 37; ++i) s.ask(Request::Query, Verdict::Forward, kA, static_cast<std::uint64_t>(i));
    for (int i = 0; i < 37; ++i) {
      EXPECT_EQ(s.hear('C')->owed.note, static_cast<std::uint64_t>(i));
      EXPECT_TRUE(s.all("Z"));
    }
  }
  EXPECT_TRUE(s.pipeline.releasable());
}

}  // namespace
}  // namespace pgsidecar::protocol
