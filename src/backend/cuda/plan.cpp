#include "backend/cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "backend/cuda/plan_hopper.h"
#include "backend/cuda/tiles.h"
#include "common/ceil_div.h"
#include "common/check.h"

namespace mfa::cuda {
namespace {

constexpr int kMaxSplits = 128;
constexpr int kInvariantKeys = 1024;  // of a split whose size depends on nothing else
constexpr int kPackedQueries = 16;
constexpr int kRowsPerBlock = 4;  // of the kernels in which a warp takes a row
constexpr int kWarpRowThreads = 128;
constexpr int kHeadThreads = 256;

const ForwardTile& forward_tile(Element dtype, int index, bool few_rows) {
  if (dtype == Element::f32) return few_rows ? kForwardFewRows32[index] : kForward32[index];
  return few_rows ? kForwardFewRows16[index] : kForward16[index];
}
// Kernels for few rows: decode where there is one whose rings fit the device, else the tiles that share keys among
// warps, where decode has none; the tiled kernel takes what is left.
bool decodes(Element dtype, int index, const DeviceTraits& device) {
  return dtype != Element::f32 && index < kDecodeSizes &&
         kDecode16[index].shared_bytes(element_size(dtype)) <= device.shared_bytes;
}
bool has_few_rows_kernel(Element dtype, int index) { return dtype == Element::f32 || index >= kDecodeSizes; }
const BackwardTile& backward_tile(Element dtype, int index) {
  return dtype == Element::f32 ? kBackward32[index] : kBackward16[index];
}

// The launch of `blocks` blocks along x. unsupported() has seen that they fit.
Launch launch_of(Kernel kernel, Element dtype, int head_dim, int64_t blocks, int threads, int shared_bytes) {
  Launch launch{kernel, dtype, head_dim};
  launch.grid[0] = static_cast<uint32_t>(blocks);
  launch.threads = static_cast<uint32_t>(threads);
  launch.shared_bytes = static_cast<uint32_t>(shared_bytes);
  return launch;
}

// Into how many parts to split `keys` so that blocks * splits fill `slots` evenly. A split costs a pass over its
// result, so a greater number must gain 5 %, or be long still and spread the work over several waves: blocks that read
// side by side do not end together.
int choose_splits(int64_t blocks, int64_t keys, int64_t slots) {
  constexpr int64_t kMinKeys = 128, kLongKeys = 1024;  // of a split
  constexpr double kWaves = 3.5;
  const int64_t most = std::min<int64_t>(
      {kMaxSplits, std::max<int64_t>(1, keys / kMinKeys), std::max<int64_t>(4, slots / std::max<int64_t>(1, blocks))});
  int best = 1;
  double best_use = 0, best_waves = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double waves = double(blocks) * splits / slots, use = waves / std::ceil(waves);
    const bool spreads = best_waves < kWaves && waves >= kWaves && keys / splits >= kLongKeys && use > 0.95 * best_use;
    if (use > 1.05 * best_use || spreads) best = static_cast<int>(splits), best_use = use, best_waves = waves;
  }
  return best;
}

int64_t rows_of_group(const AttentionProblem& p) { return int64_t{p.Hq / p.Hkv} * p.Nq; }

// Hopper's tiles hold the queries of one head; with a few of each they would stay empty, where others pack a group's.
bool fills_hopper_tiles(const AttentionProblem& p) {
  const bool packs = p.Hq > p.Hkv && p.Nq <= kPackedQueries;
  return rows_of_group(p) > DecodeTile::kRows && !packs;
}

Launch tiled_launch(const AttentionProblem& p, bool few, const ForwardTile& tile) {
  const Element dtype = element_of(p.dtype);
  return launch_of(few ? Kernel::forward_few_rows : Kernel::forward_tiled, dtype, tile_index(p.D, p.Dv),
                   int64_t{p.B} * p.Hkv * ceil_div(rows_of_group(p), tile.BQ), tile.threads(),
                   tile.shared_bytes(element_size(dtype)));
}

}  // namespace

Element element_of(DType dtype) {
  return dtype == DType::f32 ? Element::f32 : dtype == DType::f16 ? Element::f16 : Element::bf16;
}

