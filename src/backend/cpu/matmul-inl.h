// matmul-inl.h: tasks of a matrix product. Every element is summed as linear/problem.h says: blocks of terms dealt to
// chains of multiply-adds, chains added in order. So all kernels, and every tile of them, give an element the same
// bits.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kPanelColumns = kTileVectors * kLanes;
// Rows for which it pays to widen a chain of bfloat16 first: two instructions on the ports that multiply take longer
// than a load.
constexpr int kWidenedRows = 48;
// Packed rows of x; the rest of the second cache holds sums and passing weights.
constexpr size_t kPackedBytes = size_t{224} << 10;

// Rows of x, widened, as the tiles broadcast them. The stride keeps rows a power of two apart out of the same cache
// set.
template <bool kPairs>
constexpr ptrdiff_t PackedStride(int k) {
  return RoundUp(k, 64) + (kPairs ? 32 : 16);
}

// Steps of row r of x from term k0 to k0 + n, widened, and zeros up to whole words of all chains.
template <int kUnit>
HWY_INLINE void LoadSteps(const MatmulProblem& p, int64_t r, int k0, int n, float* out) {
  WithType(p.dtype, [&]<class T>(T*) { WidenRow(static_cast<const T*>(p.x.data) + p.x.at(r) + k0, n, out); });
  for (int i = RoundUp(n, kLanes); i < RoundUp(n, kChains * kUnit); ++i) out[i] = 0.f;
}
template <int kUnit>
HWY_INLINE void LoadSteps(const MatmulProblem& p, int64_t r, int k0, int n, uint32_t* out) {
  const auto* in = static_cast<const bfloat16*>(p.x.data) + p.x.at(r) + k0;
  __builtin_memcpy(out, in, static_cast<size_t>(n) * sizeof(*in));
  auto* rest = reinterpret_cast<bfloat16*>(out);
  for (int i = n; i < RoundUp(n, 2 * kChains * kUnit); ++i) rest[i] = bfloat16{0};
}

// Row r of x as few rows read it: step j of the words of all chains in neighbouring places. E is a step.
template <int kUnit, class E>
HWY_NOINLINE void PackWords(const MatmulProblem& p, int64_t r, int k0, int n, E* out) {
  constexpr int kGroup = kChains * kUnit, kStep = std::is_same_v<E, float> ? 1 : 2;
  for (const int end = k0 + n; k0 < end; k0 += kInnerBlock, out += kInnerBlock / kStep) {
    const int count = Min(kInnerBlock, end - k0);
    if constexpr (kUnit == 1) {
      LoadSteps<kUnit>(p, r, k0, count, out);
    } else {
      HWY_ALIGN E steps[kInnerBlock / kStep];
      LoadSteps<kUnit>(p, r, k0, count, steps);
      for (int g = 0; g < (count + kStep - 1) / kStep; g += kGroup) {
        if constexpr (kUnit % 4 == 0) {
          const hn::CappedTag<float, 4> d4;
          for (int j = 0; j < kUnit; j += 4) {
            hn::Vec<decltype(d4)> v[4];
            MFA_UNROLL
            for (int i = 0; i < 4; ++i) v[i] = hn::LoadU(d4, reinterpret_cast<const float*>(steps) + g + i * kUnit + j);
            Transpose(d4, v);
            MFA_UNROLL
            for (int i = 0; i < 4; ++i) hn::StoreU(v[i], d4, reinterpret_cast<float*>(out) + g + (j + i) * kChains);
          }
        } else {
          for (int j = 0; j < kUnit; ++j) {
            MFA_UNROLL
            for (int i = 0; i < kChains; ++i) out[g + j * kChains + i] = steps[g + i * kUnit + j];
          }
        }
      }
    }
  }
}

