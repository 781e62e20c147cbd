// weights-inl.h: dense weights as the matrix products read them: for a few vectors of columns, the terms w[k][n] in the
// order of k, widened to float32 or, where the processor multiplies them, as pairs of bfloat16.
//
//   Load<G>(n0, g0, k0, k1, ahead, f): f(g, k, w) with lane i of w = w[k][n0 + g * kLanes + i], g0 <= g < g0 + G, for
//   each k in [k0, k1) in order. With pairs k is even and lane i holds (w[k], w[k + 1]); past an odd K the second is
//   zero.
//
// Lanes at and past column N repeat what is there or hold zero; nothing outside the matrix is read.
//
// Next(n, k0, k1): where the terms of the panel from column n on lie, as far as it pays to ask for them before Load().
// Element is that of panels packed ahead; kPacks: whether there are such.
//
// A step is a term, or a pair. kUnit neighbouring steps belong to one chain (linear/problem.h).

namespace mfa::cpu::MFA_ISA {
namespace {

// What a step of a product multiplies: a float32, or a pair of bfloat16.
template <bool kPairs>
struct Terms {
  using Vector = VF;
  using Stored = float;  // element of a packed panel
  using X = float;       // element of a packed row of x
  static constexpr int kStep = 1;
  static HWY_INLINE VF Zero() { return hn::Zero(df); }
};
template <>
struct Terms<true> {
  using Vector = VU;
  using Stored = uint32_t;
  using X = bfloat16;
  static constexpr int kStep = 2;
  static HWY_INLINE VU Zero() { return hn::Zero(du); }
};
// Step `s` of a block, as chain and step of the chain.
template <int kUnit>
constexpr int ChainOf(int s) {
  return s / kUnit % kChains;
}
template <int kUnit>
constexpr int StepOfChain(int s) {
  return s / (kChains * kUnit) * kUnit + s % kUnit;
}

// Vectors of chains: those of one column in each 128-bit block, of `kSides` columns.
using DC = hn::CappedTag<float, 4 * kChains>;
using DCU = hn::RebindToUnsigned<DC>;
using VC = hn::Vec<DC>;
constexpr DC dc;
constexpr DCU dcu;
constexpr int kSides = static_cast<int>(hn::MaxLanes(DC())) / kChains;

// Block s is f(a tag of one block, first + s).
template <class D, class F>
HWY_INLINE hn::Vec<D> FromSides(D d, const F& f, int first = 0) {
  constexpr int kHere = static_cast<int>(hn::MaxLanes(D())) / kChains;
  if constexpr (kHere == 1) {
    return f(d, first);
  } else {
    const hn::Half<D> half;
    return hn::Combine(d, FromSides(half, f, first + kHere / 2), FromSides(half, f, first));
  }
}
// Block s is loaded from in[s].
template <class D, class T>
HWY_INLINE hn::Vec<D> LoadSides(D d, const T* const (&in)[kSides]) {
  return FromSides(d, [&](auto block, int s) MFA_INLINE_LAMBDA {
    if constexpr (std::is_same_v<hn::TFromD<D>, T>) {
      return hn::LoadU(block, in[s]);
    } else {
      return LoadFloat(block, in[s]);
    }
  });
}

HWY_INLINE void StoreStep(VF w, float* p) { hn::Store(w, df, p); }
HWY_INLINE void StoreStep(VU w, uint32_t* p) { hn::Store(w, du, p); }

constexpr ptrdiff_t kCacheLine = 64;
// Bytes before they are needed that the streams of few rows are asked for: the processor's own prefetchers stop at
// pages of 4 KB.
constexpr ptrdiff_t kStreamAhead = 1024;

// What is read next: pieces of `piece` bytes, `pitch` bytes apart.
struct Upcoming {
  const void* first;
  ptrdiff_t piece, pitch, pieces;
  HWY_INLINE ptrdiff_t bytes() const { return piece * pieces; }
  HWY_INLINE const char* At(ptrdiff_t i) const {
    return static_cast<const char*>(first) + i / piece * pitch + i % piece;
  }
};

// Weights that will be read soon, asked for in the order of memory, as many lines at a time as are read: memory is
// fastest so, and the processor's own prefetchers do not follow many rows at once. They go to the second cache, as the
// first is full of what is needed now.
class Prefetch {
 public:
  // Nothing, or from `p` on.
  explicit Prefetch(const void* p = nullptr) : p_(static_cast<const char*>(p)) {}
  template <int kLines>
  HWY_INLINE void Lines() {
    if (!p_) return;
    MFA_UNROLL
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(p_ + i * kCacheLine, 0, 2);
    p_ += kLines * kCacheLine;
  }

 private:
  const char* p_;
};

// Transposed weights: a column of w is a dense stored row. kLanes rows are transposed in registers.
template <class T, bool kPairs>
class ColumnWeights {
 public:
  using Element = std::conditional_t<kPairs, uint32_t, T>;
  static constexpr bool kPacks = true;
  static constexpr bool kByRows = false;
  static constexpr bool kDirect = true;
  static constexpr bool kHalves = std::is_same_v<T, bfloat16>;  // two terms in 32 bits
  static constexpr int kUnit = kHalves && !kPairs ? 2 : 1;
  static constexpr bool kSpread = true;
  static constexpr int kChunk = kHalves ? 2 * kLanes : kLanes;