const char* stem_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::forward_tiled:
      return "forward_tiled";
    case Kernel::forward_few_rows:
      return "forward_few_rows";
    case Kernel::forward_decode:
      return "forward_decode";
    case Kernel::merge_splits:
      return "merge_splits";
    case Kernel::backward_rows:
      return "backward_rows";
    case Kernel::backward_queries:
      return "backward_queries";
    case Kernel::backward_keys:
      return "backward_keys";
    case Kernel::bias_gradient:
      return "bias_gradient";
    case Kernel::slope_rows:
      return "slope_rows";
    case Kernel::head_gradients:
      return "head_gradients";
    case Kernel::hopper_forward:
      return "hopper_forward";
    case Kernel::hopper_forward_mask:
      return "hopper_forward_mask";
    case Kernel::hopper_forward_modified:
      return "hopper_forward_modified";
    case Kernel::hopper_split:
      return "hopper_split";
    case Kernel::hopper_mask_tiles:
      return "hopper_mask_tiles";
    case Kernel::hopper_backward_prepare:
      return "hopper_backward_prepare";
    case Kernel::hopper_dq:
      return "hopper_dq";
    case Kernel::hopper_dkv:
      return "hopper_dkv";
    case Kernel::hopper_dkv_shared:
      return "hopper_dkv_shared";
    case Kernel::hopper_dq_modified:
      return "hopper_dq_modified";
    case Kernel::hopper_dkv_modified:
      return "hopper_dkv_modified";
    case Kernel::hopper_dkv_shared_modified:
      return "hopper_dkv_shared_modified";
    case Kernel::hopper_backward_fused:
      return "hopper_backward_fused";
    case Kernel::count:
      break;
  }
  return "unknown";
}

bool is_tiled(Kernel kernel) {
  return kernel != Kernel::merge_splits && kernel != Kernel::backward_rows && kernel != Kernel::head_gradients &&
         !is_hopper(kernel);
}

bool is_hopper(Kernel kernel) { return kernel >= Kernel::hopper_forward && kernel < Kernel::count; }

std::string name_of(const Launch& launch) {
  if (launch.kernel == Kernel::hopper_mask_tiles) return stem_of(launch.kernel);
  const char* dtype = launch.dtype == Element::f32 ? "f32" : launch.dtype == Element::f16 ? "f16" : "bf16";
  if (is_hopper(launch.kernel) && launch.kernel != Kernel::hopper_backward_prepare)
    return concat(stem_of(launch.kernel), "_", kHopperColumns[launch.head_dim], "_", dtype);
  std::string name = concat(stem_of(launch.kernel), "_", dtype);
  if (is_tiled(launch.kernel)) name += concat("_", kHeadDims[launch.head_dim]);
  return name;
}

ForwardPlan plan_forward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device) {
  const Element dtype = element_of(p.dtype);
  const int index = tile_index(p.D, p.Dv);
  const int64_t heads = int64_t{p.B} * p.Hkv;
  ForwardPlan plan;
  if (fills_hopper_tiles(p) && hopper_takes(p, call, device)) {
    plan_hopper_forward(p, call, device, plan);
    return plan;
  }
  if (fills_hopper_tiles(p) && hopper_splits(p, call, device)) {
    plan_hopper_split(p, call, device, plan);
    return plan;
  }
  const bool few_rows = rows_of_group(p) <= DecodeTile::kRows;
  if (few_rows && decodes(dtype, index, device)) {
    const DecodeTile& tile = kDecode16[index];
    plan.row_tile = DecodeTile::kRows;
    plan.key_tile = DecodeTile::kKeys;
    plan.attention =
        launch_of(Kernel::forward_decode, dtype, index, heads, tile.threads(), tile.shared_bytes(element_size(dtype)));
  } else {
    const bool few = few_rows && has_few_rows_kernel(dtype, index);
    const ForwardTile& tile = forward_tile(dtype, index, few);
    plan.row_tile = tile.BQ;
    plan.key_tile = tile.BK;
    plan.attention = tiled_launch(p, few, tile);
  }
  if (!fills_hopper_tiles(p) && heads > 0) {
    const int64_t resident = std::clamp<int64_t>(device.shared_bytes / plan.attention.shared_bytes, 1, 2);
    const int splits = device.batch_invariant
                           ? static_cast<int>(std::clamp<int64_t>(ceil_div(p.Nk, kInvariantKeys), 1, kMaxSplits))
                           : choose_splits(plan.attention.grid[0], p.Nk, device.multiprocessors * resident);
    // Whole tiles, for decode one for each warp.
    const int unit = std::lcm(64, plan.key_tile);
    plan.split_keys = static_cast<int>(ceil_div(ceil_div(p.Nk, splits), unit) * unit);
    plan.splits = static_cast<int>(std::max<int64_t>(1, p.Nk > 0 ? ceil_div(p.Nk, plan.split_keys) : 1));
    plan.attention.grid[2] = static_cast<uint32_t>(plan.splits);
  }
  if (plan.splits > 1)
    plan.merge = launch_of(Kernel::merge_splits, dtype, 0, ceil_div(int64_t{p.B} * p.Hq * p.Nq, kRowsPerBlock),
                           kWarpRowThreads, 0);
  return plan;
}

