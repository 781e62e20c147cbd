// problem.h: everything that defines one attention computation. Every entry point fills an AttentionProblem; every
// backend and the reference compute from it. Semantics: docs/semantics.md.
//
//   s[i,j] = softcap(scale * q_i . k_j) + slope_h * (j - pos(i)) + bias[i,j]       for visible (i, j), else -inf
//   p[i,:] = exp(s[i,:]) / (sum_j exp(s[i,j]) + exp(sink_h))
//   o_i    = sum_j p[i,j] z[i,j] v_j,     lse_i = log(sum_j exp(s[i,j]) + exp(sink_h))
//
// with pos(i) = i + max(0, Nk_b - Nq_b), Nk_b and Nq_b the keys and queries of batch entry b, and z the dropout factor.
#pragma once

#include <cstdint>

#include "attention/neighbourhood.h"
#include "common/dtype.h"

namespace mfa {

// [B, H, N, D] in the problem's dtype. Strides are in elements and may be zero or negative; the last axis is dense.
struct TensorRef {
  const void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};  // b, h, n
};
struct MutableTensorRef {
  void* data = nullptr;
  int64_t stride[3] = {0, 0, 0};
};

// A term of the scores, [B, Hq, Nq, Nk] with stride 0 along the axes it is broadcast over. Absent: data is null.
struct BiasRef {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};
struct MaskRef {  // nonzero bytes are visible
  const uint8_t* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Where keys and values lie in pages of a pool: k [pages, Hkv, page_size, D] by its strides (page, head, token), v
// likewise. Key j of batch entry b is token j % page_size of page table[b * table_stride + j / page_size]. Entries of
// keys that a batch entry does not have are not read. Absent: table is null.
struct PagesRef {
  const int32_t* table = nullptr;
  int64_t table_stride = 0;
  int32_t page_size = 0;
  int32_t pages = 0;  // of the pool
};

// Which tiles of [block_q queries] x [block_k keys] are visible: lists of key blocks, ascending, for each query block,
// and the same transposed for the backward. The list of (b, query head h) is number b * stride_b + h * stride_h; list l
// has the key blocks key_ids[offsets[i]] .. key_ids[offsets[i + 1] - 1] of query block r with
// i = l * (query_blocks + 1) + r, and the query blocks of key block c are found likewise with key_blocks. Absent:
// offsets is null.
struct BlockListRef {
  int32_t block_q = 0, block_k = 0, query_blocks = 0, key_blocks = 0;
  int64_t stride_b = 0, stride_h = 0;
  int64_t entries = 0;  // of key_ids, and of query_ids
  const int64_t* offsets = nullptr;
  const int32_t* key_ids = nullptr;
  const int64_t* transposed_offsets = nullptr;
  const int32_t* query_ids = nullptr;
};

// Rotary embedding of q and k as they are loaded (Su et al., arXiv:2104.09864): pairs of the first `rotary_dim`
// channels are turned by the angle whose cosine and sine stand in row position(b) + i of the tables. Gradients are
// those of the unrotated q and k. Absent: cos is null.
struct RopeRef {
  const float* cos = nullptr;  // [positions, rotary_dim / 2], dense
  const float* sin = nullptr;
  int32_t positions = 0;
  int32_t rotary_dim = 0;
  bool interleaved = true;               // pairs are channels (2c, 2c + 1), else (c, c + rotary_dim / 2)
  bool rotates_k = true;                 // false: the keys are rotated already
  const int32_t* q_positions = nullptr;  // [B], of query 0; null: 0
  const int32_t* k_positions = nullptr;  // [B], of key 0; null: 0
};

struct AttentionProblem {
  int32_t B = 0, Hq = 0, Hkv = 0, Nq = 0, Nk = 0, D = 0, Dv = 0;
  DType dtype = DType::f32;  // of q, k, v, o and their gradients; all sums are float32

  TensorRef q;  // [B, Hq, Nq, D]
  TensorRef k;  // [B, Hkv, Nk, D]
  TensorRef v;  // [B, Hkv, Nk, Dv]

