// score_floor-inl.h: the k-th largest score of each row, from the scores of one block of keys after the other.
//
// Each row has a buffer of the scores that may be among its k largest. When it is full, it shrinks to the k largest,
// and from then on only larger ones enter: exact, with memory for a few times k scores a row.

namespace mfa::cpu::MFA_ISA {
namespace {

// The k-th largest of x[0, n), 1 <= k <= n, by partition around pivots. `x` and `spare` have room for one more than n;
// both are overwritten.
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
    for (int64_t i = 0; i < n; ++i) {  // without a branch: the outcomes cannot be foreseen
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
    for (int k = lo; k < hi; ++k) {
      const float* s = S + k * kWidth;
      for (int r = 0; r < kWidth; ++r) {  // without a branch: which scores enter cannot be foreseen
        rows[r * stride_ + count[r]] = s[r];
        count[r] += s[r] > least[r];
      }
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
    int64_t kept = 0;
    for (int64_t i = 0; i < count_[r]; ++i) {
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
