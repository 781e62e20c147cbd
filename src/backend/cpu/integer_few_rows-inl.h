// integer_few_rows-inl.h: products of a few integer rows with codes as they lie in memory. Lanes are terms of a group;
// the sums of some columns' groups are made first, with columns that follow each other in memory as one long column and
// x repeated beside it, then their floating-point part with columns in lanes.

namespace mfa::cpu::MFA_ISA {
namespace {

// Columns whose groups are summed, and added, at once.
using DCol = hn::CappedTag<float, 8>;
using VCol = hn::Vec<DCol>;
constexpr DCol dcol;
constexpr hn::RebindToSigned<DCol> dcoli;
constexpr int kColumnLanes = static_cast<int>(hn::MaxLanes(DCol()));
// Codes are asked for as many bytes before they are needed, and scales and biases as many columns: the processor's own
// prefetchers stop at pages of 4 KB and alone reach two thirds of the rate of memory.
constexpr int kCodesAhead = 8192, kColumnsAhead = 16;

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
    if constexpr (kEach >= 2 && kBlocks > 2) sums[i] = hn::Add(sums[i], hn::SwapAdjacentBlocks(sums[i]));
  }
  VI sum = sums[0];
  if constexpr (kEach == 2 && kBlocks == 2) {
    sum = hn::Add(hn::ConcatLowerLower(di, sums[1], sums[0]), hn::ConcatUpperUpper(di, sums[1], sums[0]));
  } else if constexpr (kEach == 2) {
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

// Lane g of dots[r] = the sum of group g and row r, for U units of vectors.
template <int kBits, int kGroup, int U, int R>
HWY_INLINE void DotUnits(const uint8_t* codes, const int16_t* x, ptrdiff_t x_stride, VI (&dots)[R]) {
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
      auto words = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(codes + vector * C::kBytes));
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
      // Else each shift loads them anew, and where they lie across cache lines that is two loads.
      asm("" : "+v"(words.raw));
#endif
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
    dots[r] = SumsOfGroups<C::kGroups>(sums[r]);
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

// A lane from each of the rows, `stride` apart. Not by way of memory: a load of what several stores wrote waits until
// all have left the processor.
template <class D>
HWY_INLINE hn::Vec<D> LoadLanes(D d, const float* p, ptrdiff_t stride) {
  if constexpr (hn::MaxLanes(D()) > 4) {
    const hn::Half<D> half;
    return hn::Combine(d, LoadLanes(half, p + 4 * stride, stride), LoadLanes(half, p, stride));
  } else {
    const auto two = hn::InsertLane(hn::Set(d, p[0]), 1, p[stride]);
    return hn::InsertLane(hn::InsertLane(two, 2, p[2 * stride]), 3, p[3 * stride]);
  }
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
        period_(WholeUnits(p_.K)),
        bytes_(p_.K * kBits / 8),
        products_stride_(RoundUp(kColumnLanes * groups_, kLanes) + kLanes),
        dense_(p_.w.stride * 32 == int64_t{p_.K} * kBits && p_.w.affine.scale_stride == groups_ &&
               p_.w.affine.bias_stride == groups_) {
    if (job.rows) View(static_cast<char*>(const_cast<void*>(job.rows)));
  }

  // Of rows of x as integers, repeated and sorted for vectors of codes, with their sums repeated and lists of the units
  // that have rests.
  size_t row_bytes() const {
    return integer_bytes() + static_cast<size_t>(rows_ * (repeated_groups() + units_ + 1)) * sizeof(int32_t);
  }
  void Prepare(char* rows) {
    View(rows);
    for (int r = 0; r < rows_; ++r) {
      const bool any_rest = QuantiseRow<kBits>(p_, r, 0, groups_, kGroup, x_, r);
      Repeat(x_.first + r * x_.stride, p_.K, repeated_terms());
      SortForVectors<kBits>(x_.first + r * x_.stride, repeated_terms());
      std::memcpy(Sums(r), x_.sum + x_.At(0, r), static_cast<size_t>(groups_) * sizeof(int32_t));
      Repeat(Sums(r), groups_, repeated_groups());
      int32_t& count = RestUnits(r)[0] = 0;
      if (!any_rest) continue;
      int16_t* rest = x_.rest + r * x_.stride;
      std::memset(rest + p_.K, 0, static_cast<size_t>(RoundUp(p_.K, C::kCodes) - p_.K) * sizeof(*rest));
      SortForVectors<kBits>(rest, RoundUp(p_.K, C::kCodes));
      for (int u = 0; u < units_; ++u) {
        bool wanted = false;
        for (int g = u * C::kGroups; g < Min(groups_, (u + 1) * C::kGroups); ++g) wanted |= x_.has_rest[x_.At(g, r)];
        if (wanted) RestUnits(r)[++count] = u;
      }
    }
  }

  size_t scratch_bytes() const {
    const ptrdiff_t row = 3 * products_stride_ + sums_stride();
    return static_cast<size_t>(rows_ * row) * sizeof(float);
  }

  void Run(int64_t task, char* scratch) {
    const int n0 = static_cast<int>(task) * plan_.column_block, n1 = Min(n0 + plan_.column_block, p_.N);
    products_ = reinterpret_cast<float*>(scratch);
    previous_products_ = products_ + rows_ * products_stride_;
    rest_products_ = previous_products_ + rows_ * products_stride_;
    sums_ = rest_products_ + rows_ * products_stride_;
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
  // The first multiple of `terms` that is whole units.
  static int WholeUnits(int terms) {
    int period = terms;
    while (period % C::kUnitCodes != 0) period += terms;
    return period;
  }
  // All units where a vector of sums may begin, and those that follow the last of them in the vector.
  int repeated_terms() const { return period_ + C::kUnits * C::kUnitCodes; }
  int repeated_groups() const { return repeated_terms() / kGroup; }
  template <class E>
  static void Repeat(E* row, int period, int n) {
    for (int i = period; i < n; i += period)
      std::memcpy(row + i, row, static_cast<size_t>(Min(period, n - i)) * sizeof(E));
  }

  size_t integer_bytes() const { return IntegerRows::Bytes(rows_, repeated_terms(), groups_); }
  void View(char* rows) {
    x_ = IntegerRows(rows_, repeated_terms(), groups_, false, rows);
    x_sums_ = reinterpret_cast<int32_t*>(rows + integer_bytes());
  }
  // Those of the groups of row r, repeated.
  int32_t* Sums(int r) const { return x_sums_ + r * repeated_groups(); }
  // How many units of row r have a rest, and which.
  int32_t* RestUnits(int r) const { return x_sums_ + rows_ * repeated_groups() + r * (units_ + 1); }
  ptrdiff_t sums_stride() const { return RoundUp(plan_.column_block, kLanes) + kLanes; }

  // Of row r and column c.
  float* Products(float* products, int r, int c) const { return products + r * products_stride_ + c * groups_; }

  template <int R, class T>
  HWY_NOINLINE void Multiply(int n0, int n1) {
    const AffineRef& a = p_.w.affine;
    for (int n = n0; n < n1; n += kColumnLanes) {
      const int columns = Min(kColumnLanes, n1 - n), together = dense_ ? columns : 1;
      for (int c = 0; c < columns; c += together)
        MultiplyColumns<R>(n + c, together, static_cast<const T*>(a.scales) + (n + c) * a.scale_stride,
                           static_cast<const T*>(a.biases) + (n + c) * a.bias_stride, Products(products_, 0, c));
      // Only now are all products of the columns before in the first cache. A load that straddles what two stores wrote
      // waits until both are.
      if (n > n0) AddGroups<R>(previous_products_, n - n0 - kColumnLanes);
      for (int r = 0; r < R; ++r)
        if (HWY_UNLIKELY(RestUnits(r)[0] > 0))
          for (int c = 0; c < columns; ++c) DotRest<T>(n + c, r, Products(rest_products_, r, c));
      float* const done = products_;
      products_ = previous_products_;
      previous_products_ = done;
    }
    AddGroups<R>(previous_products_, (n1 - n0 - 1) / kColumnLanes * kColumnLanes);
  }

  const uint8_t* Codes(int column) const {
    return reinterpret_cast<const uint8_t*>(static_cast<const uint32_t*>(p_.w.data) + column * p_.w.stride);
  }

  // products[r * products_stride_ + i] = GroupProduct() of group i of columns that follow each other in memory, as one
  // long column. What follows the last is written too.
  template <int R, class T>
  HWY_INLINE void MultiplyColumns(int column, int columns, const T* scales, const T* biases, float* products) const {
    const AffineRef& a = p_.w.affine;
    const int groups = columns * groups_, period = period_ / kGroup;
    for (int i = 0; i < groups; i += static_cast<int>(kCacheLine / sizeof(T))) {
      __builtin_prefetch(scales + kColumnsAhead * a.scale_stride + i, 0, 3);
      __builtin_prefetch(biases + kColumnsAhead * a.bias_stride + i, 0, 3);
    }
    const uint8_t *codes = Codes(column), *end = codes + columns * bytes_;
    int group = 0;  // of x
    const auto step = [&]<int U>(std::integral_constant<int, U>, const uint8_t* from, const T* s, const T* b)
                          MFA_INLINE_LAMBDA {
                            MFA_UNROLL
                            for (int i = 0; i < U * C::kUnitBytes; i += kCacheLine)
                              __builtin_prefetch(codes + kCodesAhead + i, 0, 3);
                            VI dots[R];
                            DotUnits<kBits, kGroup, U, R>(from, x_.first + group * kGroup, x_.stride, dots);
                            const VF scale = LoadFloat(s), centre = CentreOf<kBits>(df, scale, LoadFloat(b));
                            MFA_UNROLL
                            for (int r = 0; r < R; ++r) {
                              const VI sum = hn::LoadU(di, Sums(r) + group);
                              hn::StoreU(GroupProduct(df, scale, FromMiddle<kBits>(dots[r], sum), centre, sum), df,
                                         products + r * products_stride_);
                            }
                            codes += U * C::kUnitBytes;
                            scales += U * C::kGroups;
                            biases += U * C::kGroups;
                            products += U * C::kGroups;
                            group += U * C::kGroups;
                            while (group >= period) group -= period;
                          };
    while (end - codes >= C::kUnits * C::kUnitBytes)
      step(std::integral_constant<int, C::kUnits>(), codes, scales, biases);
    if (codes == end) return;
    // Scales and biases past the last group may not be there, codes are zero where groups fill no vector.
    const T* scales_end = static_cast<const T*>(a.scales) + (column + columns - 1) * a.scale_stride + groups_;
    T s[C::kUnits * C::kGroups + kLanes] = {}, b[C::kUnits * C::kGroups + kLanes] = {};
    const auto left = static_cast<size_t>(scales_end - scales);
    std::memcpy(s, scales, left * sizeof(T));
    std::memcpy(b, biases, left * sizeof(T));
    for (int i = 0; codes < end; i += C::kGroups) {
      HWY_ALIGN uint8_t unit[C::kUnitBytes] = {};
      std::memcpy(unit, codes, static_cast<size_t>(Min<ptrdiff_t>(C::kUnitBytes, end - codes)));
      step(std::integral_constant<int, 1>(), unit, s + i, b + i);
    }
  }

  // The products of a column's groups with the rest of row r, where it has one.
  template <class T>
  HWY_NOINLINE void DotRest(int column, int r, float* products) const {
    const AffineRef& a = p_.w.affine;
    const T* scales = static_cast<const T*>(a.scales) + column * a.scale_stride;
    const T* biases = static_cast<const T*>(a.biases) + column * a.bias_stride;
    for (int i = 1; i <= RestUnits(r)[0]; ++i) {
      const int unit = RestUnits(r)[i], first = unit * C::kUnitBytes;
      const uint8_t* from = Codes(column) + first;
      HWY_ALIGN uint8_t last[C::kUnitBytes] = {};
      if (HWY_UNLIKELY(first + C::kUnitBytes > bytes_)) {
        std::memcpy(last, from, static_cast<size_t>(bytes_ - first));
        from = last;
      }
      VI sums[1];
      DotUnits<kBits, kGroup, 1, 1>(from, x_.rest + r * x_.stride + unit * C::kUnitCodes, 0, sums);
      HWY_ALIGN int32_t dots[kLanes];
      hn::Store(sums[0], di, dots);
      for (int g = unit * C::kGroups; g < Min(groups_, (unit + 1) * C::kGroups); ++g) {
        using One = hn::CappedTag<float, 1>;
        const auto scale = LoadFloat(One(), scales + g), bias = LoadFloat(One(), biases + g);
        const auto dot = hn::Set(hn::RebindToSigned<One>(), dots[g - unit * C::kGroups]);
        const auto sum = hn::Set(hn::RebindToSigned<One>(), x_.rest_sum[x_.At(g, r)]);
        products[g] = hn::GetLane(
            GroupProduct(One(), scale, FromMiddle<kBits>(dot, sum), CentreOf<kBits>(One(), scale, bias), sum));
      }
    }
  }

  // The sums of the columns whose products these are.
  template <int R>
  HWY_INLINE void AddGroups(float* products, int column) const {
    MFA_UNROLL
    for (int r = 0; r < R; ++r) {
      const float *from = Products(products, r, 0), *x_scales = x_.scale + x_.At(0, r);
      VCol total = hn::Zero(dcol);
      const auto add = [&](int g, VCol product)
                           MFA_INLINE_LAMBDA { total = hn::MulAdd(hn::Set(dcol, x_scales[g]), product, total); };
      int g = 0;
      if (HWY_UNLIKELY(RestUnits(r)[0] > 0)) {
        for (; g < groups_; ++g) {
          add(g, LoadLanes(dcol, from + g, groups_));
          if (!x_.has_rest[x_.At(g, r)]) continue;
          const VCol rest = LoadLanes(dcol, Products(rest_products_, r, 0) + g, groups_);
          total = hn::MulAdd(hn::Set(dcol, x_scales[g] * kRestScale), rest, total);
        }
      }
      for (; g + kColumnLanes <= groups_; g += kColumnLanes) {
        VCol v[kColumnLanes];
        MFA_UNROLL
        for (int c = 0; c < kColumnLanes; ++c) v[c] = hn::LoadU(dcol, from + c * groups_ + g);
        Transpose(dcol, v);
        MFA_UNROLL
        for (int i = 0; i < kColumnLanes; ++i) add(g + i, v[i]);
      }
      for (; g < groups_; ++g) add(g, LoadLanes(dcol, from + g, groups_));
      hn::StoreU(total, dcol, sums_ + r * sums_stride() + column);
    }
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  int rows_, groups_, units_;
  int period_;  // of terms, whole units: after so many, x begins anew where a unit does
  int bytes_;   // of a column's codes
  ptrdiff_t products_stride_;
  bool dense_;  // columns follow each other in memory, their scales and biases too
  IntegerRows x_;
  int32_t* x_sums_ = nullptr;
  // [rows, kColumnLanes, groups], rows products_stride_ apart: of the columns in hand, those before, and rests.
  float *products_ = nullptr, *previous_products_ = nullptr, *rest_products_ = nullptr;
  float* sums_ = nullptr;  // [rows, columns]
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
