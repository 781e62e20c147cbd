// linear_cpu.cpp: how near the CPU's matrix products come to this machine's ceilings, without MLX.
//
// Each row checks its answer, warms up, then alternates bursts of the ceiling's loop with timed calls. Few rows of x
// read weights that are far larger than the caches: the calls of a sample go through copies of them. docs/benchmarks.md
// says how to read the table.

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <iostream>
#include <optional>
#include <random>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/matmul.h"
#include "backend/cpu/scratch.h"
#include "common/check.h"
#include "common/thread_pool.h"
#include "linear/reference.h"
#include "options.h"
#include "report.h"
#include "timing.h"

namespace mfa::bench {
namespace {

constexpr size_t kColdBytes = size_t{192} << 20;  // weights that a sample walks through where memory is the ceiling

struct Row {
  std::string group;
  int64_t M;
  int32_t N, K;
  DType dtype;
  int32_t bits;        // 0: dense weights
  double must, aim;    // per cent
  bool from_memory;    // weights come from memory: the ceiling is the lower of its rate and the peak
  bool packed;         // weights are constant and were packed ahead
  bool quick = false;  // also in a quick run
  std::string work() const {
    const std::string weights = bits ? concat(bits, " bits, ", name_of(dtype)) : name_of(dtype);
    return concat(weights, " ", M, " x ", N, " x ", K);
  }
};

std::vector<Row> all_rows() {
  std::vector<Row> rows;
  struct Goal {
    DType dtype;
    double must, aim;
  };
  for (const Goal& g : {Goal{DType::f32, 85, 93}, Goal{DType::bf16, 78, 88}, Goal{DType::f16, 72, 85}}) {
    const bool all = g.dtype != DType::f16;
    const auto add = [&](const char* group, int64_t M, int32_t N, int32_t K, bool packed, bool quick, double part = 1) {
      rows.push_back({group, M, N, K, g.dtype, 0, part * g.must, part * g.aim, false, packed, quick});
    };
    add("dense", 64, 1024, 1024, true, all);
    add("dense", 512, 1024, 1024, true, true);
    if (all) add("dense", 512, 512, 4096, true, false);
    if (all) add("dense", 512, 4096, 4096, true, false);
    add("dense", 4096, 1024, 1024, true, false);
    add("once", 64, 1024, 1024, false, false);
    add("once", 512, 1024, 1024, false, false);
    add("once", 4096, 1024, 1024, false, false);
    if (!all) continue;
    add("odd", 100, 1001, 777, true, false, 0.9);
    add("odd", 64, 49152, 576, true, false, 0.9);
  }
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t M : {1, 2, 4, 8, 16, 32})
      rows.push_back(
          {"few rows", M, 4096, 4096, dtype, 0, M <= 2 ? 80.0 : 70.0, M <= 2 ? 95.0 : 88.0, true, M > 4, M == 1});
  for (const int64_t M : {8, 16, 32})
    rows.push_back({"once", M, 4096, 4096, DType::bf16, 0, 70, 88, true, false, false});
  rows.push_back({"few rows", 1, 49152, 576, DType::bf16, 0, 72, 85, true, false, false});
  for (const int32_t bits : {4, 8}) {
    rows.push_back({"quantised", 1, 4096, 4096, DType::bf16, bits, 70, 90, true, false, true});
    rows.push_back({"quantised", 512, 1024, 1024, DType::bf16, bits, 60, 80, false, false, bits == 4});
  }
  return rows;
}

// One product, and for cold rows as many copies of its weights as fill kColdBytes.
class MatmulCase {
 public:
  explicit MatmulCase(const Row& row) : row_(row) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    MatmulProblem& p = problem_;
    p.M = row.M;
    p.N = row.N;
    p.K = row.K;
    p.dtype = row.dtype;
    const auto fill = [&](std::vector<uint8_t>& to, int64_t count, float scale) {
      to.resize(static_cast<size_t>(count) * size_of(row.dtype));
      for (int64_t i = 0; i < count; ++i) store_from_float(to.data(), row.dtype, i, scale * normal(random));
    };
    fill(x_, row.M * row.K, 1.f);
    out_.resize(static_cast<size_t>(row.M) * static_cast<size_t>(row.N) * size_of(row.dtype));
    p.x = {x_.data(), row.K, nullptr};
    p.out = out_.data();
    p.w.transposed = true;

    std::vector<uint8_t> first, first_scales;
    const int64_t elements = int64_t{row.N} * row.K;
    if (row.bits == 0) {
      fill(first, elements, 1.f);
      p.w.stride = row.K;
    } else {
      first.resize(static_cast<size_t>(elements) * static_cast<size_t>(row.bits) / 8);
      for (uint8_t& byte : first) byte = static_cast<uint8_t>(random());
      fill(first_scales, 2 * elements / kGroup, 0.1f);
      p.w.stride = int64_t{row.K} * row.bits / 32;
      p.w.affine = {row.bits, kGroup, nullptr, nullptr, row.K / kGroup, row.K / kGroup};
    }
    const auto bytes = static_cast<size_t>(weight_bytes(p));
    const size_t copies = row.from_memory ? std::max<size_t>(2, kColdBytes / bytes) : 1;
    w_.assign(copies, first);
    scales_.assign(copies, first_scales);
    if (!row.packed) return;
    p.w.data = first.data();
    for (size_t i = 0; i < copies; ++i) {
      packed_.emplace_back(cpu::packed_weight_bytes(p), true);
      cpu::pack_weights(p, packed_.back().data());
    }
  }

