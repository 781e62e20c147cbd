// integer_few_rows-inl.h: products of a few integer rows with codes as they lie in memory. Lanes are terms of a group;
// the sums of some columns' groups are made first, then their floating-point part with columns in lanes.

namespace mfa::cpu::MFA_ISA {
namespace {

// Columns whose groups are added at once.
using DCol = hn::CappedTag<float, 8>;
using VCol = hn::Vec<DCol>;
constexpr DCol dcol;
constexpr hn::RebindToSigned<DCol> dcoli;
constexpr int kColumnLanes = static_cast<int>(hn::MaxLanes(DCol()));
// Codes are asked for as many bytes before they are needed, and the next columns' scales and biases with them: the
// processor's own prefetchers stop at pages of 4 KB and alone reach two thirds of the rate of memory.
constexpr int kCodesAhead = 8192;

// How groups lie in vectors of codes. A 128-bit block never belongs to two groups.
template <int kBits, int kGroup>
struct CodeVectors {
  static constexpr int kBytes = 4 * kLanes;
  static constexpr int kCodes = 8 * kBytes / kBits;          // of a vector
  static constexpr int kPerGroup = Max(1, kGroup / kCodes);  // vectors of a group
  static constexpr int kGroups = Max(1, kCodes / kGroup);    // groups of a vector
  static constexpr int kShifts = 16 / kBits;                 // codes of a 16-bit lane
  static constexpr int kUnitBytes = kPerGroup * kBytes;      // of whole vectors that are whole groups
  static constexpr int kUnitCodes = Max(kGroup, kCodes);
  static constexpr int kUnits = kLanes / kGroups;  // whose sums fill a vector
};

// Sorts a row of IntegerRows for vectors of codes: what the codes at one place of all words are multiplied with lies
// together. `terms` are whole vectors of codes.
template <int kBits>
HWY_INLINE void SortForVectors(int16_t* x, int terms) {
  auto* pairs = reinterpret_cast<uint32_t*>(x);
  for (int i = 0; i < terms / 2; i += kLanes * 16 / kBits) {
    uint32_t* at = pairs + i;
    const VU a = hn::LoadU(du, at), b = hn::LoadU(du, at + kLanes);
    const VU even = hn::ConcatEven(du, b, a), odd = hn::ConcatOdd(du, b, a);
    if constexpr (kBits == 8) {
      hn::StoreU(even, du, at);
      hn::StoreU(odd, du, at + kLanes);
    } else {
      const VU c = hn::LoadU(du, at + 2 * kLanes), d = hn::LoadU(du, at + 3 * kLanes);
      const VU even2 = hn::ConcatEven(du, d, c), odd2 = hn::ConcatOdd(du, d, c);
      hn::StoreU(hn::ConcatEven(du, even2, even), du, at);
      hn::StoreU(hn::ConcatEven(du, odd2, odd), du, at + kLanes);
      hn::StoreU(hn::ConcatOdd(du, even2, even), du, at + 2 * kLanes);
      hn::StoreU(hn::ConcatOdd(du, odd2, odd), du, at + 3 * kLanes);
    }
  }
}

// In: in each 128-bit block of v[i], lanes of one group, kGroups groups a vector. Out: the sums of the groups in order.
template <int kGroups>
HWY_INLINE VI SumsOfGroups(const VI (&v)[kLanes / kGroups]) {
  constexpr int kBlocks = kLanes / 4, kEach = kBlocks / kGroups;  // blocks of a group, and quadruples of vectors
  const hn::Repartition<int64_t, DI> d64;
  VI sums[kEach];
  MFA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const VI* q = v + 4 * i;
    const VI ab = hn::Add(hn::InterleaveLower(di, q[0], q[1]), hn::InterleaveUpper(di, q[0], q[1]));
    const VI cd = hn::Add(hn::InterleaveLower(di, q[2], q[3]), hn::InterleaveUpper(di, q[2], q[3]));
    const auto low = hn::InterleaveLower(d64, hn::BitCast(d64, ab), hn::BitCast(d64, cd));
    const auto high = hn::InterleaveUpper(d64, hn::BitCast(d64, ab), hn::BitCast(d64, cd));
    sums[i] = hn::Add(hn::BitCast(di, low), hn::BitCast(di, high));  // lane j of block b: block b of q[j]
    if constexpr (kEach >= 2) sums[i] = hn::Add(sums[i], hn::SwapAdjacentBlocks(sums[i]));
  }
  VI sum = sums[0];
  if constexpr (kEach == 2) {
    sum = hn::OddEvenBlocks(sums[1], sums[0]);
  } else if constexpr (kEach == 4) {
    const VI a = hn::OddEvenBlocks(sums[1], sums[0]), b = hn::OddEvenBlocks(sums[3], sums[2]);
    sum = hn::Add(hn::ConcatLowerLower(di, b, a), hn::ConcatUpperUpper(di, b, a));
  }
  if constexpr (kGroups > 1) {  // now group g of v[4 * i + j] is lane j of block g * kEach + i
    HWY_ALIGN int32_t from[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int vector = lane / kGroups;
      from[lane] = (lane % kGroups * kEach + vector / 4) * 4 + vector % 4;
    }
    sum = hn::TableLookupLanes(sum, hn::SetTableIndices(di, from));
  }
  return sum;
}

// dots[r * dots_stride + g] = the sum of group g of a column and row r, for U units of vectors.
template <int kBits, int kGroup, int U, int R>
HWY_INLINE void DotUnits(const uint8_t* codes, const int16_t* x, ptrdiff_t x_stride, int32_t* dots,
                         ptrdiff_t dots_stride) {
  using C = CodeVectors<kBits, kGroup>;
  const hn::RebindToUnsigned<D16> du16;
  const auto mask = hn::Set(du16, (1 << kBits) - 1);
  VI sums[R][C::kUnits];
  MFA_UNROLL
  for (int u = 0; u < U; ++u) {
    PairSums acc[R];
    MFA_UNROLL
    for (int v = 0; v < C::kPerGroup; ++v) {
      const int vector = u * C::kPerGroup + v;
      const auto words = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(codes + vector * C::kBytes));
      const auto add = [&]<int i>(std::integral_constant<int, i>) MFA_INLINE_LAMBDA {
        auto code = words;
        if constexpr (i > 0) code = hn::ShiftRight<i * kBits>(code);
        if constexpr (i + 1 < C::kShifts) code = hn::And(code, mask);
        MFA_UNROLL
        for (int r = 0; r < R; ++r)
          AddPairs(acc[r], hn::BitCast(d16, code),
                   hn::LoadU(d16, x + r * x_stride + (vector * C::kShifts + i) * 2 * kLanes));
      };
      add(std::integral_constant<int, 0>());
      add(std::integral_constant<int, 1>());
      if constexpr (C::kShifts == 4) {
        add(std::integral_constant<int, 2>());
        add(std::integral_constant<int, 3>());
      }
    }
    MFA_UNROLL
    for (int r = 0; r < R; ++r) sums[r][u] = Total(acc[r]);
  }
  MFA_UNROLL
  for (int r = 0; r < R; ++r) {
    MFA_UNROLL
    for (int u = U; u < C::kUnits; ++u) sums[r][u] = hn::Zero(di);
    hn::StoreU(SumsOfGroups<C::kGroups>(sums[r]), di, dots + r * dots_stride);
  }
}

