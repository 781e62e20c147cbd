#include "attention/plan.h"

#include <algorithm>

#include "attention/tile_keys.h"
#include "attention/visibility.h"
#include "common/check.h"

namespace mfa {
namespace {

// Decode ranges below this many keys cost more in merging than they gain.
constexpr int32_t kMinSplitBlocks = 2;
// Fewer keys than this are soon computed: what a row costs by itself counts.
constexpr int32_t kManyKeys = 1024;

int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Products of bfloat16 pairs: not of rotated rows, which would have to be rounded, nor where scores are compared with a
// floor, as those were computed from widened values.
bool multiplies_pairs(const AttentionProblem& p, const CpuKernelTraits& cpu) {
  return cpu.native_bf16 && p.dtype == DType::bf16 && p.D % 2 == 0 && !p.rope.cos && !p.score_floor;
}

// Heads of a group share tiles unless they see different block lists.
void share_heads(const AttentionProblem& p, RowTiling& t) {
  const int32_t group = p.Hq / p.Hkv;
  t.heads = p.blocks.offsets && p.blocks.stride_h != 0 ? 1 : group;
  t.parts = group / t.heads;
}

// The heads of a pool's pages that decode together, a divisor of all: more than these bytes of a token or these rows
// would not stay in the second cache until they are used.
int32_t heads_together(const AttentionProblem& p, int64_t rows) {
  constexpr int64_t kBytes = 2048, kRows = kMostTogether;
  if (!p.pages.table || TileKeys::cuts(p)) return 1;
  const auto fit = std::min(kRows / rows, kBytes / (std::max(p.D, p.Dv) * static_cast<int64_t>(size_of(p.dtype))));
  auto heads = static_cast<int32_t>(std::clamp<int64_t>(fit, 1, p.Hkv));
  while (p.Hkv % heads != 0) --heads;
  return heads;
}

// Cuts tiles of at most `most_rows` so that their rows see the same keys: one block of the lists, or a box of the grid.
bool cut_at_keys(const AttentionProblem& p, const CpuKernelTraits& cpu, int32_t most_rows, RowTiling& t) {
  if (p.blocks.offsets) {
    t.unit = int64_t{p.blocks.block_q} * t.heads;
    const int64_t pieces = (t.unit + most_rows - 1) / most_rows;
    t.tile = std::min(most_rows, ceil_div(ceil_div(t.unit, pieces), cpu.lanes) * cpu.lanes);
    return true;
  }
  if (!covers_grid(p) || t.heads > most_rows) return false;
  choose_box(p.neighbourhood, t.heads, most_rows, cpu.lanes * cpu.tile_vectors, cpu.lanes, t.box);
  t.tile = t.box[0] * t.box[1] * t.box[2] * t.heads;
  return true;
}

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
  const int32_t blocks = ceil_div(p.Nk, kKeyBlock);
  plan.rows = int64_t{p.Hq / p.Hkv} * p.Nq;
  plan.native_bf16 = multiplies_pairs(p, cpu);

