#include "admin/exposition.hpp"

namespace pgsidecar::admin {
namespace {

const char* type_name(MetricType type, bool open_metrics) {
  switch (type) {
    case MetricType::Counter: return "counter";
    case MetricType::Histogram: return "histogram";
    case MetricType::Info: return open_metrics ? "info" : "gauge";
    case MetricType::Gauge: break;
  }
  return "gauge";
}

}  // namespace

// OpenMetrics names a family without its samples' suffix, and its unit, which is the name's last word.
void Writer::family(std::string_view name, MetricType type, std::string_view help) {
  name_ = name;
  const auto line = [&](std::string_view word, std::string_view text) {
    out_.append("# ").append(word).append(" ").append(name).append(" ").append(text).append("\n");
  };
  std::string_view unit;
  if (open_metrics_) {
    if (type == MetricType::Counter && name.ends_with("_total")) name.remove_suffix(6);
    if (type == MetricType::Info && name.ends_with("_info")) name.remove_suffix(5);
    for (const std::string_view known : {"_seconds", "_bytes"})
      if (name.ends_with(known)) unit = known.substr(1);
  }
  line("HELP", help);
  line("TYPE", type_name(type, open_metrics_));
  if (!unit.empty()) line("UNIT", unit);
}

void Writer::sample(std::string_view labels, std::string_view value, std::string_view suffix) {
  out_.append(name_).append(suffix);
  if (!labels.empty()) out_.append("{").append(labels).append("}");
  out_.append(" ").append(value).append("\n");
}

std::string label(std::string_view name, std::string_view value) {
  std::string out(name);
  out += "=\"";
  for (const char c : to_utf8(value)) {
    if (c == '\n') {
      out += "\\n";
      continue;
    }
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out += '"';
}

}  // namespace pgsidecar::admin