// The same for all groups of a column of `bytes` bytes. Up to kLanes dots past the last are overwritten.
template <int kBits, int kGroup, int R>
HWY_INLINE void DotColumn(const uint8_t* codes, int bytes, const int16_t* x, ptrdiff_t x_stride, int32_t* dots,
                          ptrdiff_t dots_stride) {
  using C = CodeVectors<kBits, kGroup>;
  const uint8_t* end = codes + bytes;
  const auto step = [&]<int U>(std::integral_constant<int, U>, const uint8_t* from) MFA_INLINE_LAMBDA {
    MFA_UNROLL
    for (int i = 0; i < U * C::kUnitBytes; i += kCacheLine) __builtin_prefetch(codes + kCodesAhead + i, 0, 3);
    DotUnits<kBits, kGroup, U, R>(from, x, x_stride, dots, dots_stride);
    codes += U * C::kUnitBytes;
    x += U * C::kUnitCodes;
    dots += U * C::kGroups;
  };
  while (end - codes >= C::kUnits * C::kUnitBytes) step(std::integral_constant<int, C::kUnits>(), codes);
  while (end - codes >= C::kUnitBytes) step(std::integral_constant<int, 1>(), codes);
  if (codes < end) {  // groups that fill no vector; x is zero past them
    HWY_ALIGN uint8_t last[C::kUnitBytes] = {};
    std::memcpy(last, codes, static_cast<size_t>(end - codes));
    step(std::integral_constant<int, 1>(), last);
  }
}

