// attention_cpu.cpp: how near the CPU kernels come to this machine's ceilings, without MLX.
//
// Each row checks its answer, warms up, then alternates bursts of the ceiling's loop with timed calls: one thread by
// its own CPU time, all threads by the wall clock. Medians count. docs/benchmarks.md says how to read the table.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <iostream>
#include <optional>
#include <regex>
#include <string>
#include <vector>

#include "attention_case.h"
#include "backend/cpu/attention.h"
#include "common/check.h"
#include "common/thread_pool.h"
#include "options.h"
#include "report.h"
#include "timing.h"

namespace mfa::bench {
namespace {

enum class Quantity {
  arithmetic,  // useful FLOP/s over the arithmetic peak
  window,      // time over the visible fraction of the time of full attention
  decode,      // time of the nearer ceiling, memory or arithmetic, over time
  scaling,     // wall time of one thread over that of two
};

struct Row {
  std::string group, work;
  Quantity quantity = Quantity::arithmetic;
  Shape shape;
  double must = NAN, aim = NAN;  // per cent, or a factor for window and scaling; NaN: measured without a goal
  bool quick = false;            // also in a quick run
  bool backward = false;
  std::string isa;  // forced; empty: the default
};

struct Timing {
  double seconds = NAN, spread = NAN, gflops = NAN, gbps = NAN, value = NAN;
};

struct Result {
  std::string isa, ceiling;
  Timing one, all;
  double error = NAN, one_core_gflops = NAN, all_cores_gflops = NAN, memory_gbps = NAN;
};

const char* unit(Quantity quantity) {
  return quantity == Quantity::window || quantity == Quantity::scaling ? "x" : "%";
}

std::string describe(const Shape& s) {
  std::string text = concat(name_of(s.dtype), " D ", s.D);
  if (s.Nq != s.Nk) return concat(text, ", ", s.Hkv, " KV heads, ", s.Nk, " keys, G ", s.Hq / s.Hkv);
  text += concat(" N ", s.Nk);
  if (s.window_left >= 0) text += concat(" window ", s.window_left);
  return text + (s.causal ? " causal" : " full");
}

Shape square(DType dtype, int32_t D, int32_t N, bool causal) {
  Shape s;
  s.dtype = dtype;
  s.D = D;
  s.Nq = s.Nk = N;
  s.causal = causal;
  return s;
}

// The goals of full or causal forward attention, per cent of the peak; causal rows have one from 4096 keys on.
void set_forward_goal(Row& row) {
  const Shape& s = row.shape;
  const bool wide = s.D == 128;
  if (s.causal && s.Nk < 4096) return;
  if (s.dtype == DType::f32) {
    row.must = s.causal ? (wide ? 83 : 80) : (wide ? 88 : 85);
    row.aim = s.causal ? 90 : (wide ? 94 : 92);
  } else if (s.dtype == DType::bf16) {
    row.must = s.causal ? (wide ? 74 : 68) : (wide ? 80 : 75);
    row.aim = s.causal ? 83 : (wide ? 90 : 85);
  } else if (!s.causal) {
    row.must = 78;
    row.aim = 88;
  }
}

void add_long_rows(std::vector<Row>& rows, DType dtype, bool backward) {
  for (const bool causal : {false, true}) {
    for (const int32_t D : {64, 128}) {
      for (const int32_t N : {2048, 4096}) {
        Row row;
        row.group = backward ? "backward" : "forward";
        row.shape = square(dtype, D, N, causal);
        row.backward = backward;
        row.quick = N == 2048 && (!backward || !causal);
        if (!backward) {
          set_forward_goal(row);
        } else if (!causal || N >= 4096) {
          row.must = dtype == DType::f32 ? 82 : 55;
          row.aim = dtype == DType::f32 ? 93 : 78;
        }
        rows.push_back(row);
      }
    }
  }
}

// The rows of the goals, in the order of the table in docs/benchmarks.md.
std::vector<Row> all_rows(bool force_avx2) {
  std::vector<Row> rows;
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) add_long_rows(rows, dtype, false);
  const auto add = [&](const char* group, Quantity quantity, const Shape& shape, double must, double aim, bool quick) {
    Row row;
    row.group = group;
    row.quantity = quantity;
    row.shape = shape;
    row.must = must;
    row.aim = aim;
    row.quick = quick;
    rows.push_back(row);
  };
  for (const int32_t D : {64, 128}) {
    for (const int32_t N : {2048, 4096}) {
      if (!force_avx2) continue;
      add("AVX2 forward", Quantity::arithmetic, square(DType::f32, D, N, false), 75, 88, false);
      rows.back().isa = "avx2";
    }
  }
  for (const DType dtype : {DType::f32, DType::bf16}) add_long_rows(rows, dtype, true);
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int32_t D : {64, 128})
      for (const int32_t N : {256, 512})
        add("short forward", Quantity::arithmetic, square(dtype, D, N, false), 60, 75, true);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const int32_t D : {64, 128}) {
      Shape shape = square(dtype, D, 4096, true);
      shape.window_left = 256;
      add("window", Quantity::window, shape, 1.4, 1.15, D == 64);
    }
  }
  for (const int32_t G : {1, 4, 8}) {
    Shape shape = square(DType::bf16, 128, 32768, false);
    shape.Nq = 1;
    shape.Hq = shape.Hkv * G;
    add("decode", Quantity::decode, shape, G == 1 ? 80 : 70, G == 1 ? 95 : 88, true);
  }
  add("2 threads, forward", Quantity::scaling, square(DType::f32, 64, 2048, false), 1.85, 1.97, true);
  add("2 threads, forward", Quantity::scaling, square(DType::f32, 128, 4096, false), 1.85, 1.97, false);
  add("2 threads, forward", Quantity::scaling, square(DType::f32, 128, 4096, true), 1.85, 1.97, false);
  add("2 threads, forward", Quantity::scaling, square(DType::bf16, 128, 4096, false), 1.85, 1.97, false);
  add("2 threads, backward", Quantity::scaling, square(DType::f32, 64, 2048, false), 1.85, 1.97, false);
  rows.back().backward = true;
  for (Row& row : rows) row.work = describe(row.shape);
  return rows;
}

