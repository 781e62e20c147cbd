// problem.h: everything that defines one attention computation. Every entry point fills an AttentionProblem; every
// backend and the reference compute from it. Semantics: docs/semantics.md.
//
//   s[i,j] = softcap(scale * q_i . k_j) + slope_h * (j - pos(i)) + bias[i,j]       for visible (i, j), else -inf
//   p[i,:] = exp(s[i,:]) / (sum_j exp(s[i,j]) + exp(sink_h))
//   o_i    = sum_j p[i,j] z[i,j] v_j,     lse_i = log(sum_j exp(s[i,j]) + exp(sink_h))
//
// with pos(i) = i + max(0, Nk_b - Nq), Nk_b the number of keys of batch entry b, and z the dropout factor.
#pragma once

#include <cstdint>

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

struct AttentionProblem {
  int32_t B = 0, Hq = 0, Hkv = 0, Nq = 0, Nk = 0, D = 0, Dv = 0;
  DType dtype = DType::f32;  // of q, k, v, o and their gradients; all sums are float32

  TensorRef q;  // [B, Hq, Nq, D]
  TensorRef k;  // [B, Hkv, Nk, D]
  TensorRef v;  // [B, Hkv, Nk, Dv]

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

  float dropout_p = 0.f;  // probability of dropping, in [0, 1]
  uint64_t dropout_seed = 0;
};

struct AttentionOutputs {
  MutableTensorRef o;      // [B, Hq, Nq, Dv]
  float* lse = nullptr;    // [B, Hq, Nq] dense, natural log; -inf for a row that sees no key and has no sink
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
