// decode_scores-inl.h: what happens to the scores of one query row, lanes = keys: the steps of ApplyScoreSteps in the
// same order, so that a row has the same bits in both kernels.

namespace mfa::cpu::MFA_ISA {
namespace {

// Whether lists, neighbourhood and boolean mask show entry c to row g.
HWY_INLINE bool ShowsEntry(const AttentionProblem& p, const ScoreSteps& steps, const RowTile& t, int g,
                           const TileBlock& block, int c) {
  if (block.list.has_padding && block.list.padding[c]) return false;
  const int32_t key = block.list.key[c];
  for (int x = 0; x < p.neighbourhood.axes; ++x) {
    const int32_t u = block.position[x][c];
    if (u < t.from[x][g] || u >= t.to[x][g]) return false;
  }
  if (p.blocks.offsets && block.uneven && !lists_show(p, t.b, t.head[g], t.query[g], key)) return false;
  return !steps.mask || p.mask.data[t.b * p.mask.stride[0] + t.head[g] * p.mask.stride[1] +
                                    t.query[g] * p.mask.stride[2] + key * p.mask.stride[3]] != 0;
}

// The steps for entries [lo, hi) of row g, whose scores are S[entry].
HWY_NOINLINE void ApplyRowSteps(const AttentionProblem& p, const ScoreSteps& steps, const RowTile& t, int g,
                                const TileBlock& block, bool masked, int lo, int hi, float* S) {
  const ScoreTerms terms(p);
  const int32_t* key_of = block.list.key;
  const VI begin = hn::Set(di, t.begin[g]), end = hn::Set(di, t.end[g]), pos = hn::Set(di, t.pos[g]);
  alignas(64) float bias[kLanes];
  alignas(64) int32_t mask[kLanes];
  for (int k = lo; k < hi; k += kLanes) {
    const int n = Min(kLanes, hi - k);
    const VI key = hn::LoadU(di, key_of + k);
    VF s = hn::LoadU(df, S + k);
    if (steps.softcap) s = hn::Mul(Tanh(hn::Mul(s, terms.inverse_softcap)), terms.softcap);
    if (steps.alibi) s = hn::MulAdd(hn::Set(df, t.slope[g]), hn::ConvertTo(df, hn::Sub(key, pos)), s);
    auto visible = hn::AndNot(hn::Lt(key, begin), hn::Lt(key, end));
    if (steps.bias) {
      const int64_t at = t.b * p.bias.stride[0] + t.head[g] * p.bias.stride[1] + t.query[g] * p.bias.stride[2];
      for (int i = 0; i < kLanes; ++i)
        bias[i] = i < n && !(block.list.has_padding && block.list.padding[k + i])
                      ? load_as_float(p.bias.data, p.bias.dtype, at + key_of[k + i] * p.bias.stride[3]) * kLog2e
                      : 0.f;
      const VF term = hn::Load(df, bias);
      s = hn::Add(s, term);
      visible = hn::And(visible, hn::RebindMask(di, hn::Ne(term, hn::Set(df, -kInf))));
    }
    if (masked) {
      for (int i = 0; i < kLanes; ++i) mask[i] = i < n && ShowsEntry(p, steps, t, g, block, k + i) ? -1 : 0;
      visible = hn::And(visible, hn::MaskFromVec(hn::Load(di, mask)));
    }
    if (steps.floor) visible = hn::AndNot(hn::RebindMask(di, hn::Lt(s, hn::Set(df, t.floor[g]))), visible);
    s = hn::IfThenElse(hn::RebindMask(df, visible), s, hn::Set(df, -kInf));
    if (n == kLanes) {
      hn::StoreU(s, df, S + k);
    } else {
      alignas(64) float out[kLanes];
      hn::Store(s, df, out);
      for (int i = 0; i < n; ++i) S[k + i] = out[i];
    }
  }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