// to[i][lane] = in[lane][start + i] for groups [start, start + count), count <= kColumnLanes.
template <class T>
HWY_INLINE void LoadGroups(const T* const (&in)[kColumnLanes], int start, int count,
                           float (&to)[kColumnLanes][kColumnLanes]) {
  if (HWY_LIKELY(count == kColumnLanes)) {
    VCol v[kColumnLanes];
    MFA_UNROLL
    for (int c = 0; c < kColumnLanes; ++c) v[c] = LoadFloat(dcol, in[c] + start);
    Transpose(dcol, v);
    MFA_UNROLL
    for (int i = 0; i < kColumnLanes; ++i) hn::Store(v[i], dcol, to[i]);
    return;
  }
  for (int c = 0; c < kColumnLanes; ++c)
    for (int i = 0; i < count; ++i) to[i][c] = to_float(in[c][start + i]);
}

// products[g] = GroupProduct() of group g of a column, lanes being groups. What comes after the last group may be read
// and written, but of scales and biases it is read only if they are `followed` by others. Vectors do not overlap: a
// load of what two stores wrote waits until both have left the processor.
template <int kBits, class T>
HWY_INLINE void ScaleDots(const T* scales, const T* biases, int groups, bool followed, const int32_t* dots,
                          const int32_t* sums, float* products) {
  const auto scale_dots = [&](const T* s, const T* b, int g) MFA_INLINE_LAMBDA {
    const VCol scale = LoadFloat(dcol, s), centre = CentreOf<kBits>(dcol, scale, LoadFloat(dcol, b));
    const auto dot = hn::LoadU(dcoli, dots + g), sum = hn::LoadU(dcoli, sums + g);
    hn::StoreU(GroupProduct<kBits>(dcol, scale, dot, centre, sum), dcol, products + g);
  };
  int g = 0;
  for (; g + kColumnLanes <= groups; g += kColumnLanes) scale_dots(scales + g, biases + g, g);
  if (g == groups) return;
  if (HWY_LIKELY(followed)) return scale_dots(scales + g, biases + g, g);
  T s[kColumnLanes] = {}, b[kColumnLanes] = {};
  for (int i = 0; g + i < groups; ++i) {
    s[i] = scales[g + i];
    b[i] = biases[g + i];
  }
  scale_dots(s, b, g);
}

template <int kBits, int kGroup>
class IntegerFewRows {
  using C = CodeVectors<kBits, kGroup>;

 public:
  explicit IntegerFewRows(const MatmulJob& job)
      : p_(*job.problem),
        plan_(job.plan),
        rows_(static_cast<int>(p_.M)),
        groups_(p_.K / kGroup),
        units_((p_.K + C::kUnitCodes - 1) / C::kUnitCodes),
        dots_stride_(RoundUp(groups_, kLanes) + kLanes) {
    if (job.rows) View(static_cast<char*>(const_cast<void*>(job.rows)));
  }

  // Of rows of x as integers, sorted for vectors of codes, with lists of the units that have rests.
  size_t row_bytes() const {
    return IntegerRows::Bytes(rows_, p_.K, groups_) + static_cast<size_t>(rows_ * (units_ + 1)) * sizeof(int32_t);
  }
  void Prepare(char* rows) {
    View(rows);
    for (int r = 0; r < rows_; ++r) {
      const bool any_rest = QuantiseRow<kBits>(p_, r, 0, groups_, kGroup, x_, r);
      Sort(x_.first + r * x_.stride);
      int32_t& count = RestUnits(r)[0] = 0;
      if (!any_rest) continue;
      Sort(x_.rest + r * x_.stride);
      for (int u = 0; u < units_; ++u) {
        bool wanted = false;
        for (int g = u * C::kGroups; g < Min(groups_, (u + 1) * C::kGroups); ++g) wanted |= x_.has_rest[x_.At(g, r)];
        if (wanted) RestUnits(r)[++count] = u;
      }
    }
  }

