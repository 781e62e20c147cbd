// integer_tiles-inl.h: products of many integer rows with codes. Lanes are columns: a panel of codes, unpacked to pairs
// of 16 bits, is multiplied by all rows of a task, group by group.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kPanelColumns = kTileVectors * kLanes;
// Terms of a panel, whole groups: 12 KB of the first cache (AVX2).
constexpr int kCodeBlock = 256;
// Rows of a tile. PairSums are two vectors where pairs are not multiplied at once.
constexpr int kIntegerTileRows = HWY_ARCH_X86 ? kTileRows : kTileRows / 2;

// dots[r][c] = the sums of `steps` pairs of MR rows and NR vectors of columns.
template <int MR, int NR>
HWY_INLINE void DotTile(const int16_t* HWY_RESTRICT x, ptrdiff_t x_stride, const uint32_t* HWY_RESTRICT panel, int steps,
                        VI (&dots)[MR][NR]) {
  PairSums acc[MR][NR];
  MFA_UNROLL_4
  for (int i = 0; i < steps; ++i) {
    V16 codes[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) codes[c] = hn::BitCast(d16, hn::Load(du, panel + i * kPanelColumns + c * kLanes));
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, x + r * x_stride + 2 * i, sizeof(pair));
      const V16 xv = hn::BitCast(d16, hn::Set(du, pair));
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) AddPairs(acc[r][c], xv, codes[c]);
    }
  }
  MFA_UNROLL
  for (int r = 0; r < MR; ++r) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) dots[r][c] = Total(acc[r][c]);
  }
}

template <int kBits>
class IntegerTiles {
 public:
  explicit IntegerTiles(const MatmulJob& job)
      : p_(*job.problem), plan_(job.plan), weights_(p_), group_(p_.w.affine.group_size) {}

  size_t scratch_bytes() const {
    const int terms = blocks() * kCodeBlock;
    return x_bytes() + kPanelBytes + 2 * ScaleBytes(terms) +
           static_cast<size_t>(plan_.row_block * sums_stride()) * sizeof(float);
  }

  void Run(int64_t task, char* scratch) {
    const int64_t r0 = task % plan_.row_blocks * plan_.row_block;
    const int rows = static_cast<int>(Min<int64_t>(plan_.row_block, p_.M - r0));
    const int n0 = static_cast<int>(task / plan_.row_blocks) * plan_.column_block;
    const int n1 = Min(n0 + plan_.column_block, p_.N);
    const int most = blocks() * kCodeBlock;
    panel_ = reinterpret_cast<uint32_t*>(scratch + x_bytes());
    scales_ = reinterpret_cast<float*>(scratch + x_bytes() + kPanelBytes);
    biases_ = scales_ + ScaleBytes(most) / sizeof(float);
    sums_ = biases_ + ScaleBytes(most) / sizeof(float);
    std::memset(sums_, 0, static_cast<size_t>(rows * sums_stride()) * sizeof(float));
    for (int k0 = 0; k0 < p_.K; k0 += most) {
      const int terms = Min(most, p_.K - k0);
      x_ = IntegerRows(rows, most, most / group_, scratch);
      for (int r = 0; r < rows; ++r) QuantiseRow<kBits>(p_, r0 + r, k0, terms / group_, group_, x_, r);
      for (int n = n0; n < n1; n += kPanelColumns) {
        const int vectors = Min(kTileVectors, (n1 - n + kLanes - 1) / kLanes);
        const auto multiply = [&]<int NR>(std::integral_constant<int, NR>) {
          MultiplyColumns<NR>(rows, n, k0, terms, most == terms, sums_ + (n - n0));
        };
        if (vectors == 3) {
          multiply(std::integral_constant<int, 3>());
        } else if (vectors == 2) {
          multiply(std::integral_constant<int, 2>());
        } else {
          multiply(std::integral_constant<int, 1>());
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      MendSums(p_, r0 + r, n0, n1 - n0, sums_ + r * sums_stride());
      WriteRow(p_, sums_ + r * sums_stride(), r0 + r, n0, n1 - n0);
    }
  }

 private:
  static constexpr size_t kPanelBytes = size_t{kCodeBlock / 2} * kPanelColumns * sizeof(uint32_t);
  static constexpr int kWordCodes = 32 / kBits;

  // Blocks of terms that are packed at once: those that leave the second cache room for sums and passing weights.
  int blocks() const {
    const int64_t block = int64_t{plan_.row_block} * kCodeBlock * 2;
    return Min((p_.K + kCodeBlock - 1) / kCodeBlock, Max(1, static_cast<int>((int64_t{224} << 10) / block)));
  }
  size_t x_bytes() const {
    const int terms = blocks() * kCodeBlock;
    return (IntegerRows::Bytes(plan_.row_block, terms, terms / group_) + 63) / 64 * 64;
  }
  size_t ScaleBytes(int terms) const { return static_cast<size_t>(terms / group_ * kPanelColumns) * sizeof(float); }
  ptrdiff_t sums_stride() const { return plan_.column_block + 16; }

  template <int NR>
  HWY_NOINLINE void MultiplyColumns(int rows, int n, int k0, int terms, bool ahead, float* sums) {
    LoadScales(n, k0 / group_, terms / group_);
    Prefetch next(ahead ? weights_.Begin(n + kPanelColumns) : nullptr);
    for (int k = 0; k < terms; k += kCodeBlock) {
      const int count = Min(kCodeBlock, terms - k);
      PackPanel<NR>(n, k0 + k, count, next);
      ForRowTiles<kIntegerTileRows>(0, rows, [&]<int MR>(int r) {
        for (int g = 0; g < count / group_; ++g)
          MultiplyGroup<MR, NR>(r, k / group_ + g, panel_ + g * (group_ / 2) * kPanelColumns, sums + r * sums_stride());
      });
    }
  }

  // Adds group g to the sums of MR rows.
  template <int MR, int NR>
  HWY_INLINE void MultiplyGroup(int r0, int g, const uint32_t* panel, float* sums) const {
    const float *scales = scales_ + g * kPanelColumns, *biases = biases_ + g * kPanelColumns;
    VI dots[MR][NR];
    const auto add = [&](int r, float x_scale, float x_sum) MFA_INLINE_LAMBDA {
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) {
        float* to = sums + r * sums_stride() + c * kLanes;
        hn::StoreU(AddGroup(df, hn::LoadU(df, to), hn::Set(df, x_scale), hn::Load(df, scales + c * kLanes), dots[r][c],
                            hn::Load(df, biases + c * kLanes), hn::Set(df, x_sum)),
                   df, to);
      }
    };
    const ptrdiff_t at = r0 * x_.stride + static_cast<ptrdiff_t>(g) * group_;
    DotTile<MR, NR>(x_.first + at, x_.stride, panel, group_ / 2, dots);
    uint8_t has_rest = 0;
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const int i = (r0 + r) * x_.groups + g;
      add(r, x_.scale[i], x_.sum[i]);
      has_rest |= x_.has_rest[i];
    }
    if (HWY_LIKELY(!has_rest)) return;
    DotTile<MR, NR>(x_.rest + at, x_.stride, panel, group_ / 2, dots);
    MFA_UNROLL
    for (int r = 0; r < MR; ++r) {
      const int i = (r0 + r) * x_.groups + g;
      if (x_.has_rest[i]) add(r, x_.scale[i] * kRestScale, x_.rest_sum[i]);
    }
  }

