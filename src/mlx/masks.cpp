#include "mfa/masks.h"

#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "common/check.h"
#include "masks/block_pattern.h"
#include "mlx/allocator.h"
#include "mlx/ops.h"
#include "mlx/request.h"

namespace mfa {
namespace {

// An array of the elements of `values`, which `owner` keeps alive; in place where MLX can use host memory.
template <typename T>
mx::array to_array(const std::vector<T>& values, mx::Dtype dtype, const std::shared_ptr<const BlockPattern>& owner) {
  const auto size = static_cast<int64_t>(values.size());
  check(size <= std::numeric_limits<int32_t>::max(), "BlockMask", "expected at most 2^31 - 1 visible tiles; got ", size,
        ": larger blocks are needed");
  if (size == 0) return mx::array(values.begin(), {0}, dtype);
  auto* data = const_cast<T*>(values.data());  // nothing writes to an array that has a second reference
  return mx::array(static_cast<void*>(data), {static_cast<int>(size)}, dtype, [owner](void*) {});
}

// A new bool array, filled by write(bytes).
template <typename Write>
mx::array bool_array(const char* function, const mx::Shape& shape, const Write& write) {
  int64_t size = 1;
  for (const int extent : shape) size *= extent;
  check(size <= int64_t{1} << 32, function, "a dense mask may have at most 2^32 elements; got ", size,
        ": take the mask as lists");
  auto data = mx::allocator::malloc(size);
  if (size > 0 && data.buffer().ptr() == nullptr) throw std::bad_alloc();
  if (size > 0) write(static_cast<uint8_t*>(data.buffer().raw_ptr()));
  return mx::array(std::move(data), shape, mx::bool_);
}

}  // namespace

struct BlockMask::State {
  std::shared_ptr<const BlockPattern> pattern;
  mx::array offsets, key_ids, transposed_offsets, query_ids;
};

BlockMask::BlockMask(BlockPattern pattern) {
  const auto lists = std::make_shared<const BlockPattern>(std::move(pattern));
  state_ = std::make_shared<const State>(
      State{lists, to_array(lists->offsets(), mx::int64, lists), to_array(lists->key_ids(), mx::int32, lists),
            to_array(lists->transposed_offsets(), mx::int64, lists), to_array(lists->query_ids(), mx::int32, lists)});
}

BlockMask BlockMask::from_rule(const BlockRule& rule) { return BlockMask(BlockPattern::from_rule(rule)); }

BlockMask BlockMask::from_dense(const mx::array& mask, int64_t Nq, int64_t Nk, TileSize tile) {
  constexpr const char* kFunction = "BlockMask";
  const TileGrid grid = checked_grid(kFunction, Nq, Nk, tile);
  check(mask.dtype() == mx::bool_, kFunction, "the mask must be bool; got ", mask.dtype());
  check(mask.ndim() >= 2 && mask.ndim() <= 4, kFunction,
        "the mask must be [NQ, NK], [H, NQ, NK] or [B, H, NQ, NK]; got shape ", mask.shape());
  check(mask.shape(-2) == grid.query_blocks() && mask.shape(-1) == grid.key_blocks(), kFunction, "the mask must have ",
        grid.query_blocks(), " by ", grid.key_blocks(), " tiles for ", Nq, " queries and ", Nk, " keys in blocks of (",
        tile.q, ", ", tile.k, "); got shape ", mask.shape());
  const int batch = mask.ndim() == 4 ? mask.shape(0) : 1, heads = mask.ndim() >= 3 ? mask.shape(-3) : 1;
  check(batch >= 1 && heads >= 1, kFunction, "the mask must have at least one batch entry and one head; got shape ",
        mask.shape());
  mx::array values = mask;
  values.eval();
  const auto* data = values.data<bool>();
  const int64_t stride_b = mask.ndim() == 4 ? values.strides(0) : 0;
  const int64_t stride_h = mask.ndim() >= 3 ? values.strides(-3) : 0;
  const int64_t stride_r = values.strides(-2), stride_c = values.strides(-1);
  const int NK = grid.key_blocks();
  return BlockMask(BlockPattern::from_rows(grid, batch, heads, [=](int32_t b, int32_t h, int32_t r, uint8_t* row) {
    const bool* source = data + b * stride_b + h * stride_h + r * stride_r;
    if (stride_c == 1) {
      std::memcpy(row, source, static_cast<size_t>(NK));
    } else {
      for (int c = 0; c < NK; ++c) row[c] = source[c * stride_c];
    }
  }));
}

const TileGrid& BlockMask::grid() const { return state_->pattern->grid(); }
int BlockMask::batch() const { return state_->pattern->batch(); }
int BlockMask::heads() const { return state_->pattern->heads(); }
int64_t BlockMask::count() const { return state_->pattern->count(); }
double BlockMask::density() const { return state_->pattern->density(); }
const BlockPattern& BlockMask::pattern() const { return *state_->pattern; }
const mx::array& BlockMask::offsets() const { return state_->offsets; }
const mx::array& BlockMask::key_ids() const { return state_->key_ids; }
const mx::array& BlockMask::transposed_offsets() const { return state_->transposed_offsets; }
const mx::array& BlockMask::query_ids() const { return state_->query_ids; }

mx::array BlockMask::counts() const {
  const int NQ = grid().query_blocks();
  const std::vector<int64_t>& offsets = pattern().offsets();
  std::vector<int32_t> counts;
  counts.reserve(pattern().lists() * NQ);
  for (int64_t l = 0; l < pattern().lists(); ++l) {
    const int64_t* row = offsets.data() + l * (NQ + int64_t{1});
    for (int r = 0; r < NQ; ++r) counts.push_back(static_cast<int32_t>(row[r + 1] - row[r]));
  }
  return mx::array(counts.begin(), {batch(), heads(), NQ}, mx::int32);
}

mx::array BlockMask::to_dense() const {
  mx::Shape shape = {grid().query_blocks(), grid().key_blocks()};
  if (batch() > 1 || heads() > 1) shape.insert(shape.begin(), heads());
  if (batch() > 1) shape.insert(shape.begin(), batch());
  return bool_array("BlockMask.to_dense", shape, [&](uint8_t* out) { pattern().write_dense(out); });
}

BlockMask BlockMask::refined(TileSize tile) const { return BlockMask(pattern().refined(tile.q, tile.k)); }

mx::array tile_mask(const BlockRule& rule) {
  return bool_array("tile_mask", {rule.grid.query_blocks(), rule.grid.key_blocks()},
                    [&](uint8_t* out) { write_tiles(rule, out); });
}

mx::array token_mask(const BlockRule& rule) {
  return bool_array("token_mask", {rule.grid.Nq, rule.grid.Nk}, [&](uint8_t* out) { write_tokens(rule, out); });
}

}  // namespace mfa