// As tiles read it: the steps of a chain in neighbouring places, the chains `length` steps apart.
template <int kUnit, class E>
HWY_NOINLINE void PackChains(const MatmulProblem& p, int64_t r, int k0, int n, int length, E* out) {
  HWY_ALIGN E widened[kInnerBlock];
  const E* steps = widened;
  if (std::is_same_v<E, float> && p.dtype == DType::f32 && n == kChains * length) {
    steps = static_cast<const E*>(p.x.data) + p.x.at(r) + k0;
  } else {
    LoadSteps<kUnit>(p, r, k0, n, widened);
  }
  int i = 0;  // of a chain
  for (; kUnit == 1 && i + 4 * kSides <= length; i += 4 * kSides) {
    VC v[4];
    MFA_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float* at[kSides];
      for (int s = 0; s < kSides; ++s) at[s] = reinterpret_cast<const float*>(steps) + (i + 4 * s + j) * kChains;
      v[j] = LoadSides(dc, at);
    }
    TransposeBlocks(dc, v);
    MFA_UNROLL
    for (int j = 0; j < 4; ++j) hn::StoreU(v[j], dc, reinterpret_cast<float*>(out) + j * length + i);
  }
  for (; i < length; i += kUnit) {
    MFA_UNROLL
    for (int c = 0; c < kChains; ++c) {
      MFA_UNROLL
      for (int j = 0; j < kUnit; ++j) out[c * length + i + j] = steps[i * kChains + c * kUnit + j];
    }
  }
}

// sums[r][c] += the products of `rows` packed rows and a chain of a panel. What is added first is added to zero, not
// stored, so that no sum is -0. What is upcoming is asked for meanwhile, by each chain its share.
template <int NR, class X, class B>
HWY_NOINLINE void MultiplyChain(const X* x, ptrdiff_t x_stride, int rows, const B* panel, int steps, bool first,
                                float* sums, ptrdiff_t sums_stride, const Upcoming& upcoming, int chain) {
  const ptrdiff_t row_bytes = upcoming.bytes() / (kChains * rows);
  ForRowTiles<kTileRows>(0, rows, [&]<int MR>(int r) {
    float* to = sums + r * sums_stride;
    MultiplyTile<MR, NR>(
        x + r * x_stride, StepsAdjacent{x_stride}, panel, kPanelColumns, steps,
        [&](int i, int c, VF acc) MFA_INLINE_LAMBDA {
          float* at = to + i * sums_stride + c * kLanes;
          hn::StoreU(hn::Add(first ? hn::Zero(df) : hn::LoadU(df, at), acc), df, at);
        },
        Ahead{upcoming.At((chain * rows + r) * row_bytes), MR * row_bytes / steps + 1});
  });
}

template <bool kPairs, class Weights>
class Product {
  using Step = Terms<kPairs>;
  using X = typename Step::X;
  using Stored = typename Step::Stored;
  static constexpr int kUnit = Weights::kUnit;
  static constexpr int StepsOf(int terms) { return (terms + Step::kStep - 1) / Step::kStep; }
  // Steps of each chain of a block of `terms` terms; where there are fewer, zeros stand in.
  static constexpr int ChainLength(int terms) { return RoundUp(StepsOf(terms), kChains * kUnit) / kChains; }

 public:
  explicit Product(const MatmulJob& job) : p_(*job.problem), plan_(job.plan), weights_(p_) {}

  size_t scratch_bytes() const {
    if (plan_.kernel == MatmulKernel::direct) {
      const size_t row = static_cast<size_t>(PackedStride<kPairs>(p_.K)) * sizeof(X);
      const size_t sums = size_t{2} * static_cast<size_t>(columns_padded()) * sizeof(float);
      return static_cast<size_t>(packed_rows()) * row + static_cast<size_t>(plan_.row_block) * sums;
    }
    return packed_x_bytes() + panel_bytes() + static_cast<size_t>(sums_rows() * sums_stride()) * sizeof(float);
  }

