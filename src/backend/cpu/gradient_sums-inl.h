// gradient_sums-inl.h: sums over the keys of a row of dS: the terms of ALiBi slopes, and what rounding has put into dQ.

namespace mfa::cpu::MFA_ISA {
namespace {

// The part of one partition of an array [key_partitions, rows of lse].
HWY_INLINE float* RowTerms(const AttentionProblem& p, float* rows, int partition) {
  return rows + partition * row_count(p);
}

// rows[r] += sum_j dS (j - pos) for rows [r0, r0 + width) of the tile; `ds` begins at row r0.
void AddSlopeTerms(const AttentionProblem& p, const RowTile& t, const KeyList& list, int r0, int width,
                   const BlockKeys& keys, const float* ds, ptrdiff_t ld, float* rows) {
  for (int r = r0; r < Min(r0 + width, t.count); ++r) {
    float sum = 0.f;
    for (int k = keys.lo; k < keys.hi; ++k) sum += ds[k * ld + r - r0] * static_cast<float>(list.key[k] - t.pos[r]);
    rows[row_index(p, t.b, t.head[r], t.query[r])] += sum;
  }
}

// rows[r] += sums[r - r0] for the rows of the column group that begins at r0.
void AddRowSums(const AttentionProblem& p, const RowTile& t, int r0, const float* sums, float* rows) {
  for (int r = r0; r < Min(r0 + kGroupRows, t.count); ++r)
    rows[row_index(p, t.b, t.head[r], t.query[r])] += sums[r - r0];
}

// Takes from dQ^T, [group][D][width], what the rounding of the output has put into it: see key_mean-inl.h. `mean` is
// memory for a row of D.
void CorrectQueries(const BackwardJob& job, const RowTile& t, int width, float* mean, float* sum) {
  const AttentionProblem& p = *job.problem;
  for (int r = 0; r < t.count; ++r) {
    const int64_t index = row_index(p, t.b, t.head[r], t.query[r]);
    const float lse = job.in->lse[index];
    if (t.begin[r] >= t.end[r] || lse == -kInf) continue;
    float total = 0.f;
    for (int part = 0; part < job.plan.key_partitions; ++part) total += RowTerms(p, job.ds_rows, part)[index];
    const float to_natural = job.in->lse_base2 ? 0.6931471805599453f : 1.f;
    const float sink = p.sinks ? ::expf(p.sinks[t.head[r]] - lse * to_natural) : 0.f;
    const float expected = (job.in->dlse ? job.in->dlse[index] : 0.f) + job.delta[index] * sink;
    const float excess = (total - expected) * (1.f - sink);
    bool any = false;
    WithType(p.dtype, [&]<class T>(T*) HWY_ATTR { any = MeanOfVisibleKeys<T>(p, t, r, mean); });
    if (!any) continue;
    const int g0 = r / kGroupRows * kGroupRows, group = Min(kGroupRows, width - g0);
    float* column = sum + static_cast<ptrdiff_t>(g0) * p.D + (r - g0);
    for (int d = 0; d < p.D; ++d) column[d * group] -= excess * mean[d];
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
