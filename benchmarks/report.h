// report.h: what a benchmark prints and keeps: the machine it ran on, an aligned table, a JSON file.
#pragma once

#include <cmath>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace mfa::bench {

// Writes JSON with two spaces of indent; the caller nests begin and end. NaN and infinity become null.
class JsonWriter {
 public:
  explicit JsonWriter(const std::string& path);

  void begin_object(const std::string& key = "") { open(key, '{'); }
  void begin_array(const std::string& key = "") { open(key, '['); }
  void end_object() { close('}'); }
  void end_array() { close(']'); }
  void field(const std::string& key, const std::string& value);
  void field(const std::string& key, const char* value) { field(key, std::string(value)); }
  void field(const std::string& key, double value);
  void field(const std::string& key, int64_t value);
  void field(const std::string& key, int value) { field(key, int64_t{value}); }
  void field(const std::string& key, bool value);

 private:
  void next(const std::string& key);
  void open(const std::string& key, char bracket);
  void close(char bracket);
  static std::string quoted(const std::string& text);

  std::ofstream out_;
  int depth_ = 0;
  bool first_ = true;
};

// Columns as wide as their widest cell; the first is aligned left, the others right.
class Table {
 public:
  explicit Table(std::vector<std::string> head) : rows_{std::move(head)} {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

// Processor time that everything but this process uses, in cores, from construction on; NaN where Linux cannot tell.
class OtherWork {
 public:
  OtherWork();
  double cores() const;

 private:
  double wall_s_, others_s_;
};

struct Machine {
  std::string cpu;       // model name
  std::string isa;       // of the kernels that run by default
  std::string compiler;  // of this program and the library
  int cores = 0;         // that the affinity mask and quota leave
  double load = 0;       // load average of the last minute before the run
  double others = NAN;   // cores that other processes used during the run
  // More than half a core of other work for each core before the run, or a tenth during it.
  bool noisy() const { return load > 0.5 * cores || others > 0.1 * cores; }
};
Machine describe_machine(const std::string& isa);
std::string summary(const Machine& machine);
void write(JsonWriter& json, const Machine& machine);

// `value` with `digits` after the point; "-" for NaN.
std::string number(double value, int digits);

}  // namespace mfa::bench