  // Packed sequences: batch entry b has the query rows query_starts[b] .. query_starts[b + 1] - 1 of q [1, Hq,
  // packed_queries, D] and of everything shaped like it (o, lse, their gradients), and the rows of k and v that
  // key_starts says. Nq and Nk are the longest of them or more. i and j below, and the axes of bias, mask and block
  // lists, count within a sequence. Null: not packed. Starts ascend from 0; layout.h turns (b, h, i) into addresses.
  const int32_t* query_starts = nullptr;  // [B + 1]
  const int32_t* key_starts = nullptr;    // [B + 1]
  int32_t packed_queries = 0, packed_keys = 0;
  PagesRef pages;  // excludes key_starts
  RopeRef rope;

  float scale = 1.f;
  float softcap = 0.f;                  // s = softcap * tanh(s / softcap); 0 = off
  const float* alibi_slopes = nullptr;  // [Hq]
  const float* sinks = nullptr;         // [Hq], one extra logit a head
  BiasRef bias;

  bool causal = false;                  // j <= pos(i)
  int32_t window_left = -1;             // j >= pos(i) - window_left; -1 = open
  int32_t window_right = -1;            // j <= pos(i) + window_right; -1 = open
  const int32_t* kv_lengths = nullptr;  // [B], keys of each batch entry; values outside [0, Nk] are clamped
  MaskRef mask;
  BlockListRef blocks;
  Neighbourhood neighbourhood;
  // Keys whose score s, in units of ln 2, is below the row's floor are hidden: what is left of a top-k selection. As
  // lse, [B, Hq, Nq]; computed by the kernels' own arithmetic, so that the comparison is exact. Null: none.
  const float* score_floor = nullptr;

  float dropout_p = 0.f;  // probability of dropping, in [0, 1]
  uint64_t dropout_seed = 0;
  // [B]: of the keys that dropout counts, key 0 is this one. For a part of the keys of a larger problem, which so drops
  // what that problem would. Null: 0.
  const int32_t* dropout_first_keys = nullptr;
};

// Key `j` of batch entry `b` as dropout counts keys; any number is one.
[[gnu::always_inline]] inline uint32_t dropout_key(const AttentionProblem& p, int32_t b, int32_t j) {
  return (p.dropout_first_keys ? static_cast<uint32_t>(p.dropout_first_keys[b]) : 0u) + static_cast<uint32_t>(j);
}

struct AttentionOutputs {
  MutableTensorRef o;      // [B, Hq, Nq, Dv]
  float* lse = nullptr;    // [B, Hq, Nq] (packed: [Hq, packed_queries]) dense, natural log; -inf for a row that sees no
                           // key and has no sink
  float* probs = nullptr;  // [B, Hq, Nq, Nk] dense, before dropout; null unless wanted (the one O(Nq Nk) output)
  // Write lse / ln 2, what the kernels keep: a natural lse is rounded once more, which the backward would see.
  bool lse_base2 = false;
};

// What the backward reads beside the problem: the forward's results and the cotangents.
struct AttentionGradientInputs {
  TensorRef o;                  // [B, Hq, Nq, Dv]
  TensorRef d_o;                // [B, Hq, Nq, Dv]
  const float* lse = nullptr;   // [B, Hq, Nq] dense
  const float* dlse = nullptr;  // [B, Hq, Nq] dense, or null: no cotangent; always of the natural lse
  bool lse_base2 = false;       // `lse` is lse / ln 2
};

// Every gradient is optional (null = not wanted). q, k, v gradients are in the problem's dtype, the others float32.
struct AttentionGradients {
  MutableTensorRef dq, dk, dv;
  float* dbias = nullptr;          // dense, shaped as the bias: extent 1 along each axis where its stride is 0
  float* dsinks = nullptr;         // [Hq]
  float* dalibi_slopes = nullptr;  // [Hq]
};

}  // namespace mfa
