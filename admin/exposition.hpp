// Series as text: Prometheus' format 0.0.4 and OpenMetrics 1.0 by one writer, so that a series has the same name and labels in
// both. Called by render.cpp and pgbouncer_metrics.cpp, which decide what there is to tell.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "admin/render.hpp"

namespace pgsidecar::admin {

enum class MetricType { Counter, Gauge, Histogram, Info };

class Writer {
 public:
  explicit Writer(Exposition format) : open_metrics_(format == Exposition::OpenMetrics) {}

  /// Begins a family. `name` is that of its samples: a counter's ends in _total, an Info's in _info.
  void family(std::string_view name, MetricType type, std::string_view help);
  void sample(std::string_view labels, std::string_view value, std::string_view suffix = {});
  void sample(std::string_view labels, std::uint64_t value) { sample(labels, std::to_string(value)); }
  void sample(std::string_view labels, double value) { sample(labels, number(value)); }
  /// A family of one sample without labels.
  void one(std::string_view name, MetricType type, std::string_view help, auto value) {
    family(name, type, help);
    sample({}, value);
  }
  std::string take() {
    if (open_metrics_) out_ += "# EOF\n";
    return std::move(out_);
  }

 private:
  std::string out_, name_;
  bool open_metrics_;
};

/// name="value", escaped and UTF-8.
std::string label(std::string_view name, std::string_view value);

/// A pool, or all those past LabelSets' limit in one, and what it is called in labels.
struct PoolRow {
  PoolRow(std::string_view database_name, std::string_view user, const pool::PoolSnapshot* is)
      : database(database_name), labels(label("database", database_name) + "," + label("user", user)), pool(is) {}
  std::string database, labels;
  const pool::PoolSnapshot* pool;
};

/// The series of PgBouncer's exporter (pgbouncer_exporter's collector.go has the names), with PgBouncer's meanings and units.
void write_pgbouncer(Writer& out, const pool::Snapshot& snapshot, const std::vector<PoolRow>& rows, LabelSets& labels);

}  // namespace pgsidecar::admin
