// matmul-inl.h: tasks of a matrix product. Lanes are columns of the result, and every element is summed as
// linear/problem.h says: a chain of multiply-adds over an inner block, blocks added in order. So both kernels, and
// every tile of them, give an element the same bits.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kPanelColumns = kTileVectors * kLanes;
// Packed rows of x for as many inner blocks as fit; the rest of the second cache holds sums and passing weights.
constexpr size_t kPackedBytes = size_t{224} << 10;

// Rows of x, widened, as the tiles broadcast them. The stride keeps rows a power of two apart out of the same cache
// set.
template <bool kPairs>
constexpr ptrdiff_t PackedStride(int k) {
  return RoundUp(k, 32) + (kPairs ? 32 : 16);
}

// Elements [k0, k0 + n) of row r of x.
HWY_NOINLINE void PackRow(const MatmulProblem& p, int64_t r, int k0, int n, float* out) {
  WithType(p.dtype, [&]<class T>(T*) { WidenRow(static_cast<const T*>(p.x.data) + p.x.at(r) + k0, n, out); });
}
HWY_INLINE void PackRow(const MatmulProblem& p, int64_t r, int k0, int n, bfloat16* out) {
  __builtin_memcpy(out, static_cast<const bfloat16*>(p.x.data) + p.x.at(r) + k0, static_cast<size_t>(n) * sizeof(*out));
  out[n] = bfloat16{0};  // the partner of the last term if n is odd; a row has room for it
}

// sums[r][c] += the products of `rows` packed rows and a panel, `steps` terms of an inner block. The first block is
// added to zero, not stored, so that no sum is -0.
template <bool kPairs, int NR>
HWY_NOINLINE void MultiplyPanel(const typename Terms<kPairs>::X* x, ptrdiff_t x_stride, int rows,
                                const typename Terms<kPairs>::Stored* panel, int steps, bool first, float* sums,
                                ptrdiff_t sums_stride) {
  ForRowTiles<kTileRows>(0, rows, [&]<int MR>(int r) {
    float* to = sums + r * sums_stride;
    MultiplyTile<MR, NR>(x + r * x_stride, StepsAdjacent{x_stride}, panel, kPanelColumns, steps,
                         [&](int i, int c, VF acc) MFA_INLINE_LAMBDA {
                           float* at = to + i * sums_stride + c * kLanes;
                           hn::StoreU(hn::Add(first ? hn::Zero(df) : hn::LoadU(df, at), acc), df, at);
                         });
  });
}

// The added terms of a vector of columns, the first `count` of which exist.
template <class T>
HWY_INLINE VF LoadAddend(const T* c, ptrdiff_t stride, int count) {
  if (stride == 1 && count == kLanes) return LoadFloat(c);
  T lanes[kLanes] = {};
  for (int j = 0; j < count; ++j) lanes[j] = c[j * stride];
  return LoadFloat(lanes);
}

// Writes `count` columns from n on of row r: alpha * sum + beta * c, rounded once.
HWY_NOINLINE void WriteRow(const MatmulProblem& p, const float* sums, int64_t r, int n, int count) {
  WithType(p.dtype, [&]<class T>(T*) {
    T* out = static_cast<T*>(p.out) + p.out_at(r) + n;
    const T* c = static_cast<const T*>(p.c.data);
    if (c) c += r * p.c.row_stride + n * p.c.column_stride;
    const bool plain = !c && p.alpha == 1.f;
    for (int i = 0; i < count; i += kLanes) {
      const int left = Min(kLanes, count - i);
      VF v = hn::LoadU(df, sums + i);
      if (!plain) v = hn::Mul(v, hn::Set(df, p.alpha));
      if (c) v = hn::MulAdd(hn::Set(df, p.beta), LoadAddend(c + i * p.c.column_stride, p.c.column_stride, left), v);
      if (left == kLanes) {
        StoreFloat(v, out + i);
      } else {
        T last[kLanes];
        StoreFloat(v, last);
        for (int j = 0; j < left; ++j) out[i + j] = last[j];
      }
    }
  });
}

