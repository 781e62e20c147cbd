// score_floor-inl.h: the k-th largest score of each row, from the scores of one block of keys after the other.
//
// Each row has a buffer of the scores that may be among its k largest. When it is full, it shrinks to the k largest,
// and from then on only larger ones enter: exact, with memory for a few times k scores a row.

namespace mfa::cpu::MFA_ISA {
namespace {

// For each mask of eight lanes the numbers of those that it names, four bits each.
struct NamedLanes {
  uint32_t packed[256] = {};
  constexpr NamedLanes() {
    for (uint32_t mask = 0; mask < 256; ++mask)
      for (uint32_t lane = 0, named = 0; lane < 8; ++lane)
        if (mask >> lane & 1) packed[mask] |= lane << (4 * named++);
  }
};
inline constexpr NamedLanes kNamedLanes;

// Stores the lanes of `v` that `mask` names one after another, and returns how many: a whole vector is written, as a
// store of part of one is slow on many processors. Eight lanes have a table here, as Highway 1.0 copies its own in each
// call.
HWY_INLINE int64_t StoreCompressed(VF v, MF mask, float* to) {
  if constexpr (kLanes == 8) {
    uint8_t bits[8];
    hn::StoreMaskBits(df, mask, bits);
    const VU lanes = hn::Shr(hn::Set(du, kNamedLanes.packed[bits[0]]), hn::Mul(hn::Iota(du, 0), hn::Set(du, 4u)));
    hn::StoreU(hn::TableLookupLanes(v, hn::IndicesFromVec(df, hn::And(lanes, hn::Set(du, 7u)))), df, to);
    return __builtin_popcount(bits[0]);
  } else {
    hn::StoreU(hn::Compress(v, mask), df, to);
    return static_cast<int64_t>(hn::CountTrue(df, mask));
  }
}

// The k-th largest of x[0, n), 1 <= k <= n, by partition around pivots. `x` and `spare` have room for a vector more
// than n; both are overwritten.
HWY_NOINLINE float KthLargest(float* x, int64_t n, int64_t k, float* spare) {
  constexpr int64_t kFew = 16;
  for (;;) {
    if (n <= kFew) {
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = i + 1; j < n; ++j)
          if (x[j] > x[i]) {
            const float larger = x[j];
            x[j] = x[i];
            x[i] = larger;
          }
      return x[k - 1];
    }
    const float a = x[n / 4], b = x[n / 2], c = x[n - 1 - n / 8];
    const float pivot = Max(Min(a, b), Min(Max(a, b), c));
    int64_t greater = 0, less = 0;
    const VF around = hn::Set(df, pivot);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const VF v = hn::LoadU(df, x + i);
      greater += StoreCompressed(v, hn::Gt(v, around), spare + greater);
      less += StoreCompressed(v, hn::Lt(v, around), x + less);
    }
    for (; i < n; ++i) {  // without a branch: the outcomes cannot be foreseen
      const float v = x[i];
      spare[greater] = v;
      greater += v > pivot;
      x[less] = v;
      less += v < pivot;
    }
    if (k <= greater) {
      float* other = x;
      x = spare;
      spare = other;
      n = greater;
    } else if (k <= n - less) {
      return pivot;
    } else {
      k -= n - less;
      n = less;
    }
  }
}

class ScoreSelector {
 public:
  static int64_t Capacity(int64_t keep) { return Max(2 * keep, keep + 1024) + kKeyBlock; }
  static size_t Floats(int64_t keep, int rows) {
    return static_cast<size_t>((Capacity(keep) + kLanes) * (int64_t{rows} + 2));
  }

  // Buffers at `memory`, Floats(keep, rows) of them.
  void Begin(float* memory, int64_t keep, int rows) {
    keep_ = keep;
    stride_ = Capacity(keep) + kLanes;
    work_ = memory;
    buffers_ = memory + 2 * stride_;
    for (int r = 0; r < rows; ++r) {
      count_[r] = 0;
      least_[r] = -kInf;
    }
  }

  // Takes S[k * width + r], entries [lo, hi) of rows r0 + r: those that are hidden are -inf.
  template <int NR>
  HWY_NOINLINE void Add(const float* S, int r0, int lo, int hi) {
    constexpr int kWidth = NR * kLanes;
    int64_t count[kWidth];
    float least[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      if (count_[r0 + r] + kKeyBlock > stride_ - kLanes) Shrink(r0 + r);
      count[r] = count_[r0 + r];
      least[r] = least_[r0 + r];
    }
    float* const rows = buffers_ + r0 * stride_;
    int k = lo;
    for (; k + kLanes <= hi; k += kLanes)
      for (int r = 0; r < kWidth; r += kLanes) {
        VF v[kLanes];
        MFA_UNROLL
        for (int i = 0; i < kLanes; ++i) v[i] = hn::LoadU(df, S + (k + i) * kWidth + r);
        Transpose(v);
        MFA_UNROLL
        for (int j = 0; j < kLanes; ++j)
          count[r + j] +=
              StoreCompressed(v[j], hn::Gt(v[j], hn::Set(df, least[r + j])), rows + (r + j) * stride_ + count[r + j]);
      }
    for (; k < hi; ++k)
      for (int r = 0; r < kWidth; ++r) {
        rows[r * stride_ + count[r]] = S[k * kWidth + r];
        count[r] += S[k * kWidth + r] > least[r];
      }
    for (int r = 0; r < kWidth; ++r) count_[r0 + r] = count[r];
  }

  // The floor of row r: -inf if fewer than `keep` of its scores are visible.
  float Floor(int r) {
    if (count_[r] < keep_) return -kInf;
    return Select(r);
  }

 private:
  float Select(int r) {
    __builtin_memcpy(work_, buffers_ + r * stride_, static_cast<size_t>(count_[r]) * sizeof(float));
    return KthLargest(work_, count_[r], keep_, work_ + stride_);
  }

  void Shrink(int r) {
    const float floor = Select(r);
    float* x = buffers_ + r * stride_;
    int64_t kept = 0, i = 0;
    for (; i + kLanes <= count_[r]; i += kLanes) {
      const VF v = hn::LoadU(df, x + i);
      kept += StoreCompressed(v, hn::Gt(v, hn::Set(df, floor)), x + kept);
    }
    for (; i < count_[r]; ++i) {
      const float v = x[i];
      x[kept] = v;
      kept += v > floor;
    }
    while (kept < keep_) x[kept++] = floor;
    count_[r] = kept;
    least_[r] = floor;
  }

  int64_t keep_ = 0, stride_ = 0;
  float *work_ = nullptr, *buffers_ = nullptr;
  int64_t count_[kMaxRowTile];
  float least_[kMaxRowTile];  // scores up to here do not enter
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
