// timing.h: clocks, statistics of repeats, and the ceilings (arithmetic and memory) that rates are divided by.
#pragma once

#include <time.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <thread>
#include <vector>

#include "backend/cpu/attention.h"

namespace mfa::bench {

inline double clock_s(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
inline double wall_s() { return clock_s(CLOCK_MONOTONIC); }
inline double thread_cpu_s() { return clock_s(CLOCK_THREAD_CPUTIME_ID); }

// The value below which a fraction `q` of the samples lies, interpolated; NaN if there are none.
inline double quantile(std::vector<double> samples, double q) {
  if (samples.empty()) return std::nan("");
  std::sort(samples.begin(), samples.end());
  const double at = q * static_cast<double>(samples.size() - 1);
  const size_t below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, samples.size() - 1);
  return samples[below] + (at - static_cast<double>(below)) * (samples[above] - samples[below]);
}
inline double median(const std::vector<double>& samples) { return quantile(samples, 0.5); }

// Distance of the quartiles as a fraction of the median: 0.02 is a quiet machine, 0.2 a noisy one.
inline double spread(const std::vector<double>& samples) {
  return (quantile(samples, 0.75) - quantile(samples, 0.25)) / median(samples);
}

// Seconds of one call of `work` by `clock`: the mean over `calls`.
template <typename Work>
double seconds_per_call(clockid_t clock, int calls, const Work& work) {
  const double start = clock_s(clock);
  for (int i = 0; i < calls; ++i) work();
  return (clock_s(clock) - start) / calls;
}

// How many calls make a sample of at least `min_s`, from the time of one.
inline int calls_per_sample(double one_call_s, double min_s) {
  return one_call_s >= min_s ? 1 : std::min(10000, static_cast<int>(std::ceil(min_s / std::max(one_call_s, 1e-7))));
}

// Ceilings measured in bursts between the timed calls of a row, so that both see the same clock and neighbours. The
// 75th percentile of the bursts counts: on a shared machine the median reads too low, and the best one, where a virtual
// machine's clocks are off around preemptions, too high.
class Ceilings {
 public:
  Ceilings(bool native_bf16, int threads) : native_bf16_(native_bf16), threads_(threads) {}

  void burst_one_core() {
    for (int i = 0; i < kBursts; ++i) one_core_.push_back(cpu::peak_gflops(native_bf16_));
  }

  // The same loop on all cores at once: clocks may be lower then, and siblings share one core's units.
  void burst_all_cores() {
    std::vector<double> rates(static_cast<size_t>(threads_));
    std::barrier start(threads_);
    const auto run = [&](int thread) {
      std::vector<double> bursts;
      start.arrive_and_wait();
      for (int i = 0; i < kBursts; ++i) bursts.push_back(cpu::peak_gflops(native_bf16_));
      rates[static_cast<size_t>(thread)] = quantile(bursts, 0.75);
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads_; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
    all_cores_.push_back(std::accumulate(rates.begin(), rates.end(), 0.0));
  }

  // Sequential read far beyond the last cache, by as many threads as the pool has now.
  void burst_memory() { memory_.push_back(cpu::read_bandwidth_gbps(kReadBytes)); }

  bool native_bf16() const { return native_bf16_; }
  double one_core_gflops() const { return quantile(one_core_, 0.75); }
  double all_cores_gflops() const { return quantile(all_cores_, 0.75); }
  double memory_gbps() const { return quantile(memory_, 0.75); }

 private:
  static constexpr int kBursts = 16;  // of a fraction of a millisecond each: short enough to miss most preemptions
  static constexpr size_t kReadBytes = size_t{256} << 20;
  bool native_bf16_;
  int threads_;
  std::vector<double> one_core_, all_cores_, memory_;
};

}  // namespace mfa::bench
