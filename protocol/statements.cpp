#include "protocol/statements.hpp"

#include <algorithm>
#include <charconv>

#include "protocol/normalize.hpp"
#include "protocol/sql_scan.hpp"

namespace pgsidecar::protocol {

namespace {

std::size_t held_by(const Statement& statement) {
  return sizeof statement + footprint(statement.body) + kNode + kBlock;
}

}  // namespace

std::size_t StatementCache::footprint() const {
  return held_ + footprint_of_slots(map_);
}

StatementRef StatementCache::intern(std::string_view body, const std::shared_ptr<const void>& meaning) {
  if (const auto it = map_.find(Key{meaning.get(), body}); it != map_.end()) return it->second.lock();
  StatementRef ref = make(body, meaning);
  map_.emplace(key(*ref), ref);
  return ref;
}

StatementRef StatementCache::make(std::string_view body, const std::shared_ptr<const void>& meaning) {
  auto statement = std::make_unique<Statement>();
  statement->body = body;
  statement->sql = std::string_view(statement->body).substr(0, body.find('\0'));
  statement->tags = comment_tags(statement->sql);
  statement->meaning = meaning;
  statement->id = next_id_++;
  statement->residue = scan_sql(statement->sql);
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

NamedStatement ClientStatements::look_up(std::string_view name) const {
  if (name.empty()) return {unnamed_};
  if (!named_) return {};
  const auto it = named_->find(name);
  return it == named_->end() ? NamedStatement{} : it->second;
}

void ClientStatements::set(std::string_view name, NamedStatement named) {
  if (name.empty()) {
    unnamed_ = std::move(named.statement);
    return;
  }
  if (!named_) named_ = std::make_unique<StringMap<NamedStatement>>();
  named_->insert_or_assign(std::string(name), std::move(named));
}

void ClientStatements::set_shape(std::uint64_t id, std::size_t shape) {
  if (!named_) return;
  for (auto& [name, named] : *named_)
    if (named.statement->id == id) named.shape = shape;
}

void ClientStatements::erase(std::string_view name) {
  if (name.empty())
    unnamed_.reset();
  else if (named_)
    named_->erase(name);
}

ServerStatements::Held* ServerStatements::touch(const StatementRef& statement) {
  const auto it = map_.find(statement->id);
  if (it == map_.end()) return nullptr;
  order_.splice(order_.begin(), order_, it->second);
  return &*it->second;
}

ServerStatements::Held& ServerStatements::add(const StatementRef& statement) {
  if (Held* const held = touch(statement)) return *held;
  order_.push_front({statement});
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
  order_.erase(it->second);
  map_.erase(it);
}

void ServerStatements::clear() {
  order_.clear();
  map_.clear();
  unnamed.reset();
}

StatementRef ServerStatements::evict(std::size_t limit) {
  if (order_.size() <= limit) return nullptr;
  StatementRef last = order_.back().statement;
  erase(last->id);
  return last;
}

ServerName::ServerName(std::uint64_t id) {
  constexpr std::string_view kPrefix = "pgsidecar_";
  char* digits = std::copy(kPrefix.begin(), kPrefix.end(), text_.data());
  size_ = static_cast<std::size_t>(std::to_chars(digits, text_.data() + text_.size(), id).ptr - text_.data());
}

}  // namespace pgsidecar::protocol
