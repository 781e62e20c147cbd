// backward_operands-inl.h: keys, values and rows as the products of the backward read them: float32, or bfloat16 as it
// lies where pairs of it are multiplied.

namespace mfa::cpu::MFA_ISA {
namespace {

// Calls f with a null pointer of the element type of a problem whose products have elements A.
template <class A, class F>
HWY_INLINE auto WithElement(DType dtype, const F& f) {
  if constexpr (kPack<A> == 2) {
    return f(static_cast<bfloat16*>(nullptr));
  } else {
    return WithType(dtype, f);
  }
}

template <class T>
HWY_INLINE void LoadRow(const T* in, int n, float* out) {
  WidenRow(in, n, out);
}
HWY_INLINE void LoadRow(const bfloat16* in, int n, bfloat16* out) {
  __builtin_memcpy(out, in, static_cast<size_t>(n) * sizeof(bfloat16));
}

// The keys of a block, and of those the entries that a tile sees.
template <class A>
class BackwardKeys {
 public:
  // `panels`: the tiles need panels of the keys.
  BackwardKeys(const AttentionProblem& p, bool panels, const BackwardScratch<A>& x)
      : p_(p), panels_(panels), d_padded_(RoundUp(p.D, kLanes)), dv_padded_(RoundUp(p.Dv, kLanes)), x_(x) {}

  const A *k = nullptr, *v = nullptr;  // rows of the selected entries
  ptrdiff_t k_stride = 0, v_stride = 0;

  // The keys [k0, k0 + keys), all of which the sequence has.
  void Load(int b, int kv_head, int64_t k0, int keys) {
    keys_ = keys;
    nonfinite_ = -1;
    packed_block_ = false;
    WithElement<A>(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      const StridedRows<T> rows{keys > 0 ? KeyRow<T>(p_, p_.k, b, kv_head, k0) : nullptr, p_.k.stride[2]};
      const StridedRows<T> values{keys > 0 ? KeyRow<T>(p_, p_.v, b, kv_head, k0) : nullptr, p_.v.stride[2]};
      const T* table[kBackwardKeys];
      if (GathersRows(p_)) {
        KeyList list;
        for (int i = 0; i < keys; ++i) list.key[i] = static_cast<int32_t>(k0) + i;
        KeyRows(p_, p_.v, b, kv_head, list, 0, keys, table);
        for (int i = 0; i < keys; ++i) LoadRow(table[i], p_.Dv, x_.v + i * dv_padded_);
        block_v_ = x_.v;
        block_v_stride_ = dv_padded_;
        KeyRows(p_, p_.k, b, kv_head, list, 0, keys, table);
      } else {
        block_v_ = InPlace(values, keys, p_.Dv, x_.v, block_v_stride_);
        if (!RotatesKeys(p_)) {
          block_k_ = InPlace(rows, keys, p_.D, x_.k, block_k_stride_);
          return;
        }
        for (int i = 0; i < keys; ++i) table[i] = rows.At(i);
      }
      for (int i = 0; i < keys; ++i) {
        LoadRow(table[i], p_.D, x_.k + i * d_padded_);
        if constexpr (kPack<A> == 1)
          if (RotatesKeys(p_)) RotateKey(p_, b, k0 + i, x_.k + i * d_padded_);
      }
      block_k_ = x_.k;
      block_k_stride_ = d_padded_;
    });
  }

  // Selects the entries of x.block: of a run the block's own rows and panels, of a list copies.
  void Select() {
    const TileBlock& block = x_.block;
    if (!block.listed) {
      k = block_k_;
      v = block_v_;
      k_stride = block_k_stride_;
      v_stride = block_v_stride_;
      if (panels_ && !packed_block_) {
        Pack(0, keys_);
        packed_block_ = true;
      }
      return;
    }
    for (int c = block.all.lo; c < block.all.hi; ++c) {
      const bool padding = block.list.has_padding && block.list.padding[c];  // its key may not exist
      const int64_t key = block.list.key[c] - block.k0;
      LoadRow(padding ? ZeroRow<A>() : block_k_ + key * block_k_stride_, p_.D, x_.listed_k + c * d_padded_);
      LoadRow(padding ? ZeroRow<A>() : block_v_ + key * block_v_stride_, p_.Dv, x_.listed_v + c * dv_padded_);
    }
    k = x_.listed_k;
    v = x_.listed_v;
    k_stride = d_padded_;
    v_stride = dv_padded_;
    if (!panels_) return;
    Pack(block.all.lo, block.all.hi);
    packed_block_ = false;
  }

