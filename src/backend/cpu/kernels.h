// kernels.h: what each instruction set's translation units offer to the dispatchers in attention.cc and matmul.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/plan.h"
#include "attention/problem.h"
#include "linear/plan.h"
#include "linear/problem.h"

namespace mfa::cpu {

// Results of single key blocks, kept when the keys of a row are split over tasks. For each (b * Hkv + hkv, row tile,
// key block): `m`, `l` [row_width] and `o` [Dv * row_width], in the layout of the kernel that wrote them.
struct BlockPartials {
  float* m = nullptr;
  float* l = nullptr;
  float* o = nullptr;
  int32_t row_width = 0;  // rows of a tile, padded to whole vectors
  int32_t blocks = 0;     // key blocks of the problem
};

struct ForwardJob {
  const AttentionProblem* problem;
  const AttentionOutputs* out;
  ForwardPlan plan;
  BlockPartials partials;  // used when plan.key_splits > 1
};

struct BackwardJob {
  const AttentionProblem* problem;
  const AttentionGradientInputs* in;
  const AttentionGradients* out;
  BackwardPlan plan;
  const float* delta;  // [B, Hq, Nq]: sum_d dO O - dlse
  float* dq_partials;  // [B * Hkv, key_partitions, row_tiles, D, row_tile], transposed tiles, float32
  float* dslope_rows;  // [B * Hkv, key_partitions, rows]: sum_j dS (j - pos), or null
  float* ds_rows;      // the same of sum_j dS, or null: dq is not corrected
};

struct MatmulJob {
  const MatmulProblem* problem;
  MatmulPlan plan;
};

// The matrix products of one instruction set, in a unit of their own.
struct MatmulTable {
  MatmulTraits traits;
  size_t (*scratch_bytes)(const MatmulJob&);
  void (*task)(const MatmulJob&, int64_t task, void* scratch);
};

// The entry points of one instruction set. `scratch` is 64-byte aligned and has the size that *_scratch_bytes says.
struct KernelTable {
  CpuKernelTraits traits;
  size_t (*forward_scratch_bytes)(const ForwardJob&);
  void (*forward_task)(const ForwardJob&, int64_t task, void* scratch);
  void (*merge_task)(const ForwardJob&, int64_t tile,
                     void* scratch);  // tile in [0, B * Hkv * row_tiles)
  size_t (*backward_scratch_bytes)(const BackwardJob&);
  void (*delta_rows)(const BackwardJob&, int64_t begin, int64_t end,
                     float* delta);  // rows of [B, Hq, Nq]
  void (*backward_task)(const BackwardJob&, int64_t task, void* scratch);
  void (*dq_task)(const BackwardJob&, int64_t tile,
                  void* scratch);                  // sums the partials of a row tile into dq
  int64_t (*bias_tasks)(const AttentionProblem&);  // regions of dbias
  void (*bias_task)(const BackwardJob&, int64_t task,
                    void* scratch);  // fills one; scratch as backward_task
  double (*peak_flops)(bool native_bf16,
                       int64_t iterations);  // runs the loop; returns the operations done
  double (*read_sum)(const float* data,
                     size_t count);  // a sequential read of `count` floats
  const MatmulTable& (*matmul)();
};

#if defined(MFA_HAVE_AVX2)
const KernelTable& kernels_avx2();
const MatmulTable& matmul_avx2();
#endif
#if defined(MFA_HAVE_AVX512)
const KernelTable& kernels_avx512();
const MatmulTable& matmul_avx512();
#endif
#if defined(MFA_HAVE_AVX512_BF16)
const KernelTable& kernels_avx512_bf16();
const MatmulTable& matmul_avx512_bf16();
#endif
#if defined(MFA_HAVE_NEON)
const KernelTable& kernels_neon();
const MatmulTable& matmul_neon();
#endif

}  // namespace mfa::cpu
