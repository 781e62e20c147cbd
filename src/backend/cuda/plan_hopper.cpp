#include "backend/cuda/plan_hopper.h"

#include <algorithm>
#include <iterator>

#include "common/ceil_div.h"

namespace mfa::cuda {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int64_t kMaxItems = int64_t{1} << 30;  // that the kernels can number

constexpr int kColumns[] = {64, 96, 128, 192, 256, 512, 576};  // of the first rows of forward_tiles and kHopperColumns

int columns_of(const AttentionProblem& p) { return hopper::columns_of(std::max(p.D, p.Dv)); }

int index_of(int columns) {
  return static_cast<int>(std::find(std::begin(kColumns), std::end(kColumns), columns) - std::begin(kColumns));
}

template <int n>
hopper::TileChoice tile_of(const hopper::TileChoice (&table)[n], const AttentionProblem& p) {
  const int columns = columns_of(p);
  return *std::find_if(table, table + n, [&](const auto& tile) { return tile.columns == columns; });
}

// Blocks stay for the whole launch and draw tiles.
Launch persistent(Kernel kernel, const AttentionProblem& p, const DeviceTraits& device, const HopperSchedule& schedule,
                  int threads, int shared_bytes) {
  Launch launch{kernel, element_of(p.dtype), index_of(columns_of(p))};
  launch.schedule = schedule;
  launch.grid[0] = static_cast<uint32_t>(std::min(device.multiprocessors, schedule.tiles));
  launch.threads = static_cast<uint32_t>(threads);
  launch.shared_bytes = static_cast<uint32_t>(shared_bytes);
  return launch;
}

bool has_unequal_tiles(const AttentionProblem& p, const CallTraits& call) {
  return p.causal || p.window_left >= 0 || p.window_right >= 0 || call.lengths;
}

// All gradients in one pass, where there is such a kernel. Blocks wait for each other, a group at a time, so a device
// must run that many at once.
void plan_fused(const AttentionProblem& p, const DeviceTraits& device, BackwardPlan& plan) {
  const auto* end = std::end(hopper::fused_tiles);
  const auto* found =
      std::find_if(std::begin(hopper::fused_tiles), end, [&](const auto& t) { return t.columns == columns_of(p); });
  if (found == end || device.multiprocessors < 2 * hopper::fused_group) return;
  const hopper::TileChoice tile = *found;
  const int tiles_per_head = static_cast<int>(ceil_div(p.Nk, 64 * tile.consumers));
  const HopperSchedule schedule{p.B * p.Hkv * tiles_per_head, tiles_per_head, 0, 0, 0};
  plan.fused = persistent(Kernel::hopper_backward_fused, p, device, schedule, 128 * (tile.consumers + 1),
                          hopper::fused_layout(tile).bytes);
  plan.fused.query_box = tile.tile;
  plan.fused.key_box = 64;
  plan.fused_columns = tile.columns;
}

// A pass over a mask that several heads share costs little beside their attention.
void plan_mask_tiles(const AttentionProblem& p, const CallTraits& call, ForwardPlan& plan) {
  constexpr int kMinSharing = 4, kThreads = 1024;
  constexpr int64_t kMaxGrid = 65535;
  const int64_t planes = int64_t{call.mask_varies[0] ? p.B : 1} * (call.mask_varies[1] ? p.Hq : 1);
  const int64_t tiles = call.mask_varies[2] ? ceil_div(p.Nq, 64) : 1, words = ceil_div(p.Nk, 32 * plan.key_tile);
  if (planes * kMinSharing > int64_t{p.B} * p.Hq || p.Nk <= plan.key_tile || tiles > kMaxGrid || planes > kMaxGrid ||
      planes * tiles * words >= kMaxItems)
    return;
  plan.mask_tiles = Launch{Kernel::hopper_mask_tiles, element_of(p.dtype), 0};
  plan.mask_tiles.grid[0] = static_cast<uint32_t>(words);
  plan.mask_tiles.grid[1] = static_cast<uint32_t>(tiles);
  plan.mask_tiles.grid[2] = static_cast<uint32_t>(planes);
  plan.mask_tiles.threads = kThreads;
}

// Of a size that the kernels can number.
bool is_countable(const AttentionProblem& p) {
  constexpr int64_t kMaxPositions = int64_t{1} << 29;
  const int64_t tiles = int64_t{p.B} * p.Hq * (ceil_div(p.Nq, 64) + 2 * ceil_div(p.Nk, 64));
  return p.B > 0 && p.Nq > 0 && p.Nk > 0 && int64_t{p.Nq} + p.Nk < kMaxPositions && tiles < kMaxItems;
}

}  // namespace