  void Run(int64_t task, char* scratch) {
    const int64_t r0 = task % plan_.row_blocks * plan_.row_block;
    const int rows = static_cast<int>(Min<int64_t>(plan_.row_block, p_.M - r0));
    const int n0 = static_cast<int>(task / plan_.row_blocks) * plan_.column_block;
    const int n1 = Min(n0 + plan_.column_block, p_.N);
    if constexpr (Weights::kDirect) {
      if (plan_.kernel == MatmulKernel::direct) {
        if (rows == 1) return Direct<1>(r0, rows, n0, n1, scratch);
        if (rows == 2) return Direct<2>(r0, rows, n0, n1, scratch);
        if constexpr (Weights::kByRows) {
          if (rows == 3) return Direct<3>(r0, rows, n0, n1, scratch);
        } else {
          if constexpr (Weights::kSpread && kLanes >= 16) {
            if (rows > kDirectRowsTransposed) return Direct<kDirectRowsWide>(r0, rows, n0, n1, scratch);
          }
          if (rows > 4) return Direct<8>(r0, rows, n0, n1, scratch);
        }
        return Direct<4>(r0, rows, n0, n1, scratch);
      }
    }
    Tiled(r0, rows, n0, n1, scratch);
  }

 private:
  int columns_padded() const { return RoundUp(plan_.column_block, kLanes); }
  // Of a direct task: where rows are interleaved, as many as are multiplied together and one more.
  int packed_rows() const {
    if constexpr (Weights::kByRows) return plan_.row_block;
    int rows = 1;
    while (rows < plan_.row_block) rows *= 2;
    return rows + 1;
  }

  // ---- direct -------------------------------------------------------------------------------------------------------
  template <int R>
  HWY_NOINLINE void Direct(int64_t r0, int rows, int n0, int n1, char* scratch) {
    const ptrdiff_t x_stride = PackedStride<kPairs>(p_.K);
    X* x = reinterpret_cast<X*>(scratch);
    float* sums = reinterpret_cast<float*>(x + packed_rows() * x_stride);
    const auto pack = [&](int r, X* to) { PackWords<kUnit>(p_, r0 + r, 0, p_.K, reinterpret_cast<Stored*>(to)); };
    if constexpr (Weights::kByRows) {
      for (int r = 0; r < rows; ++r) pack(r, x + r * x_stride);
      DirectByRows<R>(r0, n0, n1, x, x_stride, sums);
    } else {
      X* last = R == 1 ? x : x + R * x_stride;
      for (int r = 0; r < R; ++r) {
        if (r < rows) pack(r, last);
        if constexpr (R > 1) {
          constexpr int kTerms = kChains * kUnit * Step::kStep;
          for (int k = 0; k < p_.K; k += kTerms) std::memcpy(x + k * R + r * kTerms, last + k, kTerms * sizeof(X));
        }
      }
      MultiplyFewRows<kPairs, R>(weights_, p_.K, x, rows, n0, n1, sums, columns_padded());
      for (int r = 0; r < rows; ++r) WriteRow(p_, sums + r * columns_padded(), r0 + r, n0, n1 - n0);
    }
  }