  int calls_per_round() const { return static_cast<int>(w_.size()); }
  double flops() const { return 2.0 * static_cast<double>(row_.M) * row_.N * row_.K; }
  double bytes() const { return static_cast<double>(weight_bytes(problem_)); }

  // The product with the next copy of the weights.
  void run() {
    use(next_);
    next_ = (next_ + 1) % w_.size();
    cpu::matmul({&problem_, 1});
  }

  // The largest error of some elements, relative to the largest of them; throws if it is too large.
  double check_answer() {
    use(0);
    cpu::matmul({&problem_, 1});
    std::mt19937 random(2);
    double error = 0, largest = 0;
    for (int i = 0; i < 64; ++i) {
      const auto r = static_cast<int64_t>(random() % static_cast<uint64_t>(row_.M));
      const auto n = static_cast<int32_t>(random() % static_cast<uint32_t>(row_.N));
      double exact = 0;
      for (int32_t k = 0; k < row_.K; ++k)
        exact += double{load_as_float(x_.data(), row_.dtype, r * row_.K + k)} * weight_at(problem_, k, n);
      error = std::max(error, std::abs(exact - load_as_float(out_.data(), row_.dtype, r * row_.N + n)));
      largest = std::max(largest, std::abs(exact));
    }
    const double allowed = row_.dtype == DType::f32 ? 1e-5 : row_.dtype == DType::f16 ? 1e-3 : 8e-3;
    if (!(error <= allowed * largest))
      throw std::runtime_error(concat(row_.work(), ": error ", error, " of values up to ", largest));
    return error / largest;
  }

 private:
  static constexpr int32_t kGroup = 64;

  void use(size_t copy) {
    problem_.w.data = w_[copy].data();
    if (row_.packed) problem_.w.packed = packed_[copy].data();
    if (row_.bits == 0) return;
    problem_.w.affine.scales = scales_[copy].data();
    problem_.w.affine.biases = scales_[copy].data() + scales_[copy].size() / 2;
  }

  const Row& row_;
  MatmulProblem problem_;
  std::vector<uint8_t> x_, out_;
  std::vector<std::vector<uint8_t>> w_, scales_;
  std::vector<cpu::AlignedBuffer> packed_;  // of each copy
  size_t next_ = 0;
};

struct Timing {
  double seconds = NAN, spread = NAN, gflops = NAN, gbps = NAN, value = NAN, memory_gbps = NAN;
};
struct Result {
  std::string isa, ceiling;
  Timing one, all;
  double error = NAN, one_core_gflops = NAN, all_cores_gflops = NAN;
};

// Per cent of the nearer ceiling.
double share(double flops, double bytes, double seconds, double gflops, double gbps) {
  const double by_peak = flops / (gflops * 1e9), by_memory = std::isnan(gbps) ? 0 : bytes / (gbps * 1e9);
  return 100 * std::max(by_peak, by_memory) / seconds;
}

Result measure(const Row& row, const std::string& isa, int threads, int reps) {
  constexpr double kMinSample_s = 5e-3;
  cpu::set_isa(isa);
  const CpuKernelTraits traits = cpu::kernel_traits().value();
  set_thread_count(threads);
  MatmulCase subject(row);
  Result r;
  r.isa = traits.isa;
  r.error = subject.check_answer();
  const auto work = [&] { subject.run(); };
  const bool native = row.dtype == DType::bf16 && traits.native_bf16;
  Ceilings one(native, 1), all(native, threads);
  const int round = subject.calls_per_round();
  const int calls = std::max(round, calls_per_sample(seconds_per_call(CLOCK_MONOTONIC, 1, work), kMinSample_s));
  // One thread by its CPU time; where memory is the ceiling by the wall clock, as the memory's rate is measured by
  // that.
  const clockid_t clock = row.from_memory ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
  std::vector<double> one_s, all_s;
  for (int rep = 0; rep < reps; ++rep) {
    set_thread_count(1);
    one.burst_one_core();
    if (row.from_memory) one.burst_memory();
    one_s.push_back(seconds_per_call(clock, calls, work));
    set_thread_count(threads);
    all.burst_all_cores();
    if (row.from_memory) all.burst_memory();
    work();  // wakes the pool
    all_s.push_back(seconds_per_call(CLOCK_MONOTONIC, calls, work));
  }
  r.one_core_gflops = one.one_core_gflops();
  r.all_cores_gflops = all.all_cores_gflops();
  const auto timing = [&](const std::vector<double>& seconds, double peak, double memory) {
    Timing t;
    t.seconds = median(seconds);
    t.spread = spread(seconds);
    t.gflops = subject.flops() / t.seconds * 1e-9;
    t.gbps = subject.bytes() / t.seconds * 1e-9;
    t.memory_gbps = memory;
    t.value = share(subject.flops(), subject.bytes(), t.seconds, peak, memory);
    return t;
  };
  r.one = timing(one_s, r.one_core_gflops, one.memory_gbps());
  r.all = timing(all_s, r.all_cores_gflops, all.memory_gbps());
  const bool by_memory = subject.bytes() * r.all_cores_gflops > subject.flops() * r.all.memory_gbps;
  r.ceiling = row.from_memory && by_memory ? "memory read" : native ? "bfloat16 peak" : "float32 peak";
  set_thread_count(0);
  cpu::set_isa("");
  return r;
}