  size_t scratch_bytes() const {
    const ptrdiff_t row = (1 + 2 * kColumnLanes) * dots_stride_ + sums_stride();
    return static_cast<size_t>(rows_ * row) * sizeof(float);
  }

  void Run(int64_t task, char* scratch) {
    const int n0 = static_cast<int>(task) * plan_.column_block, n1 = Min(n0 + plan_.column_block, p_.N);
    dots_ = reinterpret_cast<int32_t*>(scratch);
    products_ = reinterpret_cast<float*>(dots_ + rows_ * dots_stride_);
    rest_products_ = products_ + rows_ * kColumnLanes * dots_stride_;
    sums_ = rest_products_ + rows_ * kColumnLanes * dots_stride_;
    static_assert(kDirectRowsInteger == 4);
    WithHalf(p_.dtype, [&]<class T>(T*) {
      if (rows_ == 1) return Multiply<1, T>(n0, n1);
      if (rows_ == 2) return Multiply<2, T>(n0, n1);
      if (rows_ == 3) return Multiply<3, T>(n0, n1);
      Multiply<4, T>(n0, n1);
    });
    for (int r = 0; r < rows_; ++r) {
      MendSums(p_, r, n0, n1 - n0, sums_ + r * sums_stride());
      WriteRow(p_, sums_ + r * sums_stride(), r, n0, n1 - n0);
    }
  }

 private:
  void View(char* rows) {
    x_ = IntegerRows(rows_, p_.K, groups_, false, rows);
    rest_units_ = reinterpret_cast<int32_t*>(rows + IntegerRows::Bytes(rows_, p_.K, groups_));
  }
  // How many units of row r have a rest, and which.
  int32_t* RestUnits(int r) const { return rest_units_ + r * (units_ + 1); }
  ptrdiff_t sums_stride() const { return RoundUp(plan_.column_block, kLanes) + kLanes; }

  // Of whole vectors of codes.
  void Sort(int16_t* row) const {
    const int padded = RoundUp(p_.K, C::kCodes);
    std::memset(row + p_.K, 0, static_cast<size_t>(padded - p_.K) * sizeof(*row));
    SortForVectors<kBits>(row, padded);
  }

  float* Products(float* products, int r, int c) const { return products + (r * kColumnLanes + c) * dots_stride_; }

  template <int R, class T>
  HWY_NOINLINE void Multiply(int n0, int n1) {
    const AffineRef& a = p_.w.affine;
    const int bytes = p_.K * kBits / 8;
    for (int n = n0; n < n1; n += kColumnLanes) {
      for (int c = 0; c < kColumnLanes; ++c) {
        const int column = Min(n + c, n1 - 1);
        const T* scales = static_cast<const T*>(a.scales) + column * a.scale_stride;
        const T* biases = static_cast<const T*>(a.biases) + column * a.bias_stride;
        const bool followed = (p_.N - 1 - column) * std::min(a.scale_stride, a.bias_stride) >= kColumnLanes;
        for (int g = 0; g < groups_; g += static_cast<int>(kCacheLine / sizeof(T))) {
          __builtin_prefetch(scales + kColumnLanes * a.scale_stride + g, 0, 3);
          __builtin_prefetch(biases + kColumnLanes * a.bias_stride + g, 0, 3);
        }
        const auto* codes =
            reinterpret_cast<const uint8_t*>(static_cast<const uint32_t*>(p_.w.data) + column * p_.w.stride);
        DotColumn<kBits, kGroup, R>(codes, bytes, x_.first, x_.stride, dots_, dots_stride_);
        MFA_UNROLL
        for (int r = 0; r < R; ++r)
          ScaleDots<kBits>(scales, biases, groups_, followed, dots_ + r * dots_stride_, x_.sum + x_.At(0, r),
                           Products(products_, r, c));
        for (int r = 0; r < R; ++r)
          if (HWY_UNLIKELY(RestUnits(r)[0] > 0)) DotRest(codes, scales, biases, r, c);
      }
      AddGroups<R>(n - n0);
    }
  }

