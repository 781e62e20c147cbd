// probabilities-inl.h: the probabilities that a call may return: the scores of each block as it comes, then normalised.

namespace mfa::cpu::MFA_ISA {
namespace {

// Row r of the tile.
HWY_INLINE float* ProbabilityRow(const ForwardJob& job, const RowTile& t, int r) {
  const AttentionProblem& p = *job.problem;
  return job.out->probs + row_index(p, t.b, t.head[r], t.query[r]) * p.Nk;
}

void HideAllProbabilities(const ForwardJob& job, const RowTile& t) {
  for (int r = 0; r < t.count; ++r) {
    float* row = ProbabilityRow(job, t, r);
    for (int k = 0; k < job.problem->Nk; ++k) row[k] = -kInf;
  }
}

// Keeps the scores S[k * width + r] of entries [lo, hi) for the rows of a column group.
void StoreScores(const ForwardJob& job, const RowTile& t, const KeyList& list, int g0, int lo, int hi, const float* S,
                 int width) {
  for (int r = 0; r < width && g0 + r < t.count; ++r) {
    float* row = ProbabilityRow(job, t, g0 + r);
    for (int k = lo; k < hi; ++k)
      if (!list.has_padding || !list.padding[k]) row[list.key[k]] = S[k * width + r];
  }
}

void NormaliseProbabilities(const ForwardJob& job, const RowTile& t, int r, float lse2) {
  float* row = ProbabilityRow(job, t, r);
  const int keys = job.problem->Nk;
  const VF shift = hn::Set(df, lse2 == -kInf ? 0.f : lse2);
  int k = 0;
  for (; k + kLanes <= keys; k += kLanes) hn::StoreU(Exp2(hn::Sub(hn::LoadU(df, row + k), shift)), df, row + k);
  for (; k < keys; ++k) row[k] = hn::GetLane(Exp2(hn::Sub(hn::Set(df, row[k]), shift)));
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