template <bool kPairs, class Weights>
class Product {
  using Step = Terms<kPairs>;
  using X = typename Step::X;
  using Stored = typename Step::Stored;

 public:
  explicit Product(const MatmulJob& job) : p_(*job.problem), plan_(job.plan), weights_(p_) {}

  size_t scratch_bytes() const {
    if (plan_.kernel == MatmulKernel::direct) {
      const size_t sums = Weights::kByRows ? size_t{2} * kDirectRows * static_cast<size_t>(columns_padded()) : 0;
      return kDirectRows * static_cast<size_t>(PackedStride<kPairs>(p_.K)) * sizeof(X) + sums * sizeof(float) + 64;
    }
    return packed_x_bytes() + panel_bytes() + static_cast<size_t>(plan_.row_block * sums_stride()) * sizeof(float);
  }

  void Run(int64_t task, void* scratch) {
    const int64_t r0 = task % plan_.row_blocks * plan_.row_block;
    const int rows = static_cast<int>(Min<int64_t>(plan_.row_block, p_.M - r0));
    const int n0 = static_cast<int>(task / plan_.row_blocks) * plan_.column_block;
    const int n1 = Min(n0 + plan_.column_block, p_.N);
    if constexpr (Weights::kDirect) {
      if (plan_.kernel == MatmulKernel::direct) {
        char* to = static_cast<char*>(scratch);
        if constexpr (Weights::kByRows) {
          if (rows == 2) return Direct<2>(r0, n0, n1, to);
          if (rows == 3) return Direct<3>(r0, n0, n1, to);
          if (rows == 4) return Direct<4>(r0, n0, n1, to);
        }
        return Direct<1>(r0, n0, n1, to);
      }
    }
    Tiled(r0, rows, n0, n1, static_cast<char*>(scratch));
  }

 private:
  int columns_padded() const { return RoundUp(plan_.column_block, kLanes); }

  // ---- direct -------------------------------------------------------------------------------------------------------
  template <int R>
  HWY_NOINLINE void Direct(int64_t r0, int n0, int n1, char* scratch) {
    const ptrdiff_t x_stride = PackedStride<kPairs>(p_.K);
    X* x = reinterpret_cast<X*>(scratch);
    for (int r = 0; r < R; ++r) PackRow(p_, r0 + r, 0, p_.K, x + r * x_stride);
    if constexpr (Weights::kByRows) {
      DirectByRows<R>(r0, n0, n1, x, x_stride, reinterpret_cast<float*>(x + kDirectRows * x_stride));
    } else {
      DirectByColumns(r0, n0, n1, x);
    }
  }

  // A few vectors of columns at a time, their sums in registers.
  HWY_INLINE void DirectByColumns(int64_t r0, int n0, int n1, const X* x) {
    constexpr int G = Weights::kDirectVectors;
    for (int n = n0; n < n1; n += G * kLanes) {
      HWY_ALIGN float totals[G * kLanes] = {};
      Prefetch ahead(weights_.Begin(n + G * kLanes));
      for (int k0 = 0; k0 < p_.K; k0 += kInnerBlock) {
        const int k1 = Min(k0 + kInnerBlock, p_.K);
        weights_.Prepare(n, G, k0, k1);
        VF sums[G];
        MFA_UNROLL
        for (int g = 0; g < G; ++g) sums[g] = hn::Zero(df);
        weights_.template Load<G>(n, 0, k0, k1, ahead, [&](int g, int k, typename Step::Vector w) MFA_INLINE_LAMBDA {
          sums[g] = Accumulate(BroadcastStep(x + k), w, sums[g]);
        });
        MFA_UNROLL
        for (int g = 0; g < G; ++g) {
          float* total = totals + g * kLanes;
          hn::Store(hn::Add(hn::Load(df, total), sums[g]), df, total);
        }
      }
      WriteRow(p_, totals, r0, n, Min(G * kLanes, n1 - n));
    }
  }

