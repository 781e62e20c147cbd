#include "mfa/block_selection.h"

#include <cmath>
#include <limits>

#include "common/check.h"
#include "masks/selectors.h"
#include "mlx/ops.h"
#include "mlx/request.h"
#include "mlx/transforms.h"

namespace mfa {
namespace {

// q and k as the selectors read them; the arrays keep what they point to.
struct Inputs {
  mx::array q_array, k_array;
  SelectionOperand q, k;
};

SelectionOperand operand(const mx::array& x) {
  return {{x.data<void>(), {x.strides(0), x.strides(1), x.strides(2)}},
          to_dtype(x.dtype()),
          x.shape(0),
          x.shape(1),
          x.shape(2),
          x.shape(3)};
}

Inputs checked_inputs(const char* function, const mx::array& q, const mx::array& k) {
  check(q.ndim() == 4 && k.ndim() == 4, function, "q and k must have 4 dimensions; got shapes ", q.shape(), " and ",
        k.shape());
  check((q.dtype() == mx::float32 || q.dtype() == mx::float16 || q.dtype() == mx::bfloat16) && k.dtype() == q.dtype(),
        function, "q and k must be float32, float16 or bfloat16, both the same; got ", q.dtype(), " and ", k.dtype());
  check(q.size() > 0 && k.size() > 0, function, "q and k must not be empty; got shapes ", q.shape(), " and ",
        k.shape());
  check(q.shape(0) == k.shape(0) && q.shape(3) == k.shape(3), function,
        "q and k must agree in batch and head dimension; got shapes ", q.shape(), " and ", k.shape());
  check(q.shape(1) % k.shape(1) == 0, function, "the heads of q must be a multiple of those of k; got ", q.shape(1),
        " and ", k.shape(1));
  const auto readable = [](const mx::array& x) { return x.shape(3) == 1 ? x : mx::contiguous(x); };
  mx::array q_ready = q, k_ready = k;
  mx::eval(q_ready, k_ready);
  if (q_ready.strides(3) != 1) q_ready = readable(q_ready);
  if (k_ready.strides(3) != 1) k_ready = readable(k_ready);
  mx::eval(q_ready, k_ready);
  return {q_ready, k_ready, operand(q_ready), operand(k_ready)};
}

// The grid of q and k, and that the masks of all heads are not absurdly large.
TileGrid checked_heads_grid(const char* function, const mx::array& q, const mx::array& k, TileSize tile) {
  const TileGrid grid = checked_grid(function, q.shape(2), k.shape(2), tile);
  const double tiles = static_cast<double>(grid.query_blocks()) * grid.key_blocks();
  check(tiles * q.shape(0) * q.shape(1) <= 0x1p32, function, "expected at most 2^32 tiles in all heads; got ",
        grid.query_blocks(), " by ", grid.key_blocks(), " for ", q.shape(0), " by ", q.shape(1), " heads");
  return grid;
}

std::vector<int32_t> checked_sizes(const char* function, const char* name, const std::vector<int64_t>& sizes,
                                   int32_t tiles, int32_t block) {
  check(sizes.empty() || static_cast<int32_t>(sizes.size()) == tiles, function, name, " must have ", tiles,
        " numbers, one for each tile; got ", sizes.size());
  std::vector<int32_t> result;
  for (const int64_t size : sizes) {
    check(size >= 0 && size <= block, function, name, " must be 0 to ", block, "; got ", size);
    result.push_back(static_cast<int32_t>(size));
  }
  return result;
}

// Fractions and masses: written so that NaN fails.
void check_share(const char* function, const char* name, double value) {
  check(value >= 0 && value <= 1, function, name, " must be 0 to 1; got ", value);
}

}  // namespace

BlockMask averaged_top_blocks(const mx::array& q, const mx::array& k, const BlockRule& allowed, int64_t top_k,
                              const char* function) {
  check(top_k >= 1, function, "top_k must be 1 or more; got ", top_k);
  const Inputs inputs = checked_inputs(function, q, k);
  check(q.shape(2) == allowed.grid.Nq && k.shape(2) == allowed.grid.Nk, function, "q and k must have ", allowed.grid.Nq,
        " and ", allowed.grid.Nk, " tokens; got ", q.shape(2), " and ", k.shape(2));
  const int64_t width = int64_t{k.shape(0)} * k.shape(1) * k.shape(3);
  check(width <= std::numeric_limits<int32_t>::max(), function, "batch entries, heads and channels of k must have a ",
        "product below 2^31; got shape ", k.shape());
  return BlockMask(averaged_top_tiles(inputs.q, inputs.k, allowed, top_k));
}

BlockMask pooled_top_blocks(const mx::array& q, const mx::array& k, int64_t top_k, bool centred,
                            const std::vector<int64_t>& q_sizes, const std::vector<int64_t>& k_sizes, TileSize tile,
                            const char* function) {
  check(top_k >= 1, function, "top_k must be 1 or more; got ", top_k);
  const Inputs inputs = checked_inputs(function, q, k);
  const TileGrid grid = checked_heads_grid(function, q, k, tile);
  PooledTopOptions options{.top_k = top_k, .centred = centred, .q_sizes = {}, .k_sizes = {}};
  options.q_sizes = checked_sizes(function, "q_sizes", q_sizes, grid.query_blocks(), grid.block_q);
  options.k_sizes = checked_sizes(function, "kv_sizes", k_sizes, grid.key_blocks(), grid.block_k);
  return BlockMask(pooled_top_tiles(inputs.q, inputs.k, grid, options));
}

BlockMask draft_blocks(const mx::array& q, const mx::array& k, int64_t rows, int64_t columns, int64_t budget,
                       int64_t local_range, int64_t window_tokens) {
  constexpr const char* kFunction = "make_draft_mask";
  constexpr int64_t kMost = int64_t{1} << 31;
  check(rows >= 1 && columns >= 1 && rows < kMost && columns < kMost, kFunction,
        "window_rows and window_columns must be 1 to 2^31 - 1; got ", rows, " and ", columns);
  check(budget >= 0 && local_range >= 1, kFunction, "budget must be 0 or more and local_range 1 or more; got ", budget,
        " and ", local_range);
  const Inputs inputs = checked_inputs(kFunction, q, k);
  const TileGrid grid = checked_heads_grid(kFunction, q, k, {window_tokens, window_tokens});
  const int64_t chunk = rows * columns;
  check(q.shape(2) % window_tokens == 0 && k.shape(2) % window_tokens == 0 && grid.query_blocks() % chunk == 0 &&
            grid.key_blocks() % chunk == 0,
        kFunction, "q and k must have whole chunks of ", rows, " by ", columns, " windows of ", window_tokens,
        " tokens; got ", q.shape(2), " and ", k.shape(2), " tokens");
  return BlockMask(draft_tiles(inputs.q, inputs.k, grid,
                               {.rows = rows, .columns = columns, .local_range = local_range, .budget = budget}));
}

BlockMask similarity_mass_blocks(const mx::array& q, const mx::array& k, double mass, std::optional<double> fraction,
                                 double similarity, bool causal, bool sink, TileSize tile) {
  constexpr const char* kFunction = "make_sparge_mask";
  check_share(kFunction, "mass", mass);
  if (fraction) check_share(kFunction, "fraction", *fraction);
  check(!std::isnan(similarity), kFunction, "similarity must be a number; got NaN");
  const Inputs inputs = checked_inputs(kFunction, q, k);
  const TileGrid grid = checked_heads_grid(kFunction, q, k, tile);
  return BlockMask(similarity_mass_tiles(
      inputs.q, inputs.k, grid,
      {.mass = mass, .fraction = fraction, .similarity = similarity, .causal = causal, .sink = sink}));
}

BlockMask antidiagonal_blocks(const mx::array& q, const mx::array& k, double mass, int64_t stride, bool causal,
                              TileSize tile) {
  constexpr const char* kFunction = "make_xattention_mask";
  check_share(kFunction, "threshold", mass);
  const Inputs inputs = checked_inputs(kFunction, q, k);
  const TileGrid grid = checked_heads_grid(kFunction, q, k, tile);
  check(stride >= 1 && tile.q % stride == 0 && tile.k % stride == 0, kFunction, "stride must divide the block size (",
        tile.q, ", ", tile.k, "); got ", stride);
  check(stride * q.shape(3) < int64_t{1} << 31, kFunction, "stride times the head dimension must be below 2^31; got ",
        stride, " times ", q.shape(3));
  return BlockMask(antidiagonal_tiles(inputs.q, inputs.k, grid,
                                      {.stride = static_cast<int32_t>(stride), .mass = mass, .causal = causal}));
}

}  // namespace mfa
