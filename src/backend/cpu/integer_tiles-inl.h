// integer_tiles-inl.h: products of many integer rows with codes. Lanes are columns: a panel of codes, unpacked to pairs
// of 16 bits, is multiplied by all rows of a task, group by group.

namespace mfa::cpu::MFA_ISA {
namespace {

// A tile of sums. Where a product needs a register of its own, 3 vectors would leave too few; two halves of a sum
// (PairSums) need twice as many.
constexpr int kIntegerRows = kLanes == 16 ? 8 : 4, kIntegerVectors = kLanes == 16 ? 3 : 2;
constexpr int kIntegerPanel = kIntegerVectors * kLanes;
// Terms of a panel, whole groups: 8 KB of the first cache with AVX2.
constexpr int kCodeBlock = 256;

// dots[r][c] = the sums of `steps` pairs of MR rows and NR vectors of columns.
template <int MR, int NR>
HWY_INLINE void DotTile(const int16_t* HWY_RESTRICT x, ptrdiff_t x_stride, const uint32_t* HWY_RESTRICT panel,
                        int steps, VI (&dots)[MR][NR]) {
  PairSums acc[MR][NR];
  // The end of a loop of as many steps as a group has is not always foreseen, that of a short one is.
  constexpr int kSteps = kMinGroup / 2;
  MFA_NO_UNROLL
  for (int end = kSteps; end <= steps; end += kSteps) {
    MFA_NO_UNROLL
    for (int i = end - kSteps; i < end; ++i) {
      V16 codes[NR];
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) codes[c] = hn::BitCast(d16, hn::Load(du, panel + i * kIntegerPanel + c * kLanes));
      MFA_UNROLL
      for (int r = 0; r < MR; ++r) {
        uint32_t pair;
        __builtin_memcpy(&pair, x + r * x_stride + 2 * i, sizeof(pair));
        const V16 xv = hn::BitCast(d16, hn::Set(du, pair));
        MFA_UNROLL
        for (int c = 0; c < NR; ++c) AddPairs(acc[r][c], xv, codes[c]);
      }
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
    centres_ = scales_ + ScaleBytes(most) / sizeof(float);
    sums_ = centres_ + ScaleBytes(most) / sizeof(float);
    std::memset(sums_, 0, static_cast<size_t>(rows * sums_stride()) * sizeof(float));
    for (int k0 = 0; k0 < p_.K; k0 += most) {
      const int terms = Min(most, p_.K - k0);
      x_ = IntegerRows(rows, most, most / group_, true, scratch);
      for (int r = 0; r < rows; ++r) {
        if (r + 2 < rows) FetchRow(p_, r0 + r + 2, k0, terms);
        QuantiseRow<kBits>(p_, r0 + r, k0, terms / group_, group_, x_, r);
      }
      for (int n = n0; n < n1; n += kIntegerPanel) {
        // With all terms at once, panels are read in the order of memory.
        Prefetch next(most >= p_.K ? weights_.Begin(n + kIntegerPanel) : nullptr);
        const int vectors = Min(kIntegerVectors, (n1 - n + kLanes - 1) / kLanes);
        if (vectors == kIntegerVectors) {
          MultiplyColumns<kIntegerVectors>(rows, n, k0, terms, next, sums_ + (n - n0));
        } else if (vectors == 2) {
          MultiplyColumns<2>(rows, n, k0, terms, next, sums_ + (n - n0));
        } else {
          MultiplyColumns<1>(rows, n, k0, terms, next, sums_ + (n - n0));
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      MendSums(p_, r0 + r, n0, n1 - n0, sums_ + r * sums_stride());
      WriteRow(p_, sums_ + r * sums_stride(), r0 + r, n0, n1 - n0);
    }
  }

 private:
  static constexpr size_t kPanelBytes = size_t{kCodeBlock / 2} * kIntegerPanel * sizeof(uint32_t);
  static constexpr int kWordCodes = 32 / kBits;

  // Blocks of terms that are packed at once: those that leave the second cache room for sums and passing weights.
  int blocks() const {
    const int64_t block = int64_t{plan_.row_block} * kCodeBlock * 2;
    return Min((p_.K + kCodeBlock - 1) / kCodeBlock, Max(1, static_cast<int>((int64_t{224} << 10) / block)));
  }
  size_t x_bytes() const {
    const int terms = blocks() * kCodeBlock;
    return IntegerRows::Bytes(plan_.row_block, terms, terms / group_);
  }
  size_t ScaleBytes(int terms) const { return static_cast<size_t>(terms / group_ * kIntegerPanel) * sizeof(float); }
  ptrdiff_t sums_stride() const { return plan_.column_block + 16; }

  template <int NR>
  HWY_NOINLINE void MultiplyColumns(int rows, int n, int k0, int terms, Prefetch& next, float* sums) {
    LoadScales(n, k0 / group_, terms / group_);
    for (int k = 0; k < terms; k += kCodeBlock) {
      const int count = Min(kCodeBlock, terms - k), g0 = k / group_, groups = count / group_;
      PackPanel<NR>(n, k0 + k, count, next);
      ForRowTiles<kIntegerRows>(0, rows,
                                [&]<int MR>(int r) { MultiplyRows<MR, NR>(r, g0, groups, sums + r * sums_stride()); });
    }
  }

  // Scales and centres of a group of NR vectors of columns.
  template <int NR>
  struct GroupScales {
    VF scale[NR], centre[NR];
  };
  template <int NR>
  HWY_INLINE GroupScales<NR> ScalesOf(int g) const {
    GroupScales<NR> of;
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      of.scale[c] = hn::Load(df, scales_ + g * kIntegerPanel + c * kLanes);
      of.centre[c] = hn::Load(df, centres_ + g * kIntegerPanel + c * kLanes);
    }
    return of;
  }
  // Adds a group of a row of x, whose products with the columns are `dots`.
  template <int NR>
  static HWY_INLINE void AddGroup(const GroupScales<NR>& group, float x_scale, int32_t x_sum, const VI (&dots)[NR],
                                  float* sums) {
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      const VF product = GroupProduct(df, group.scale[c], dots[c], group.centre[c], hn::Set(di, x_sum));
      float* to = sums + c * kLanes;
      hn::StoreU(hn::MulAdd(hn::Set(df, x_scale), product, hn::LoadU(df, to)), df, to);
    }
  }
  // The rests of group g, of those of MR rows that have them. Apart, as it is rare and would take registers.
  template <int MR, int NR>
  HWY_NOINLINE void AddRests(const int16_t* rest, const uint32_t* panel, int g, int at, float* sums) const {
    VI dots[MR][NR];
    DotTile<MR, NR>(rest, x_.stride, panel, group_ / 2, dots);
    const GroupScales<NR> group = ScalesOf<NR>(g);
    MFA_UNROLL
    for (int r = 0; r < MR; ++r)
      if (x_.has_rest[at + r])
        AddGroup<NR>(group, x_.scale[at + r] * kRestScale, x_.rest_sum[at + r], dots[r], sums + r * sums_stride());
  }

  // Adds the panel's groups, from g0 on, to the sums of MR rows.
  template <int MR, int NR>
  HWY_INLINE void MultiplyRows(int r0, int g0, int groups, float* sums) const {
    const ptrdiff_t sums_stride = this->sums_stride(), x_stride = x_.stride;
    ptrdiff_t from = r0 * x_stride + static_cast<ptrdiff_t>(g0) * group_;
    const uint32_t* panel = panel_;
    for (int g = g0; g < g0 + groups; ++g, from += group_, panel += group_ / 2 * kIntegerPanel) {
      VI dots[MR][NR];
      DotTile<MR, NR>(x_.first + from, x_stride, panel, group_ / 2, dots);
      const int at = x_.At(g, r0);  // of row r at + r
      const GroupScales<NR> group = ScalesOf<NR>(g);
      const float* x_scale = x_.scale + at;
      const int32_t* x_sum = x_.sum + at;
      MFA_UNROLL
      for (int r = 0; r < MR; ++r) AddGroup<NR>(group, x_scale[r], x_sum[r], dots[r], sums + r * sums_stride);
      uint64_t has_rest = 0;
      __builtin_memcpy(&has_rest, x_.has_rest + at, MR);
      if (HWY_UNLIKELY(has_rest)) AddRests<MR, NR>(x_.rest + from, panel, g, at, sums);
    }
  }

  // panel[pair][column]: pair j of word i of every column, from term k0 on, codes counting from the middle.
  template <int NR>
  HWY_NOINLINE void PackPanel(int n, int k0, int terms, Prefetch& ahead) {
    constexpr int kPairs = kWordCodes / 2;
    const VU mask = hn::Set(du, ((1u << kBits) - 1) * 0x10001u);
    const V16 middle = hn::Set(d16, kMiddle<kBits>);
    HWY_ALIGN uint32_t words[kLanes * kLanes];
    for (int v = 0; v < NR; ++v)
      for (int w = 0; w < terms / kWordCodes; w += kLanes) {
        ahead.Lines<kLanes * kLanes * 4 / kCacheLine>();
        weights_.TransposeWords(n + v * kLanes, k0 / kWordCodes + w, words);
        for (int i = 0; i < Min(kLanes, terms / kWordCodes - w); ++i) {
          VU bits = hn::Load(du, words + i * kLanes);
          uint32_t* to = panel_ + (w + i) * kPairs * kIntegerPanel + v * kLanes;
          MFA_UNROLL
          for (int j = 0; j < kPairs; ++j) {
            const V16 codes = hn::BitCast(d16, hn::And(bits, mask));
            hn::Store(hn::BitCast(du, hn::Sub(codes, middle)), du, to + j * kIntegerPanel);
            if (j + 1 < kPairs) bits = hn::ShiftRight<kBits>(bits);
          }
        }
      }
  }

  // Scales and centres of the panel's columns with columns in lanes, for groups [g0, g0 + count).
  HWY_NOINLINE void LoadScales(int n, int g0, int count) {
    const AffineRef& a = p_.w.affine;
    WithHalf(p_.dtype, [&]<class T>(T*) {
      for (int c = 0; c < kIntegerPanel; c += kColumnLanes) {
        const T *scales[kColumnLanes], *biases[kColumnLanes];
        for (int i = 0; i < kColumnLanes; ++i) {
          const int column = Min(n + c + i, p_.N - 1);
          scales[i] = static_cast<const T*>(a.scales) + column * a.scale_stride + g0;
          biases[i] = static_cast<const T*>(a.biases) + column * a.bias_stride + g0;
        }
        Spread(scales, count, scales_ + c);
        Spread(biases, count, centres_ + c);
        for (int g = 0; g < count; ++g) {
          float* centre = centres_ + g * kIntegerPanel + c;
          const VCol scale = hn::Load(dcol, scales_ + g * kIntegerPanel + c);
          hn::Store(CentreOf<kBits>(dcol, scale, hn::Load(dcol, centre)), dcol, centre);
        }
      }
    });
  }
  // to[g * kIntegerPanel + lane] = in[lane][g].
  template <class T>
  static HWY_INLINE void Spread(const T* const (&in)[kColumnLanes], int count, float* to) {
    HWY_ALIGN float lanes[kColumnLanes][kColumnLanes];
    for (int g0 = 0; g0 < count; g0 += kColumnLanes) {
      const int groups = Min(kColumnLanes, count - g0);
      LoadGroups(in, g0, groups, lanes);
      for (int g = 0; g < groups; ++g) hn::Store(hn::Load(dcol, lanes[g]), dcol, to + (g0 + g) * kIntegerPanel);
    }
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  AffineColumnWeights<kBits, false> weights_;
  int group_;
  IntegerRows x_;
  uint32_t* panel_ = nullptr;
  float *scales_ = nullptr, *centres_ = nullptr;  // [groups, kIntegerPanel]
  float* sums_ = nullptr;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
