// attention.h: the CPU backend's attention. Plans, allocates scratch, and runs on the process's thread pool.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "attention/plan.h"
#include "attention/problem.h"

namespace mfa::cpu {

// The traits of the kernels that will run: the best instruction set of this processor that was built, or the one that
// MFA_CPU_ISA names ("avx2", "avx512", "avx512_bf16", "neon"). nullopt if there is none; `reason`, if
// given, then says why. Throws std::invalid_argument if MFA_CPU_ISA names one that is unknown or cannot run here.
std::optional<CpuKernelTraits> kernel_traits(std::string* reason = nullptr);

// The instruction sets that were built and that this processor can run, best first.
std::vector<std::string> runnable_isas();

// Selects an instruction set for the process (tests, benchmarks); empty = the default choice again.
void set_isa(const std::string& isa);

// Computes `out.o` and, where not null, `out.lse` and `out.probs`. The problem must be valid (the caller's boundary has
// checked it) and supported. Throws std::bad_alloc if scratch cannot be had.
void attention_forward(const AttentionProblem& p, const AttentionOutputs& out);

// The same of several problems: their tasks are handed out to the threads as those of one. Each gets the bits that a
// call of its own would give it.
struct ForwardCall {
  AttentionProblem problem;
  AttentionOutputs out;
};
void attention_forward(std::span<const ForwardCall> calls);

// The floors that leave each row its `keep` largest scores, as AttentionProblem::score_floor has them: the keep-th
// largest of the visible scores in units of ln 2, -inf for a row that sees fewer. Rows of batch entry b keep
// max(1, min(keep[b], keys)). Floors of `p` itself are ignored. O(keep) scratch a row of a tile.
void score_floors(const AttentionProblem& p, const int32_t* keep, float* floors);

// Computes the wanted gradients, overwriting them.
void attention_backward(const AttentionProblem& p, const AttentionGradientInputs& in, const AttentionGradients& out);

// GFLOP/s of one core in a register-only multiply-add loop of the selected instruction set, bfloat16 pairs if
// `native_bf16`: the denominators of the benchmarks. GB/s for the sequential read of `bytes` by all threads.
double peak_gflops(bool native_bf16);
double read_bandwidth_gbps(size_t bytes);

}  // namespace mfa::cpu
