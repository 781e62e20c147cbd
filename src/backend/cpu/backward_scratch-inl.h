// backward_scratch-inl.h: the memory of one task of the backward.

namespace mfa::cpu::MFA_ISA {
namespace {

constexpr int kBackwardKeys = 256;  // keys per block: for each of them all rows are brought in and packed once
constexpr ptrdiff_t kKeyPanel = PanelStride(kBackwardKeys);
constexpr int kRowPad = 16;  // lanes between rows: rows a power of two apart would share a few cache sets

// A is the element of the operands that the products broadcast, float or bfloat16; the others have a Lane<A> for one
// step in each lane: a float, or a pair of bfloat16.
template <class A>
using Lane = std::conditional_t<kPack<A> == 2, uint32_t, float>;

template <class A>
struct BackwardScratch {
  RowTile tile;
  TileBlock block;
  alignas(64) float lse[kBackwardRowTile];  // base-2; +inf for rows that see nothing, so that P = 0
  alignas(64) float delta[kBackwardRowTile];
  float* dq;           // [group][D][width], sums of the partials of a tile; shares the memory of qt
  Lane<A>*qt, *dot;    // [group][D steps][width] (float: in base-2 units), [group][Dv steps][width]
  Lane<A>*q, *d_o;     // [row steps][padded D + kRowPad], [row steps][padded Dv + kRowPad]
  float *s, *dp, *dr;  // [kBackwardKeys][row]: P, dS, derivative of softcap
  A *p, *ds;           // [kBackwardKeys][kBackwardRowTile], what the products read of P and dS: s and dp themselves
  Lane<A>* ds_t;       // or of a tile, and dS again with steps along the keys: [key steps][kBackwardRowTile]
  float* bias;
  int32_t* mask;
  A *k, *v;                // [kBackwardKeys][padded], keys and values that are not read in place
  A *listed_k, *listed_v;  // the same, those of a list of entries
  A* k_panels;             // panels of kBackwardKeys rows, D columns
  float *dk, *dv;          // [kBackwardKeys][padded]
  size_t bytes;

  // Rows of s, dp and dr: those of a tile, or of a column group where the products read copies.
  static constexpr int kScoreRows = kPack<A> == 1 ? kBackwardRowTile : kGroupRows;

  BackwardScratch(const AttentionProblem& problem, char* base) {
    size_t at = 0;
    const auto take = [&]<class T>(T*& out, size_t count) {
      out = reinterpret_cast<T*>(base + at);
      at += (count * sizeof(T) + 63) / 64 * 64;
    };
    const size_t d = RoundUp(problem.D, kLanes), d_v = RoundUp(problem.Dv, kLanes);
    constexpr size_t kSteps = kPack<A>, kRows = kBackwardRowTile, kKeys = kBackwardKeys;
    const ScoreSteps steps(problem);
    take(dq, d * kRows);
    qt = reinterpret_cast<Lane<A>*>(dq);
    take(dot, d_v / kSteps * kRows);
    take(q, (d + kRowPad) * kRows / kSteps);
    take(d_o, (d_v + kRowPad) * kRows / kSteps);
    if constexpr (kSteps > 1) {
      take(p, kKeys * kRows);
      take(ds, kKeys * kRows);
      take(ds_t, kKeys / kSteps * kRows);
    }
    take(bias, steps.bias ? kKeys * kGroupRows : 0);
    take(mask, steps.mask || steps.cuts ? kKeys * kGroupRows : 0);
    const bool gathers = GathersRows(problem), copies = gathers || problem.dtype != TypeOf<A>();
    take(k, copies || RotatesKeys(problem) ? kKeys * d : 0);
    take(v, copies ? kKeys * d_v : 0);
    take(listed_k, steps.cuts ? kKeys * d : 0);
    take(listed_v, steps.cuts ? kKeys * d_v : 0);
    take(k_panels, PanelFloats(kBackwardKeys, problem.D));
    take(dk, kKeys * d);
    take(dv, kKeys * d_v);
    take(s, kKeys * kScoreRows);
    take(dp, kKeys * kScoreRows);
    take(dr, steps.softcap ? kKeys * kScoreRows : 0);
    if constexpr (kSteps == 1) {
      p = s;
      ds = ds_t = dp;
    }
    bytes = at;
  }

 private:
  template <class T>
  static constexpr DType TypeOf() {
    return sizeof(T) == 2 ? DType::bf16 : DType::f32;
  }
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
