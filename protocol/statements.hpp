// Protocol-level prepared statements in transaction mode. A client's names are its own; on a server connection a
// statement is prepared once under a name of the proxy's, shared by all clients whose Parse had the same text and
// parameter types. Decides names and what must be prepared or evicted; sends nothing.
#pragma once

#include <array>
#include <boost/container_hash/hash.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "protocol/footprint.hpp"

namespace pgsidecar::protocol {

/// Whether the server looks up a text's names when it parses it. Of utility commands it keeps the words until they are executed
/// (transformStmt).
bool is_analysed(std::string_view sql);
/// Whether what a text says may depend on settings such as DateStyle and client_encoding: it quotes, escapes or isn't ASCII alone.
bool has_constants(std::string_view sql);

/// A described statement's parameter types, by the shape_of what was told of it.
struct ToldTypes {
  std::uint32_t shape;
  std::uint32_t era;  ///< of the cache's, in which it was told
  std::vector<std::uint32_t> types;
};

/// One text with parameter types (Parse's body after the name) and what of the session decided its meaning when it was parsed.
/// Shared by clients and servers while any holds it.
struct Statement {
  Statement() = default;
  Statement(const Statement&) = delete;  // has views of its own body
  Statement& operator=(const Statement&) = delete;

  std::string body;
  std::string_view sql;                 ///< the text
  std::string_view tags;                ///< comment_tags of it
  std::shared_ptr<const void> meaning;  ///< compared only; statements with other meanings are others
  std::uint64_t id = 0;
  std::uint32_t residue = 0;                ///< scan_sql of the text
  bool has_constants = false;               ///< and is analysed, or its characters are in doubt
  bool infers_types = false;                ///< of parameters, from what its names stand for
  bool own_path = false;                    ///< its names were looked up where only its transaction has them looked up
  bool own_reading = false;                 ///< it was read under what only its transaction had set
  mutable std::vector<ToldTypes> told;      ///< in what clients were told; few
  mutable std::uint64_t fingerprint = 0;    ///< of the normalised text; 0: not computed yet
  mutable std::uint64_t proven_with = 0;    ///< the number of the settings of a session in which a server has accepted it
  mutable std::uint32_t proven_in = 0;      ///< the generation in which it has
  mutable std::uint64_t names_version = 0;  ///< of the catalog by which the next was judged
  mutable std::uint32_t names_residue = 0;  ///< of what hangs on what the text names
};
using StatementRef = std::shared_ptr<const Statement>;

/// Interns statements. A known body costs no allocation; one with a constant such as 'now' or 'today', which stands for the moment when
/// it was parsed, is a statement of its own each time. Must outlive every StatementRef that it gave out.
class StatementCache {
 public:
  StatementRef intern(std::string_view body, const std::shared_ptr<const void>& meaning = {});
  /// A statement that nobody shares.
  StatementRef make(std::string_view body, const std::shared_ptr<const void>& meaning, bool own_path = false, bool own_reading = false);
  void note_told(const Statement& statement, std::uint32_t shape, const std::vector<std::uint32_t>& types);
  /// What clients were told may be of another database: types of its own have other numbers there.
  void forget_told_types() { ++era_; }
  /// The same text with parameter types as a client was told them with this shape; null: it has all of them, or nothing is known.
  StatementRef with_told_types(const Statement& statement, std::uint32_t shape);
  /// The same body is another statement from now on, since its plan doesn't fit the tables any more.
  void retire(const Statement& statement);
  /// Counts how often anything was made, altered or dropped: what was prepared before may be planned for something else.
  std::uint32_t generation() const { return generation_; }
  void begin_generation() { ++generation_; }
  std::size_t size() const { return map_.size(); }
  std::size_t footprint() const;

 private:
  using Key = std::pair<const void*, std::string_view>;
  bool is_outdated(const ToldTypes& told) const;
  static Key key(const Statement& statement) { return {statement.meaning.get(), statement.body}; }

  // Keys are views into the statements; a statement leaves the map when its last holder does.
  boost::unordered_flat_map<Key, std::weak_ptr<const Statement>, boost::hash<Key>> map_;
  std::uint64_t next_id_ = 1;
  std::uint32_t generation_ = 1, era_ = 0;
  std::size_t held_ = 0;  // bytes of statements that live
};

/// Lets maps with std::string keys be asked with views.
struct StringHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view s) const { return boost::hash<std::string_view>{}(s); }
};
template <class T>
using StringMap = boost::unordered_flat_map<std::string, T, StringHash, std::equal_to<>>;

/// What a client's name stands for.
struct NamedStatement {
  StatementRef statement;
  std::uint32_t generation = 0;  ///< in which the client has parsed it, so that no older plan will do
  std::uint32_t shape = 0;       ///< shape_of its parameters and columns, as the client was told last; 0: it wasn't told
};

inline constexpr std::size_t kLongText = 64 * 1024;  ///< of a statement

