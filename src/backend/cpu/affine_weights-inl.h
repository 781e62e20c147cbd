// affine_weights-inl.h: quantised weights with the interface of weights-inl.h: codes are read where they lie and become
// scale * code + bias in registers, float32, rounded to bfloat16 only where pairs of those are multiplied.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kMinGroup = 32;                        // of the group sizes of the format
constexpr int kMaxGroups = kInnerBlock / kMinGroup;  // groups of one column in an inner block
constexpr int kMaxColumnVectors = 3;                 // vectors of columns that are asked for at once

// Codes of kBits bits, packed along the sum: a column of w is a stored row.
template <int kBits, bool kPairs>
class AffineColumnWeights {
  static constexpr bool kWhole = 32 % kBits == 0;  // no code lies across two words
  static constexpr int kWords = kWhole ? kLanes : kBits;
  static constexpr int kLoads = (kWords + kLanes - 1) / kLanes;
  static constexpr int kSlots = 64;  // groups of a column whose scales are held widened: whole inner blocks of them
  static constexpr int kCodes = kWhole ? 32 / kBits : 32;  // that are unpacked together, all of one group

 public:
  using Element = typename Terms<kPairs>::Stored;
  static constexpr bool kPacks = false;
  static constexpr bool kByRows = false;
  static constexpr bool kDirect = !kPairs && (kBits == 4 || kBits == 8);
  static constexpr bool kSpread = false;
  static constexpr int kUnit = kWhole ? 32 / kBits / (kPairs ? 2 : 1) : 1;
  static constexpr int kChunk = kWords * 32 / kBits;
  static_assert(kInnerBlock % kChunk == 0);

  explicit AffineColumnWeights(const MatmulProblem& p) : p_(&p), words_((int64_t{p.K} * kBits + 31) / 32) {
    const AffineRef& a = p.w.affine;
    groups_ = (p.K + a.group_size - 1) / a.group_size;
    shift_ = a.group_size == 32 ? 5 : a.group_size == 64 ? 6 : 7;
  }

  // kSides columns as few rows of float32 read them: weights-inl.h.
  struct Columns {
    const uint32_t* side[kSides];
    int n[kSides];
    int first, last;  // the groups in the slots
    float scales[kSides][kSlots], biases[kSides][kSlots];
  };
  HWY_INLINE void BeginColumn(Columns& columns, int side, int n) const {
    columns.n[side] = n;
    columns.side[side] = Row(n);
    columns.last = 0;
  }
  HWY_INLINE void BeginBlock(Columns& columns, int k1) const {
    if (((k1 - 1) >> shift_) >= columns.last) Refill(columns);
  }
  template <int V, class F>
  HWY_INLINE void Words(const Columns (&columns)[V], int k, const F& f) const {
    // A code of every column after the other: what is done to one is a long chain.
    const auto mask = hn::Set(dcu, (1u << kBits) - 1);
    hn::Vec<DCU> words[V];
    VC scale[V], bias[V];
    const int group = (k >> shift_) - columns[0].first;
    MFA_UNROLL
    for (int v = 0; v < V; ++v) {
      const uint32_t* at[kSides];
      MFA_UNROLL
      for (int s = 0; s < kSides; ++s) at[s] = columns[v].side[s] + static_cast<ptrdiff_t>(k) * kBits / 32;
      words[v] = LoadSides(dcu, at);
      scale[v] = SetSides(columns[v].scales, group);
      bias[v] = SetSides(columns[v].biases, group);
    }
    UnrollCodes(std::make_integer_sequence<int, 32 / kBits>(),
                [&]<int i>(std::integral_constant<int, i>) MFA_INLINE_LAMBDA {
                  const hn::RebindToSigned<DC> dci;
                  MFA_UNROLL
                  for (int v = 0; v < V; ++v) {
                    auto bits = words[v];
                    if constexpr (i > 0) bits = hn::ShiftRight<i * kBits>(bits);
                    if constexpr (i * kBits + kBits < 32) bits = hn::And(bits, mask);
                    f(v, 0, i, hn::MulAdd(hn::ConvertTo(dc, hn::BitCast(dci, bits)), scale[v], bias[v]));
                  }
                });
  }
  // Groups are whole words of all chains, so there are no others.
  template <int V, class F>
  HWY_INLINE void LastWords(const Columns (&)[V], int, int, const F&) const {
    static_assert(kMinGroup % (kChains * 32 / kBits) == 0);
  }

  const void* Begin(int n) const { return static_cast<const uint32_t*>(p_->w.data) + n * p_->w.stride; }

  HWY_INLINE Upcoming Next(int, int, int) const { return {p_->w.data, 1, 1, 0}; }  // Load() asks for its own

  // Brings the scales and biases of `vectors` vectors of columns and k in [k0, k1), an inner block, into lanes.
  HWY_NOINLINE void Prepare(int n0, int vectors, int k0, int k1) {
    const AffineRef& a = p_->w.affine;
    const int first = k0 >> shift_, count = ((k1 - 1) >> shift_) + 1 - first;
    start_ = first;
    WithType(p_->dtype, [&]<class T>(T*) {
      for (int g = 0; g < vectors; ++g) {
        Gather(static_cast<const T*>(a.scales), a.scale_stride, n0 + g * kLanes, first, count, scales_[g]);
        Gather(static_cast<const T*>(a.biases), a.bias_stride, n0 + g * kLanes, first, count, biases_[g]);
      }
    });
  }

