// backward_scratch-inl.h: the memory of one task of the backward.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kBackwardKeys = 256;  // keys per block: for each of them all rows are brought in and packed once
constexpr ptrdiff_t kKeyPanel = PanelStride(kBackwardKeys);
constexpr int kRowPad = 16;  // floats between rows: rows a power of two apart would share a few cache sets

struct BackwardScratch {
  RowTile tile;
  TileBlock block;
  alignas(64) float lse[kBackwardRowTile];  // base-2; +inf for rows that see nothing, so that P = 0
  alignas(64) float delta[kBackwardRowTile];
  float *qt, *dot;  // [group][D][width] base-2 units, [group][Dv][width]
  float *q, *d_o;   // [row][padded D + kRowPad], [row][padded Dv + kRowPad]
  float *s, *dp,
      *dr;  // [kBackwardKeys][kBackwardRowTile]: P, dS, derivative of softcap
  float* bias;
  int32_t* mask;
  float *k, *v;                // [kBackwardKeys][padded], keys and values that are not read in place
  float *listed_k, *listed_v;  // the same, those of a list of entries
  float* k_panels;             // panels of kBackwardKeys rows, D columns
  float *dk, *dv;              // [kBackwardKeys][padded]
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
    const bool masked = steps.mask || steps.cuts;
    mask = reinterpret_cast<int32_t*>(take(masked ? static_cast<size_t>(kBackwardKeys) * kGroupRows : 0));
    const bool wide = p.dtype != DType::f32 || GathersRows(p);
    k = take(wide || RotatesKeys(p) ? kBackwardKeys * d : 0);
    v = take(wide ? kBackwardKeys * d_v : 0);
    listed_k = take(steps.cuts ? kBackwardKeys * d : 0);
    listed_v = take(steps.cuts ? kBackwardKeys * d_v : 0);
    k_panels = take(PanelFloats(kBackwardKeys, p.D));
    dk = take(kBackwardKeys * d);
    dv = take(kBackwardKeys * d_v);
    bytes = at;
  }
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
