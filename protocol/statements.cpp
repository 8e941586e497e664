#include "protocol/statements.hpp"

#include <algorithm>
#include <charconv>

#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"
#include "protocol/wire.hpp"

namespace pgsidecar::protocol {

namespace {

/// Of which the server keeps the words until they are executed; EXPLAIN, DECLARE, CALL and CREATE TABLE AS aren't.
constexpr std::string_view kUtilities[] = {"abort",   "alter",    "analyze",    "begin",   "checkpoint", "close",     "cluster", "comment",
                                           "commit",  "copy",     "deallocate", "discard", "do",         "drop",      "end",     "fetch",
                                           "grant",   "listen",   "load",       "lock",    "move",       "notify",    "prepare", "execute",
                                           "reindex", "release",  "reset",      "revoke",  "rollback",   "savepoint", "set",     "show",
                                           "start",   "truncate", "unlisten",   "vacuum"};

std::string_view next_word(std::string_view& text) {
  const std::size_t begin = std::min(text.find_first_not_of(" \t\n\r\f\v"), text.size());
  const auto is_letter = [](char c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; };
  const auto end = std::find_if_not(text.begin() + static_cast<std::ptrdiff_t>(begin), text.end(), is_letter);
  const std::string_view word = text.substr(begin, static_cast<std::size_t>(end - text.begin()) - begin);
  text.remove_prefix(begin + word.size());
  return word;
}

bool same_word(std::string_view word, std::string_view lower) {
  return std::ranges::equal(word, lower, [](char a, char b) { return (a | 32) == b; });
}

/// A dollar before a digit, which is a parameter; or before anything else, which quotes.
bool has_dollar(std::string_view sql, bool of_parameter) {
  for (std::size_t at = sql.find('$'); at != std::string_view::npos; at = sql.find('$', at + 1))
    if ((at + 1 < sql.size() && sql[at + 1] >= '0' && sql[at + 1] <= '9') == of_parameter) return true;
  return false;
}

/// Of a Parse's body: a parameter of the text has no type of its own.
bool infers_types(std::string_view body, std::string_view sql) {
  const bool any = has_dollar(sql, true);
  if (!any || body.size() < sql.size() + 3) return any;
  Reader types(Bytes(reinterpret_cast<const std::uint8_t*>(body.data()) + sql.size() + 1, body.size() - sql.size() - 1));
  const std::size_t count = types.u16();
  for (std::size_t left = count; left > 0; --left)
    if (types.u32() == 0) return true;
  return count == 0;  // who declares any declares all
}

/// It may have a constant such as 'now' or 'today', which stands for the moment when the text was parsed.
bool has_moment(std::string_view sql) {
  constexpr std::string_view kMoments[] = {"now", "today", "tomorrow", "yesterday"};
  constexpr auto is_letter = [](char c) { return (c | 32) >= 'a' && (c | 32) <= 'z'; };
  const std::size_t quote = sql.find_first_of("'$");
  if (quote == std::string_view::npos) return false;
  for (std::size_t at = quote; at < sql.size();) {
    if (!is_letter(sql[at]) && ++at) continue;
    const std::size_t begin = at;
    while (at < sql.size() && (is_letter(sql[at]) || sql[at] == '_')) ++at;
    const std::string_view word = sql.substr(begin, at - begin);
    const bool calls = at < sql.size() && sql[at] == '(';
    if (!calls && std::ranges::any_of(kMoments, [&](std::string_view moment) { return same_word(word, moment); })) return true;
  }
  return false;
}

std::size_t held_by(const Statement& statement) {
  return sizeof statement + footprint(statement.body) + kNode + kBlock;
}

}  // namespace

bool has_constants(std::string_view sql) {
  if (std::ranges::any_of(sql, [](char c) { return c == '\\' || static_cast<unsigned char>(c) >= 0x80; })) return true;
  return is_analysed(sql) && (sql.find('\'') != std::string_view::npos || has_dollar(sql, false));
}

bool is_analysed(std::string_view sql) {
  const std::string_view first = next_word(sql), second = next_word(sql);
  if (same_word(first, "create")) return !same_word(second, "index") && !same_word(second, "unique") && !same_word(second, "database");
  return std::ranges::none_of(kUtilities, [&](std::string_view utility) { return same_word(first, utility); });
}

std::size_t StatementCache::footprint() const {
  return held_ + footprint_of_slots(map_);
}

StatementRef StatementCache::intern(std::string_view body, const std::shared_ptr<const void>& meaning) {
  if (const auto it = map_.find(Key{meaning.get(), body}); it != map_.end()) return it->second.lock();
  StatementRef ref = make(body, meaning);
  if (!has_moment(ref->sql)) map_.emplace(key(*ref), ref);
  return ref;
}

StatementRef StatementCache::make(std::string_view body, const std::shared_ptr<const void>& meaning, bool own_path, bool own_reading) {
  auto statement = std::make_unique<Statement>();
  statement->body = body;
  statement->sql = std::string_view(statement->body).substr(0, body.find('\0'));
  statement->tags = comment_tags(statement->sql);
  statement->meaning = meaning;
  statement->id = next_id_++;
  statement->residue = scan_sql(statement->sql);
  statement->has_constants = has_constants(statement->sql);
  statement->infers_types = infers_types(body, statement->sql);
  statement->own_path = own_path;
  statement->own_reading = own_reading;
  held_ += held_by(*statement);
  return {statement.release(), [this](const Statement* s) {
            retire(*s);
            held_ -= held_by(*s);
            delete s;
          }};
}

void StatementCache::retire(const Statement& statement) {
  const auto it = map_.find(key(statement));
  if (it != map_.end() && it->first.second.data() == statement.body.data()) map_.erase(it);
}

bool StatementCache::is_outdated(const ToldTypes& told) const {
  constexpr std::uint32_t kFirstOfItsOwn = 16384;  // FirstNormalObjectId: those below are the same in every database
  return told.era != era_ && std::ranges::any_of(told.types, [](std::uint32_t type) { return type >= kFirstOfItsOwn; });
}

void StatementCache::note_told(const Statement& statement, std::uint32_t shape, const std::vector<std::uint32_t>& types) {
  constexpr std::size_t kMost = 4;
  std::erase_if(statement.told, [this](const ToldTypes& told) { return is_outdated(told); });
  if (statement.told.size() < kMost && std::ranges::find(statement.told, shape, &ToldTypes::shape) == statement.told.end())
    statement.told.push_back({shape, era_, types});
}

StatementRef StatementCache::with_told_types(const Statement& statement, std::uint32_t shape) {
  const auto known = std::ranges::find(statement.told, shape, &ToldTypes::shape);
  if (known == statement.told.end() || is_outdated(*known)) return nullptr;
  std::string body(statement.sql);
  Writer w(body);
  w.u8(0).u16(static_cast<std::uint16_t>(known->types.size()));
  for (const std::uint32_t type : known->types) w.u32(type);
  if (body == statement.body) return nullptr;
  return statement.own_path ? make(body, statement.meaning, true) : intern(body, statement.meaning);
}

NamedStatement ClientStatements::look_up(std::string_view name) const {
  if (name.empty()) return unnamed_;
  if (!named_) return {};
  const auto it = named_->find(name);
  return it == named_->end() ? NamedStatement{} : it->second;
}

void ClientStatements::set(std::string_view name, NamedStatement named) {
  if (name.empty()) {
    unnamed_ = std::move(named);
    return;
  }
  if (!named_) named_ = std::make_unique<StringMap<NamedStatement>>();
  named_->insert_or_assign(std::string(name), std::move(named));
}

template <class F>
void ClientStatements::for_each_of(std::uint64_t id, F&& f) {
  if (unnamed_.statement && unnamed_.statement->id == id) f(unnamed_);
  if (!named_) return;
  for (auto& [name, named] : *named_)
    if (named.statement->id == id) f(named);
}

void ClientStatements::set_shape(std::uint64_t id, std::uint32_t shape) {
  for_each_of(id, [shape](NamedStatement& named) {
    if (named.shape == 0) named.shape = shape;
  });
}

void ClientStatements::replace(std::uint64_t id, const StatementRef& by) {
  for_each_of(id, [&by](NamedStatement& named) { named.statement = by; });
}

void ClientStatements::erase(std::string_view name) {
  if (name.empty())
    unnamed_ = {};
  else if (named_)
    named_->erase(name);
}

void ClientStatements::drop_unnamed() {
  static const StatementRef kGone = std::make_shared<const Statement>();
  unnamed_ = {kGone};
}

void LongTexts::add(ClientStatements& of) {
  const std::size_t size = of.long_unnamed();
  kept_.push_back({&of, size});
  bytes_ += size;
  while (bytes_ > kMost && kept_.size() > 1) {
    if (kept_.front().of->long_unnamed() != 0) kept_.front().of->drop_unnamed();
    erase(kept_.begin());
  }
}

void LongTexts::remove(const ClientStatements& of) {
  const auto kept = std::ranges::find(kept_, &of, &Kept::of);
  if (kept != kept_.end()) erase(kept);
}

void LongTexts::erase(std::vector<Kept>::iterator kept) {
  bytes_ -= kept->bytes;
  kept_.erase(kept);
  if (kept_.empty()) kept_.shrink_to_fit();
}

ServerStatements::Held* ServerStatements::touch(const StatementRef& statement) {
  const auto it = map_.find(statement->id);
  if (it == map_.end()) return nullptr;
  order_.splice(order_.begin(), order_, it->second);
  return &*it->second;
}

ServerStatements::Held& ServerStatements::add(const StatementRef& statement, std::uint32_t generation) {
  if (Held* const held = touch(statement)) return *held;
  order_.push_front({statement, generation});
  bytes_ += statement->body.size();
  map_.emplace(statement->id, order_.begin());
  return order_.front();
}

ServerStatements::Held* ServerStatements::look_up(std::uint64_t id) const {
  const auto it = map_.find(id);
  return it == map_.end() ? nullptr : &*it->second;
}

StatementRef ServerStatements::find(std::uint64_t id) const {
  const Held* const held = look_up(id);
  return held ? held->statement : nullptr;
}

void ServerStatements::erase(std::uint64_t id) {
  const auto it = map_.find(id);
  if (it == map_.end()) return;
  bytes_ -= it->second->statement->body.size();
  order_.erase(it->second);
  map_.erase(it);
}

void ServerStatements::clear() {
  order_.clear();
  map_.clear();
  bytes_ = 0;
  unnamed.reset();
}

StatementRef ServerStatements::evict(std::size_t limit) {
  const bool too_long = bytes_ > kMostBytes && order_.size() > 1;  // the last one is about to be used
  if (order_.size() <= limit && !too_long) return nullptr;
  StatementRef last = order_.back().statement;
  erase(last->id);
  return last;
}

ServerName::ServerName(std::uint64_t id) {
  char* digits = std::copy(kServerNamePrefix.begin(), kServerNamePrefix.end(), text_.data());
  size_ = static_cast<std::size_t>(std::to_chars(digits, text_.data() + text_.size(), id).ptr - text_.data());
}

}  // namespace pgsidecar::protocol
