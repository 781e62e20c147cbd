// diagnostics.h: which implementation runs a call and why, what this machine offers, and settings of the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "mfa/api.h"
#include "mfa/attention.h"

namespace mfa {

// An implementation that was considered, and why it cannot run the problem.
struct Refusal {
  std::string route;  // as in Explanation
  std::string reason;
};

struct Explanation {
  std::string function;           // the entry point, as messages of errors name it
  std::string route;              // "mfa_cpu", "mfa_cuda", "mlx_sdpa" or "composed"
  std::string kernel;             // the kernel of that route
  std::string isa;                // instruction set of a CPU kernel, else empty
  int row_tile = 0;               // query rows of a task
  int key_block = 0;              // keys of a block
  int splits = 1;                 // tasks along the keys
  int64_t tasks = 0;              // tasks in all
  int threads = 0;                // threads that may share them
  bool native_bf16 = false;       // multiplies bfloat16 pairs without widening them
  std::vector<Refusal> refusals;  // in the order they were tried
};

// What attention(q, k, v, options, s) does with arguments of these shapes, dtypes and options or, if `returns_lse`,
// what attention_with_lse does. Runs nothing. Throws what attention() throws.
MFA_API Explanation explain(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                            const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {},
                            bool returns_lse = false);

// While it lives, notes each attention call that this thread builds, by whatever entry point, with what explain() says
// of it. Entry points of several parts make several calls. They may be nested: each sees the calls built in it.
class MFA_API RouteRecorder {
 public:
  RouteRecorder();
  ~RouteRecorder();
  RouteRecorder(const RouteRecorder&) = delete;
  RouteRecorder& operator=(const RouteRecorder&) = delete;
  void add(const Explanation& call);
  const std::vector<Explanation>& calls() const { return calls_; }

 private:
  RouteRecorder* outer_;
  std::vector<Explanation> calls_;
};

// Calls of the process by route since it started or since reset_counters(): graphs built, not evaluations.
struct Counters {
  uint64_t mfa_cpu = 0;
  uint64_t mfa_cuda = 0;
  uint64_t mlx_sdpa = 0;
  uint64_t composed = 0;
};
MFA_API Counters counters();
MFA_API void reset_counters();

struct CpuInfo {
  bool available = false;         // there is a kernel for this processor, and no MFA_ variable is wrong
  std::string reason;             // why not
  std::string isa;                // the instruction set in use
  std::vector<std::string> isas;  // all that were built and can run here, best first
  bool native_bf16 = false;
  int threads = 0;
};
MFA_API CpuInfo cpu_info();

struct GpuInfo {
  bool available = false;  // this library has kernels for the GPU that MLX runs on
  std::string reason;      // why not
};
MFA_API GpuInfo gpu_info();

// Smallest and largest head dimension that attention accepts.
inline constexpr int kMinHeadDim = 1;
inline constexpr int kMaxHeadDim = 576;

// Threads of the process's pool. 0 sets the default: MFA_NUM_THREADS, else what the affinity mask and the cgroup quota
// allow. Results do not depend on it. Throws std::invalid_argument if negative.
MFA_API void set_cpu_threads(int count);

// Instruction set of the kernels, as cpu_info().isas names them; empty sets the default: MFA_CPU_ISA, else the best.
// Throws std::invalid_argument if it is unknown or cannot run here.
MFA_API void set_cpu_isa(const std::string& isa);

// Denominators of benchmarks: GFLOP/s of one core in a register-only multiply-add loop of the instruction set in use,
// and GB/s of a sequential read of `bytes` by all threads.
MFA_API double cpu_peak_gflops(bool native_bf16);
MFA_API double cpu_read_bandwidth_gbps(size_t bytes);

}  // namespace mfa
