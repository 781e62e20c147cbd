// backward-inl.h: gradients of attention, lanes = query rows for the scores, channels for dK and dV.
//
// A task owns a range of keys of one KV head. For each block of keys it walks the row tiles that see them, recomputes
//   P = exp2(S - lse),   dS = P (dP - delta),   dP = dO V^T
// and accumulates dV += P^T dO, dK += dS^T Q and dQ += dS K. dK and dV stay in the task; dQ goes to the task's own
// partial, summed in a fixed order afterwards, so that no result depends on the number of threads. Source: Dao et al.,
// arXiv:2205.14135, section B.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kBackwardKeys = 256;  // keys per block: for each of them all rows are brought in and packed once
constexpr ptrdiff_t kKeyPanel = PanelStride(kBackwardKeys);
constexpr int kRowPad = 16;  // floats between rows: rows a power of two apart would share a few cache sets

struct BackwardScratch {
  RowTile tile;
  alignas(64) float lse[kBackwardRowTile];  // base-2; +inf for rows that see nothing, so that P = 0
  alignas(64) float delta[kBackwardRowTile];
  float *qt, *dot;  // [group][D][width] base-2 units, [group][Dv][width]
  float *q, *d_o;   // [row][padded D + kRowPad], [row][padded Dv + kRowPad]
  float *s, *dp,
      *dr;  // [kBackwardKeys][kBackwardRowTile]: P, dS, derivative of softcap
  float* bias;
  int32_t* mask;
  float *k, *v;     // [kBackwardKeys][padded], widened
  float* k_panels;  // panels of kBackwardKeys rows, D columns
  float *dk, *dv;   // [kBackwardKeys][padded]
  size_t bytes;

  BackwardScratch(const AttentionProblem& p, char* base) {
    size_t at = 0;
    const auto take = [&](size_t count) {
      float* out = reinterpret_cast<float*>(base + at);
      at += (count * sizeof(float) + 63) / 64 * 64;
      return out;
    };
    const size_t d = RoundUp(p.D, kLanes), d_v = RoundUp(p.Dv, kLanes);
    const size_t block = static_cast<size_t>(kBackwardKeys) * kBackwardRowTile;
    const ScoreSteps steps(p);
    qt = take(d * kBackwardRowTile);
    dot = take(d_v * kBackwardRowTile);
    q = take((d + kRowPad) * kBackwardRowTile);
    d_o = take((d_v + kRowPad) * kBackwardRowTile);
    s = take(block);
    dp = take(block);
    dr = take(steps.softcap ? block : 0);
    bias = take(steps.bias ? static_cast<size_t>(kBackwardKeys) * kGroupRows : 0);
    mask = reinterpret_cast<int32_t*>(take(steps.mask ? static_cast<size_t>(kBackwardKeys) * kGroupRows : 0));
    k = take(p.dtype == DType::f32 ? 0 : kBackwardKeys * d);
    v = take(p.dtype == DType::f32 ? 0 : kBackwardKeys * d_v);
    k_panels = take(PanelFloats(kBackwardKeys, p.D));
    dk = take(kBackwardKeys * d);
    dv = take(kBackwardKeys * d_v);
    bytes = at;
  }
};

class Backward {
 public:
  Backward(const BackwardJob& job, void* scratch)
      : job_(job),
        p_(*job.problem),
        steps_(p_),
        d_padded_(RoundUp(p_.D, kLanes)),
        dv_padded_(RoundUp(p_.Dv, kLanes)),
        q_stride_(d_padded_ + kRowPad),
        d_o_stride_(dv_padded_ + kRowPad),
        x_(p_, static_cast<char*>(scratch)) {}

  size_t scratch_bytes() const { return x_.bytes; }

  void Run(int64_t task) {
    const BackwardPlan& plan = job_.plan;
    const int64_t heads = int64_t{p_.B} * p_.Hkv;
    head_ = task % heads;
    partition_ = static_cast<int>(task / heads);
    const int64_t partition_keys = int64_t{plan.partition_blocks} * kKeyBlock;
    const int64_t first = partition_ * partition_keys, last = Min<int64_t>(p_.Nk, first + partition_keys);
    for (float* rows : {job_.dslope_rows, job_.ds_rows})
      if (rows) __builtin_memset(TaskRows(rows), 0, static_cast<size_t>(plan.rows) * sizeof(float));
    for (int64_t k0 = first; k0 < last; k0 += kBackwardKeys)
      Keys(k0, static_cast<int>(Min<int64_t>(kBackwardKeys, last - k0)), k0 == first);
    if (first >= last)
      for (int tile = 0; tile < row_tiles(); ++tile) ClearPartial(tile);
  }

