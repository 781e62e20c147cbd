// forward_scratch-inl.h: the memory of a task of the tiled forward kernel.

namespace mfa::cpu::MFA_ISA {
namespace {

struct ForwardScratch {
  RowTile tile;
  RowState state;
  float* q;       // [group][D][width]
  float* o;       // [group][Dv][width]
  float* s;       // [kKeyBlock][width], scores, then probabilities
  float* bias;    // [kKeyBlock][width]
  int32_t* mask;  // [kKeyBlock][width]
  uint8_t* seen;  // [kKeyBlock][width], which scores are visible; only for non-finite values
  float* k;       // keys that are not read in place
  float* v;       // panels of [kKeyBlock] rows, Dv columns
  float* select;  // buffers of ScoreSelector
  size_t bytes;

  ForwardScratch(const ForwardJob& job, char* base) {
    const AttentionProblem& p = *job.problem;
    size_t at = 0;
    const auto take = [&](size_t count, size_t size) {
      char* out = base + at;
      at += (count * size + 63) / 64 * 64;
      return out;
    };
    const size_t block_rows = static_cast<size_t>(kKeyBlock) * kGroupRows;
    const ScoreSteps steps(p);
    q = reinterpret_cast<float*>(take(static_cast<size_t>(p.D) * kMaxRowTile, 4));
    o = reinterpret_cast<float*>(take(static_cast<size_t>(p.Dv) * kMaxRowTile, 4));
    s = reinterpret_cast<float*>(take(block_rows, 4));
    bias = reinterpret_cast<float*>(take(steps.bias ? block_rows : 0, 4));
    mask = reinterpret_cast<int32_t*>(take(steps.mask || steps.cuts ? block_rows : 0, 4));
    seen = reinterpret_cast<uint8_t*>(take(block_rows, 1));
    k = reinterpret_cast<float*>(take(BlockReader::KeyFloats(p), 4));
    v = reinterpret_cast<float*>(take(PanelFloats(kKeyBlock, p.Dv), 4));
    select = reinterpret_cast<float*>(
        take(job.floors ? ScoreSelector::Floats(job.most_kept, RoundUp(job.plan.row_width, kLanes)) : 0, 4));
    bytes = at;
  }
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