  // panel[pair][column]: pair j of word i of every column, from term k0 on.
  template <int NR>
  HWY_NOINLINE void PackPanel(int n, int k0, int terms, Prefetch& ahead) {
    constexpr int kPairs = kWordCodes / 2;
    const VU mask = hn::Set(du, ((1u << kBits) - 1) * 0x10001u);
    HWY_ALIGN uint32_t words[kLanes * kLanes];
    for (int v = 0; v < NR; ++v)
      for (int w = 0; w < terms / kWordCodes; w += kLanes) {
        ahead.Lines<kLanes * kLanes * 4 / kCacheLine>();
        weights_.TransposeWords(n + v * kLanes, k0 / kWordCodes + w, words);
        for (int i = 0; i < Min(kLanes, terms / kWordCodes - w); ++i) {
          VU bits = hn::Load(du, words + i * kLanes);
          uint32_t* to = panel_ + (w + i) * kPairs * kPanelColumns + v * kLanes;
          MFA_UNROLL
          for (int j = 0; j < kPairs; ++j) {
            hn::Store(hn::And(bits, mask), du, to + j * kPanelColumns);
            if (j + 1 < kPairs) bits = hn::ShiftRight<kBits>(bits);
          }
        }
      }
  }

  // Scales and biases of the panel's columns with columns in lanes, for groups [g0, g0 + count).
  HWY_NOINLINE void LoadScales(int n, int g0, int count) {
    const AffineRef& a = p_.w.affine;
    WithHalf(p_.dtype, [&]<class T>(T*) {
      for (int c = 0; c < kPanelColumns; c += kColumnLanes) {
        const T *scales[kColumnLanes], *biases[kColumnLanes];
        for (int i = 0; i < kColumnLanes; ++i) {
          const int column = Min(n + c + i, p_.N - 1);
          scales[i] = static_cast<const T*>(a.scales) + column * a.scale_stride + g0;
          biases[i] = static_cast<const T*>(a.biases) + column * a.bias_stride + g0;
        }
        Spread(scales, count, scales_ + c);
        Spread(biases, count, biases_ + c);
      }
    });
  }
  // to[g * kPanelColumns + lane] = in[lane][g].
  template <class T>
  static HWY_INLINE void Spread(const T* const (&in)[kColumnLanes], int count, float* to) {
    HWY_ALIGN float lanes[kColumnLanes][kColumnLanes];
    for (int g0 = 0; g0 < count; g0 += kColumnLanes) {
      const int groups = Min(kColumnLanes, count - g0);
      LoadGroups(in, g0, groups, lanes);
      for (int g = 0; g < groups; ++g) hn::Store(hn::Load(dcol, lanes[g]), dcol, to + (g0 + g) * kPanelColumns);
    }
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  AffineColumnWeights<kBits, false> weights_;
  int group_;
  IntegerRows x_;
  uint32_t* panel_ = nullptr;
  float *scales_ = nullptr, *biases_ = nullptr;  // [groups, kPanelColumns]
  float* sums_ = nullptr;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