  // Long pieces of a few stored rows at a time, the sums of all columns in the first cache.
  template <int R>
  HWY_INLINE void DirectByRows(int64_t r0, int n0, int n1, const X* x, ptrdiff_t x_stride, float* sums) {
    constexpr int kRowsAtATime = 8;
    const int columns = RoundUp(n1 - n0, kLanes);
    float* totals = sums + R * columns;
    Prefetch none;
    for (int i = 0; i < R * columns; i += kLanes) hn::StoreU(hn::Zero(df), df, totals + i);
    for (int k0 = 0; k0 < p_.K; k0 += kInnerBlock) {
      const int steps = StepsOf(Min(kInnerBlock, p_.K - k0)), length = ChainLength(Min(kInnerBlock, p_.K - k0));
      for (int chain = 0; chain < kChains; ++chain) {
        for (int i = 0; i < R * columns; i += kLanes) hn::StoreU(hn::Zero(df), df, sums + i);
        for (int first = 0; first < length; first += kRowsAtATime) {
          // Terms of stored rows, and where x has them. Past the last there is nothing to add.
          int terms[kRowsAtATime], places[kRowsAtATime], count = 0;
          for (int i = first; i < Min(first + kRowsAtATime, length); ++i) {
            const int step = i / kUnit * kChains * kUnit + chain * kUnit + i % kUnit;
            if (step >= steps) break;
            terms[count] = k0 + step * Step::kStep;
            places[count++] = k0 + (i * kChains + chain) * Step::kStep;
          }
          const auto add = [&](auto rows) MFA_INLINE_LAMBDA {
            for (int c = 0; c < columns; c += kLanes) {
              VF acc[R];
              MFA_UNROLL
              for (int r = 0; r < R; ++r) acc[r] = hn::LoadU(df, sums + r * columns + c);
              for (int i = 0; i < rows; ++i) {
                weights_.template Load<1>(
                    n0 + c, 0, terms[i], terms[i] + 1, none, [&](int, int, typename Step::Vector w) MFA_INLINE_LAMBDA {
                      MFA_UNROLL
                      for (int r = 0; r < R; ++r)
                        acc[r] = Accumulate(BroadcastStep(x + r * x_stride + places[i]), w, acc[r]);
                    });
              }
              MFA_UNROLL
              for (int r = 0; r < R; ++r) hn::StoreU(acc[r], df, sums + r * columns + c);
            }
          };
          if (count == kRowsAtATime) {
            add(std::integral_constant<int, kRowsAtATime>());
          } else {
            add(count);
          }
        }
        for (int i = 0; i < R * columns; i += kLanes)
          hn::StoreU(hn::Add(hn::LoadU(df, totals + i), hn::LoadU(df, sums + i)), df, totals + i);
      }
    }
    for (int r = 0; r < R; ++r) WriteRow(p_, totals + r * columns, r0 + r, n0, n1 - n0);
  }

  // ---- tiled --------------------------------------------------------------------------------------------------------
  static constexpr ptrdiff_t kStride = PackedStride<kPairs>(kInnerBlock);

  // Rows of x that are packed at a time.
  int rows_at_once() const {
    const ptrdiff_t row = PackedStride<kPairs>(Min(p_.K, kInnerBlock)) * static_cast<ptrdiff_t>(sizeof(X));
    return Min(plan_.row_block, Max(kTileRows, static_cast<int>(kPackedBytes / row) / kTileRows * kTileRows));
  }
  // Panels of all columns of the task are kept for the rows that follow, if any do.
  bool keeps_panels() const { return !p_.w.packed && plan_.row_block > rows_at_once(); }
  // Elements of a panel's terms [k0, k1).
  static constexpr ptrdiff_t PanelSize(int terms) { return ptrdiff_t{ChainLength(terms)} * kChains * kPanelColumns; }

  size_t packed_x_bytes() const { return (static_cast<size_t>(rows_at_once() * kStride) * sizeof(X) + 63) / 64 * 64; }
  size_t panel_bytes() const {
    const ptrdiff_t panels = keeps_panels() ? plan_.column_block / kPanelColumns : 1;
    return static_cast<size_t>(panels * PanelSize(kInnerBlock)) * sizeof(Stored);
  }
  ptrdiff_t sums_stride() const { return plan_.column_block + 16; }
  // Rows whose sums are kept: where a block is all terms, they are written before the next rows are packed.
  int sums_rows() const { return p_.K <= kInnerBlock ? rows_at_once() : plan_.row_block; }