  // Sums the partials of one row tile and writes dq.
  void ReduceQueries(int64_t index) {
    const BackwardPlan& plan = job_.plan;
    const int tiles = row_tiles();
    head_ = index / tiles;
    const int tile = static_cast<int>(index % tiles);
    FillTile(tile);
    float* sum = x_.qt;  // [group][D][width]
    const int64_t size = int64_t{width_} * p_.D;
    for (int part = 0; part < plan.key_partitions; ++part) {
      const float* from = PartialTile(part, tile);
      for (int64_t i = 0; i < size; i += kLanes) {
        const VF x = hn::Load(df, from + i);
        hn::Store(part == 0 ? x : hn::Add(hn::Load(df, sum + i), x), df, sum + i);
      }
    }
    if (job_.ds_rows) CorrectQueries(sum);
    alignas(64) float scale[kLanes];
    for (float& f : scale) f = p_.scale;
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
        const int width = Min(kGroupRows, width_ - g0);
        for (int r = 0; r < width; r += kLanes) {
          const int real = Min(kLanes, x_.tile.count - g0 - r);
          T* rows[kLanes];
          for (int i = 0; i < real; ++i)
            rows[i] = RowPointer<T>(job_.out->dq, x_.tile.b, x_.tile.head[g0 + r + i], x_.tile.query[g0 + r + i]);
          UnpackTransposed(sum + static_cast<ptrdiff_t>(g0) * p_.D + r, width, p_.D, scale, rows, real);
        }
      }
    });
  }

  // dbias over one region of the bias: see bias_gradient-inl.h.
  template <class Visit>
  void VisitScores(int b, int head, int64_t row, int count, int64_t k0, int keys, const Visit& visit) {
    head_ = int64_t{b} * p_.Hkv + head;
    FillRowTile(p_, b, head, row, count, RoundUp(count, kLanes), x_.tile);
    width_ = RoundUp(count, kLanes);
    const BlockKeys seen = KeysOfBlock(x_.tile, 0, width_, k0, keys);
    if (seen.empty()) return;
    LoadRows();
    LoadKeys(k0, keys);
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) Scores(g0, k0, seen);
    visit(x_.tile, seen, x_.dp);
  }

 private:
  int row_tiles() const { return (job_.plan.rows + job_.plan.row_tile - 1) / job_.plan.row_tile; }

  float* PartialTile(int partition, int tile) const {
    const int64_t index = (head_ * job_.plan.key_partitions + partition) * row_tiles() + tile;
    return job_.dq_partials + index * int64_t{p_.D} * job_.plan.row_tile;
  }

  void ClearPartial(int tile) {
    if (!job_.out->dq.data) return;
    const size_t size = static_cast<size_t>(p_.D) * static_cast<size_t>(job_.plan.row_tile);
    __builtin_memset(PartialTile(partition_, tile), 0, size * sizeof(float));
  }
  // This task's part of an array [B * Hkv, key_partitions, rows].
  float* TaskRows(float* rows) const {
    return rows + (head_ * job_.plan.key_partitions + partition_) * int64_t{job_.plan.rows};
  }

  void FillTile(int tile) {
    first_row_ = int64_t{tile} * job_.plan.row_tile;
    const int count = static_cast<int>(Min<int64_t>(job_.plan.row_tile, job_.plan.rows - first_row_));
    width_ = RoundUp(count, kLanes);
    FillRowTile(p_, static_cast<int>(head_ / p_.Hkv), static_cast<int>(head_ % p_.Hkv), first_row_, count, width_,
                x_.tile);
  }

  void LoadKeys(int64_t k0, int keys) {
    const int b = static_cast<int>(head_ / p_.Hkv), h = static_cast<int>(head_ % p_.Hkv);
    WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
      k_ = WidenBlock<T>(p_.k, b, h, k0, 0, keys, p_.D, x_.k, &k_stride_);
      v_ = WidenBlock<T>(p_.v, b, h, k0, 0, keys, p_.Dv, x_.v, &v_stride_);
    });
    if (job_.out->dq.data) PackPanels(k_, k_stride_, 0, keys, p_.D, kKeyPanel, x_.k_panels);
  }

  // Packs the rows of the tile. Rows that see no key have no gradient: they are zero here, whatever they hold.
  void LoadRows() {
    const RowTile& t = x_.tile;
    for (int r = 0; r < width_; ++r) {
      float* q = x_.q + r * q_stride_;
      float* d_o = x_.d_o + r * d_o_stride_;
      const int64_t index = (int64_t{t.b} * p_.Hq + t.head[r]) * p_.Nq + t.query[r];
      const float lse = job_.in->lse[index];
      const bool live = r < t.count && t.begin[r] < t.end[r] && lse != -kInf;
      x_.lse[r] = !live ? kInf : job_.in->lse_base2 ? lse : Base2Lse(lse);
      x_.delta[r] = live ? job_.delta[index] : 0.f;
      if (live) {
        WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
          WidenRow(RowPointer<T>(p_.q, t.b, t.head[r], t.query[r]), p_.D, q);
          WidenRow(RowPointer<T>(job_.in->d_o, t.b, t.head[r], t.query[r]), p_.Dv, d_o);
        });
      } else {
        for (int i = 0; i < d_padded_; i += kLanes) hn::Store(hn::Zero(df), df, q + i);
        for (int i = 0; i < dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, d_o + i);
      }
    }
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
      const int width = Min(kGroupRows, width_ - g0);
      for (int r = 0; r < width; r += kLanes) {
        const float *q[kLanes], *d_o[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          q[i] = x_.q + (g0 + r + i) * q_stride_;
          d_o[i] = x_.d_o + (g0 + r + i) * d_o_stride_;
        }
        PackTransposed(q, p_.D, p_.scale * kLog2e, x_.qt + static_cast<ptrdiff_t>(g0) * p_.D + r, width);
        PackTransposed(d_o, p_.Dv, 1.f, x_.dot + static_cast<ptrdiff_t>(g0) * p_.Dv + r, width);
      }
    }
  }

  // `first`: the partials of dQ hold nothing yet.
  void Keys(int64_t k0, int keys, bool first) {
    LoadKeys(k0, keys);
    for (int i = 0; i < keys * d_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dk + i);
    for (int i = 0; i < keys * dv_padded_; i += kLanes) hn::Store(hn::Zero(df), df, x_.dv + i);
    int nonfinite = -1;
    for (int tile = 0; tile < row_tiles(); ++tile) {
      FillTile(tile);
      const BlockKeys seen = KeysOfBlock(x_.tile, 0, width_, k0, keys);
      if (seen.empty()) {
        if (first) ClearPartial(tile);
        continue;
      }
      LoadRows();
      bool hides = !seen.full || steps_.mask || steps_.bias;
      if (hides && nonfinite < 0) nonfinite = AnyNonFinite(k_, k_stride_, keys, p_.D);
      if (hides && nonfinite <= 0) {
        hides = AnyNonFinite(x_.q, q_stride_, width_, p_.D) || AnyNonFinite(x_.d_o, d_o_stride_, width_, p_.Dv);
      }
      for (int g0 = 0; g0 < width_; g0 += kGroupRows) Scores(g0, k0, seen);
      if (job_.dslope_rows) AccumulateSlopes(k0, seen);
      if (job_.ds_rows) AccumulateRowSums(seen);
      if (job_.out->dv.data) {
        if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, 0, width_, k0, seen.lo, seen.hi, x_.s, kBackwardRowTile);
        AccumulateKeys(x_.s, x_.d_o, d_o_stride_, p_.Dv, seen, hides, x_.dv);
      }
      if (steps_.softcap)
        for (int k = seen.lo; k < seen.hi; ++k)
          for (int r = 0; r < width_; r += kLanes) {
            const ptrdiff_t at = k * kBackwardRowTile + r;
            const VF ds = hn::Load(df, x_.dp + at);
            // dS is exactly 0 where nothing is visible, and the derivative there may be NaN.
            hn::Store(hn::IfThenElse(hn::Eq(ds, hn::Zero(df)), ds, hn::Mul(ds, hn::Load(df, x_.dr + at))), df,
                      x_.dp + at);
          }
      if (job_.out->dk.data) AccumulateKeys(x_.dp, x_.q, q_stride_, p_.D, seen, hides, x_.dk);
      if (job_.out->dq.data) AccumulateQueries(tile, k0, keys, hides, first);
    }
    WriteKeys(k0, keys);
  }

  // P into s and dS (before softcap's derivative) into dp, for the rows of a column group and the keys that the tile
  // sees; zero where not visible.
  void Scores(int g0, int64_t k0, const BlockKeys& keys) {
    const int vectors = Min(kGroupRows, width_ - g0) / kLanes;
    if (vectors == 1) {
      GroupScores<1>(g0, k0, keys);
    } else if (vectors == 2) {
      GroupScores<2>(g0, k0, keys);
    } else {
      GroupScores<kTileVectors>(g0, k0, keys);
    }
  }

  template <int NR>
  HWY_NOINLINE void GroupScores(int g0, int64_t k0, const BlockKeys& keys) {
    constexpr int kWidth = NR * kLanes;
    float *S = x_.s + g0, *dP = x_.dp + g0;
    const BlockKeys seen = KeysOfBlock(x_.tile, g0, kWidth, k0, keys.hi);
    const int lo = Min(Max(keys.lo, seen.lo), keys.hi), hi = Max(lo, seen.hi);
    for (int k = keys.lo; k < keys.hi; ++k) {
      if (k == lo) k = hi;
      if (k >= keys.hi) break;
      for (int c = 0; c < NR; ++c) {
        hn::Store(hn::Zero(df), df, S + k * kBackwardRowTile + c * kLanes);
        hn::Store(hn::Zero(df), df, dP + k * kBackwardRowTile + c * kLanes);
      }
    }
    if (lo >= hi) return;
    const float* qt = x_.qt + static_cast<ptrdiff_t>(g0) * p_.D;
    const float* dot = x_.dot + static_cast<ptrdiff_t>(g0) * p_.Dv;
    ForRowTiles<kTileRows>(lo, hi, [&]<int MR>(int k) HWY_ATTR {
      PrefetchRows(g0, k, MR, keys);
      MultiplyTile<MR, NR>(k_ + k * k_stride_, StepsAdjacent{k_stride_}, qt, kWidth, p_.D,
                           [&](int r, int c, VF s)
                               HWY_ATTR { hn::Store(s, df, S + (k + r) * kBackwardRowTile + c * kLanes); });
      MultiplyTile<MR, NR>(v_ + k * v_stride_, StepsAdjacent{v_stride_}, dot, kWidth, p_.Dv,
                           [&](int r, int c, VF s)
                               HWY_ATTR { hn::Store(s, df, dP + (k + r) * kBackwardRowTile + c * kLanes); });
    });
    if (p_.dropout_p > 0.f) ApplyDropout(p_, x_.tile, g0, kWidth, k0, lo, hi, dP, kBackwardRowTile);

    const bool plain = seen.full && !steps_.any();
    if (!plain) {
      for (int c = 0; c < NR; ++c) {
        if (steps_.mask) PackMask(p_, x_.tile, g0 + c * kLanes, k0 + lo, hi - lo, x_.mask + c * kLanes, kWidth);
        if (steps_.bias) PackBias(p_, x_.tile, g0 + c * kLanes, k0 + lo, hi - lo, x_.bias + c * kLanes, kWidth);
      }
      VF ignored[NR];
      for (int c = 0; c < NR; ++c) ignored[c] = hn::Zero(df);
      ApplyScoreSteps<NR>(p_, steps_, x_.tile, g0, k0, lo, hi, x_.bias, x_.mask, S, kBackwardRowTile, ignored,
                          steps_.softcap ? x_.dr + g0 : nullptr);
    }
    VF lse[NR], delta[NR];
    MFA_UNROLL
    for (int c = 0; c < NR; ++c) {
      lse[c] = hn::Load(df, x_.lse + g0 + c * kLanes);
      delta[c] = hn::Load(df, x_.delta + g0 + c * kLanes);
    }
    for (int k = lo; k < hi; ++k) {
      MFA_UNROLL
      for (int c = 0; c < NR; ++c) {
        float *s_at = S + k * kBackwardRowTile + c * kLanes, *dp_at = dP + k * kBackwardRowTile + c * kLanes;
        const VF s = hn::Load(df, s_at);
        const VF prob = Exp2(hn::Sub(s, lse[c]));
        const VF ds = hn::Mul(prob, hn::Sub(hn::Load(df, dp_at), delta[c]));
        // Of a hidden key dP may be NaN, and P too where the row's lse is: both count as zero.
        const MF hidden = hn::Eq(s, hn::Set(df, -kInf));
        hn::Store(hn::IfThenZeroElse(hidden, prob), df, s_at);
        hn::Store(hn::IfThenZeroElse(hidden, ds), df, dp_at);
      }
    }
  }

  // Fetches the share of the next tile's rows, and of its dQ, that falls to tile [k, k + count) of the group's
  // products: a few lines at a time, as more would fill the queue of outstanding misses.
  HWY_INLINE void PrefetchRows(int g0, int k, int count, const BlockKeys& keys) const {
    const int64_t next = first_row_ + job_.plan.row_tile;
    const int rows = static_cast<int>(Min<int64_t>(job_.plan.row_tile, job_.plan.rows - next));
    if (rows <= 0) return;
    const int slots = (width_ + kGroupRows - 1) / kGroupRows * (keys.hi - keys.lo);
    const int slot = g0 / kGroupRows * (keys.hi - keys.lo) + k - keys.lo;
    const int G = p_.Hq / p_.Hkv, size = p_.dtype == DType::f32 ? 4 : 2;
    const auto row = [&](const TensorRef& x, int head, int64_t query, int bytes) HWY_ATTR {
      const char* at = static_cast<const char*>(x.data) +
                       (x_.tile.b * x.stride[0] + head * x.stride[1] + query * x.stride[2]) * size;
      for (int i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    };
    for (int r = rows * slot / slots; r < rows * (slot + count) / slots; ++r) {
      const int head = x_.tile.kv_head * G + static_cast<int>((next + r) % G);
      row(p_.q, head, (next + r) / G, p_.D * size);
      row(job_.in->d_o, head, (next + r) / G, p_.Dv * size);
    }
    if (!job_.out->dq.data) return;
    const int lines = rows * p_.D / 16;
    const char* dq =
        reinterpret_cast<const char*>(PartialTile(partition_, static_cast<int>(next / job_.plan.row_tile)));
    for (int i = lines * slot / slots; i < lines * (slot + count) / slots; ++i) __builtin_prefetch(dq + i * 64, 1, 2);
  }

  void AccumulateSlopes(int64_t k0, const BlockKeys& keys) {
    const RowTile& t = x_.tile;
    float* rows = TaskRows(job_.dslope_rows) + first_row_;
    for (int r = 0; r < t.count; ++r) {
      float sum = 0.f;
      for (int k = keys.lo; k < keys.hi; ++k)
        sum += x_.dp[k * kBackwardRowTile + r] * static_cast<float>(static_cast<int32_t>(k0) + k - t.pos[r]);
      rows[r] += sum;
    }
  }

  void AccumulateRowSums(const BlockKeys& keys) {
    float* rows = TaskRows(job_.ds_rows) + first_row_;
    alignas(64) float sums[kLanes];
    for (int r = 0; r < width_; r += kLanes) {
      VF sum = hn::Zero(df);
      for (int k = keys.lo; k < keys.hi; ++k) sum = hn::Add(sum, hn::Load(df, x_.dp + k * kBackwardRowTile + r));
      hn::Store(sum, df, sums);
      for (int i = 0; i < Min(kLanes, x_.tile.count - r); ++i) rows[r + i] += sums[i];
    }
  }

  // Takes from dQ^T what the rounding of the output has put into it: see key_mean-inl.h.
  void CorrectQueries(float* sum) {
    const RowTile& t = x_.tile;
    for (int r = 0; r < t.count; ++r) {
      const int64_t index = (int64_t{t.b} * p_.Hq + t.head[r]) * p_.Nq + t.query[r];
      const float lse = job_.in->lse[index];
      if (t.begin[r] >= t.end[r] || lse == -kInf) continue;
      float total = 0.f;
      for (int part = 0; part < job_.plan.key_partitions; ++part)
        total += job_.ds_rows[(head_ * job_.plan.key_partitions + part) * int64_t{job_.plan.rows} + first_row_ + r];
      const float to_natural = job_.in->lse_base2 ? 0.6931471805599453f : 1.f;
      const float sink = p_.sinks ? ::expf(p_.sinks[t.head[r]] - lse * to_natural) : 0.f;
      const float expected = (job_.in->dlse ? job_.in->dlse[index] : 0.f) + job_.delta[index] * sink;
      const float excess = (total - expected) * (1.f - sink);
      float* mean = x_.q;
      bool any = false;
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR { any = MeanOfVisibleKeys<T>(p_, t, r, mean); });
      if (!any) continue;
      const int g0 = r / kGroupRows * kGroupRows, width = Min(kGroupRows, width_ - g0);
      float* column = sum + static_cast<ptrdiff_t>(g0) * p_.D + (r - g0);
      for (int d = 0; d < p_.D; ++d) column[d * width] -= excess * mean[d];
    }
  }

  // out[k][d] += sum_r A[k][r] * rows[r][d]
  void AccumulateKeys(const float* A, const float* rows, int stride, int width, const BlockKeys& keys, bool skip_zero,
                      float* out) {
    const int padded = RoundUp(width, kLanes);
    if (HWY_UNLIKELY(skip_zero)) {  // non-finite rows must not reach keys that do not see them; the sums are the tile's
      for (int k = keys.lo; k < keys.hi; ++k)
        for (int d = 0; d < width; ++d) {
          float sum = 0.f;
          for (int r = 0; r < width_; ++r) {
            const float weight = A[k * kBackwardRowTile + r];
            if (weight != 0.f) sum = __builtin_fmaf(weight, rows[r * stride + d], sum);
          }
          out[k * padded + d] += sum;
        }
      return;
    }
    const int vectors = padded / kLanes;
    ForRowTiles<kChannelVectors>(0, vectors, [&]<int NR>(int c0) HWY_ATTR {
      AccumulateKeyColumns<NR>(A, rows + c0 * kLanes, stride, keys, out + c0 * kLanes, padded);
    });
  }

  template <int NR>
  HWY_NOINLINE void AccumulateKeyColumns(const float* A, const float* rows, int stride, const BlockKeys& keys,
                                         float* out, int padded) {
    ForRowTiles<kChannelRows>(keys.lo, keys.hi, [&]<int MR>(int k) HWY_ATTR {
      MultiplyTile<MR, NR>(A + k * kBackwardRowTile, StepsAdjacent{kBackwardRowTile}, rows, stride, width_,
                           [&](int r, int c, VF acc) HWY_ATTR {
                             float* at = out + (k + r) * padded + c * kLanes;
                             hn::Store(hn::Add(hn::Load(df, at), acc), df, at);
                           });
    });
  }

  // dQ^T[d][r] += sum_k K[k][d] dS[k][r]
  void AccumulateQueries(int tile, int64_t k0, int keys, bool skip_zero, bool first) {
    float* out = PartialTile(partition_, tile);
    for (int g0 = 0; g0 < width_; g0 += kGroupRows) {
      const int vectors = Min(kGroupRows, width_ - g0) / kLanes;
      float* to = out + static_cast<ptrdiff_t>(g0) * p_.D;
      const BlockKeys seen = KeysOfBlock(x_.tile, g0, vectors * kLanes, k0, keys);
      const bool hidden = seen.empty();
      if (first && (hidden || skip_zero))
        for (int i = 0; i < vectors * p_.D; ++i) hn::Store(hn::Zero(df), df, to + i * kLanes);
      if (hidden) continue;
      if (HWY_UNLIKELY(skip_zero)) {
        AccumulateVisibleQueries(g0, vectors * kLanes, seen, to);
        continue;
      }
      if (vectors == 1) {
        AccumulateQueryGroup<1>(g0, seen, first, to);
      } else if (vectors == 2) {
        AccumulateQueryGroup<2>(g0, seen, first, to);
      } else {
        AccumulateQueryGroup<kTileVectors>(g0, seen, first, to);
      }
    }
  }

  // For blocks with non-finite keys, which must not reach rows that do not see them; the sums are the tile's.
  void AccumulateVisibleQueries(int g0, int width, const BlockKeys& keys, float* out) {
    for (int d = 0; d < p_.D; ++d)
      for (int r = 0; r < width; ++r) {
        float sum = 0.f;
        for (int k = keys.lo; k < keys.hi; ++k) {
          const float weight = x_.dp[k * kBackwardRowTile + g0 + r];
          if (weight != 0.f) sum = __builtin_fmaf(k_[k * k_stride_ + d], weight, sum);
        }
        out[static_cast<ptrdiff_t>(d) * width + r] += sum;
      }
  }

  template <int NR>
  HWY_NOINLINE void AccumulateQueryGroup(int g0, const BlockKeys& keys, bool first, float* out) {
    constexpr int kWidth = NR * kLanes;
    ForRowTiles<kTileRows>(0, p_.D, [&]<int MR>(int d) HWY_ATTR {
      const float* k = x_.k_panels + d / kTileRows * kKeyPanel + keys.lo * kTileRows + d % kTileRows;
      MultiplyTile<MR, NR>(k, RowsAdjacent{kTileRows}, x_.dp + keys.lo * kBackwardRowTile + g0, kBackwardRowTile,
                           keys.hi - keys.lo, [&](int r, int c, VF acc) HWY_ATTR {
                             float* at = out + (d + r) * kWidth + c * kLanes;
                             hn::Store(first ? acc : hn::Add(hn::Load(df, at), acc), df, at);
                           });
    });
  }

  void WriteKeys(int64_t k0, int keys) {
    const int b = static_cast<int>(head_ / p_.Hkv), h = static_cast<int>(head_ % p_.Hkv);
    const auto write = [&](const MutableTensorRef& to, const float* from, int width, int padded, float factor) {
      if (!to.data) return;
      const VF f = hn::Set(df, factor);
      WithType(p_.dtype, [&]<class T>(T*) HWY_ATTR {
        for (int k = 0; k < keys; ++k) {
          T* row = RowPointer<T>(to, b, h, k0 + k);
          const float* x = from + k * padded;
          int d = 0;
          for (; d + kLanes <= width; d += kLanes) StoreFloat(hn::Mul(hn::Load(df, x + d), f), row + d);
          for (; d < width; ++d) StoreScalar(x[d] * factor, row + d);
        }
      });
    };
    write(job_.out->dk, x_.dk, p_.D, d_padded_, p_.scale);
    write(job_.out->dv, x_.dv, p_.Dv, dv_padded_, 1.f);
  }

  const BackwardJob& job_;
  const AttentionProblem& p_;
  const ScoreSteps steps_;
  const int d_padded_, dv_padded_, q_stride_, d_o_stride_;
  BackwardScratch x_;
  int64_t head_ = 0, first_row_ = 0;
  int partition_ = 0, width_ = 0;
  const float *k_ = nullptr, *v_ = nullptr;
  ptrdiff_t k_stride_ = 0, v_stride_ = 0;
};

// delta = sum_d dO O - dlse for rows [begin, end) of [B, Hq, Nq].
template <class T>
void DeltaRows(const BackwardJob& job, int64_t begin, int64_t end, float* delta) {
  const AttentionProblem& p = *job.problem;
  for (int64_t i = begin; i < end; ++i) {
    const int b = static_cast<int>(i / p.Nq / p.Hq), h = static_cast<int>(i / p.Nq % p.Hq);
    const int64_t n = i % p.Nq;
    const T *o = RowPointer<T>(job.in->o, b, h, n), *d_o = RowPointer<T>(job.in->d_o, b, h, n);
    VF sum = hn::Zero(df);
    int d = 0;
    for (; d + kLanes <= p.Dv; d += kLanes) sum = hn::MulAdd(LoadFloat(o + d), LoadFloat(d_o + d), sum);
    float total = hn::GetLane(hn::SumOfLanes(df, sum));
    for (; d < p.Dv; ++d) total = __builtin_fmaf(to_float(o[d]), to_float(d_o[d]), total);
    delta[i] = total - (job.in->dlse ? job.in->dlse[i] : 0.f);
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
