// block_reader-inl.h: walks the blocks of keys that the rows of a tile see and brings each to where the tiles read it,
// and says which rows come next.

namespace mfa::cpu::MFA_ISA {
namespace {

class BlockReader {
 public:
  // Scratch of the reader: Floats() for keys that are not read in place, panels of values.
  BlockReader(const ForwardJob& job, float* k, float* v)
      : job_(job), p_(*job.problem), pairs_(kNativeBf16 && job.plan.native_bf16), finder_(p_, pairs_), k_(k), v_(v) {}

  static size_t KeyFloats(const AttentionProblem& p) {
    const bool copies = p.dtype != DType::f32 || RotatesKeys(p);
    return static_cast<size_t>(copies ? kKeyBlock : kMostTileRows) * RoundUp(p.D, kLanes);
  }

  // Goes to the first of the blocks [first, last) that some of the `width` lanes of the tile sees.
  void Begin(const RowTile& tile, int width, int first, int last) {
    tile_ = &tile;
    width_ = width;
    last_ = last;
    keys_ = key_count(p_, tile.b);
    finder_.Select(tile);
    index_ = Seek(first, *at_);
    first_ = index_;
  }
  // Replaces the values that lie in place by panels.
  void PackValues(KeyBlock& block) {
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      LoadValues<T>(StridedRows<T>{static_cast<const T*>(block.v_rows), block.v_step}, block);
    });
    block.v_rows = nullptr;
  }
  int index() const { return index_; }  // of the block that is read; that of the end after the last
  const TileBlock& block() const { return at_->block; }
  bool at_last() const { return after_ >= last_; }  // once the block is loaded