  void Tiled(int64_t r0, int rows, int n0, int n1, char* scratch) {
    const int at_once = rows_at_once();
    X* x = reinterpret_cast<X*>(scratch);
    Stored* panels = reinterpret_cast<Stored*>(scratch + packed_x_bytes());
    float* sums = reinterpret_cast<float*>(scratch + packed_x_bytes() + panel_bytes());
    if (p_.K == 0) {
      std::memset(sums, 0, static_cast<size_t>(sums_stride()) * sizeof(float));
      for (int r = 0; r < rows; ++r) WriteRow(p_, sums, r0 + r, n0, n1 - n0);
    }
    const int columns = keeps_panels() || p_.w.packed ? n1 - n0 : kPanelColumns;
    for (int k0 = 0; k0 < p_.K; k0 += kInnerBlock) {
      const int k1 = Min(k0 + kInnerBlock, p_.K);
      for (int begin = n0; begin < n1; begin += columns) {
        const int end = Min(begin + columns, n1);
        if (!p_.w.packed) {
          for (int n = begin; n < end; n += kPanelColumns)
            PackPanel(n, k0, k1, panels + (n - begin) / kPanelColumns * PanelSize(k1 - k0));
        }
        for (int r = 0; r < rows; r += at_once) {
          const int count = Min(at_once, rows - r);
          float* to = sums + (sums_rows() < plan_.row_block ? 0 : r) * sums_stride();
          if (begin == n0) PackRows(r0 + r, count, k0, k1, x);
          for (int n = begin; n < end; n += kPanelColumns) {
            const auto multiply = [&](const auto* panel, Stored* widened) {
              const ptrdiff_t bytes = PanelSize(k1 - k0) * static_cast<ptrdiff_t>(sizeof(*panel));
              const Upcoming next = keeps_panels() || widened ? Upcoming{panel + PanelSize(k1 - k0), bytes, bytes, 1}
                                                              : weights_.Next(n + kPanelColumns, k0, k1);
              MultiplyPanel(x, count, panel, widened, k0, k1, Min(kPanelColumns, n1 - n), to + n - n0, next);
            };
            if constexpr (Weights::kPacks) {
              if (p_.w.packed) {
                multiply(PackedPanel(static_cast<const Element*>(p_.w.packed), n, k0, k1), panels);
                continue;
              }
            }
            multiply(panels + (n - begin) / kPanelColumns * PanelSize(k1 - k0), nullptr);
          }
          if (k1 == p_.K && end == n1)
            for (int i = 0; i < count; ++i) WriteRow(p_, to + i * sums_stride(), r0 + r + i, n0, n1 - n0);
        }
      }
    }
  }

  HWY_INLINE void PackRows(int64_t r0, int rows, int k0, int k1, X* x) {
    for (int r = 0; r < rows; ++r) {
      if (r + 2 < rows) FetchRow(p_, r0 + r + 2, k0, k1 - k0);
      PackChains<kUnit>(p_, r0 + r, k0, k1 - k0, ChainLength(k1 - k0), reinterpret_cast<Stored*>(x + r * kStride));
    }
  }

  // sums += packed rows times the terms [k0, k1) of a panel of which `columns` exist. A chain of the panel stays in the
  // first cache while all rows pass, and what is upcoming is brought into the second.
  template <class B>
  HWY_INLINE void MultiplyPanel(const X* x, int rows, const B* panel, Stored* widened, int k0, int k1, int columns,
                                float* sums, const Upcoming& upcoming) {
    const int length = ChainLength(k1 - k0);
    for (int chain = 0; chain < kChains; ++chain, panel += length * kPanelColumns) {
      const auto multiply = [&]<int NR>(const auto* from) {
        MultiplyChain<NR>(x + chain * length * Step::kStep, kStride, rows, from, length, k0 == 0 && chain == 0, sums,
                          sums_stride(), upcoming, chain);
      };
      const auto any_width = [&](const auto* from) {
        if (columns > 2 * kLanes) {
          multiply.template operator()<3>(from);
        } else if (columns > kLanes) {
          multiply.template operator()<2>(from);
        } else {
          multiply.template operator()<1>(from);
        }
      };
      if constexpr (std::is_same_v<B, bfloat16>) {
        if (rows >= kWidenedRows) {
          for (int i = 0; i < length * kPanelColumns; i += kLanes) hn::Store(LoadFloat(panel + i), df, widened + i);
          any_width(widened);
          continue;
        }
      }
      any_width(panel);
    }
  }

  // ---- weights packed ahead -----------------------------------------------------------------------------------------
  // Panels as tasks of many rows bring them in, block after block of terms, in the dtype of the weights.
  using Element = typename Weights::Element;

