#include "protocol/notifications.hpp"

#include <gtest/gtest.h>

namespace pgsidecar::protocol {
namespace {

/// What was written, as "pid:channel:payload" words; anything else as it is.
std::string told(const std::string& bytes) {
  std::string out;
  Bytes left(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  while (!left.empty() && left[0] == 'A') {
    const std::size_t total = load_u32(left.data() + 1) + 1;
    const auto n = parse_notification(left.subspan(kHeaderSize, total - kHeaderSize));
    if (!n) return out + "malformed";
    out += std::to_string(n->pid) + ":" + std::string(n->channel) + ":" + std::string(n->payload) + " ";
    left = left.subspan(total);
  }
  return out.append(reinterpret_cast<const char*>(left.data()), left.size());
}

/// Streams are written as words: `a1` is payload 1 on channel a by backend 7, `a1!` by the leased backend 9, `#5` marker 5.
void feed(Inbox& inbox, bool listener, std::string_view words) {
  while (!words.empty()) {
    const std::size_t end = std::min(words.find(' '), words.size());
    const std::string_view word = words.substr(0, end);
    words.remove_prefix(std::min(end + 1, words.size()));
    if (word[0] == '#') {
      const std::uint64_t marker = std::stoull(std::string(word.substr(1)));
      listener ? inbox.mark_listener(marker) : inbox.mark_leased(marker);
      continue;
    }
    const Notification n{word.back() == '!' ? 9u : 7u, word.substr(0, 1), word.substr(1, 1)};
    listener ? inbox.from_listener(n) : inbox.from_leased(n);
  }
}

TEST(Notifications, Parse) {
  std::string message;
  write_notification(message, {7, "c", "payload"});
  const Bytes body(reinterpret_cast<const std::uint8_t*>(message.data()) + kHeaderSize, message.size() - kHeaderSize);
  ASSERT_TRUE(parse_notification(body));
  EXPECT_EQ(parse_notification(body)->payload, "payload");
  for (std::size_t n = 0; n < body.size(); ++n) EXPECT_FALSE(parse_notification(body.first(n))) << n;
}

TEST(Notifications, HandOvers) {
  const struct {
    const char* what;
    HandOver hand_over;
    const char *listener, *leased, *told;
    Channels after;
  } rows[] = {
      {"the first LISTEN", {0, 0, 5, {}, {"a"}}, "#5 a3 a4", "a1 a2 #5 a3", "7:a:1 7:a:2 7:a:3 7:a:4 ", {"a"}},
      {"its own NOTIFY has the client's pid", {0, 0, 5, {}, {"a"}}, "#5", "a1! #5", "1:a:1 ", {"a"}},
      {"another channel",
       {3, 0, 5, {"a"}, {"a", "b"}},
       "a1 #3 a3 #5 b5 a6",
       "a1 #3 b2 a3 b4 #5 b5",
       "7:a:1 7:b:2 7:a:3 7:b:4 7:b:5 7:a:6 ",
       {"a", "b"}},
      {"the leased connection is ahead", {3, 0, 5, {"a"}, {"a"}}, "a1 a2 #3 a3 #5", "a2 #3 a3 #5 a4", "7:a:1 7:a:2 7:a:3 ", {"a"}},
      {"UNLISTEN", {3, 0, 5, {"a", "b"}, {"b"}}, "a1 #3 a2 b2 #5 a3 b3", "a1 #3 b2 #5 b3", "7:a:1 7:b:2 7:b:3 ", {"b"}},
      {"rolled back", {3, 0, 5, {"a"}, {}}, "a1 a2 #5 a3", "", "7:a:1 7:a:2 7:a:3 ", {"a"}},
      {"UNLISTEN *", {3, 0, 5, {"a"}, {}}, "a1 #3 a2! #5 a3", "", "7:a:1 ", {}},
      {"UNLISTEN * and LISTEN in one transaction",
       {3, 0, 5, {"a", "b"}, {"a", "c"}},
       "a1 #3 a2 b2 #5 b3 c3",
       "a1 a2 c2 #5",
       "7:a:1 7:a:2 7:c:2 7:c:3 ",
       {"a", "c"}},
      {"LISTEN out of sight", {0, 0, 5, {"a"}, {"b"}}, "a1 #5 b3", "b2 #5 b3", "7:a:1 7:b:2 7:b:3 ", {"a", "b"}},
      {"the listener is lost on the way", {3, 0, 5, {"a"}, {"a"}}, "a1", "a1 #3 a2 #5", "7:a:1 7:a:2 ", {"a"}},
      {"other markers", {3, 0, 5, {"a"}, {"a"}}, "#1 a1 #3 #4 #5 #6 a3", "#2 #3 a2 #5 #6", "7:a:1 7:a:2 7:a:3 ", {"a"}},
  };
  for (const auto& row : rows) {
    Inbox inbox;
    feed(inbox, true, row.listener);
    feed(inbox, false, row.leased);
    std::string out;
    EXPECT_EQ(inbox.settle(row.hand_over, {9, 1}, out), row.after) << row.what;
    EXPECT_EQ(told(out), row.told) << row.what;
    EXPECT_TRUE(inbox.empty());
    EXPECT_EQ(inbox.bytes(), 0u);
  }
}

TEST(Notifications, OwnOnesAreThoseAfterTheirMarker) {
  Inbox inbox;
  std::string out;
  feed(inbox, true, "a1! #4 a2! a3");
  inbox.take(4, {9, 1}, out);
  feed(inbox, true, "a4! #5 a5!");
  HandOver fence;
  fence.own = 4;
  fence.end = 5;
  fence.before = {"a"};
  EXPECT_EQ(inbox.settle(fence, {9, 1}, out), Channels{"a"});
  feed(inbox, true, "a6!");
  inbox.take(0, {9, 1}, out);
  EXPECT_EQ(told(out), "9:a:1 1:a:2 7:a:3 1:a:4 9:a:5 9:a:6 ");
}

TEST(Notifications, MessagesKeepTheirPlace) {
  Inbox inbox;
  std::string out;
  feed(inbox, true, "a1");
  inbox.insert("message");
  EXPECT_GT(inbox.bytes(), 7u);
  inbox.take(0, {9, 1}, out);
  EXPECT_EQ(told(out), "7:a:1 message");
}

TEST(Notifications, Subscriptions) {
  Subscriptions<int> table;
  EXPECT_TRUE(table.add("a", 1));
  EXPECT_FALSE(table.add("a", 2));
  EXPECT_FALSE(table.add("a", 2));
  EXPECT_EQ(table.of("a").size(), 2u);
  EXPECT_TRUE(table.of("b").empty());
  EXPECT_FALSE(table.remove("b", 1));
  EXPECT_FALSE(table.remove("a", 1));
  EXPECT_TRUE(table.remove("a", 2));
  EXPECT_TRUE(table.empty());
}

}  // namespace
}  // namespace pgsidecar::protocol
