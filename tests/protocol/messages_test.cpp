#include "protocol/messages.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>

namespace pgsidecar::protocol {
namespace {

using namespace std::string_literals;

/// A copy of exactly its size, so that a sanitizer sees a read beyond.
struct Exact {
  explicit Exact(std::string_view s) : bytes(new std::uint8_t[s.size()]), size(s.size()) {
    if (size > 0) std::memcpy(bytes.get(), s.data(), size);
  }
  Bytes view() const { return {bytes.get(), size}; }
  std::unique_ptr<std::uint8_t[]> bytes;
  std::size_t size;
};

TEST(Messages, StartupRows) {
  const struct {
    std::string body;
    bool ok;
  } rows[] = {
      {"\0\3\0\0\0"s, true},  // no parameter at all
      {"\0\3\0\0user\0u\0\0"s, true},
      {"\0\3\0\0user\0\0\0"s, true},  // an empty value
      {"\0\3\0\2user\0u\0_pq_.a\0"
       "b\0\0"s,
       true},
      {""s, false},
      {"\0\3\0"s, false},
      {"\0\3\0\0"s, false},  // no terminator
      {"\0\3\0\0user\0u\0"s, false},
      {"\0\3\0\0user\0\0"s, false},  // a name without a value and its terminator
      {"\0\3\0\0user"s, false},
      {"\0\3\0\0user\0u\0\0x"s, false},  // one byte more
      {"\0\3\0\0\0\0"s, false},
  };
  for (const auto& row : rows) {
    const Exact body(row.body);
    EXPECT_EQ(parse_startup(body.view()).has_value(), row.ok) << testing::PrintToString(row.body);
  }
}

TEST(Messages, ErrorRows) {
  const struct {
    std::string body;
    bool ok;
    std::string severity, sqlstate, message;
  } rows[] = {
      {"SERROR\0C42601\0Mbad\0\0"s, true, "ERROR", "42601", "bad"},
      {"SFEHLER\0VERROR\0C42601\0Mbad\0\0"s, true, "ERROR", "42601", "bad"},  // V isn't translated
      {"VERROR\0SFEHLER\0C42601\0Mbad\0\0"s, true, "ERROR", "42601", "bad"},
      {"SERROR\0C42601\0Mbad\0Xunknown\0\0"s, true, "ERROR", "42601", "bad"},
      {"Mbad\0\0"s, true, "", "XX000", "bad"},
      {"C123456\0\0"s, true, "", "XX000", ""},
      {"\0"s, true, "", "XX000", ""},
      {""s, true, "", "XX000", ""},  // lenient: fields were expected
      {"SERROR\0C42601\0Mbad\0"s, true, "ERROR", "42601", "bad"},
      {"SERROR\0C42601\0Mbad"s, false, "", "", ""},  // truncated
      {"S"s, false, "", "", ""},
      {"SERROR\0\0x"s, false, "", "", ""},  // one byte more
  };
  for (const auto& row : rows) {
    const Exact body(row.body);
    const auto error = parse_error(body.view());
    ASSERT_EQ(error.has_value(), row.ok) << testing::PrintToString(row.body);
    if (!error) continue;
    EXPECT_EQ(error->severity, row.severity) << testing::PrintToString(row.body);
    EXPECT_EQ(error->sqlstate, row.sqlstate) << testing::PrintToString(row.body);
    EXPECT_EQ(error->message, row.message) << testing::PrintToString(row.body);
  }
}

TEST(Messages, OptionsRows) {
  using Settings = std::vector<std::pair<std::string, std::string>>;
  const struct {
    const char* text;
    std::optional<Settings> settings;
  } rows[] = {
      {"", Settings{}},
      {"  \t ", Settings{}},
      {"-c a=b", Settings{{"a", "b"}}},
      {"-ca=b", Settings{{"a", "b"}}},
      {"--a=b", Settings{{"a", "b"}}},
      {"--a-b=c-d", Settings{{"a_b", "c-d"}}},
      {"-c a=", Settings{{"a", ""}}},
      {"-c a=b=c", Settings{{"a", "b=c"}}},
      {"-c a=x\\ y\\\\z -c b=1", Settings{{"a", "x y\\z"}, {"b", "1"}}},
      {"-c a=b\\", Settings{{"a", "b"}}},
      {"-e", Settings{{"datestyle", "euro"}}},
      {"-S 64 -ec a=b", Settings{{"work_mem", "64"}, {"datestyle", "euro"}, {"a", "b"}}},
      {"-OPS64", Settings{{"allow_system_table_mods", "true"}, {"ignore_system_indexes", "true"}, {"work_mem", "64"}}},
      {"-S", std::nullopt},
      {"-eE", std::nullopt},
      {"-", std::nullopt},
      {"-c", std::nullopt},
      {"-c a", std::nullopt},
      {"-c =a", std::nullopt},
      {"--a", std::nullopt},
      {"-E", std::nullopt},
      {"endpoint=ep-cool-name", Settings{}},
      {"project=x -c a=b neon_endpoint_type:read_write", Settings{{"a", "b"}}},
      {"neon_x", std::nullopt},
      {"a=b", std::nullopt},
      {"-c a=b c", std::nullopt},
  };
  std::string complaint;
  for (const auto& row : rows) EXPECT_EQ(parse_options(row.text, complaint), row.settings) << row.text;
}

TEST(Messages, OptionsAreRefusedInTheServersWords) {
  const struct {
    const char *text, *complaint;
  } rows[] = {{"-c foo", "-c foo requires a value"},
              {"-cfoo -c a=b", "-c foo requires a value"},
              {"--foo", "--foo requires a value"},
              {"-z", "invalid command-line argument for server process: -z"},
              {"-c a=b foo", "invalid command-line argument for server process: foo"},
              {"-c", "invalid command-line argument for server process: -c"},
              {"-", "invalid command-line argument for server process: -"},
              {"-E", ""}};  // it takes that one
  for (const auto& row : rows) {
    std::string complaint;
    EXPECT_FALSE(parse_options(row.text, complaint)) << row.text;
    EXPECT_EQ(complaint, row.complaint) << row.text;
  }
}

TEST(Messages, BuildersSayTheirOwnLength) {
  const std::string key = "0123";
  std::string out;
  write_ready_for_query(out, TxStatus::Failed);
  write_parameter_status(out, "a", "b");
  write_backend_key_data(out, 7, key);
  write_query(out, "SELECT 1");
  write_negotiate_protocol_version(out, kProtocol30, {"_pq_.a", "_pq_.b"});
  write_notice(out, "01000", "n", "h");
  std::string types;
  for (std::size_t at = 0; at < out.size();) {
    ASSERT_GE(out.size() - at, kHeaderSize);
    types += out[at];
    at += 1 + load_u32(reinterpret_cast<const std::uint8_t*>(out.data()) + at + 1);
    ASSERT_LE(at, out.size());
  }
  EXPECT_EQ(types, "ZSKQvN");
  out.clear();
  write_cancel_request(out, 7, key);
  EXPECT_EQ(out, "\0\0\0\x10\4\xd2\x16\x2e\0\0\0\7"s + key);
}

TEST(Reader, AnOverrunIsForGood) {
  const Exact body("ab\0c"s);
  Reader reader(body.view());
  EXPECT_EQ(reader.cstring(), "ab");
  EXPECT_TRUE(reader.ok());
  EXPECT_EQ(reader.u16(), 0);  // one byte is left
  EXPECT_FALSE(reader.ok());
  EXPECT_EQ(reader.u8(), 0);  // though it would fit
  EXPECT_EQ(reader.cstring(), "");
  EXPECT_TRUE(reader.bytes(1).empty());
  EXPECT_FALSE(reader.done());
  for (const std::size_t n : {std::size_t{5}, std::size_t(-1)}) {
    Reader whole(body.view());
    EXPECT_TRUE(whole.bytes(n).empty());
    EXPECT_FALSE(whole.ok());
  }
  Reader unterminated(body.view().subspan(3));
  EXPECT_EQ(unterminated.cstring(), "");
  EXPECT_FALSE(unterminated.ok());
}

TEST(Messages, ShapesOfStatements) {
  struct Column {
    std::string_view name;
    std::uint32_t table, type, modifier;
    std::uint16_t format;
  };
  const auto columns = [](std::initializer_list<Column> all) {
    std::string out;
    Writer w(out);
    w.u16(static_cast<std::uint16_t>(all.size()));
    for (const Column& c : all) w.cstring(c.name).u32(c.table).u16(1).u32(c.type).u16(4).u32(c.modifier).u16(c.format);
    return out;
  };
  const auto shape = [](Backend type, const std::string& body, std::uint32_t seed = 7) { return shape_of(type, Exact(body).view(), seed); };
  const std::size_t one = shape(Backend::RowDescription, columns({{"a", 1, 23, 0xffffffff, 0}}));
  EXPECT_EQ(one, shape(Backend::RowDescription, columns({{"a", 2, 23, 0xffffffff, 1}}))) << "of another table, in another format";
  EXPECT_NE(one, shape(Backend::RowDescription, columns({{"b", 1, 23, 0xffffffff, 0}})));
  EXPECT_NE(one, shape(Backend::RowDescription, columns({{"a", 1, 20, 0xffffffff, 0}})));
  EXPECT_NE(one, shape(Backend::RowDescription, columns({{"a", 1, 23, 8, 0}})));
  EXPECT_NE(one, shape(Backend::RowDescription, columns({{"a", 1, 23, 0xffffffff, 0}, {"b", 1, 23, 0xffffffff, 0}})));
  EXPECT_NE(one, shape(Backend::RowDescription, columns({{"a", 1, 23, 0xffffffff, 0}}), 8)) << "other parameters";
  EXPECT_NE(one, shape(Backend::NoData, ""));
  EXPECT_NE(shape(Backend::ParameterDescription, "\0\1\0\0\0\x17"s), shape(Backend::ParameterDescription, "\0\1\0\0\0\x19"s));
  EXPECT_EQ(shape(Backend::CommandComplete, ""), 0u);
  const std::string cut = columns({{"a", 1, 23, 0, 0}});
  for (std::size_t n = 0; n < cut.size(); ++n) EXPECT_NE(shape(Backend::RowDescription, cut.substr(0, n)), 0u);  // no read beyond
}

}  // namespace
}  // namespace pgsidecar::protocol