  template <class E>
  HWY_INLINE E* PackedPanel(E* packed, int n, int k0, int k1) const {
    const ptrdiff_t panels = (p_.N + kPanelColumns - 1) / kPanelColumns;
    return packed + k0 / kInnerBlock * panels * PanelSize(kInnerBlock) + n / kPanelColumns * PanelSize(k1 - k0);
  }

 public:
  size_t packed_bytes() const {
    if constexpr (Weights::kPacks) {
      const ptrdiff_t panels = (p_.N + kPanelColumns - 1) / kPanelColumns;
      const int blocks = p_.K / kInnerBlock;
      const ptrdiff_t elements = blocks * PanelSize(kInnerBlock) + PanelSize(p_.K - blocks * kInnerBlock);
      return static_cast<size_t>(panels * elements) * sizeof(Element);
    }
    return 0;
  }

  // Packs the panel of columns from n on.
  void PackAhead(int n, void* packed) {
    if constexpr (Weights::kPacks) {
      for (int k0 = 0; k0 < p_.K; k0 += kInnerBlock) {
        const int k1 = Min(k0 + kInnerBlock, p_.K);
        Element* to = PackedPanel(static_cast<Element*>(packed), n, k0, k1);
        if constexpr (std::is_same_v<Element, Stored>) {
          PackPanel(n, k0, k1, to);
        } else {
          HWY_ALIGN Stored panel[PanelSize(kInnerBlock)];
          PackPanel(n, k0, k1, panel);
          for (ptrdiff_t i = 0; i < PanelSize(k1 - k0); i += kLanes) StoreFloat(hn::Load(df, panel + i), to + i);
        }
      }
    }
  }

 private:
  // Where a block is all terms, panels follow each other in memory.
  HWY_INLINE Prefetch Following(int n) const {
    if constexpr (!Weights::kByRows) {
      if (p_.K <= kInnerBlock) return Prefetch(weights_.Begin(n));
    }
    return Prefetch();
  }

