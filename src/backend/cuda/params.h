// params.h: what the CUDA kernels are given: plain structs passed by value, the same for the host compiler and nvcc.
//
// Scores are in base-2 units inside the kernels: s2 = s * log2(e), so that p = exp2(s2 - lse2). Strides are in
// elements, 64 bits, possibly zero or negative; the last axis of q, k, v, o and their gradients is dense. Semantics:
// attention/problem.h, whose names these are.
#pragma once

#include <cstdint>

namespace mfa::cuda {

enum class Element : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// [B, H, N, D]; stride for [b, h, n].
struct Tensor {
  const void* data;
  int64_t stride[3];
};
struct MutableTensor {
  void* data;
  int64_t stride[3];
};

// Broadcast over [B, Hq, Nq, Nk]: stride 0 along the axes it does not vary over. Absent: data is null.
struct Bias {
  const void* data;
  int64_t stride[4];
  Element dtype;
};
struct Mask {
  const uint8_t* data;  // nonzero bytes are visible
  int64_t stride[4];
};

// The computation: everything that forward and backward share.
struct Problem {
  int32_t B, Hq, Hkv, Nq, Nk, D, Dv;
  int32_t G;  // Hq / Hkv: query head h reads KV head h / G

  Tensor q;  // [B, Hq, Nq, D]
  Tensor k;  // [B, Hkv, Nk, D]
  Tensor v;  // [B, Hkv, Nk, Dv]

  float scale;       // multiplies q . k
  float scale_log2;  // scale * log2(e)
  // Without softcap s2 = scale_log2 * (q . k). With it, softcap > 0:
  //   s2 = softcap_log2 * tanh(scale_over_softcap * (q . k)),  ds/d(scale q . k) = 1 - tanh^2
  float softcap, softcap_log2, scale_over_softcap;

  // Query i, at pos(i) = i + max(0, Nk_b - Nq), sees j >= pos(i) - left and j <= pos(i) + right; -1 = open. Causal is
  // right = 0. No wider than Nq + Nk: see set_windows.
  int32_t window_left, window_right;
  const int32_t* kv_lengths;  // [B] on the device, or null; clamped to [0, Nk] by the kernel

  const float* alibi_slopes;  // [Hq], natural units: adds slope * (j - pos(i)); or null
  const float* sinks;         // [Hq], natural units: one more logit; or null
  Bias bias;                  // natural units
  Mask mask;

  // Dropout: key j of (b, h, i) is kept iff word j % 4 of
  //   philox4x32({j / 4, i, b * Hq + h, 0}, seed[0] | seed[1] << 32)  is >= dropout_threshold,
  // and then weighted by dropout_scale. No dropout: dropout_seed is null.
  const uint32_t* dropout_seed;  // [2] on the device: low word, high word
  uint64_t dropout_threshold;    // floor(p * 2^32)
  float dropout_scale;           // 1 / (1 - p), 0 for p = 1
};

// Windows of any width, cut so that 32 bits hold every position that kernels compute from them.
inline void set_windows(Problem& p, bool causal, int32_t left, int32_t right) {
  const int64_t all = int64_t{p.Nq} + p.Nk;
  const int32_t widest = all < INT32_MAX ? static_cast<int32_t>(all) : INT32_MAX;
  p.window_left = left < widest ? left : widest;
  p.window_right = causal ? 0 : right < widest ? right : widest;
}

// Which tiles of `keys` keys a boolean mask shows anything of to a tile of 64 queries: bit n % 32 of word n / 32. The
// strides of [b, h, query tile], in words, are 0 along the axes that the mask does not vary over.
struct ShownTiles {
  uint32_t* words;  // null: not known
  int32_t stride[3];
  int32_t keys;
};

struct ForwardParams {
  Problem p;
  ShownTiles shown;   // written by a kernel of its own, for those that read masks
  MutableTensor o;    // [B, Hq, Nq, Dv]
  float* lse;         // [B, Hq, Nq] dense, or null; -inf for a row that sees nothing and has no sink
  int32_t lse_base2;  // write lse / ln 2

  // Split keys: block z of `splits` takes keys [z * split_keys, (z + 1) * split_keys), a multiple of the key tile, and
  // writes its part, normalised, float32, with the base-2 lse of its keys, the sink left to the merge.
  int32_t splits;
  int32_t split_keys;
  float* o_part;    // [splits, B, Hq, Nq, Dv]
  float* lse_part;  // [splits, B, Hq, Nq]
};

// A tile of 64 rows of float32 as parts: scale * (part 0 + part 1), but for the rows set apart, whose parts are zero.
struct alignas(16) SplitTileFacts {
  uint64_t apart;      // bit n: row n
  float scale;         // a power of two
  uint32_t nonfinite;  // a row has NaN or infinity
};

// Float32 q, k and v as two parts of float16 each, [2, B, H, N, columns], and the facts of their tiles,
// [B, H, ceil(N / 64)].
struct SplitOperands {
  void* parts[3];
  SplitTileFacts* tiles[3];
};

struct BackwardParams {
  Problem p;
  Tensor o;           // [B, Hq, Nq, Dv]
  Tensor d_o;         // [B, Hq, Nq, Dv]
  const float* lse;   // [B, Hq, Nq] dense
  const float* dlse;  // [B, Hq, Nq] dense, cotangent of the natural lse, or null
  int32_t lse_base2;  // `lse` is lse / ln 2
  // Written by the preprocess kernel for the others, [B, Hq, Nq_padded]: tiles of 128 rows may start at any query.
  //   delta = sum_d o d_o - dlse
  //   lse2 = base-2 lse; so great that p = exp2(s - lse2) = 0 for padding, and +inf for rows that see nothing
  float* delta;
  float* lse2;
  int32_t Nq_padded;
  // Of the kernel that computes dq, dk and dv in one pass, or null: sums of dq by tiles of 64 queries, as fragments,
  // and how many key tiles have added to each, [B, Hq, ceil(Nq / 64)], then how many of the tiles have been drawn to be
  // finished; zeroed by the preprocess kernel.
  float* dq_sums;
  int32_t* dq_turns;

  MutableTensor dq, dk, dv;  // in the dtype of q, k, v; data null = not wanted

  float* dbias;             // dense, shaped as the bias: extent 1 along each axis where its stride is 0; or null
  int64_t dbias_stride[4];  // of dbias, 0 along the axes that are summed
  float* dsinks;            // [Hq] or null
  float* dalibi_slopes;     // [Hq] or null
  float* dalibi_part;       // scratch, [B, Hq, Nq]: row sums of ds * (j - pos(i))
};

// The host's compiler and nvcc must agree.
static_assert(sizeof(Problem) == 296 && sizeof(ForwardParams) == 392 && sizeof(BackwardParams) == 584);

}  // namespace mfa::cuda