  RowTiling& t = plan.tiling;
  share_heads(p, t);
  t.decode_rows = wants_probs ? 0 : p.Nk < kManyKeys ? cpu.few_key_decode_rows : cpu.max_decode_rows;
  plan.kernel = is_decode(t, p.Nq) ? ForwardKernel::decode : ForwardKernel::tiled;
  if (plan.kernel == ForwardKernel::decode) {
    plan.row_tile = plan.row_width = t.tile = static_cast<int32_t>(part_rows(t, p.Nq));
  } else {
    // Narrower tiles where full ones would leave threads idle; a row has the same bits in any tile.
    const int32_t group = cpu.lanes * cpu.tile_vectors;
    t.tile = std::clamp(cpu.row_tile_floats / (p.D + p.Dv) / group * group, group, cpu.max_row_tile);
    if (!cut_at_keys(p, cpu, t.tile, t)) {
      while (t.tile > group && TileMap(p, t).count() < 4 * threads) t.tile = (t.tile / 2 + group - 1) / group * group;
    }
    t.tile = plan.row_tile = static_cast<int32_t>(std::min<int64_t>(t.tile, part_rows(t, p.Nq)));
    plan.row_width = (plan.row_tile + cpu.lanes - 1) / cpu.lanes * cpu.lanes;
  }
  plan.row_tiles = tile_count(t, p.neighbourhood, p.Nq);
  plan.tiles = TileMap(p, t);
  const int64_t row_tasks = plan.tiles.count();
  if (plan.kernel == ForwardKernel::decode) plan.together = heads_together(p, plan.rows);
  const int64_t parts = row_tasks / plan.together;
  int32_t splits = 1;
  if (!wants_probs && threads > 1 && parts > 0 && parts < 4 * threads)
    splits = std::clamp<int32_t>(ceil_div(4 * threads, parts), 1, std::max(1, blocks / kMinSplitBlocks));
  plan.split_blocks = std::max(1, ceil_div(blocks, splits));
  plan.key_splits = std::max(1, ceil_div(blocks, plan.split_blocks));
  plan.batch = plan.together;
  if (plan.key_splits == 1)
    plan.batch *= static_cast<int32_t>(std::clamp<int64_t>(parts / (int64_t{64} * std::max(1, threads)), 1, 32));
  plan.tasks = (row_tasks + plan.batch - 1) / plan.batch * plan.key_splits;
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
  // Of a few keys dS is little more than the difference of two sums, and float32 costs next to nothing.
  constexpr int32_t kFewKeys = 64;
  plan.native_bf16 = multiplies_pairs(p, cpu) && p.Dv % 2 == 0 && p.Nk >= kFewKeys;
  RowTiling& t = plan.tiling;
  share_heads(p, t);
  t.tile = cpu.backward_row_tile;
  cut_at_keys(p, cpu, t.tile, t);
  plan.row_tile = t.tile;
  plan.row_tiles = tile_count(t, p.neighbourhood, p.Nq);
  plan.tiles = TileMap(p, t);
  const int32_t wanted = std::clamp<int32_t>(ceil_div(kTasks, heads), 1, kMaxPartitions);
  plan.partition_blocks = std::max(1, ceil_div(blocks, std::min(wanted, std::max(1, blocks))));
  plan.key_partitions = std::max(1, ceil_div(blocks, plan.partition_blocks));
  plan.tasks = heads * plan.key_partitions;
  if (p.query_starts) {
    plan.partial_starts.assign(static_cast<size_t>(p.B) + 1, 0);
    for (int32_t b = 0; b < p.B; ++b)
      plan.partial_starts[static_cast<size_t>(b) + 1] =
          plan.partial_starts[static_cast<size_t>(b)] + plan.partial_rows_of(p, b) * p.Hkv * plan.key_partitions;
  } else {
    plan.partial_rows = plan.partial_rows_of(p, 0);
  }
  return plan;
}

int64_t BackwardPlan::partial_rows_of(const AttentionProblem& p, int32_t b) const {
  if (partial_rows > 0) return partial_rows;
  const int32_t queries = query_count(p, b);
  const int64_t count = tile_count(tiling, p.neighbourhood, queries);
  if (count == 1) return ceil_div(std::min<int64_t>(row_tile, part_rows(tiling, queries)), 16) * int64_t{16};
  return count * ((row_tile + 15) / 16 * 16);
}

int64_t BackwardPlan::partial_row(const AttentionProblem& p, int32_t b, int32_t kv_head, int32_t partition,
                                  int64_t tile) const {
  const int64_t rows = partial_rows_of(p, b);
  const int64_t first =
      partial_starts.empty() ? b * rows * p.Hkv * key_partitions : partial_starts[static_cast<size_t>(b)];
  return first + (int64_t{kv_head} * key_partitions + partition) * rows + tile * ((row_tile + 15) / 16 * 16);
}

int64_t BackwardPlan::partial_row_count(const AttentionProblem& p) const {
  return partial_starts.empty() ? partial_rows * p.B * p.Hkv * key_partitions : partial_starts.back();
}

std::optional<std::string> unsupported(const AttentionProblem& p, const CpuKernelTraits& cpu) {
  constexpr int32_t kMaxHeadDim = 576;
  if (cpu.lanes == 0) return "no CPU kernels for this processor were built";
  if (p.D < 1 || p.D > kMaxHeadDim || p.Dv < 1 || p.Dv > kMaxHeadDim)
    return concat("head dims D and Dv must be 1 to ", kMaxHeadDim, "; got ", p.D, " and ", p.Dv);
  return std::nullopt;
}

}  // namespace mfa
