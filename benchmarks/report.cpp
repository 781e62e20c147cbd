#include "report.h"

#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <stdexcept>

#include "common/check.h"
#include "common/cpu_limits.h"
#include "timing.h"

namespace mfa::bench {

JsonWriter::JsonWriter(const std::string& path) {
  const std::filesystem::path parent = std::filesystem::path(path).parent_path();
  if (!parent.empty()) std::filesystem::create_directories(parent);
  out_.open(path);
  if (!out_) throw std::runtime_error("cannot write " + path);
}

std::string JsonWriter::quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

void JsonWriter::next(const std::string& key) {
  if (!first_) out_ << ',';
  if (depth_ > 0) out_ << '\n' << std::string(static_cast<size_t>(2 * depth_), ' ');
  if (!key.empty()) out_ << quoted(key) << ": ";
  first_ = false;
}

void JsonWriter::open(const std::string& key, char bracket) {
  next(key);
  out_ << bracket;
  ++depth_;
  first_ = true;
}

void JsonWriter::close(char bracket) {
  --depth_;
  if (!first_) out_ << '\n' << std::string(static_cast<size_t>(2 * depth_), ' ');
  out_ << bracket;
  first_ = false;
  if (depth_ == 0) out_ << '\n';
}

void JsonWriter::field(const std::string& key, const std::string& value) {
  next(key);
  out_ << quoted(value);
}

void JsonWriter::field(const std::string& key, double value) {
  next(key);
  if (!std::isfinite(value)) {
    out_ << "null";
    return;
  }
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  out_ << text;
}

void JsonWriter::field(const std::string& key, int64_t value) {
  next(key);
  out_ << value;
}

void JsonWriter::field(const std::string& key, bool value) {
  next(key);
  out_ << (value ? "true" : "false");
}

std::string Table::text() const {
  std::vector<size_t> widths(rows_.front().size());
  for (const auto& row : rows_)
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  std::string out;
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string padding(widths[c] - row[c].size(), ' ');
      out += c == 0 ? row[c] + padding : "  " + padding + row[c];
    }
    out += '\n';
  }
  return out;
}

namespace {

// Seconds that all processors were busy since the start, those stolen by the host included, less this process's own.
double busy_s_of_others() {
  std::ifstream stat("/proc/stat");
  std::string name;
  double user, nice, system, idle, iowait, irq, softirq, steal;
  if (!(stat >> name >> user >> nice >> system >> idle >> iowait >> irq >> softirq >> steal)) return NAN;
  rusage own;
  getrusage(RUSAGE_SELF, &own);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return (user + nice + system + irq + softirq + steal) / static_cast<double>(sysconf(_SC_CLK_TCK)) -
         seconds(own.ru_utime) - seconds(own.ru_stime);
}

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (colon != std::string::npos && line.starts_with("model name")) return line.substr(colon + 2);
  }
  return "unknown";
}

std::string compiler() {
#if defined(__clang__)
  return concat("clang ", __clang_major__, ".", __clang_minor__, ".", __clang_patchlevel__);
#else
  return concat("g++ ", __GNUC__, ".", __GNUC_MINOR__, ".", __GNUC_PATCHLEVEL__);
#endif
}

}  // namespace

OtherWork::OtherWork() : wall_s_(wall_s()), others_s_(busy_s_of_others()) {}

double OtherWork::cores() const {
  return std::max(0.0, busy_s_of_others() - others_s_) / std::max(wall_s() - wall_s_, 1e-3);
}

Machine describe_machine(const std::string& isa) {
  Machine machine;
  machine.cpu = cpu_model();
  machine.isa = isa;
  machine.compiler = compiler();
  machine.cores = usable_cores();
  if (getloadavg(&machine.load, 1) != 1) machine.load = std::nan("");
  return machine;
}

std::string summary(const Machine& m) {
  return concat(m.cpu, ", ", m.cores, m.cores == 1 ? " core" : " cores", ", kernels ", m.isa, ", ", m.compiler,
                ", load before ", number(m.load, 2));
}

void write(JsonWriter& json, const Machine& machine) {
  json.begin_object("machine");
  json.field("cpu", machine.cpu);
  json.field("isa", machine.isa);
  json.field("compiler", machine.compiler);
  json.field("cores", machine.cores);
  json.field("load_before", machine.load);
  json.field("others_during", machine.others);
  json.field("noisy", machine.noisy());
  json.end_object();
}

std::string number(double value, int digits) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

}  // namespace mfa::bench
