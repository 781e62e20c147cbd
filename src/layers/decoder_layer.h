// decoder_layer.h: layers of a llama-like decoder, for a few tokens with a cache of the keys and values before them:
//
//   h = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = rms_norm(x)
//   out = h + down(silu(gate(m)) * up(m)),                m = rms_norm(h)
//
// Every intermediate is rounded to the dtype, so that the bits are those of the operations one by one. What a layer
// saves is what each of some thirty operations costs beside its work, which for one token is half of the time.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "attention/problem.h"
#include "linear/problem.h"

namespace mfa {

// x [tokens, K] to [tokens, N].
struct Projection {
  int32_t N = 0, K = 0;
  WeightRef w;
};

struct RmsNormWeights {
  const void* weight = nullptr;  // dense
  float eps = 0.f;
};

struct DecoderLayerProblem {
  int64_t B = 0, T = 0;  // batch entries, new tokens of each
  int32_t width = 0;     // of x and out
  int32_t Hq = 0, Hkv = 0, D = 0;
  DType dtype = DType::f32;
  RmsNormWeights attention_norm, mlp_norm;
  Projection q, k, v, o, gate, up, down;
  // Of q and k, as in RopeProblem; the first new token has position `offset`.
  int32_t rope_dims = 0;
  bool traditional = false;
  float rope_scale = 1.f, rope_base = 0.f;
  const float* rope_periods = nullptr;
  MutableTensorRef keys, values;  // [B, Hkv, offset + T or more, D]; rows from `offset` on are written
  int32_t offset = 0;
  float scale = 1.f;    // of scores
  bool causal = false;  // else every token sees all keys
};

// Layers that follow each other, of the same B, T and width: x and out are [B, T, width], dense, and may be the same.
// Runs on the process's thread pool. Throws std::bad_alloc if there is no memory to work in.
void decoder_layers(std::span<const DecoderLayerProblem> layers, const void* x, void* out);

}  // namespace mfa