  explicit ColumnWeights(const MatmulProblem& p)
      : data_(static_cast<const T*>(p.w.data)), stride_(p.w.stride), N_(p.N) {}

  // kSides columns as few rows read them. Words(columns, k, f) calls f(v, 0, j, w) for each of columns[v] and j <
  // kUnit, block s of w being step j of the words of all chains of column s from term k on. LastWords does where terms
  // from k1 on are zero. Lines(columns, k, f) reads kSides such words of each column at once, i being which: f(v, i, j,
  // w).
  struct Columns {
    const T* side[kSides];
  };
  HWY_INLINE void BeginColumn(Columns& columns, int side, int n) const { columns.side[side] = data_ + n * stride_; }
  HWY_INLINE void BeginBlock(Columns&, int) const {}
  template <int V, class F>
  HWY_INLINE void Lines(const Columns (&columns)[V], int k, const F& f) const {
    constexpr int kAhead = static_cast<int>(kStreamAhead / sizeof(T));
    MFA_UNROLL
    for (int v = 0; v < V; ++v) {
      VC words[kSides];
      MFA_UNROLL
      for (int s = 0; s < kSides; ++s) {
        const T* at = columns[v].side[s] + k;
        if constexpr (kSides > 1) __builtin_prefetch(at + kAhead, 0, 3);  // with one, once a quarter of a line
        if constexpr (kHalves) {
          words[s] = hn::BitCast(dc, hn::LoadU(dcu, reinterpret_cast<const uint32_t*>(at)));
        } else {
          words[s] = LoadFloat(dc, at);
        }
      }
      TransposeSquare(dc, words);
      MFA_UNROLL
      for (int i = 0; i < kSides; ++i) Steps(words[i], v, i, f);
    }
  }
  template <int V, class F>
  HWY_INLINE void Words(const Columns (&columns)[V], int k, const F& f) const {
    MFA_UNROLL
    for (int v = 0; v < V; ++v) {
      const T* at[kSides];
      MFA_UNROLL
      for (int s = 0; s < kSides; ++s) at[s] = columns[v].side[s] + k;
      Steps(LoadWords(at), v, 0, f);
    }
  }
  template <int V, class F>
  HWY_INLINE void LastWords(const Columns (&columns)[V], int k, int k1, const F& f) const {
    constexpr int kTerms = kChains * (kHalves ? 2 : 1);
    MFA_UNROLL
    for (int v = 0; v < V; ++v) {
      HWY_ALIGN T words[kSides][kTerms] = {};
      const T* at[kSides];
      for (int s = 0; s < kSides; ++s) {
        for (int i = 0; i < Min(kTerms, k1 - k); ++i) words[s][i] = columns[v].side[s][k + i];
        at[s] = words[s];
      }
      Steps(LoadWords(at), v, 0, f);
    }
  }

  // Where the first of the columns from n on begins.
  const void* Begin(int n) const { return data_ + n * stride_; }
  HWY_INLINE Upcoming Next(int n, int k0, int k1) const {
    constexpr auto kSize = static_cast<ptrdiff_t>(sizeof(T));
    return {data_ + Min(n, N_ - 1) * stride_ + k0, (k1 - k0) * kSize, stride_ * kSize, kTileVectors * kLanes};
  }
  HWY_INLINE void Prepare(int, int, int, int) {}

  template <int G, class F>
  HWY_INLINE void Load(int n0, int g0, int k0, int k1, Prefetch&, const F& f) const {
    n0 += g0 * kLanes;
    if (n0 + G * kLanes <= N_) {
      const T* base = data_ + n0 * stride_;
      return Walk<G>([&](int g, int lane) MFA_INLINE_LAMBDA { return base + (g * kLanes + lane) * stride_; }, g0, k0,
                     k1, f);
    }
    Walk<G>([&](int g, int lane) MFA_INLINE_LAMBDA { return data_ + Min(n0 + g * kLanes + lane, N_ - 1) * stride_; },
            g0, k0, k1, f);
  }

 private:
  static HWY_INLINE VC LoadWords(const T* const (&at)[kSides]) {
    if constexpr (kHalves) {
      const uint32_t* words[kSides];
      for (int s = 0; s < kSides; ++s) words[s] = reinterpret_cast<const uint32_t*>(at[s]);
      return hn::BitCast(dc, LoadSides(dcu, words));
    } else {
      return LoadSides(dc, at);
    }
  }
  template <class F>
  static HWY_INLINE void Steps(VC words, int v, int i, const F& f) {
    const auto bits = hn::BitCast(dcu, words);
    if constexpr (kPairs) {
      f(v, i, 0, bits);
    } else if constexpr (kHalves) {
      f(v, i, 0, hn::BitCast(dc, hn::ShiftLeft<16>(bits)));
      f(v, i, 1, hn::BitCast(dc, hn::And(bits, hn::Set(dcu, 0xffff0000u))));
    } else {
      f(v, i, 0, words);
    }
  }

