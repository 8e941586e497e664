// What is known of a database's own functions: what running one may leave behind in the session, read from its body. Some are
// called by name; others run because a text names what they hang on: a table's triggers, defaults, checks, policies and
// rules, a view's query, a type's checks. A function whose body can't be read (another language, SQL put together when it runs)
// has the session looked at after every call.
//
// A Survey finds out what hangs on what. It is made before a pool's first connection is used, again on a connection that clients
// have used when the last one is a minute old, and after the proxy saw something being made or altered.
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pool/pins.hpp"
#include "protocol/sql_scan.hpp"
#include "protocol/statements.hpp"
#include "protocol/words.hpp"

namespace pgsidecar::proxy {

class SettingsCache;

class Catalog {
 public:
  using Time = std::chrono::steady_clock::time_point;
  using Names = std::vector<std::string>;

  /// Custom settings that functions set are learned by `settings`.
  explicit Catalog(SettingsCache& settings) : settings_(settings) { unknown(); }

  /// The residue of calling these and all that they call. With kFunction if it isn't known; then `unknown` gets those to ask for.
  std::uint32_t residue_of_calls(const Names& names, Time now, Names& unknown) const;
  /// No text leaves behind more than its statements and calls show.
  bool quiet() const { return everywhere_ == 0 && words_.empty(); }
  /// The residue of what hangs on all that a text names.
  std::uint32_t residue_of_names(std::string_view sql) const;
  std::uint32_t residue_of_names(const std::vector<protocol::Word>& words) const;
  std::uint32_t residue_of_names(const protocol::Statement& statement) const;  ///< kept with it

  /// Of functions that were asked for, those whose bodies leave something, in the order of their names; the first 100.
  std::vector<pool::FunctionEffects> effects() const;
  std::size_t footprint() const;
  std::uint32_t everywhere() const { return everywhere_; }  ///< the residue of any text

  /// What one question is about, and what has come back so far.
  struct Inquiry;
  /// About those of the names that aren't known by now.
  Inquiry inquire(const Names& unknown, Time now) const;
  /// SQL that asks: rows (name, language, owned by an extension, body).
  static std::string question(const Inquiry& inquiry);
  void answer(Inquiry& inquiry, const std::string& name, std::string_view language, bool extension, std::string_view body);
  /// All rows have come: what was asked for and has none is no function. `failed`: not all.
  void answered(Inquiry& inquiry, Time now, bool failed);

  /// Something was made or changed.
  void forget();
  bool keeps_plans() const { return keeps_plans_; }  ///< there are functions of a language that keeps plans, such as PL/pgSQL
  bool inlines() const { return inlines_; }          ///< there are SQL functions whose constants may become part of others' plans
  bool surveyed() const { return surveyed_; }        ///< what naming things may leave behind is known
  bool due(Time now) const { return now >= due_; }   ///< a survey is
  /// True once when something has been found that sessions may have been used by unseen since the last look.
  bool take_late() { return std::exchange(late_, false); }
  /// True once when anything was made, altered or dropped since the last look.
  bool take_rewritten() { return std::exchange(rewritten_, false); }

 private:
  friend class Survey;
  struct Known {
    std::uint32_t residue = 0;
    std::vector<std::string> calls;
    std::vector<protocol::Word> words;  // of its body, sorted
    Time learned{};
  };
  using Words = boost::unordered_flat_map<protocol::Word, std::uint32_t>;
  static constexpr std::chrono::seconds kGood{60}, kSurveyEvery{30}, kRetry{5};

  std::uint32_t walk(const std::string& name, Time since, std::vector<const Known*>& visited, Names& unknown) const;
  std::uint32_t walk(const Known& known, Time since, std::vector<const Known*>& visited, Names& unknown) const;
  Inquiry older(const Names& names, Time since) const;
  void unknown();

  SettingsCache& settings_;
  protocol::StringMap<Known> known_;
  Words words_;                   // what naming something may leave behind, if anything
  std::uint32_t everywhere_ = 0;  // what every text may
  std::uint64_t version_ = 0;     // of these two, unlike any other catalog's
  std::uint64_t changes_ = 0;     // forget() was called so often
  Time due_{};
  bool surveyed_ = false, failing_ = false, late_ = false, rewritten_ = false, keeps_plans_ = true, inlines_ = true;
  std::string rows_written_;  // of the catalogs, as the server counts them
};

struct Catalog::Inquiry {
  std::vector<std::string> names;
  protocol::StringMap<Known> found;
};

/// Asks the server, in as many steps as it takes. While one is on its way another connection may make one too.
class Survey {
 public:
  using Time = Catalog::Time;

  Survey(Catalog& catalog, Time now);
  /// The next question, for rows of four columns. Empty: that was all, and the catalog knows.
  std::string next(Time now);
  void answer(std::string (&field)[4]);
  void answered(Time now, bool failed);
  /// What naming these may leave behind, as it found.
  std::uint32_t residue_of(const std::vector<protocol::Word>& words) const;

 private:
  struct Hanging {
    protocol::Word word;  // of what it hangs on; 0: counts everywhere
    std::string function;
  };
  /// Reckons what naming things may leave behind, as far as it is known what functions hang on; returns the functions that
  /// leave anything.
  std::vector<std::string> reckon();
  std::string give_up(Time now, Catalog::Time::duration retry, const char* why);

  Catalog& catalog_;
  const Time begun_;
  const std::uint64_t changes_;
  int rounds_ = 0, failures_ = 0;
  bool asks_relations_ = false, failed_ = false, keeps_plans_ = false, inlines_ = false;
  Catalog::Names wanted_;
  std::vector<std::string> functions_;  // that hang on something
  std::vector<std::string> stateful_;   // of those, whose relations are known
  std::vector<Hanging> hanging_;
  Catalog::Inquiry inquiry_, expressions_;  // expressions_: answers of the first question, which only this one knows by their names
  Catalog::Words words_;
  std::uint32_t everywhere_ = 0;
};

}  // namespace pgsidecar::proxy