  // Long pieces of a few stored rows at a time, the sums of all columns in the first cache.
  template <int R>
  HWY_INLINE void DirectByRows(int64_t r0, int n0, int n1, const X* x, ptrdiff_t x_stride, float* sums) {
    const int columns = RoundUp(n1 - n0, kLanes);
    float* totals = sums + R * columns;
    Prefetch none;
    for (int i = 0; i < R * columns; i += kLanes) hn::StoreU(hn::Zero(df), df, totals + i);
    for (int k0 = 0; k0 < p_.K; k0 += kInnerBlock) {
      const int k1 = Min(k0 + kInnerBlock, p_.K);
      for (int i = 0; i < R * columns; i += kLanes) hn::StoreU(hn::Zero(df), df, sums + i);
      for (int k = k0; k < k1; k += Weights::kChunk) {
        const int last = Min(k + Weights::kChunk, k1);
        for (int c = 0; c < columns; c += kLanes) {
          VF acc[R];
          MFA_UNROLL
          for (int r = 0; r < R; ++r) acc[r] = hn::LoadU(df, sums + r * columns + c);
          weights_.template Load<1>(n0 + c, 0, k, last, none,
                                    [&](int, int kk, typename Step::Vector w) MFA_INLINE_LAMBDA {
                                      MFA_UNROLL
                                      for (int r = 0; r < R; ++r)
                                        acc[r] = Accumulate(BroadcastStep(x + r * x_stride + kk), w, acc[r]);
                                    });
          MFA_UNROLL
          for (int r = 0; r < R; ++r) hn::StoreU(acc[r], df, sums + r * columns + c);
        }
      }
      for (int i = 0; i < R * columns; i += kLanes)
        hn::StoreU(hn::Add(hn::LoadU(df, totals + i), hn::LoadU(df, sums + i)), df, totals + i);
    }
    for (int r = 0; r < R; ++r) WriteRow(p_, totals + r * columns, r0 + r, n0, n1 - n0);
  }

  // ---- tiled --------------------------------------------------------------------------------------------------------
  int blocks_packed() const {
    const size_t block = static_cast<size_t>(plan_.row_block * PackedStride<kPairs>(kInnerBlock)) * sizeof(X);
    const int all = (p_.K + kInnerBlock - 1) / kInnerBlock;
    return Min(all, Max(1, static_cast<int>(kPackedBytes / block)));
  }
  size_t packed_x_bytes() const {
    const size_t bytes =
        static_cast<size_t>(blocks_packed() * plan_.row_block * PackedStride<kPairs>(kInnerBlock)) * sizeof(X);
    return (bytes + 63) / 64 * 64;
  }
  static constexpr size_t panel_bytes() { return size_t{kInnerBlock / Step::kStep} * kPanelColumns * sizeof(Stored); }
  ptrdiff_t sums_stride() const { return plan_.column_block + 16; }