// The goal holds for both columns.
std::string verdict(const Row& row, const Result& r) {
  const double lower = std::min(r.one.value, r.all.value);
  return lower >= row.aim ? "aim" : lower >= row.must ? "must" : "below";
}

void write(JsonWriter& json, const std::string& key, const Timing& t) {
  json.begin_object(key);
  json.field("median_s", t.seconds);
  json.field("spread", t.spread);
  json.field("gflops", t.gflops);
  json.field("gbps", t.gbps);
  json.field("memory_read_gbps", t.memory_gbps);
  json.field("value", t.value);
  json.end_object();
}

void write(JsonWriter& json, const Row& row, const Result& r) {
  json.begin_object();
  json.field("group", row.group);
  json.field("work", row.work());
  json.field("dtype", name_of(row.dtype));
  json.field("M", row.M);
  json.field("N", row.N);
  json.field("K", row.K);
  json.field("bits", row.bits);
  json.field("packed", row.packed);
  json.field("isa", r.isa);
  json.field("ceiling", r.ceiling);
  json.field("unit", "%");
  json.field("must", row.must);
  json.field("aim", row.aim);
  json.field("reached", verdict(row, r));
  json.field("relative_error", r.error);
  json.field("peak_one_core_gflops", r.one_core_gflops);
  json.field("peak_all_cores_gflops", r.all_cores_gflops);
  json.field("memory_read_gbps", r.all.memory_gbps);
  write(json, "one_thread", r.one);
  write(json, "all_threads", r.all);
  json.end_object();
}

std::vector<std::string> cells(const Row& row, const Result& r) {
  const auto rate = [&](const Timing& t) {
    return row.from_memory ? number(t.gbps, 1) + " GB/s" : number(t.gflops, 1);
  };
  return {row.group + ": " + row.work(),
          number(r.one.seconds * 1e3, 3),
          rate(r.one),
          number(r.one.value, 1),
          number(r.all.seconds * 1e3, 3),
          rate(r.all),
          number(r.all.value, 1),
          number(row.must, 0),
          number(row.aim, 0),
          concat("% of ", r.ceiling),
          verdict(row, r),
          number(100 * std::max(r.one.spread, r.all.spread), 1)};
}

int run(const Options& options) {
  cpu::set_isa(options.isa);
  std::string reason;
  const std::optional<CpuKernelTraits> traits = cpu::kernel_traits(&reason);
  check(traits.has_value(), "linear_cpu", "kernels that this processor can run; ", reason);
  cpu::set_isa("");
  const std::regex filter(options.filter);
  std::vector<Row> rows;
  for (const Row& row : all_rows())
    if (std::regex_search(row.group + ": " + row.work(), filter) && (row.quick || !options.quick)) rows.push_back(row);
  check(!rows.empty(), "linear_cpu", "a filter that matches a row; got \"", options.filter, "\"");
  if (options.list) {
    for (const Row& row : rows) std::cout << row.group << ": " << row.work() << '\n';
    return 0;
  }
  const int threads = options.threads > 0 ? options.threads : thread_count();
  const int reps = options.reps > 0 ? options.reps : options.quick ? 3 : 9;
  Machine machine = describe_machine(traits->isa);
  std::cout << summary(machine) << "\n" << threads << " threads, " << reps << " repeats\n" << std::flush;
  const bool show_progress = isatty(STDERR_FILENO);
  Table table({"work (rows x columns x terms)", "1 thread ms", "rate", "value", "all ms", "rate", "value", "must",
               "aim", "unit", "reached", "spread %"});
  std::vector<Result> results;
  const OtherWork others;
  for (const Row& row : rows) {
    if (show_progress)
      std::cerr << "\r\033[K" << results.size() + 1 << "/" << rows.size() << " " << row.group << ": " << row.work();
    results.push_back(measure(row, options.isa, threads, reps));
    table.add(cells(row, results.back()));
  }
  if (show_progress) std::cerr << "\r\033[K";
  machine.others = others.cores();
  std::cout << table.text() << "other work during the run: " << number(machine.others, 2) << " cores"
            << (machine.noisy() ? "; NOISY, do not quote" : "") << "\n";
  if (options.json.empty()) return 0;
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
  std::cout << "written to " << options.json << "\n";
  return 0;
}

}  // namespace
}  // namespace mfa::bench

int main(int argc, char** argv) {
  try {
    return mfa::bench::run(mfa::bench::parse_options(
        "linear_cpu", "speed of the CPU's matrix products against this machine's ceilings", argc, argv));
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