// Seconds of one call, a sample for each repeat.
struct Samples {
  std::vector<double> one, one_wall, all;  // one thread by its CPU time and by the wall clock, all threads
  std::vector<double> full_one, full_all;  // window rows: the same problem without the window
};

Samples collect(const Row& row, int threads, int reps, AttentionCase& subject, AttentionCase* full,
                Ceilings& ceilings) {
  constexpr double kMinSample_s = 5e-3;
  const auto work = [&] { row.backward ? subject.backward() : subject.forward(); };
  const auto full_work = [&] { full->forward(); };
  const int calls = calls_per_sample(seconds_per_call(CLOCK_MONOTONIC, 1, work), kMinSample_s);
  Samples samples;
  for (int rep = 0; rep < reps; ++rep) {
    set_thread_count(1);
    ceilings.burst_one_core();
    const double start = wall_s();
    samples.one.push_back(seconds_per_call(CLOCK_THREAD_CPUTIME_ID, calls, work));
    samples.one_wall.push_back((wall_s() - start) / calls);
    if (full) samples.full_one.push_back(seconds_per_call(CLOCK_THREAD_CPUTIME_ID, 1, full_work));
    ceilings.burst_one_core();

    set_thread_count(threads);
    ceilings.burst_all_cores();
    if (row.quantity == Quantity::decode) ceilings.burst_memory();
    work();  // wakes the pool and brings back what the bursts pushed out of the caches
    samples.all.push_back(seconds_per_call(CLOCK_MONOTONIC, calls, work));
    if (full) samples.full_all.push_back(seconds_per_call(CLOCK_MONOTONIC, 1, full_work));
    ceilings.burst_all_cores();
  }
  return samples;
}