  template <class T>
  HWY_NOINLINE void DotRest(const uint8_t* codes, const T* scales, const T* biases, int r, int c) {
    const int bytes = p_.K * kBits / 8;
    float* products = Products(rest_products_, r, c);
    for (int i = 1; i <= RestUnits(r)[0]; ++i) {
      const int unit = RestUnits(r)[i], first = unit * C::kUnitBytes;
      const uint8_t* from = codes + first;
      HWY_ALIGN uint8_t last[C::kUnitBytes] = {};
      if (HWY_UNLIKELY(first + C::kUnitBytes > bytes)) {
        std::memcpy(last, from, static_cast<size_t>(bytes - first));
        from = last;
      }
      HWY_ALIGN int32_t dots[kLanes];
      DotUnits<kBits, kGroup, 1, 1>(from, x_.rest + r * x_.stride + unit * C::kUnitCodes, 0, dots, 0);
      for (int g = unit * C::kGroups; g < Min(groups_, (unit + 1) * C::kGroups); ++g) {
        using One = hn::CappedTag<float, 1>;
        const auto scale = LoadFloat(One(), scales + g), bias = LoadFloat(One(), biases + g);
        const auto dot = hn::Set(hn::RebindToSigned<One>(), dots[g - unit * C::kGroups]);
        const auto sum = hn::Set(hn::RebindToSigned<One>(), x_.rest_sum[x_.At(g, r)]);
        products[g] = hn::GetLane(GroupProduct<kBits>(One(), scale, dot, CentreOf<kBits>(One(), scale, bias), sum));
      }
    }
  }

  // The sums of the columns whose products are made.
  template <int R>
  HWY_INLINE void AddGroups(int column) {
    MFA_UNROLL
    for (int r = 0; r < R; ++r) {
      const float* from[kColumnLanes];
      for (int c = 0; c < kColumnLanes; ++c) from[c] = Products(products_, r, c);
      const bool any_rest = RestUnits(r)[0] > 0;
      VCol total = hn::Zero(dcol);
      for (int g0 = 0; g0 < groups_; g0 += kColumnLanes) {
        const int count = Min(kColumnLanes, groups_ - g0);
        HWY_ALIGN float products[kColumnLanes][kColumnLanes];
        LoadGroups(from, g0, kColumnLanes, products);  // whole vectors: the buffer is padded
        if (HWY_LIKELY(!any_rest)) {
          const float* scales = x_.scale + x_.At(g0, r);
          for (int i = 0; i < count; ++i)
            total = hn::MulAdd(hn::Set(dcol, scales[i]), hn::Load(dcol, products[i]), total);
          continue;
        }
        for (int i = 0; i < count; ++i) {
          const int at = x_.At(g0 + i, r);
          total = hn::MulAdd(hn::Set(dcol, x_.scale[at]), hn::Load(dcol, products[i]), total);
          if (HWY_LIKELY(!x_.has_rest[at])) continue;
          HWY_ALIGN float rest[kColumnLanes];
          for (int c = 0; c < kColumnLanes; ++c) rest[c] = Products(rest_products_, r, c)[g0 + i];
          total = hn::MulAdd(hn::Set(dcol, x_.scale[at] * kRestScale), hn::Load(dcol, rest), total);
        }
      }
      hn::StoreU(total, dcol, sums_ + r * sums_stride() + column);
    }
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  int rows_, groups_, units_;
  ptrdiff_t dots_stride_;
  IntegerRows x_;
  int32_t* rest_units_ = nullptr;
  int32_t* dots_ = nullptr;                               // [rows, groups], of one column
  float *products_ = nullptr, *rest_products_ = nullptr;  // [rows, kColumnLanes, groups]
  float* sums_ = nullptr;                                 // [rows, columns]
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
