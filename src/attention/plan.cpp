#include "attention/plan.h"

#include <algorithm>

#include "common/check.h"

namespace mfa {
namespace {

// Decode ranges below this many keys cost more in merging than they gain.
constexpr int32_t kMinSplitBlocks = 2;

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

}  // namespace

const char* name_of(ForwardKernel kernel) {
  switch (kernel) {
    case ForwardKernel::empty:
      return "empty";
    case ForwardKernel::tiled:
      return "tiled";
    case ForwardKernel::decode:
      return "decode";
  }
  return "unknown";
}

ForwardPlan plan_forward(const AttentionProblem& p, const CpuKernelTraits& cpu, int threads, bool wants_probs) {
  ForwardPlan plan;
  if (p.B == 0 || p.Hq == 0 || p.Nq == 0) return plan;
  const int64_t heads = int64_t{p.B} * p.Hkv;
  const int32_t blocks = ceil_div(p.Nk, kKeyBlock);
  plan.rows = int64_t{p.Hq / p.Hkv} * p.Nq;
  plan.kernel = plan.rows <= cpu.max_decode_rows && !wants_probs ? ForwardKernel::decode : ForwardKernel::tiled;
  plan.native_bf16 = cpu.native_bf16 && p.dtype == DType::bf16 && p.D % 2 == 0;

  if (plan.kernel == ForwardKernel::decode) {
    plan.row_tile = plan.row_width = static_cast<int32_t>(plan.rows);
    plan.row_tiles = 1;
  } else {
    // Narrower tiles where full ones would leave threads idle; a row has the same bits in any tile.
    const int32_t group = cpu.lanes * cpu.tile_vectors;
    int32_t tile = std::clamp(cpu.row_tile_floats / (p.D + p.Dv) / group * group, group, cpu.max_row_tile);
    while (tile > group && heads * ceil_div(plan.rows, tile) < 4 * threads)
      tile = (tile / 2 + group - 1) / group * group;
    plan.row_tile = static_cast<int32_t>(std::min<int64_t>(tile, plan.rows));
    plan.row_tiles = ceil_div(plan.rows, plan.row_tile);
    plan.row_width = (plan.row_tile + cpu.lanes - 1) / cpu.lanes * cpu.lanes;
  }
  const int64_t row_tasks = heads * plan.row_tiles;
  int32_t splits = 1;
  if (!wants_probs && threads > 1 && row_tasks < 4 * threads)
    splits = std::clamp<int32_t>(ceil_div(4 * threads, row_tasks), 1, std::max(1, blocks / kMinSplitBlocks));
  plan.split_blocks = std::max(1, ceil_div(blocks, splits));
  plan.key_splits = std::max(1, ceil_div(blocks, plan.split_blocks));
  plan.tasks = row_tasks * plan.key_splits;
  return plan;
}

BackwardPlan plan_backward(const AttentionProblem& p, const CpuKernelTraits& cpu) {
  // Enough tasks for the machines of today whatever this one has: the partition decides the bits of dq.
  constexpr int64_t kTasks = 32;
  constexpr int32_t kMaxPartitions = 8;  // each keeps a float32 copy of dq

  BackwardPlan plan;
  if (p.B == 0 || p.Hq == 0) return plan;
  const int64_t heads = int64_t{p.B} * p.Hkv;
  const int32_t blocks = ceil_div(p.Nk, kKeyBlock);
  plan.rows = int64_t{p.Hq / p.Hkv} * p.Nq;
  plan.row_tile = cpu.backward_row_tile;
  plan.row_tiles = ceil_div(plan.rows, plan.row_tile);
  const int32_t wanted = std::clamp<int32_t>(ceil_div(kTasks, heads), 1, kMaxPartitions);
  plan.partition_blocks = std::max(1, ceil_div(blocks, std::min(wanted, std::max(1, blocks))));
  plan.key_partitions = std::max(1, ceil_div(blocks, plan.partition_blocks));
  plan.tasks = heads * plan.key_partitions;
  return plan;
}

std::optional<std::string> unsupported(const AttentionProblem& p, const CpuKernelTraits& cpu) {
  constexpr int32_t kMaxHeadDim = 576;
  if (cpu.lanes == 0) return "no CPU kernels for this processor were built";
  if (p.D < 1 || p.D > kMaxHeadDim || p.Dv < 1 || p.Dv > kMaxHeadDim)
    return concat("head dims D and Dv must be 1 to ", kMaxHeadDim, "; got ", p.D, " and ", p.Dv);
  if (p.query_starts || p.key_starts) return "the CPU kernels do not take packed sequences";
  if (p.pages.table) return "the CPU kernels do not take paged keys and values";
  if (p.rope.cos) return "the CPU kernels do not take rotary embeddings";
  if (p.blocks.offsets) return "the CPU kernels do not take block lists";
  if (p.neighbourhood.axes > 0) return "the CPU kernels do not take a neighbourhood";
  if (p.score_floor) return "the CPU kernels do not take a floor of the scores";
  return std::nullopt;
}

}  // namespace mfa
