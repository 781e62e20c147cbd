// kernels.h: what each instruction set's translation units offer to the dispatchers in attention.cc and matmul.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/plan.h"
#include "attention/problem.h"
#include "linear/plan.h"
#include "linear/problem.h"

namespace mfa::cpu {

// Results of single key blocks, kept when the keys of a row are split over tasks. For each (row tile, key block): `m`,
// `l` [row_width] and `o` [o_stride * row_width], in the layout of the kernel that wrote them.
struct BlockPartials {
  float* m = nullptr;
  float* l = nullptr;
  float* o = nullptr;
  int64_t o_stride = 0;   // Dv padded to whole vectors
  int32_t row_width = 0;  // rows of a tile, padded to whole vectors
  int32_t blocks = 0;     // key blocks of the problem
};

struct ForwardJob {
  const AttentionProblem* problem;
  const AttentionOutputs* out;
  ForwardPlan plan;
  BlockPartials partials;  // used when plan.key_splits > 1
  // Only the floors of a top-k selection are wanted, [rows of lse]: of each row of batch entry b the kept[b]-th largest
  // score. `out` is null then, and the kernel the tiled one.
  float* floors = nullptr;
  const int32_t* kept = nullptr;
  int32_t most_kept = 0;
};

// A page of one batch entry: the slot of its table that names it.
struct PageUse {
  int32_t b = 0;
  int64_t slot = 0;
};

struct BackwardJob {
  const AttentionProblem* problem;
  const AttentionGradientInputs* in;
  const AttentionGradients* out;
  BackwardPlan plan;
  const float* delta = nullptr;  // as lse: sum_d dO O - dlse
  float* dq_partials = nullptr;  // transposed tiles [D, rows], float32, where plan.partial_row() says
  float* dslope_rows = nullptr;  // [key_partitions, rows of lse]: sum_j dS (j - pos), or null
  float* ds_rows = nullptr;      // the same of sum_j dS, or null: dq is not corrected
  // Of pages: float32 gradients of each batch entry's own keys, [Hkv, keys, D] from row key_offsets[b] * Hkv on, and
  // the uses of each page of the pool, in the order of the batch.
  float *dk_rows = nullptr, *dv_rows = nullptr;
  const int64_t* key_offsets = nullptr;
  const int64_t* page_starts = nullptr;  // [pages + 1]
  const PageUse* page_uses = nullptr;
};

struct MatmulJob {
  const MatmulProblem* problem;
  MatmulPlan plan;
  const void* rows = nullptr;  // x as prepare() writes it, where tasks read it so; jobs with the same x may share it
};

// The matrix products of one instruction set, in a unit of their own.
struct MatmulTable {
  MatmulTraits traits;
  size_t (*scratch_bytes)(const MatmulJob&);
  void (*task)(const MatmulJob&, int64_t task, void* scratch);
  size_t (*row_bytes)(const MatmulJob&);  // of what prepare() writes; 0: tasks read x itself
  void (*prepare)(const MatmulJob&, void* rows);
  size_t (*packed_bytes)(const MatmulProblem&);                    // of the weights packed ahead; 0: they never are
  void (*pack)(const MatmulProblem&, int64_t task, void* packed);  // a task is traits.panel columns
};

// Small layers of one instruction set, on dense rows; an output may be an input.
struct LayerTable {
  // out = x / sqrt(mean(x^2) + eps) * weight, [D] each; the weight may be null.
  void (*norm_row)(DType dtype, const void* x, const void* weight, int D, float eps, void* out);
  void (*swiglu)(DType dtype, const void* gate, const void* x, int64_t size, void* out);
  void (*add)(DType dtype, const void* a, const void* b, int64_t size, void* out);
  // Turns pairs (i, i + half) of x, i < half.
  void (*turn_row)(DType dtype, const void* x, const float* cosine, const float* sine, int half, void* out);
};

// The entry points of one instruction set. `scratch` is 64-byte aligned and has the size that *_scratch_bytes says.
struct KernelTable {
  CpuKernelTraits traits;
  size_t (*forward_scratch_bytes)(const ForwardJob&);
  void (*forward_task)(const ForwardJob&, int64_t task, void* scratch);
  void (*merge_task)(const ForwardJob&, int64_t tile,
                     void* scratch);  // tile in [0, plan.tiles.count())
  size_t (*backward_scratch_bytes)(const BackwardJob&);
  void (*delta_rows)(const BackwardJob&, int64_t begin, int64_t end,
                     float* delta);  // rows of lse
  void (*backward_task)(const BackwardJob&, int64_t task, void* scratch);
  void (*dq_task)(const BackwardJob&, int64_t tile,
                  void* scratch);                       // sums the partials of a row tile into dq
  void (*page_task)(const BackwardJob&, int64_t task);  // dk and dv of page task / Hkv, head task % Hkv
  int64_t (*bias_tasks)(const AttentionProblem&);       // regions of dbias
  void (*bias_task)(const BackwardJob&, int64_t task,
                    void* scratch);  // fills one; scratch as backward_task
  double (*peak_flops)(bool native_bf16,
                       int64_t iterations);  // runs the loop; returns the operations done
  double (*read_sum)(const float* data,
                     size_t count);  // a sequential read of `count` floats
  const MatmulTable& (*matmul)();
  const LayerTable& (*layers)();
};

#if defined(MFA_HAVE_AVX2)
const KernelTable& kernels_avx2();
const MatmulTable& matmul_avx2();
const LayerTable& layers_avx2();
#endif
#if defined(MFA_HAVE_AVX512)
const KernelTable& kernels_avx512();
const MatmulTable& matmul_avx512();
const LayerTable& layers_avx512();
#endif
#if defined(MFA_HAVE_AVX512_BF16)
const KernelTable& kernels_avx512_bf16();
const MatmulTable& matmul_avx512_bf16();
const LayerTable& layers_avx512_bf16();
#endif
#if defined(MFA_HAVE_NEON)
const KernelTable& kernels_neon();
const MatmulTable& matmul_neon();
const LayerTable& layers_neon();
#endif

}  // namespace mfa::cpu
