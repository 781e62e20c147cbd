// decode_scratch-inl.h: what the decode kernel keeps: of every tile that is computed together with others, and once.

namespace mfa::cpu::MFA_ISA {
namespace {

// Of a tile.
struct DecodeRows {
  float *m, *l;  // [kMaxDecodeRows], of the blocks so far
  float *block_m, *block_l;
  float* q;        // [rows][padded D], scaled to base-2 units; pairs as they are
  float* o;        // [rows][padded Dv]
  float* s;        // [rows][kScoreStride]
  float* block_o;  // [rows][padded Dv]
};

class DecodeScratch {
 public:
  DecodeScratch(const AttentionProblem& p, int rows, int tiles, void* base)
      : rows_(rows), d_(RoundUp(p.D, kLanes)), dv_(RoundUp(p.Dv, kLanes)), base_(static_cast<float*>(base)) {
    k = base_ + tiles * TileFloats();
    columns = k + (RotatesKeys(p) ? kLanes * d_ : 0);
    queries = columns + (rows > kFewRows ? kTileVectors * kLanes * p.D : 0);
    const float* end = queries + (tiles > 1 ? kFewRows * p.D * QueryWidth(tiles) : 0);
    bytes = static_cast<size_t>(end - base_) * sizeof(float);
  }
  // Of tile number `tile` of those that are computed together.
  DecodeRows Rows(int tile) const {
    DecodeRows r;
    float* at = base_ + tile * TileFloats();
    const auto take = [&](size_t floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    r.m = take(kMaxDecodeRows);
    r.l = take(kMaxDecodeRows);
    r.block_m = take(kMaxDecodeRows);
    r.block_l = take(kMaxDecodeRows);
    r.q = take(rows_ * d_);
    r.o = take(rows_ * dv_);
    r.s = take(rows_ * kScoreStride);
    r.block_o = take(rows_ * dv_);
    return r;
  }
  // Queries of one term in `queries`: those of `tiles` tiles, and again where a vector of them may begin anywhere.
  static int QueryWidth(int tiles) { return tiles % kLanes == 0 ? tiles : tiles + kLanes; }

  float* k;        // [kLanes][padded D], rotated keys
  float* columns;  // [D][vectors of keys], transposed keys
  float* queries;  // [kFewRows][terms of D][QueryWidth()], of all tiles
  size_t bytes;

 private:
  size_t TileFloats() const { return 4 * kMaxDecodeRows + rows_ * (d_ + 2 * dv_ + kScoreStride); }

  const size_t rows_, d_, dv_;
  float* base_;
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