  // Brings the block in. Adds to `upcoming` the rows of the block after it.
  KeyBlock Load(UpcomingRows& upcoming) {
    KeyBlock block{};
    block.index = index_;
    after_ = Seek(index_ + 1, *other_);
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      LoadBlock<T>(block);
      if (after_ < last_) AddBlock<T>(*other_, upcoming);
    });
    return block;
  }
  // Adds the first keys of another tile, of its row (query, head), if they are in order.
  void AddFirstKeys(const TileMap::Place& place, int32_t query, int32_t head, UpcomingRows& upcoming) const {
    if (GathersRows(p_) || p_.neighbourhood.axes > 0) return;
    int64_t first = 0, count = kKeyBlock;
    if (const BlockListRef& lists = p_.blocks; lists.offsets) {
      const int64_t row = (place.b * lists.stride_b + head * lists.stride_h) * (lists.query_blocks + 1);
      const int64_t* list = lists.offsets + row + query / lists.block_q;
      if (list[0] == list[1]) return;
      first = int64_t{lists.key_ids[list[0]]} * lists.block_k;
      count = Min<int64_t>(lists.block_k, kKeyBlock);
    }
    count = Min(count, key_count(p_, place.b) - first);
    if (count <= 0) return;
    WithType(p_.dtype, [&]<class T>(T*)
                           HWY_ATTR { AddRun<T>(place.b, place.kv_head, first, static_cast<int>(count), upcoming); });
  }
  // Goes to the next block.
  void Advance() {
    index_ = after_;
    BlockRows* done = at_;
    at_ = other_;
    other_ = done;
  }

  // The keys of entries k .. k + MR - 1 of a block for one tile.
  template <int MR>
  HWY_INLINE StridedRows<float> Keys(const KeyBlock& block, int k) const {
    if (!block.k_rows) return {block.k + k * block.k_stride, block.k_stride};
    return EvenRows<MR>(block.k_rows + k, block.k_stride);
  }
  template <int MR>
  HWY_INLINE StridedRows<bfloat16> KeyPairs(const KeyBlock& block, int k) const {
    if (!block.k16_rows) return {block.k16 + k * block.k16_stride, block.k16_stride};
    return EvenRows<MR>(block.k16_rows + k, block.k16_stride);
  }

 private:
  // The first block from `index` on, before the last, that some row sees, in `out`; the end if there is none.
  int Seek(int index, BlockRows& out) {
    for (; index < last_; ++index) {
      const int64_t k0 = int64_t{index} * kKeyBlock;
      finder_.Find(*tile_, width_, k0, static_cast<int>(Min<int64_t>(kKeyBlock, keys_ - k0)), out.block);
      if (out.block.all.empty()) continue;
      if (out.block.listed || GathersRows(p_)) {
        WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
          const TileBlock& at = out.block;
          KeyRows(p_, p_.k, tile_->b, tile_->kv_head, at.list, at.all.lo, at.all.hi,
                  reinterpret_cast<const T**>(out.k));
          KeyRows(p_, p_.v, tile_->b, tile_->kv_head, at.list, at.all.lo, at.all.hi,
                  reinterpret_cast<const T**>(out.v));
        });
      }
      break;
    }
    return index;
  }

  // MR rows that mostly lie `step` apart: where they lie, or copied.
  template <int MR, class A>
  HWY_INLINE StridedRows<A> EvenRows(const A* const* rows, ptrdiff_t step) const {
    static_assert(MR <= kMostTileRows);
    bool even = true;
    for (int r = 1; r < MR; ++r) even = even && rows[r] == rows[0] + r * step;
    if (HWY_LIKELY(even)) return {rows[0], step};
    const ptrdiff_t padded = RoundUp(p_.D, kLanes);
    A* copies = reinterpret_cast<A*>(k_);
    for (int r = 0; r < MR; ++r) __builtin_memcpy(copies + r * padded, rows[r], static_cast<size_t>(p_.D) * sizeof(A));
    return {copies, padded};
  }

  template <class T>
  void AddBlock(const BlockRows& rows, UpcomingRows& upcoming) const {
    const TileBlock& at = rows.block;
    if (!at.listed && !GathersRows(p_))
      return AddRun<T>(tile_->b, tile_->kv_head, at.k0 + at.all.lo, at.all.hi - at.all.lo, upcoming);
    for (int c = at.all.lo; c < at.all.hi; ++c) upcoming.Add(rows.k[c], 1, 0, static_cast<size_t>(p_.D) * sizeof(T));
    if (job_.floors) return;
    for (int c = at.all.lo; c < at.all.hi; ++c) upcoming.Add(rows.v[c], 1, 0, static_cast<size_t>(p_.Dv) * sizeof(T));
  }
  template <class T>
  void AddRun(int b, int kv_head, int64_t key, int count, UpcomingRows& upcoming) const {
    const auto add = [&](const TensorRef& x, int width) {
      constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));
      upcoming.Add(KeyRow<T>(p_, x, b, kv_head, key), count, x.stride[2] * kSize, static_cast<size_t>(width * kSize));
    };
    add(p_.k, p_.D);
    if (!job_.floors) add(p_.v, p_.Dv);
  }

  template <class T>
  void LoadBlock(KeyBlock& block) {
    const TileBlock& at = at_->block;
    const int b = tile_->b, h = tile_->kv_head;
    if (at.listed || GathersRows(p_)) {
      LoadValues<T>(RowTable<T>{reinterpret_cast<const T* const*>(at_->v)}, block);
      return LoadKeys(reinterpret_cast<const T* const*>(at_->k), block);
    }
    const StridedRows<T> v{KeyRow<T>(p_, p_.v, b, h, at.k0), p_.v.stride[2]};
    if (ReadsValuesInPlace()) {
      block.v_rows = v.first;
      block.v_step = v.step;
    } else {
      LoadValues<T>(v, block);
    }
    const StridedRows<T> k{KeyRow<T>(p_, p_.k, b, h, at.k0), p_.k.stride[2]};
    if (RotatesKeys(p_)) {
      const T* rows[kKeyBlock];
      for (int c = at.all.lo; c < at.all.hi; ++c) rows[c] = k.At(c);
      return LoadKeys(rows, block);
    }
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (pairs_) {
        block.k16 = k.first;
        block.k16_stride = k.step;
        return;
      }
    }
    block.k = WidenBlock<T>(k, at.all.lo, at.all.hi, p_.D, k_, &block.k_stride);
  }

  // Whether one column group sees this block alone: OutputRows() takes the values as they are.
  bool ReadsValuesInPlace() const {
    return width_ <= kGroupRows && index_ == first_ && at_last() && job_.plan.key_splits == 1 && !job_.floors &&
           !pairs_ && p_.Dv % kLanes == 0;
  }

  template <class T, class Rows>
  void LoadValues(const Rows& rows, KeyBlock& block) {
    const int lo = at_->block.all.lo, hi = at_->block.all.hi;
    if (job_.floors) {  // only the scores count: values are not read, and none is NaN
      block.v = v_;
      return;
    }
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (pairs_) {
        bfloat16* panels = reinterpret_cast<bfloat16*>(v_);
        PackPairPanels(rows, lo & ~1, RoundUp(hi, 2), lo, hi, p_.Dv, kValuePanel, panels);
        block.v16 = panels;
        return;
      }
    }
    PackPanels<T>(rows, lo, hi, p_.Dv, kValuePanel, v_);
    block.v = v_;
  }

  // Keys that are found one by one: float32 stays where it lies, unless it is rotated.
  template <class T>
  void LoadKeys(const T* const* rows, KeyBlock& block) {
    const TileBlock& at = at_->block;
    const ptrdiff_t stride = RoundUp(p_.D, kLanes);
    if constexpr (std::is_same_v<T, float>) {
      if (!RotatesKeys(p_)) {
        block.k_rows = rows;
        block.k_stride = p_.k.stride[2];
        return;
      }
    }
    if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>) {
      if (pairs_) {
        block.k16_rows = rows;
        block.k16_stride = p_.k.stride[2];
        return;
      }
    }
    GatherKeys(p_, tile_->b, at.list, rows, at.all.lo, at.all.hi, k_, stride);
    block.k = k_;
    block.k_stride = stride;
  }

  const ForwardJob& job_;
  const AttentionProblem& p_;
  const bool pairs_;
  BlockFinder finder_;
  float *k_, *v_;
  const RowTile* tile_ = nullptr;
  int width_ = 0, first_ = 0, index_ = 0, after_ = 0, last_ = 0, keys_ = 0;
  BlockRows blocks_[2];  // the one that is read and the next
  BlockRows *at_ = &blocks_[0], *other_ = &blocks_[1];
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