  template <int G, class F>
  HWY_INLINE void Load(int n0, int g0, int k0, int k1, Prefetch& ahead, const F& f) const {
    HWY_ALIGN uint32_t words[G][kLoads * kLanes * kLanes];
    for (int k = k0; k < k1; k += kChunk) {
      const int count = Min(kChunk, k1 - k);
      const ptrdiff_t at = static_cast<ptrdiff_t>(k) * kBits / 32;
      ahead.Lines<kWords * G * kLanes * 4 / kCacheLine>();
      MFA_UNROLL
      for (int g = 0; g < G; ++g) TransposeWords(n0 + (g0 + g) * kLanes, at, words[g]);
      if constexpr (kWhole) {
        for (int j = 0; j * kCodes < count; ++j) {
          const int group = ((k + j * kCodes) >> shift_) - start_;
          MFA_UNROLL
          for (int g = 0; g < G; ++g) Unpack(g0 + g, group, k + j * kCodes, words[g] + j * kLanes, f);
        }
      } else {
        const int group = (k >> shift_) - start_;
        MFA_UNROLL
        for (int g = 0; g < G; ++g) Unpack(g0 + g, group, k, words[g], f);
      }
    }
  }

  // out[i][lane] = word at + i of column n0 + lane.
  HWY_INLINE void TransposeWords(int n0, ptrdiff_t at, uint32_t* out) const {
    MFA_UNROLL
    for (int load = 0; load < kLoads; ++load) {
      const ptrdiff_t from = at + load * kLanes;
      VF v[kLanes];
      if (HWY_LIKELY(from + kLanes <= words_ && n0 + kLanes <= p_->N)) {
        const uint32_t* base = static_cast<const uint32_t*>(p_->w.data) + n0 * p_->w.stride + from;
        MFA_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) {
          v[lane] = hn::BitCast(df, hn::LoadU(du, base + lane * p_->w.stride));
        }
      } else {
        HWY_ALIGN uint32_t rows[kLanes][kLanes] = {};
        for (int lane = 0; lane < kLanes; ++lane)
          for (ptrdiff_t i = from; i < Min(from + kLanes, words_); ++i) rows[lane][i - from] = Row(n0 + lane)[i];
        MFA_UNROLL
        for (int lane = 0; lane < kLanes; ++lane) v[lane] = hn::BitCast(df, hn::Load(du, rows[lane]));
      }
      Transpose(v);
      MFA_UNROLL
      for (int i = 0; i < kLanes; ++i) hn::Store(hn::BitCast(du, v[i]), du, out + (load * kLanes + i) * kLanes);
    }
  }

 private:
  // Brings the scales and biases of the next groups into the slots.
  HWY_NOINLINE void Refill(Columns& columns) const {
    const AffineRef& a = p_->w.affine;
    columns.first = columns.last;
    columns.last = Min(groups_, columns.first + kSlots);
    WithType(p_->dtype, [&]<class T>(T*) {
      const auto widen = [&](const void* in, int64_t stride, float (&to)[kSides][kSlots]) {
        for (int s = 0; s < kSides; ++s) {
          const T* row = static_cast<const T*>(in) + columns.n[s] * stride + columns.first;
          const int count = columns.last - columns.first;
          int i = 0;
          for (; i + kLanes <= count; i += kLanes) hn::StoreU(LoadFloat(row + i), df, to[s] + i);
          for (; i < count; ++i) to[s][i] = to_float(row[i]);
        }
      };
      widen(a.scales, a.scale_stride, columns.scales);
      widen(a.biases, a.bias_stride, columns.biases);
    });
  }
  static HWY_INLINE VC SetSides(const float (&slots)[kSides][kSlots], int i) {
    return FromSides(dc, [&](auto block, int s) MFA_INLINE_LAMBDA { return hn::Set(block, slots[s][i]); });
  }

  const uint32_t* Row(int n) const {
    return static_cast<const uint32_t*>(p_->w.data) + Min(n, p_->N - 1) * p_->w.stride;
  }

  template <class F>
  HWY_INLINE void Unpack(int g, int group, int k, const uint32_t* words, const F& f) const {
    const VF scale = hn::Load(df, scales_[g] + group * kLanes), bias = hn::Load(df, biases_[g] + group * kLanes);
    const VU mask = hn::Set(du, (1u << kBits) - 1);
    VF even = bias;
    UnrollCodes(std::make_integer_sequence<int, kCodes>(),
                [&]<int i>(std::integral_constant<int, i>) MFA_INLINE_LAMBDA {
                  constexpr int kWord = i * kBits / 32, kOffset = i * kBits % 32;
                  VU bits = hn::ShiftRight<kOffset>(hn::Load(du, words + kWord * kLanes));
                  if constexpr (kOffset + kBits > 32)
                    bits = hn::Or(bits, hn::ShiftLeft<32 - kOffset>(hn::Load(du, words + (kWord + 1) * kLanes)));
                  if constexpr (kOffset + kBits != 32) bits = hn::And(bits, mask);
                  const VF w = hn::MulAdd(hn::ConvertTo(df, hn::BitCast(di, bits)), scale, bias);
                  if constexpr (!kPairs) {
                    f(g, k + i, w);
                  } else if constexpr (i % 2 == 0) {
                    even = w;
                  } else {
                    f(g, k + i - 1, PackPairs(even, w));
                  }
                });
  }
  template <int... i, class F>
  static HWY_INLINE void UnrollCodes(std::integer_sequence<int, i...>, const F& f) {
    (f(std::integral_constant<int, i>()), ...);
  }

  // to[j][lane] = in[row n0 + lane][first + j], j < count; slots up to the next whole vector may be filled too.
  template <class T>
  HWY_INLINE void Gather(const T* in, int64_t stride, int n0, int first, int count, float* to) {
    int j = 0;
    for (; j < count && n0 + kLanes <= p_->N && first + j + kLanes <= groups_; j += kLanes) {
      VF v[kLanes];
      MFA_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) v[lane] = LoadFloat(in + (n0 + lane) * stride + first + j);
      Transpose(v);
      MFA_UNROLL
      for (int i = 0; i < kLanes; ++i) hn::Store(v[i], df, to + (j + i) * kLanes);
    }
    for (; j < count; ++j)
      for (int lane = 0; lane < kLanes; ++lane)
        to[j * kLanes + lane] = to_float(in[Min(n0 + lane, p_->N - 1) * stride + first + j]);
  }

  static constexpr int kGroupSlots = RoundUp(kMaxGroups, kLanes);
  const MatmulProblem* p_;
  ptrdiff_t words_;  // of a stored row
  int groups_, shift_;
  int start_ = 0;  // the group in slot 0 of scales_ and biases_
  alignas(64) float scales_[kMaxColumnVectors][kGroupSlots * kLanes];
  alignas(64) float biases_[kMaxColumnVectors][kGroupSlots * kLanes];
};

