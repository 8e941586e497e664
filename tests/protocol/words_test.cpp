#include "protocol/words.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace pgsidecar::protocol {
namespace {

std::vector<Word> words(std::string_view text) {
  std::vector<Word> out;
  for_each_word(text, [&](Word word) { out.push_back(word); });
  return out;
}

bool names(std::string_view text, std::string_view name) {
  const auto all = words(text);
  return std::find(all.begin(), all.end(), word_of_name(name)) != all.end();
}

TEST(Words, FoldedWhereverTheyStand) {
  EXPECT_EQ(words(""), std::vector<Word>{});
  EXPECT_EQ(words(" ;,()'\"$$\t"), std::vector<Word>{});
  EXPECT_EQ(words("Orders"), words("oRDERS"));
  EXPECT_EQ(words("a.b").size(), 2u);
  EXPECT_NE(words("ab"), words("ba"));
}

TEST(Words, OfNames) {
  const std::string longest(63, 'x');
  const struct {
    const char *text, *name;
    bool named;
  } rows[] = {
      {"INSERT INTO orders VALUES (1)", "orders", true},
      {"INSERT INTO s.ORDERS(a) VALUES (1)", "orders", true},
      {"DO $$BEGIN INSERT INTO orders VALUES (1);END$$", "orders", true},
      {"DO $q$orders$q$", "orders", true},
      {"TABLE \"Orders\"", "Orders", true},
      {"SELECT * FROM orders2", "orders", false},
      {"SELECT * FROM my_orders", "orders", false},
      {"SELECT * FROM \"my orders, old\"", "my orders, old", true},
      {"SELECT * FROM a$b", "a$b", true},
      {"SELECT * FROM gr\xc3\xb6\xc3\x9f"
       "e",
       "gr\xf6\xdf"
       "e",
       true},  // in another encoding
      {"SELECT * FROM groesse",
       "gr\xc3\xb6\xc3\x9f"
       "e",
       false},
  };
  for (const auto& row : rows) EXPECT_EQ(names(row.text, row.name), row.named) << row.text;
  EXPECT_TRUE(names("TABLE " + longest + "yz", longest)) << "the server cuts it";
  EXPECT_EQ(word_of_name("-+"), 0u);
}

}  // namespace
}  // namespace pgsidecar::protocol
