// kernels-inl.h: the body of every kernels_<isa>.cc: one source, compiled once for each instruction set. The including
// file defines MFA_ISA (the namespace), MFA_ISA_NAME, MFA_ISA_TABLE, MFA_ISA_MATMUL and MFA_ISA_LAYERS (the tables'
// functions) and MFA_ISA_TARGET (Highway's static target).
#include "backend/cpu/kernels.h"
#include "backend/cpu/scratch.h"

// Each file builds on those before it.
// clang-format off
#include "backend/cpu/simd-inl.h"
#include "backend/cpu/dot-inl.h"
#include "backend/cpu/tile-inl.h"
#include "backend/cpu/rows-inl.h"
#include "backend/cpu/scores-inl.h"
#include "backend/cpu/vector_keys-inl.h"
#include "backend/cpu/upcoming_rows-inl.h"
#include "backend/cpu/key_block-inl.h"
#include "backend/cpu/block_reader-inl.h"
#include "backend/cpu/score_floor-inl.h"
#include "backend/cpu/row_state-inl.h"
#include "backend/cpu/forward_scratch-inl.h"
#include "backend/cpu/output_rows-inl.h"
#include "backend/cpu/probabilities-inl.h"
#include "backend/cpu/forward_tiled-inl.h"
#include "backend/cpu/decode_products-inl.h"
#include "backend/cpu/decode_scores-inl.h"
#include "backend/cpu/decode_scratch-inl.h"
#include "backend/cpu/decode_tile-inl.h"
#include "backend/cpu/forward_decode-inl.h"
#include "backend/cpu/key_mean-inl.h"
#include "backend/cpu/backward_scratch-inl.h"
#include "backend/cpu/backward_operands-inl.h"
#include "backend/cpu/gradient_products-inl.h"
#include "backend/cpu/gradient_sums-inl.h"
#include "backend/cpu/gradient_rows-inl.h"
#include "backend/cpu/backward-inl.h"
#include "backend/cpu/bias_gradient-inl.h"
#include "backend/cpu/peak-inl.h"
// clang-format on

static_assert(HWY_STATIC_TARGET == MFA_ISA_TARGET, "the flags of this unit do not select its instruction set");

namespace mfa::cpu {
namespace MFA_ISA {
namespace {

// Calls f with the kernel object for tile number `tile`, or for decode rows if `decodes`.
template <class F>
HWY_INLINE void WithForward(const ForwardJob& job, bool decodes, void* scratch, const F& f) {
  if (!decodes) {
    TiledForward kernel(job, scratch);
    return f(kernel);
  }
  WithType(job.problem->dtype, [&]<class T>(T*) {
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (job.plan.native_bf16) {
        DecodeForward<T, true> kernel(job, scratch);
        return f(kernel);
      }
    }
    DecodeForward<T, false> kernel(job, scratch);
    f(kernel);
  });
}
bool Decodes(const ForwardJob& job, const TileMap::Place& place) {
  return is_decode(job.plan.tiling, query_count(*job.problem, place.b));
}

size_t ForwardScratchBytes(const ForwardJob& job) {
  size_t bytes = 0;
  for (const bool decodes : {false, true}) {
    if (decodes ? job.plan.tiling.decode_rows == 0 : job.plan.kernel == ForwardKernel::decode) continue;
    WithForward(job, decodes, nullptr, [&](auto& kernel) { bytes = Max(bytes, kernel.scratch_bytes()); });
  }
  return bytes;
}
void ForwardTask(const ForwardJob& job, int64_t task, void* scratch) {
  const ForwardPlan& plan = job.plan;
  const int64_t batches = plan.tasks / plan.key_splits;
  const int begin = static_cast<int>(task / batches) * plan.split_blocks, end = begin + plan.split_blocks;
  const int64_t first = task % batches * plan.batch, last = Min(plan.tiles.count(), first + plan.batch);
  TileMap::Place place = plan.tiles.locate(first);
  for (int64_t index = first; index < last;) {
    const bool decodes = Decodes(job, place);
    WithForward(job, decodes, scratch, [&](auto& kernel) {
      do {
        const int64_t at = index;
        index += plan.together;
        const Upcoming next{index < last ? plan.tiles.locate(index) : place, begin};
        kernel.Run(at, place, begin, end, index < last ? &next : nullptr);
        place = next.place;
      } while (index < last && Decodes(job, place) == decodes);
    });
  }
}
void MergeTask(const ForwardJob& job, int64_t index, void* scratch) {
  const TileMap::Place place = job.plan.tiles.locate(index);
  WithForward(job, Decodes(job, place), scratch, [&](auto& kernel) { kernel.Merge(index, place); });
}

// Calls f with the kernel object of the backward.
template <class F>
HWY_INLINE auto WithBackward(const BackwardJob& job, void* scratch, const F& f) {
  if constexpr (kNativeBf16) {
    if (job.plan.native_bf16) {
      Backward<bfloat16> kernel(job, scratch);
      return f(kernel);
    }
  }
  Backward<float> kernel(job, scratch);
  return f(kernel);
}
size_t BackwardScratchBytes(const BackwardJob& job) {
  return WithBackward(job, nullptr, [](auto& kernel) { return kernel.scratch_bytes(); });
}
void DeltaTask(const BackwardJob& job, int64_t begin, int64_t end, float* delta) {
  WithType(job.problem->dtype, [&]<class T>(T*) { DeltaRows<T>(job, begin, end, delta); });
}
void BackwardTask(const BackwardJob& job, int64_t task, void* scratch) {
  WithBackward(job, scratch, [&](auto& kernel) { kernel.Run(task); });
}
void QueryGradientTask(const BackwardJob& job, int64_t tile, void* scratch) {
  WithBackward(job, scratch, [&](auto& kernel) { kernel.ReduceQueries(tile); });
}
void BiasTask(const BackwardJob& job, int64_t task, void* scratch) {
  WithBackward(job, scratch, [&](auto& kernel) { BiasGradientTask(job, task, kernel); });
}
int64_t BiasTasks(const AttentionProblem& p) { return BiasRegions(p).tasks(); }

constexpr KernelTable kTable = {
    .traits = {.isa = MFA_ISA_NAME,
               .lanes = kLanes,
               .tile_vectors = kTileVectors,
               .max_row_tile = kMaxRowTile,
               .row_tile_floats = kLanes == 16 ? 128 << 10 : 96 << 10,
               .backward_row_tile = kBackwardRowTile,
               .max_decode_rows = kLanes < 8 ? 2 : kMaxDecodeRows,
               .few_key_decode_rows = kLanes < 8 ? 2 : kTileRows,
               .native_bf16 = kNativeBf16},
    .forward_scratch_bytes = ForwardScratchBytes,
    .forward_task = ForwardTask,
    .merge_task = MergeTask,
    .backward_scratch_bytes = BackwardScratchBytes,
    .delta_rows = DeltaTask,
    .backward_task = BackwardTask,
    .dq_task = QueryGradientTask,
    .page_task = PageGradientTask,
    .bias_tasks = BiasTasks,
    .bias_task = BiasTask,
    .peak_flops = PeakFlops,
    .read_sum = ReadSum,
    .matmul = MFA_ISA_MATMUL,
    .layers = MFA_ISA_LAYERS,
};

}  // namespace
}  // namespace MFA_ISA

const KernelTable& MFA_ISA_TABLE() { return MFA_ISA::kTable; }

}  // namespace mfa::cpu