BackwardPlan plan_backward(const AttentionProblem& p, const CallTraits& call, const BiasAxes& bias,
                           const DeviceTraits& device) {
  const Element dtype = element_of(p.dtype);
  const int index = tile_index(p.D, p.Dv);
  const BackwardTile& tile = backward_tile(dtype, index);
  const int shared = tile.shared_bytes(element_size(dtype)), threads = tile.threads();
  const int64_t heads = int64_t{p.B} * p.Hkv, row_tiles = ceil_div(rows_of_group(p), tile.BQ);
  const int64_t key_tiles = ceil_div(p.Nk, tile.BK);
  BackwardPlan plan;
  plan.Nq_padded = static_cast<int>((ceil_div(p.Nq, 128) + 1) * 128);
  plan.rows = launch_of(Kernel::backward_rows, dtype, 0, ceil_div(int64_t{p.B} * p.Hq * p.Nq, kRowsPerBlock),
                        kWarpRowThreads, 0);
  plan.queries = launch_of(Kernel::backward_queries, dtype, index, heads * row_tiles, threads, shared);
  plan.keys = launch_of(Kernel::backward_keys, dtype, index, heads * key_tiles, threads, shared);
  if (hopper_takes_backward(p, call, device)) plan_hopper_backward(p, call, device, plan);
  if (fills_hopper_tiles(p) && hopper_splits(p, call, device))
    plan.lse = tiled_launch(p, false, forward_tile(dtype, index, false));
  plan.slopes = launch_of(Kernel::slope_rows, dtype, index, heads * row_tiles, threads, shared);
  plan.heads = launch_of(Kernel::head_gradients, dtype, 0, p.Hq, kHeadThreads, 0);
  const int64_t extent[4] = {p.B, p.Hq, ceil_div(p.Nq, tile.BQ), key_tiles};
  int64_t bias_blocks = 1;
  for (int a = 0; a < 4; ++a)
    if (!bias.summed[a]) bias_blocks *= extent[a];
  plan.bias = launch_of(Kernel::bias_gradient, dtype, index, bias_blocks, threads, shared);
  return plan;
}

std::optional<std::string> unsupported(const AttentionProblem& p, const DeviceTraits& device) {
  if (device.compute_capability < 80)
    return concat("the CUDA kernels need compute capability 8.0; got ", device.compute_capability / 10, ".",
                  device.compute_capability % 10);
  const int index = tile_index(p.D, p.Dv);
  if (p.D < 1 || p.Dv < 1 || index < 0)
    return concat("head dims D and Dv must be 1 to ", kHeadDims[3], "; got ", p.D, " and ", p.Dv);
  const Element dtype = element_of(p.dtype);
  const int size = element_size(dtype);
  const bool few = has_few_rows_kernel(dtype, index);
  const int needed = std::max({forward_tile(dtype, index, false).shared_bytes(size),
                               few ? forward_tile(dtype, index, true).shared_bytes(size) : 0,
                               backward_tile(dtype, index).shared_bytes(size)});
  if (needed > device.shared_bytes)
    return concat("head dims ", p.D, " and ", p.Dv, " in ", name_of(p.dtype), " need ", needed,
                  " bytes of shared memory a block; the device has ", device.shared_bytes);
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  const double rows = double(p.B) * p.Hq * p.Nq;
  if (double(p.Hq / p.Hkv) * p.Nq + 128 > double(kLimit) || rows > 4.0 * double(kLimit) ||
      double(p.Nq) + p.Nk + 1024 > double(kLimit))
    return concat("rows and keys are numbered in 32 bits; got B ", p.B, ", Hq ", p.Hq, ", Nq ", p.Nq, ", Nk ", p.Nk);
  return std::nullopt;
}

}  // namespace mfa::cuda