  void Tiled(int64_t r0, int rows, int n0, int n1, char* scratch) {
    constexpr ptrdiff_t kStride = PackedStride<kPairs>(kInnerBlock);
    const int blocks = blocks_packed();
    // With all terms packed at once, panels are read in the order of memory.
    const bool next_panel_follows = blocks * kInnerBlock >= p_.K;
    X* x = reinterpret_cast<X*>(scratch);
    Stored* panel = reinterpret_cast<Stored*>(scratch + packed_x_bytes());
    float* sums = reinterpret_cast<float*>(scratch + packed_x_bytes() + panel_bytes());
    if (p_.K == 0) std::memset(sums, 0, static_cast<size_t>(rows * sums_stride()) * sizeof(float));
    for (int outer = 0; outer < p_.K; outer += blocks * kInnerBlock) {
      const int end = Min(outer + blocks * kInnerBlock, p_.K);
      for (int k0 = outer; k0 < end; k0 += kInnerBlock) {
        X* to = x + (k0 - outer) / kInnerBlock * rows * kStride;
        for (int r = 0; r < rows; ++r) PackRow(p_, r0 + r, k0, Min(kInnerBlock, end - k0), to + r * kStride);
      }
      for (int n = n0; n < n1; n += kPanelColumns) {
        const int vectors = Min(kTileVectors, (n1 - n + kLanes - 1) / kLanes);
        Prefetch ahead = NextPanel(next_panel_follows, n + kPanelColumns);
        for (int k0 = outer; k0 < end; k0 += kInnerBlock) {
          const int k1 = Min(k0 + kInnerBlock, end);
          const X* block = x + (k0 - outer) / kInnerBlock * rows * kStride;
          PackPanel(n, k0, k1, ahead, panel);
          const auto multiply = [&]<int NR>(std::integral_constant<int, NR>) {
            MultiplyPanel<kPairs, NR>(block, kStride, rows, panel, (k1 - k0 + Step::kStep - 1) / Step::kStep, k0 == 0,
                                      sums + (n - n0), sums_stride());
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
    }
    for (int r = 0; r < rows; ++r) WriteRow(p_, sums + r * sums_stride(), r0 + r, n0, n1 - n0);
  }

  HWY_INLINE Prefetch NextPanel(bool follows, int n) const {
    if constexpr (!Weights::kByRows) {
      if (follows) return Prefetch(weights_.Begin(n));
    }
    return Prefetch();
  }

  // panel[step][column] = the terms of [k0, k1).
  HWY_NOINLINE void PackPanel(int n, int k0, int k1, Prefetch& ahead, Stored* panel) {
    weights_.Prepare(n, kTileVectors, k0, k1);
    for (int vector = 0; vector < kTileVectors; ++vector)
      weights_.template Load<1>(n, vector, k0, k1, ahead, [&](int g, int k, typename Step::Vector w) MFA_INLINE_LAMBDA {
        StoreStep(w, panel + (k - k0) / Step::kStep * kPanelColumns + g * kLanes);
      });
  }

  const MatmulProblem& p_;
  const MatmulPlan& plan_;
  Weights weights_;
};

// Calls f with the Product of the job's weights.
template <class F>
HWY_INLINE void WithProduct(const MatmulJob& job, const F& f) {
  const WeightRef& w = job.problem->w;
  const auto run = [&]<bool kPairs, class Weights>(std::bool_constant<kPairs>, Weights*) {
    Product<kPairs, Weights> product(job);
    f(product);
  };
  if (!w.quantised()) {
    WithType(job.problem->dtype, [&]<class T>(T*) {
      constexpr std::bool_constant<kNativeBf16 && std::is_same_v<T, bfloat16>> kPairs;
      if (w.transposed) {
        run(kPairs, static_cast<ColumnWeights<T, kPairs()>*>(nullptr));
      } else {
        run(kPairs, static_cast<RowWeights<T, kPairs()>*>(nullptr));
      }
    });
    return;
  }
  const auto affine = [&]<bool kPairs>(std::bool_constant<kPairs> pairs) {
    if (!w.transposed) return run(pairs, static_cast<AffineRowWeights<kPairs>*>(nullptr));
    switch (w.affine.bits) {
      case 2:
        return run(pairs, static_cast<AffineColumnWeights<2, kPairs>*>(nullptr));
      case 3:
        return run(pairs, static_cast<AffineColumnWeights<3, kPairs>*>(nullptr));
      case 4:
        return run(pairs, static_cast<AffineColumnWeights<4, kPairs>*>(nullptr));
      case 5:
        return run(pairs, static_cast<AffineColumnWeights<5, kPairs>*>(nullptr));
      case 6:
        return run(pairs, static_cast<AffineColumnWeights<6, kPairs>*>(nullptr));
      default:
        return run(pairs, static_cast<AffineColumnWeights<8, kPairs>*>(nullptr));
    }
  };
  if constexpr (kNativeBf16) {
    if (job.problem->dtype == DType::bf16) return affine(std::true_type());
  }
  affine(std::false_type());
}

size_t MatmulScratchBytes(const MatmulJob& job) {
  size_t bytes = 0;
  WithProduct(job, [&](auto& product) { bytes = product.scratch_bytes(); });
  return bytes;
}
void MatmulTask(const MatmulJob& job, int64_t task, void* scratch) {
  WithProduct(job, [&](auto& product) { product.Run(task, scratch); });
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