/// A client's names. Few per client, so a small vector would do; a map keeps the bound of thousands cheap.
class ClientStatements {
 public:
  NamedStatement look_up(std::string_view name) const;  ///< no statement: there is none of that name
  StatementRef find(std::string_view name) const { return look_up(name).statement; }
  void set(std::string_view name, NamedStatement named);
  void set(std::string_view name, StatementRef statement, std::uint32_t generation = 0) {
    set(name, NamedStatement{std::move(statement), generation});
  }
  void set_shape(std::uint64_t id, std::uint32_t shape);  ///< of all names of this statement
  void replace(std::uint64_t id, const StatementRef& by);
  void erase(std::string_view name);
  void clear_named() { named_.reset(); }
  template <class F>
  void for_each_named(F&& f) const {
    if (named_)
      for (const auto& [name, named] : *named_) f(name, named.statement);
  }
  void clear_unnamed() { unnamed_ = {}; }
  NamedStatement exchange_unnamed(NamedStatement by) { return std::exchange(unnamed_, std::move(by)); }
  /// The length of the unnamed statement, if it is a long one; else 0.
  std::size_t long_unnamed() const {
    const std::size_t size = unnamed_.statement ? unnamed_.statement->body.size() : 0;
    return size > kLongText ? size : 0;
  }
  void drop_unnamed();  ///< there is one still, but its text is gone
  std::size_t size() const { return named_ ? named_->size() : 0; }
  std::size_t footprint() const { return named_ ? sizeof *named_ + footprint_of_slots(*named_) : 0; }

 private:
  template <class F>
  void for_each_of(std::uint64_t id, F&& f);  ///< f(NamedStatement&)

  NamedStatement unnamed_;
  std::unique_ptr<StringMap<NamedStatement>> named_;
};

/// The long texts that clients keep in unnamed statements without having a server connection: those who prepare in one request what they
/// execute in the next find them, but in all there are no more than a few.
class LongTexts {
 public:
  static constexpr std::size_t kMost = 8u << 20;  ///< bytes, or a single text

  /// Drops what was kept first, if it is too much.
  void keep(ClientStatements& of) {
    if (of.long_unnamed() != 0) add(of);
  }
  void let_go(const ClientStatements& of) {
    if (!kept_.empty()) remove(of);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  struct Kept {
    ClientStatements* of;
    std::size_t bytes;
  };
  void add(ClientStatements& of);
  void remove(const ClientStatements& of);
  void erase(std::vector<Kept>::iterator kept);

  std::vector<Kept> kept_;  // the first kept first
  std::size_t bytes_ = 0;
};

/// What is prepared on one server connection, least recently used last.
class ServerStatements {
 public:
  static constexpr std::size_t kMostBytes = 8u << 20;  ///< of texts

  struct Held {
    StatementRef statement;
    std::uint32_t generation = 0;  ///< in which it was prepared
    std::uint32_t shape = 0;       ///< as the server has said since it was prepared there; 0: it hasn't
    bool doubtful = false;         ///< used, and so maybe planned, where texts are read otherwise
  };

  /// Null: it isn't prepared there; else it counts as used now.
  Held* touch(const StatementRef& statement);
  Held& add(const StatementRef& statement, std::uint32_t generation);
  Held* look_up(std::uint64_t id) const;  ///< null: it isn't prepared there
  StatementRef find(std::uint64_t id) const;
  void erase(std::uint64_t id);
  void clear();
  template <class F>
  void erase_if(F&& f) {
    for (auto it = order_.begin(); it != order_.end();) {
      const auto held = it++;
      if (f(std::as_const(*held))) erase(held->statement->id);
    }
  }
  /// A statement to close because more than `limit` are prepared, or longer ones than kMostBytes in all; nullptr if none. It is forgotten.
  StatementRef evict(std::size_t limit);
  std::size_t size() const { return order_.size(); }
  std::size_t footprint() const { return footprint_of_nodes(order_) + footprint_of_slots(map_); }
  void drop_long_unnamed() {
    if (unnamed && unnamed->body.size() > kLongText) unnamed.reset();
  }
  StatementRef unnamed;  ///< what the server's unnamed statement holds, if known

 private:
  std::list<Held> order_;
  boost::unordered_flat_map<std::uint64_t, std::list<Held>::iterator> map_;
  std::size_t bytes_ = 0;
};

/// Of the proxy's names for statements on a server connection.
inline constexpr std::string_view kServerNamePrefix = "pgsidecar_";
/// The name under which a statement is prepared on servers. Written for each Bind, so it lives without the heap.
class ServerName {
 public:
  explicit ServerName(std::uint64_t id);
  std::string_view view() const { return {text_.data(), size_}; }
  operator std::string_view() const { return view(); }
  std::size_t size() const { return size_; }

 private:
  std::array<char, 32> text_;
  std::size_t size_;
};
inline ServerName server_name(std::uint64_t id) {
  return ServerName(id);
}

}  // namespace pgsidecar::protocol
