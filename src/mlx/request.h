// request.h: a validated call of attention, and how its arrays are passed to the implementations.
#pragma once

#include <optional>
#include <vector>

#include "attention/problem.h"
#include "mfa/attention.h"
#include "mlx/array.h"
#include "mlx/stream.h"

namespace mfa {

namespace mx = mlx::core;

// Everything about a call that is not an array. Two calls of equal parameters on the same arrays are the same call.
struct AttentionParams {
  float scale = 1.f;
  float softcap = 0.f;
  float dropout_p = 0.f;
  int window_left = -1;
  int window_right = -1;
  bool causal = false;
  bool has_alibi = false;
  bool has_sinks = false;
  bool has_bias = false;
  bool has_mask = false;
  bool has_lengths = false;
  bool has_seed = false;
  bool returns_probs = false;
  bool operator==(const AttentionParams&) const = default;
};

// The arrays of a call in the order of this struct, absent ones left out: q, k, v always, then the optional ones.
struct InputLayout {
  explicit constexpr InputLayout(const AttentionParams& p) {
    if (p.has_alibi) alibi = count++;
    if (p.has_sinks) sinks = count++;
    if (p.has_bias) bias = count++;
    if (p.has_mask) mask = count++;
    if (p.has_lengths) kv_lengths = count++;
    if (p.has_seed) seed = count++;
  }
  int alibi = -1, sinks = -1, bias = -1, mask = -1, kv_lengths = -1, seed = -1;
  int count = 3;
};

// Arrays as the implementations take them: q, k, v of one dtype; alibi and sinks float32 [Hq]; bias float32, float16 or
// bfloat16 and mask bool, both of rank 4 with extent 1 on the axes that are broadcast; kv_lengths int32 [B]; seed
// uint32 [2].
struct Request {
  AttentionParams params;
  std::vector<mx::array> inputs;
  mx::Stream stream;
};

// Checks the arguments of attention() and brings them into that form. Throws std::invalid_argument.
Request make_request(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                     bool returns_probs, mx::StreamOrDevice s);

inline DType to_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? DType::f16 : dtype == mx::bfloat16 ? DType::bf16 : DType::f32;
}

// The problem's sizes and options. Its pointers are null, strides 0.
AttentionProblem describe(const AttentionParams& params, const std::vector<mx::array>& inputs);

}  // namespace mfa