Result evaluate(const Row& row, const AttentionCase& subject, const Samples& samples, const Ceilings& ceilings) {
  const double flops = row.backward ? subject.backward_flops() : subject.forward_flops();
  const double bytes = subject.key_value_bytes();
  const auto timing = [&](const std::vector<double>& seconds) {
    Timing t;
    t.seconds = median(seconds);
    t.spread = spread(seconds);
    t.gflops = flops / t.seconds * 1e-9;
    t.gbps = bytes / t.seconds * 1e-9;
    return t;
  };
  Result r;
  r.one = timing(samples.one);
  r.all = timing(samples.all);
  r.one_core_gflops = ceilings.one_core_gflops();
  r.all_cores_gflops = ceilings.all_cores_gflops();
  r.memory_gbps = ceilings.memory_gbps();
  r.ceiling = ceilings.native_bf16() ? "bfloat16 peak" : "float32 peak";
  switch (row.quantity) {
    case Quantity::arithmetic:
      r.one.value = 100 * r.one.gflops / r.one_core_gflops;
      r.all.value = 100 * r.all.gflops / r.all_cores_gflops;
      break;
    case Quantity::window:
      r.ceiling = "visible part of full";
      r.one.value = r.one.seconds / (median(samples.full_one) * subject.visible_fraction());
      r.all.value = r.all.seconds / (median(samples.full_all) * subject.visible_fraction());
      break;
    case Quantity::decode: {
      // With one query to a key (G = 1) the goal is the memory's rate; with a group, the nearer of the two ceilings.
      const double by_memory = bytes / (r.memory_gbps * 1e9), by_peak = flops / (r.all_cores_gflops * 1e9);
      const bool memory_bound = row.shape.Hq == row.shape.Hkv || by_memory >= by_peak;
      if (memory_bound) r.ceiling = "memory read";
      r.all.value = 100 * (memory_bound ? by_memory : by_peak) / r.all.seconds;
      break;
    }
    case Quantity::scaling:
      r.ceiling = "one thread";
      r.one = timing(samples.one_wall);
      r.all.value = r.one.seconds / r.all.seconds;
      break;
  }
  return r;
}

// Measures `row` with `threads` in the "all threads" columns; throws std::runtime_error if its answer is wrong.
Result measure(const Row& row, int threads, int reps) {
  cpu::set_isa(row.isa);
  const CpuKernelTraits traits = cpu::kernel_traits().value();
  if (row.quantity == Quantity::scaling) threads = 2;
  set_thread_count(threads);

  AttentionCase subject(row.shape, row.backward);
  std::optional<AttentionCase> full;
  if (row.quantity == Quantity::window) {
    Shape open = row.shape;
    open.causal = false;
    open.window_left = open.window_right = -1;
    full.emplace(open, false);
    full->forward();
  }
  subject.forward();
  double error = subject.check_forward();
  if (row.backward) {
    subject.backward();
    error = std::max(error, subject.check_backward());
  }

  Ceilings ceilings(row.shape.dtype == DType::bf16 && traits.native_bf16, threads);
  const Samples samples = collect(row, threads, reps, subject, full ? &*full : nullptr, ceilings);
  Result result = evaluate(row, subject, samples, ceilings);
  result.isa = traits.isa;
  result.error = error;
  set_thread_count(0);
  cpu::set_isa("");
  return result;
}

// The goal holds for both columns that have a value.
std::string verdict(const Row& row, const Result& r) {
  if (std::isnan(row.must)) return "";
  const auto reaches = [&](double goal) {
    for (const double value : {r.one.value, r.all.value}) {
      if (std::isnan(value)) continue;
      if (row.quantity == Quantity::window ? value > goal : value < goal) return false;
    }
    return true;
  };
  return reaches(row.aim) ? "aim" : reaches(row.must) ? "must" : "below";
}

void write(JsonWriter& json, const std::string& key, const Timing& t) {
  json.begin_object(key);
  json.field("median_s", t.seconds);
  json.field("spread", t.spread);
  json.field("gflops", t.gflops);
  json.field("gbps", t.gbps);
  json.field("value", t.value);
  json.end_object();
}

void write(JsonWriter& json, const Row& row, const Result& r) {
  json.begin_object();
  json.field("group", row.group);
  json.field("work", row.work);
  json.field("dtype", name_of(row.shape.dtype));
  json.field("Hq", row.shape.Hq);
  json.field("Hkv", row.shape.Hkv);
  json.field("Nq", row.shape.Nq);
  json.field("Nk", row.shape.Nk);
  json.field("D", row.shape.D);
  json.field("causal", row.shape.causal);
  json.field("window_left", row.shape.window_left);
  json.field("isa", r.isa);
  json.field("ceiling", r.ceiling);
  json.field("unit", unit(row.quantity));
  json.field("must", row.must);
  json.field("aim", row.aim);
  json.field("reached", verdict(row, r));
  json.field("relative_error", r.error);
  json.field("peak_one_core_gflops", r.one_core_gflops);
  json.field("peak_all_cores_gflops", r.all_cores_gflops);
  json.field("memory_read_gbps", r.memory_gbps);
  write(json, "one_thread", r.one);
  write(json, "all_threads", r.all);
  json.end_object();
}