  // panel[step][column] = the terms of [k0, k1), chain after chain.
  HWY_NOINLINE void PackPanel(int n, int k0, int k1, Stored* panel) {
    const int steps = StepsOf(k1 - k0), length = ChainLength(k1 - k0);
    if (length != chain_length_) {
      chain_length_ = length;
      for (int i = 0; i < length * kChains; ++i)
        row_of_[i] = (ChainOf<kUnit>(i) * length + StepOfChain<kUnit>(i)) * kPanelColumns;
    }
    if (steps < length * kChains) {
      for (int chain = 0; chain < kChains; ++chain)  // the last words may be missing
        std::memset(panel + ((chain + 1) * length - kUnit) * kPanelColumns, 0, sizeof(Stored) * kUnit * kPanelColumns);
    }
    Prefetch ahead = Following(n + kPanelColumns);
    weights_.Prepare(n, kTileVectors, k0, k1);
    for (int vector = 0; vector < kTileVectors; ++vector)
      weights_.template Load<1>(n, vector, k0, k1, ahead, [&](int g, int k, typename Step::Vector w) MFA_INLINE_LAMBDA {
        StoreStep(w, panel + row_of_[(k - k0) / Step::kStep] + g * kLanes);
      });
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  Weights weights_;
  int chain_length_ = 0;
  int32_t row_of_[kInnerBlock];  // where the steps of a block lie in a panel whose chains have chain_length_ steps
};

// Calls f with the Product of the job's dense weights.
template <class F>
HWY_INLINE void WithDenseProduct(const MatmulJob& job, const F& f) {
  WithType(job.problem->dtype, [&]<class T>(T*) {
    constexpr bool kPairs = kNativeBf16 && std::is_same_v<T, bfloat16>;
    if (job.problem->w.transposed) {
      f(Product<kPairs, ColumnWeights<T, kPairs>>(job));
    } else {
      f(Product<kPairs, RowWeights<T, kPairs>>(job));
    }
  });
}

// Calls f with what computes the job's sums of integers by few rows.
template <class F>
HWY_INLINE void WithIntegerFewRows(const MatmulJob& job, const F& f) {
  const AffineRef& affine = job.problem->w.affine;
  const auto groups = [&]<int kBits>(std::integral_constant<int, kBits>) {
    if (affine.group_size == 32) return f(IntegerFewRows<kBits, 32>(job));
    if (affine.group_size == 64) return f(IntegerFewRows<kBits, 64>(job));
    f(IntegerFewRows<kBits, 128>(job));
  };
  if (affine.bits == 4) return groups(std::integral_constant<int, 4>());
  groups(std::integral_constant<int, 8>());
}
inline bool IsIntegerFewRows(const MatmulJob& job) {
  return job.plan.kernel == MatmulKernel::direct && sums_integers(*job.problem);
}

// The same with whatever computes the job.
template <class F>
HWY_INLINE void WithProduct(const MatmulJob& job, const F& f) {
  const WeightRef& w = job.problem->w;
  if (IsIntegerFewRows(job)) return WithIntegerFewRows(job, f);
  if (sums_integers(*job.problem)) {
    if (w.affine.bits == 4) return f(IntegerTiles<4>(job));
    return f(IntegerTiles<8>(job));
  }
  if (!w.quantised()) return WithDenseProduct(job, f);
  const auto run = [&]<bool kPairs, class Weights>(std::bool_constant<kPairs>, Weights*) {
    f(Product<kPairs, Weights>(job));
  };
  const auto affine = [&]<bool kPairs>(std::bool_constant<kPairs> pairs) {
    if (!w.transposed) return run(pairs, static_cast<AffineRowWeights<kPairs>*>(nullptr));
    switch (w.affine.bits) {
      case 2:
        return run(pairs, static_cast<AffineColumnWeights<2, kPairs>*>(nullptr));
      case 3:
        return run(pairs, static_cast<AffineColumnWeights<3, kPairs>*>(nullptr));
      case 5:
        return run(pairs, static_cast<AffineColumnWeights<5, kPairs>*>(nullptr));
      case 6:
        return run(pairs, static_cast<AffineColumnWeights<6, kPairs>*>(nullptr));
    }
    // x is float32: those of 16 bits were sums of integers.
    if constexpr (!kPairs) {
      if (w.affine.bits == 4) return run(pairs, static_cast<AffineColumnWeights<4, false>*>(nullptr));
      run(pairs, static_cast<AffineColumnWeights<8, false>*>(nullptr));
    }
  };
  if constexpr (kNativeBf16) {
    if (job.problem->dtype == DType::bf16) return affine(std::true_type());
  }
  affine(std::false_type());
}

size_t MatmulScratchBytes(const MatmulJob& job) {
  size_t bytes = 0;
  WithProduct(job, [&](auto&& product) { bytes = product.scratch_bytes(); });
  return bytes;
}
void MatmulTask(const MatmulJob& job, int64_t task, void* scratch) {
  WithProduct(job, [&](auto&& product) { product.Run(task, static_cast<char*>(scratch)); });
}

size_t MatmulRowBytes(const MatmulJob& job) {
  size_t bytes = 0;
  if (IsIntegerFewRows(job)) WithIntegerFewRows(job, [&](auto&& product) { bytes = product.row_bytes(); });
  return bytes;
}
void PrepareMatmulRows(const MatmulJob& job, void* rows) {
  WithIntegerFewRows(job, [&](auto&& product) { product.Prepare(static_cast<char*>(rows)); });
}

size_t PackedWeightBytes(const MatmulProblem& p) {
  size_t bytes = 0;
  if (!p.w.quantised()) WithDenseProduct({&p, {}}, [&](auto&& product) { bytes = product.packed_bytes(); });
  return bytes;
}
void PackWeightsTask(const MatmulProblem& p, int64_t task, void* packed) {
  WithDenseProduct({&p, {}},
                   [&](auto&& product) { product.PackAhead(static_cast<int>(task) * kPanelColumns, packed); });
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
