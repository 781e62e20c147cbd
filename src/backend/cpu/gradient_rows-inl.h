// gradient_rows-inl.h: what comes before and after the backward's tiles, row by row: delta, and gradients as they are
// written.

namespace mfa::cpu::MFA_ISA {
namespace {

// x * factor, in the type of `row`.
template <class T>
HWY_INLINE void StoreRow(const float* x, int width, float factor, T* row) {
  const VF f = hn::Set(df, factor);
  int d = 0;
  for (; d + kLanes <= width; d += kLanes) StoreFloat(hn::Mul(hn::Load(df, x + d), f), row + d);
  for (; d < width; ++d) StoreScalar(x[d] * factor, row + d);
}

// `count` rows of dk and dv from key k0 on, of a KV head with `key_rows` of them.
struct KeyGradientRows {
  int b, kv_head;
  int64_t k0;
  int count;
  int64_t key_rows;

  // Writes `from` [count][padded width] times `factor` to the output, or `apart` where the gradient is summed over the
  // sequences that share a page: see PageGradientTask.
  void Write(const BackwardJob& job, const MutableTensorRef& to, float* apart, const float* from, int width,
             float factor) const {
    if (!to.data) return;
    const AttentionProblem& p = *job.problem;
    const ptrdiff_t padded = RoundUp(width, kLanes);
    if (apart) {
      const int64_t first = job.key_offsets[b] * p.Hkv + kv_head * key_rows + k0;
      for (int k = 0; k < count; ++k) StoreRow(from + k * padded, width, factor, apart + (first + k) * width);
      return;
    }
    WithType(p.dtype, [&]<class T>(T*) HWY_ATTR {
      for (int k = 0; k < count; ++k) StoreRow(from + k * padded, width, factor, KeyRow<T>(p, to, b, kv_head, k0 + k));
    });
  }
};

// The gradient of one page of one KV head, the sum over the sequences that have it, in their order.
void PageGradientTask(const BackwardJob& job, int64_t task) {
  const AttentionProblem& p = *job.problem;
  const int32_t page = static_cast<int32_t>(task / p.Hkv), head = static_cast<int32_t>(task % p.Hkv);
  const int64_t size = p.pages.page_size;
  const auto sum = [&](const MutableTensorRef& to, const float* rows, int width) {
    if (!to.data) return;
    alignas(64) float total[640];
    for (int64_t token = 0; token < size; ++token) {
      for (int d = 0; d < width; ++d) total[d] = 0.f;
      for (int64_t u = job.page_starts[page]; u < job.page_starts[page + 1]; ++u) {
        const PageUse& use = job.page_uses[u];
        const int64_t keys = key_count(p, use.b), j = use.slot * size + token;
        if (j >= keys) continue;
        const float* from = rows + (job.key_offsets[use.b] * p.Hkv + head * keys + j) * width;
        for (int d = 0; d < width; ++d) total[d] += from[d];
      }
      WithType(p.dtype, [&]<class T>(T*) HWY_ATTR {
        T* row = static_cast<T*>(to.data) + page * to.stride[0] + head * to.stride[1] + token * to.stride[2];
        int d = 0;
        for (; d + kLanes <= width; d += kLanes) StoreFloat(hn::Load(df, total + d), row + d);
        for (; d < width; ++d) StoreScalar(total[d], row + d);
      });
    }
  };
  sum(job.out->dk, job.dk_rows, p.D);
  sum(job.out->dv, job.dv_rows, p.Dv);
}

// DeltaRows() by the products that give dP, in their order: where a row sees one key alone, so that O is its value, dS
// is exactly zero.
HWY_MAYBE_UNUSED void DeltaRowsOfPairs(const BackwardJob& job, int64_t begin, int64_t end, float* delta) {
  const AttentionProblem& p = *job.problem;
  const int64_t length = p.query_starts ? p.packed_queries : p.Nq;  // rows of a head
  constexpr int kPairs = 64;                                        // transposed at a time
  alignas(64) uint32_t o[kPairs * kLanes], d_o[kPairs * kLanes];
  alignas(64) float sums[kLanes];
  for (int64_t first = begin; first < end; first += kLanes) {
    VF sum = hn::Zero(df);
    for (int c = 0; c < p.Dv / 2; c += kPairs) {
      const bfloat16 *o_rows[kLanes], *d_o_rows[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const int64_t i = Min(first + r, end - 1);
        const int64_t b = i / length / p.Hq, h = i / length % p.Hq, n = i % length;
        const auto row = [&](const TensorRef& x) {
          return static_cast<const bfloat16*>(x.data) + b * x.stride[0] + h * x.stride[1] + n * x.stride[2] + 2 * c;
        };
        o_rows[r] = row(job.in->o);
        d_o_rows[r] = row(job.in->d_o);
      }
      const int pairs = Min(kPairs, p.Dv / 2 - c);
      PackTransposedPairs(o_rows, pairs, o, kLanes);
      PackTransposedPairs(d_o_rows, pairs, d_o, kLanes);
      for (int i = 0; i < pairs; ++i) sum = Accumulate(LoadStep(o + i * kLanes), LoadStep(d_o + i * kLanes), sum);
    }
    hn::Store(sum, df, sums);
    for (int64_t i = first; i < Min<int64_t>(end, first + kLanes); ++i)
      delta[i] = sums[i - first] - (job.in->dlse ? job.in->dlse[i] : 0.f);
  }
}

// delta = sum_d dO O - dlse for rows [begin, end) of lse.
template <class T>
void DeltaRows(const BackwardJob& job, int64_t begin, int64_t end, float* delta) {
  if constexpr (kNativeBf16 && std::is_same_v<T, bfloat16>)
    if (job.plan.native_bf16) return DeltaRowsOfPairs(job, begin, end, delta);
  const AttentionProblem& p = *job.problem;
  const int64_t length = p.query_starts ? p.packed_queries : p.Nq;  // rows of a head
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / length / p.Hq, h = i / length % p.Hq, n = i % length;
    const auto row = [&](const TensorRef& x) {
      return static_cast<const T*>(x.data) + b * x.stride[0] + h * x.stride[1] + n * x.stride[2];
    };
    const T *o = row(job.in->o), *d_o = row(job.in->d_o);
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