bool hopper_takes(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device) {
  constexpr int kMaxHeadDim = 576, kMaxValueDim = 512;
  return device.compute_capability == 90 && p.dtype != DType::f32 && p.D <= kMaxHeadDim && p.Dv <= kMaxValueDim &&
         p.D % 8 == 0 && p.Dv % 8 == 0 && (p.scale > 0.f || is_modified(p, call)) && is_countable(p) && call.mapped;
}

bool hopper_splits(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device) {
  constexpr int kMaxHeadDim = 128;
  return device.compute_capability == 90 && p.dtype == DType::f32 && std::max(p.D, p.Dv) <= kMaxHeadDim &&
         p.softcap == 0.f && (p.scale > 0.f || is_modified(p, call)) && is_countable(p);
}

bool hopper_takes_backward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device) {
  constexpr int kMaxGrid = 65535;  // the rows' terms are a grid of heads and batch entries
  constexpr int kMaxHeadDim = 256;
  return hopper_takes(p, call, device) && std::max(p.D, p.Dv) <= kMaxHeadDim && p.Hq <= kMaxGrid && p.B <= kMaxGrid;
}

bool is_modified(const AttentionProblem& p, const CallTraits& call) {
  return p.softcap > 0.f || call.alibi || call.bias || call.mask || call.dropout;
}

void plan_hopper_forward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                         ForwardPlan& plan) {
  const bool mask_alone = call.mask && call.mask_in_words && columns_of(p) <= 256 &&
                          !(p.softcap > 0.f || call.alibi || call.bias || call.dropout);
  const Kernel kernel = !is_modified(p, call) ? Kernel::hopper_forward
                        : mask_alone          ? Kernel::hopper_forward_mask
                                              : Kernel::hopper_forward_modified;
  const bool narrow_values = kernel == Kernel::hopper_forward && columns_of(p) == 192 && p.Dv <= 128;
  const hopper::TileChoice tile = narrow_values                           ? hopper::forward_tiles[kNarrowValues]
                                  : kernel == Kernel::hopper_forward      ? tile_of(hopper::forward_tiles, p)
                                  : kernel == Kernel::hopper_forward_mask ? tile_of(hopper::forward_mask_tiles, p)
                                                                          : tile_of(hopper::forward_modified_tiles, p);
  plan.row_tile = 64 * tile.consumers;
  plan.key_tile = tile.tile;
  const auto layout = hopper::forward_layout(tile);
  const auto schedule = hopper::schedule(p.B * p.Hq, static_cast<int>(ceil_div(p.Nq, plan.row_tile)),
                                         int64_t{p.Nk} * (p.D + p.Dv) * 2, has_unequal_tiles(p, call), true, 0);
  plan.attention = persistent(kernel, p, device, schedule, layout.threads, layout.bytes);
  if (narrow_values) plan.attention.head_dim = kNarrowValues;
  plan.attention.query_box = 64;
  plan.attention.key_box = tile.tile;
  if (call.mask) plan_mask_tiles(p, call, plan);
}

