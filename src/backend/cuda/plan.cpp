#include "backend/cuda/plan.h"

#include <algorithm>
#include <limits>

#include "backend/cuda/tiles.h"
#include "common/check.h"

namespace mfa::cuda {
namespace {

constexpr int kMaxSplits = 128;
constexpr int kRowsPerBlock = 4;  // of the kernels in which a warp takes a row
constexpr int kWarpRowThreads = 128;
constexpr int kHeadThreads = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const ForwardTile& forward_tile(Element dtype, int index, bool few_rows) {
  if (dtype == Element::f32) return few_rows ? kForwardFewRows32[index] : kForward32[index];
  return few_rows ? kForwardFewRows16[index] : kForward16[index];
}
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

int64_t rows_of_group(const AttentionProblem& p) { return int64_t{p.Hq / p.Hkv} * p.Nq; }

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
    case Kernel::count:
      break;
  }
  return "unknown";
}

bool is_tiled(Kernel kernel) {
  return kernel != Kernel::merge_splits && kernel != Kernel::backward_rows && kernel != Kernel::head_gradients;
}

std::string name_of(const Launch& launch) {
  const char* dtype = launch.dtype == Element::f32 ? "f32" : launch.dtype == Element::f16 ? "f16" : "bf16";
  std::string name = concat(stem_of(launch.kernel), "_", dtype);
  if (is_tiled(launch.kernel)) name += concat("_", kHeadDims[launch.head_dim]);
  return name;
}

ForwardPlan plan_forward(const AttentionProblem& p, const DeviceTraits& device) {
  const Element dtype = element_of(p.dtype);
  const int size = element_size(dtype), index = tile_index(p.D, p.Dv);
  const int64_t rows = rows_of_group(p), heads = int64_t{p.B} * p.Hkv;
  ForwardPlan plan;
  const bool few_rows = rows <= forward_tile(dtype, index, true).BQ;
  const ForwardTile& tile = forward_tile(dtype, index, few_rows);
  plan.row_tile = tile.BQ;
  plan.key_tile = tile.BK;
  const int64_t blocks = heads * ceil_div(rows, tile.BQ), key_tiles = std::max<int64_t>(1, ceil_div(p.Nk, tile.BK));

  // Split the keys where the tiles of rows leave multiprocessors idle, into parts of at least four tiles.
  const int64_t resident = std::max(1, device.shared_bytes / tile.shared_bytes(size));
  const int64_t wanted = device.multiprocessors * std::min<int64_t>(resident, 2);
  if (few_rows && blocks < wanted) {
    const int64_t splits = std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1,
                                               std::min<int64_t>(kMaxSplits, std::max<int64_t>(1, key_tiles / 4)));
    const int64_t tiles_per_split = ceil_div(key_tiles, splits);
    plan.splits = static_cast<int>(ceil_div(key_tiles, tiles_per_split));
    plan.split_keys = static_cast<int>(std::min<int64_t>(tiles_per_split * tile.BK, p.Nk));
    if (plan.splits > 1) plan.split_keys = static_cast<int>(tiles_per_split * tile.BK);
  }
  plan.attention = launch_of(few_rows ? Kernel::forward_few_rows : Kernel::forward_tiled, dtype, index, blocks,
                             tile.threads(), tile.shared_bytes(size));
  plan.attention.grid[2] = static_cast<uint32_t>(plan.splits);
  if (plan.splits > 1)
    plan.merge = launch_of(Kernel::merge_splits, dtype, 0, ceil_div(int64_t{p.B} * p.Hq * p.Nq, kRowsPerBlock),
                           kWarpRowThreads, 0);
  return plan;
}

BackwardPlan plan_backward(const AttentionProblem& p, const BiasAxes& bias, const DeviceTraits&) {
  const Element dtype = element_of(p.dtype);
  const int index = tile_index(p.D, p.Dv);
  const BackwardTile& tile = backward_tile(dtype, index);
  const int shared = tile.shared_bytes(element_size(dtype)), threads = tile.threads();
  const int64_t heads = int64_t{p.B} * p.Hkv, row_tiles = ceil_div(rows_of_group(p), tile.BQ);
  const int64_t key_tiles = ceil_div(p.Nk, tile.BK);
  BackwardPlan plan;
  plan.Nq_padded = static_cast<int>(ceil_div(p.Nq, 128) * 128);
  plan.rows = launch_of(Kernel::backward_rows, dtype, 0, ceil_div(int64_t{p.B} * p.Hq * p.Nq, kRowsPerBlock),
                        kWarpRowThreads, 0);
  plan.queries = launch_of(Kernel::backward_queries, dtype, index, heads * row_tiles, threads, shared);
  plan.keys = launch_of(Kernel::backward_keys, dtype, index, heads * key_tiles, threads, shared);
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
  const int needed = std::max({forward_tile(dtype, index, false).shared_bytes(size),
                               forward_tile(dtype, index, true).shared_bytes(size),
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