  // Whether a key of the block is not finite.
  bool AnyNonFiniteKey() {
    if (nonfinite_ < 0) nonfinite_ = AnyNonFinite(block_k_, block_k_stride_, keys_, p_.D);
    return nonfinite_ > 0;
  }

 private:
  template <class T>
  static HWY_INLINE const A* InPlace(const StridedRows<T>& rows, int count, int width, A* scratch, ptrdiff_t& stride) {
    if constexpr (kPack<A> == 2) {
      stride = rows.step;
      return rows.first;
    } else {
      return WidenBlock<T>(rows, 0, count, width, scratch, &stride);
    }
  }

  void Pack(int lo, int hi) {
    const StridedRows<A> rows{k, k_stride};
    if constexpr (kPack<A> == 2) {
      PackPairPanels(rows, lo & ~1, RoundUp(hi, 2), lo, hi, p_.D, kKeyPanel, x_.k_panels);
    } else {
      PackPanels<A>(rows, lo, hi, p_.D, kKeyPanel, x_.k_panels);
    }
  }

  const AttentionProblem& p_;
  const bool panels_;
  const ptrdiff_t d_padded_, dv_padded_;
  const BackwardScratch<A>& x_;
  int keys_ = 0, nonfinite_ = -1;
  const A *block_k_ = nullptr, *block_v_ = nullptr;
  ptrdiff_t block_k_stride_ = 0, block_v_stride_ = 0;
  bool packed_block_ = false;  // the panels are the block's
};

// Packs `width` rows of q or dO, [D] each: with steps along the channels times `factor` into `transposed`, and with
// steps along the rows into `rows`, `stride` lanes apart. Row r is load(r, out) for float; for bfloat16 load(r) says
// where it lies, and `factor` is not applied.
template <class Load>
void PackRows(const Load& load, int width, int D, float factor, float* transposed, float* rows, int stride) {
  for (int g0 = 0; g0 < width; g0 += kGroupRows) {
    const int group = Min(kGroupRows, width - g0);
    for (int r = 0; r < group; r += kLanes) {
      const float* from[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        load(g0 + r + i, rows + (g0 + r + i) * stride);
        from[i] = rows + (g0 + r + i) * stride;
      }
      PackTransposed(from, D, factor, transposed + static_cast<ptrdiff_t>(g0) * D + r, group);
    }
  }
}
template <class Load>
void PackRows(const Load& load, int width, int D, float, uint32_t* transposed, uint32_t* rows, int stride) {
  for (int g0 = 0; g0 < width; g0 += kGroupRows) {
    const int group = Min(kGroupRows, width - g0);
    for (int r = 0; r < group; r += kLanes) {
      const bfloat16* from[kLanes];
      for (int i = 0; i < kLanes; ++i) from[i] = load(g0 + r + i);
      PackTransposedPairs(from, D / 2, transposed + static_cast<ptrdiff_t>(g0) * (D / 2) + r, group);
      for (int i = 0; i < kLanes; i += 2) {
        uint32_t* to = rows + (g0 + r + i) / 2 * stride;
        int d = 0;
        for (; d + kLanes <= D; d += kLanes) hn::Store(LoadPairs(du, from[i] + d, from[i + 1] + d), du, to + d);
        for (int end = RoundUp(D, kLanes); d < end; ++d)
          to[d] = d < D ? from[i][d].bits | static_cast<uint32_t>(from[i + 1][d].bits) << 16 : 0;
      }
    }
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