void plan_hopper_split(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                       ForwardPlan& plan) {
  constexpr int kSplitThreads = 256;
  const bool modified = is_modified(p, call), wide = std::max(p.D, p.Dv) > hopper::split_tiles[0].columns;
  const hopper::TileChoice tile = modified ? hopper::split_modified_tiles[wide] : hopper::split_tiles[wide];
  plan.row_tile = 64 * tile.consumers;
  plan.key_tile = tile.tile;
  const auto layout = hopper::split_layout(tile);
  const auto schedule =
      hopper::schedule(p.B * p.Hq, static_cast<int>(ceil_div(p.Nq, plan.row_tile)),
                       int64_t{p.Nk} * tile.columns * 2 * hopper::split_parts * 2, has_unequal_tiles(p, call), true, 0);
  plan.attention = persistent(modified ? Kernel::hopper_forward_modified : Kernel::hopper_forward, p, device, schedule,
                              layout.threads, layout.bytes);
  plan.attention.head_dim = index_of(tile.columns);
  plan.attention.query_box = 64;
  plan.attention.key_box = tile.tile;
  plan.split = Launch{Kernel::hopper_split, Element::f32, plan.attention.head_dim};
  plan.split.grid[0] = static_cast<uint32_t>(int64_t{p.B} * p.Hq * ceil_div(p.Nq, hopper::split_rows) +
                                             2 * int64_t{p.B} * p.Hkv * ceil_div(p.Nk, hopper::split_rows));
  plan.split.threads = kSplitThreads;
  plan.split_columns = tile.columns;
}

void plan_hopper_backward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device,
                          BackwardPlan& plan) {
  const bool unequal = has_unequal_tiles(p, call);
  plan.rows = Launch{Kernel::hopper_backward_prepare, element_of(p.dtype), 0};
  plan.rows.grid[0] = static_cast<uint32_t>(p.Hq * ceil_div(plan.Nq_padded, hopper::prepare_rows(p.Dv)));
  plan.rows.grid[1] = static_cast<uint32_t>(p.B);
  plan.rows.threads = kPrepareThreads;

  const bool modified = is_modified(p, call);
  const hopper::TileChoice dq = modified ? tile_of(hopper::dq_modified_tiles, p) : tile_of(hopper::dq_tiles, p);
  const auto dq_layout = hopper::backward_layout(dq);
  plan.queries = persistent(modified ? Kernel::hopper_dq_modified : Kernel::hopper_dq, p, device,
                            hopper::schedule(p.B * p.Hq, static_cast<int>(ceil_div(p.Nq, 64 * dq.consumers)),
                                             int64_t{p.Nk} * (p.D + p.Dv) * 2, unequal, true, 0),
                            dq_layout.threads, dq_layout.bytes);
  plan.queries.query_box = 64;
  plan.queries.key_box = dq.tile;

  const bool shared_keys = columns_of(p) > 128;
  const hopper::TileChoice dkv =
      modified ? shared_keys ? tile_of(hopper::dkv_shared_modified_tiles, p) : tile_of(hopper::dkv_modified_tiles, p)
      : shared_keys ? tile_of(hopper::dkv_shared_tiles, p)
                    : tile_of(hopper::dkv_tiles, p);
  const Kernel keys_kernel = modified ? shared_keys ? Kernel::hopper_dkv_shared_modified : Kernel::hopper_dkv_modified
                             : shared_keys ? Kernel::hopper_dkv_shared
                                           : Kernel::hopper_dkv;
  const auto dkv_layout = hopper::backward_layout(dkv, shared_keys);
  plan.keys = persistent(keys_kernel, p, device,
                         hopper::schedule(p.B * p.Hkv, static_cast<int>(ceil_div(p.Nk, 64 * dkv.consumers)),
                                          int64_t{p.Nq} * (p.D + p.Dv) * 2, unequal, false, 0),
                         dkv_layout.threads, dkv_layout.bytes);
  plan.keys.query_box = dkv.tile;
  plan.keys.key_box = 64;
  if (!modified) plan_fused(p, device, plan);
}

}  // namespace mfa::cuda