std::vector<std::string> cells(const Row& row, const Result& r) {
  const bool factor = std::string(unit(row.quantity)) == "x";
  const int digits = factor ? 2 : 1;
  const bool decode = row.quantity == Quantity::decode;
  const auto rate = [&](const Timing& t) { return decode ? number(t.gbps, 1) + " GB/s" : number(t.gflops, 1); };
  return {row.group + ": " + row.work,
          number(r.one.seconds * 1e3, 2),
          rate(r.one),
          number(r.one.value, digits),
          number(r.all.seconds * 1e3, 2),
          rate(r.all),
          number(r.all.value, digits),
          number(row.must, factor ? 2 : 0),
          number(row.aim, factor ? 2 : 0),
          concat(unit(row.quantity), factor ? "" : " of ", factor ? " " : "", r.ceiling),
          verdict(row, r),
          number(100 * std::max(r.one.spread, r.all.spread), 1)};
}

std::vector<Row> selected_rows(const Options& options) {
  const std::vector<std::string> isas = cpu::runnable_isas();
  const bool has_avx2 = std::find(isas.begin(), isas.end(), "avx2") != isas.end();
  const std::regex filter(options.filter);
  std::vector<Row> rows;
  for (Row& row : all_rows(has_avx2 && options.isa.empty())) {
    if (row.isa.empty()) row.isa = options.isa;
    if (std::regex_search(row.group + ": " + row.work, filter) && (row.quick || !options.quick)) rows.push_back(row);
  }
  return rows;
}

void write(const Options& options, const Machine& machine, int threads, int reps, const std::vector<Row>& rows,
           const std::vector<Result>& results) {
  JsonWriter json(options.json);
  json.begin_object();
  write(json, machine);
  json.field("threads", threads);
  json.field("repeats", reps);
  json.field("quick", options.quick);
  json.begin_array("rows");
  for (size_t i = 0; i < rows.size(); ++i) write(json, rows[i], results[i]);
  json.end_array();
  json.end_object();
}

int run(const Options& options) {
  cpu::set_isa(options.isa);
  std::string reason;
  const std::optional<CpuKernelTraits> traits = cpu::kernel_traits(&reason);
  check(traits.has_value(), "attention_cpu", "kernels that this processor can run; ", reason);
  cpu::set_isa("");
  const int threads = options.threads > 0 ? options.threads : thread_count();
  const int reps = options.reps > 0 ? options.reps : options.quick ? 3 : 9;
  Machine machine = describe_machine(traits->isa);

  std::vector<Row> rows = selected_rows(options);
  check(!rows.empty(), "attention_cpu", "a filter that matches a row; got \"", options.filter, "\"");
  if (machine.cores < 2) std::erase_if(rows, [](const Row& row) { return row.quantity == Quantity::scaling; });
  if (options.list) {
    for (const Row& row : rows) std::cout << row.group << ": " << row.work << '\n';
    return 0;
  }

  std::cout << summary(machine) << "\n" << threads << " threads, " << reps << " repeats\n" << std::flush;
  const bool show_progress = isatty(STDERR_FILENO);
  Table table({"work (B 1, H 8)", "1 thread ms", "GFLOP/s", "value", "all ms", "GFLOP/s", "value", "must", "aim",
               "unit", "reached", "spread %"});
  std::vector<Result> results;
  const OtherWork others;
  for (const Row& row : rows) {
    if (show_progress)
      std::cerr << "\r\033[K" << results.size() + 1 << "/" << rows.size() << " " << row.group << ": " << row.work;
    results.push_back(measure(row, threads, reps));
    table.add(cells(row, results.back()));
  }
  if (show_progress) std::cerr << "\r\033[K";
  machine.others = others.cores();
  std::cout << table.text() << "other work during the run: " << number(machine.others, 2) << " cores"
            << (machine.noisy() ? "; NOISY, do not quote" : "") << "\n";
  if (!options.json.empty()) {
    write(options, machine, threads, reps, rows, results);
    std::cout << "written to " << options.json << "\n";
  }
  return 0;
}

}  // namespace
}  // namespace mfa::bench

int main(int argc, char** argv) {
  try {
    return mfa::bench::run(mfa::bench::parse_options(
        "attention_cpu", "speed of the CPU attention kernels against this machine's ceilings", argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