  template <int G, class Row, class F>
  HWY_INLINE void Walk(const Row& row, int g0, int k0, int k1, const F& f) const {
    // A whole cache line of each row at a time: rows a power of two apart compete for a few sets and do not stay.
    constexpr int kLine = Max(kChunk, static_cast<int>(kCacheLine / sizeof(T)));
    int k = k0;
    for (; k + kLine <= k1; k += kLine) {
      MFA_UNROLL
      for (int g = 0; g < G; ++g) {
        // The same terms of the next vector of columns: rows are too many and too short for the processor's own
        // prefetchers. Past the last column nothing is read.
        MFA_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) __builtin_prefetch(row(g, lane) + kLanes * stride_ + k, 0, 2);
        MFA_NO_UNROLL
        for (int i = 0; i < kLine; i += kChunk) {
          VF v[kLanes];
          MFA_UNROLL
          for (int lane = 0; lane < kLanes; ++lane) v[lane] = Raw(row(g, lane) + k + i);
          Emit(g0 + g, k + i, kChunk, v, f);
        }
      }
    }
    for (; k < k1; k += kChunk) {
      for (int g = 0; g < G; ++g) {
        T tail[kLanes][kChunk] = {};
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < Min(kChunk, k1 - k); ++i) tail[lane][i] = row(g, lane)[k + i];
        VF v[kLanes];
        MFA_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) v[lane] = Raw(tail[lane]);
        Emit(g0 + g, k, Min(kChunk, k1 - k), v, f);
      }
    }
  }

  static HWY_INLINE VF Raw(const T* p) {
    if constexpr (kHalves) {
      return hn::BitCast(df, hn::LoadU(du, reinterpret_cast<const uint32_t*>(p)));
    } else {
      return LoadFloat(p);
    }
  }

  template <class F>
  HWY_INLINE void Emit(int g, int k, int count, VF (&v)[kLanes], const F& f) const {
    Transpose(v);
    MFA_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if constexpr (kPairs) {
        if (2 * i < count) f(g, k + 2 * i, hn::BitCast(du, v[i]));
      } else if constexpr (kHalves) {
        const VU bits = hn::BitCast(du, v[i]);
        if (2 * i < count) f(g, k + 2 * i, hn::BitCast(df, hn::ShiftLeft<16>(bits)));
        if (2 * i + 1 < count) f(g, k + 2 * i + 1, hn::BitCast(df, hn::And(bits, hn::Set(du, 0xffff0000u))));
      } else {
        if (i < count) f(g, k + i, v[i]);
      }
    }
  }

  const T* data_;
  ptrdiff_t stride_;
  int N_;
};

// Weights stored as they are: a row of w is dense.
template <class T, bool kPairs>
class RowWeights {
 public:
  using Element = std::conditional_t<kPairs, uint32_t, T>;
  static constexpr bool kPacks = true;
  static constexpr bool kByRows = true;
  static constexpr bool kDirect = true;
  static constexpr int kUnit = std::is_same_v<T, bfloat16> && !kPairs ? 2 : 1;

  explicit RowWeights(const MatmulProblem& p)
      : data_(static_cast<const T*>(p.w.data)), stride_(p.w.stride), N_(p.N), K_(p.K) {}

  HWY_INLINE Upcoming Next(int, int, int) const { return {data_, 1, 1, 0}; }
  HWY_INLINE void Prepare(int, int, int, int) {}

  template <int G, class F>
  HWY_INLINE void Load(int n0, int g0, int k0, int k1, Prefetch&, const F& f) const {
    n0 += g0 * kLanes;
    constexpr int kStep = Terms<kPairs>::kStep;
    if (n0 + G * kLanes <= N_) {
      for (int k = k0; k < k1; k += kStep) {
        const T* row = data_ + k * stride_ + n0;
        const T* next = k + 1 < K_ ? row + stride_ : nullptr;
        MFA_UNROLL
        for (int g = 0; g < G; ++g) f(g0 + g, k, Widen(row + g * kLanes, next ? next + g * kLanes : nullptr));
      }
      return;
    }
    for (int k = k0; k < k1; k += kStep) {
      T rows[2][G * kLanes] = {};
      for (int n = n0; n < N_; ++n) {
        rows[0][n - n0] = data_[k * stride_ + n];
        if (kPairs && k + 1 < K_) rows[1][n - n0] = data_[(k + 1) * stride_ + n];
      }
      MFA_UNROLL
      for (int g = 0; g < G; ++g) f(g0 + g, k, Widen(rows[0] + g * kLanes, rows[1] + g * kLanes));
    }
  }

 private:
  static HWY_INLINE typename Terms<kPairs>::Vector Widen(const T* row, const T* next) {
    if constexpr (kPairs) {
      static constexpr bfloat16 kZeros[kLanes] = {};
      return LoadPairs(du, row, next ? next : kZeros);
    } else {
      return LoadFloat(row);
    }
  }

  const T* data_;
  ptrdiff_t stride_;
  int N_, K_;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