// Codes packed along the columns: a row of w is a stored row. The rarer direction (gradients), so the plainer code.
template <bool kPairs>
class AffineRowWeights {
 public:
  using Element = typename Terms<kPairs>::Stored;
  static constexpr bool kPacks = false;
  static constexpr bool kByRows = true;
  static constexpr bool kDirect = false;
  static constexpr int kUnit = 1;

  explicit AffineRowWeights(const MatmulProblem& p) : p_(&p) {}

  HWY_INLINE Upcoming Next(int, int, int) const { return {p_->w.data, 1, 1, 0}; }
  HWY_INLINE void Prepare(int, int, int, int) {}

  template <int G, class F>
  HWY_INLINE void Load(int n0, int g0, int k0, int k1, Prefetch&, const F& f) const {
    for (int k = k0; k < k1; k += Terms<kPairs>::kStep) {
      MFA_UNROLL
      for (int g = 0; g < G; ++g) {
        const VF w = Row(k, n0 + (g0 + g) * kLanes);
        if constexpr (kPairs) {
          f(g0 + g, k, PackPairs(w, k + 1 < p_->K ? Row(k + 1, n0 + (g0 + g) * kLanes) : hn::Zero(df)));
        } else {
          f(g0 + g, k, w);
        }
      }
    }
  }

 private:
  HWY_NOINLINE VF Row(int k, int n0) const {
    const AffineRef& a = p_->w.affine;
    const auto* row = reinterpret_cast<const uint8_t*>(static_cast<const uint32_t*>(p_->w.data) + k * p_->w.stride);
    HWY_ALIGN int32_t codes[kLanes] = {};
    HWY_ALIGN float scale[kLanes] = {}, bias[kLanes] = {};
    constexpr int kSpan = kLanes < 8 ? kLanes : 8;
    for (int i = 0; i < kLanes && n0 + i < p_->N; i += kSpan) {
      // A group is a multiple of a span and divides N, so whole spans lie in the row and have one scale.
      const ptrdiff_t bit = static_cast<ptrdiff_t>(n0 + i) * a.bits;
      uint64_t bits = 0;
      __builtin_memcpy(&bits, row + bit / 8, static_cast<size_t>((kSpan * a.bits + 7) / 8));
      bits >>= bit % 8;
      const int64_t group = (n0 + i) / a.group_size;
      const float s = load_as_float(a.scales, p_->dtype, k * a.scale_stride + group);
      const float b = load_as_float(a.biases, p_->dtype, k * a.bias_stride + group);
      for (int j = 0; j < kSpan; ++j) {
        codes[i + j] = static_cast<int32_t>(bits >> (j * a.bits) & ((1u << a.bits) - 1));
        scale[i + j] = s;
        bias[i + j] = b;
      }
    }
    return hn::MulAdd(hn::ConvertTo(df, hn::Load(di, codes)), hn::Load(df, scale), hn::Load(df, bias));
  }

  const MatmulProblem* p_;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
