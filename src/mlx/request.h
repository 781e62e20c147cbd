// request.h: a validated call of attention, and how its arrays are passed to the implementations.
#pragma once

#include <optional>
#include <vector>

#include "attention/problem.h"
#include "mfa/attention.h"
#include "mlx/array.h"
#include "mlx/sources.h"
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
  bool returns_lse = true;  // false only for a call of which no gradient is foreseen
  bool returns_probs = false;

  // As AttentionSources says.
  const char* function = "flash_attention";
  bool packs_queries = false, packs_keys = false;
  int longest_query = 0, longest_key = 0;
  bool paged = false;
  bool rotary = false, interleaved = true, rotates_k = true;
  bool has_q_positions = false, has_k_positions = false;
  bool has_blocks = false, lists_b = false, lists_h = false;
  int block_q = 0, block_k = 0;
  Neighbourhood neighbourhood = {};
  bool has_floor = false;
  bool has_dropout_keys = false;

  // Whether the call is of batched, dense arrays, and sees keys by intervals, mask and bias alone.
  bool plain() const {
    return !packs_queries && !paged && !rotary && !has_blocks && neighbourhood.axes == 0 && !has_floor;
  }
  // Whether MLX's operations can compute the call.
  bool composable() const { return !packs_queries && !paged && !rotary && !has_floor; }
  bool operator==(const AttentionParams&) const = default;
};

// The arrays of a call in this order, absent ones left out: q, k, v always, then those of the sources and of the
// options.
struct InputLayout {
  explicit constexpr InputLayout(const AttentionParams& p) {
    if (p.packs_queries) query_starts = count++;
    if (p.packs_keys) key_starts = count++;
    if (p.paged) table = count++;
    if (p.rotary) {
      cos = count++;
      sin = count++;
    }
    if (p.has_q_positions) q_positions = count++;
    if (p.has_k_positions) k_positions = count++;
    if (p.has_blocks) {
      offsets = count++;
      key_ids = count++;
      transposed_offsets = count++;
      query_ids = count++;
    }
    if (p.has_floor) floor = count++;
    if (p.has_dropout_keys) dropout_keys = count++;
    if (p.has_alibi) alibi = count++;
    if (p.has_sinks) sinks = count++;
    if (p.has_bias) bias = count++;
    if (p.has_mask) mask = count++;
    if (p.has_lengths) kv_lengths = count++;
    if (p.has_seed) seed = count++;
  }
  int alibi = -1, sinks = -1, bias = -1, mask = -1, kv_lengths = -1, seed = -1;
  int query_starts = -1, key_starts = -1, table = -1, cos = -1, sin = -1, q_positions = -1, k_positions = -1;
  int offsets = -1, key_ids = -1, transposed_offsets = -1, query_ids = -1, floor = -1, dropout_keys = -1;
  int count = 3;
};

// Arrays as the implementations take them: q, k, v of one dtype; alibi and sinks float32 [Hq]; bias float32, float16 or
// bfloat16 and mask bool, both of rank 4 with extent 1 on the axes that are broadcast; kv_lengths int32 [B]; seed
// uint32 [2]; those of AttentionSources as it says.
struct Request {
  AttentionParams params;
  std::vector<mx::array> inputs;
  mx::Stream stream;
};

// The name of a call in messages: what the options give, or else the function's own.
inline const char* name_of(const AttentionOptions& options, const char* own) {
  return options.function ? options.function : own;
}

// Checks the arguments of attention() and of the entry points that add `sources`, and brings them into that form; those
// of sources have their ranks and dtypes already. Values of starts, tables, lengths and positions are checked here
// where they are known without computing anything, else where the work runs. Throws std::invalid_argument.
Request make_request(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionOptions& options,
                     bool returns_probs, mx::StreamOrDevice s, const AttentionSources& sources = {});

// A bias and a mask of the scores [B, Hq, Nq, Nk], of rank 4 and a dtype that the implementations take; throw
// std::invalid_argument.
mx::array checked_bias(const mx::array& bias, const mx::Shape& scores, const char* function, mx::Stream s);
mx::array checked_mask(const mx::array& mask, const mx::Shape& scores, const char* function, mx::Stream s);

// Throws std::invalid_argument unless each side of the window is a size or -1.
void check_window(const AttentionOptions& options, const char* function);

// The seed given, or one that is drawn.
mx::array dropout_seed(const AttentionOptions& options, mx::Stream s);

// Throws std::invalid_argument, naming `name`, unless `x` holds one real number for each of the Hq heads of q.
void check_per_head(const mx::array& x, const char* name, int Hq, const char* function);

inline DType to_dtype(mx::Dtype dtype) {
  return dtype == mx::float16 ? DType::f16 : dtype == mx::bfloat16 ? DType::bf16 : DType::f32;
}

// The problem's sizes and options. Its pointers are null, strides 0.
AttentionProblem describe(const AttentionParams& params, const std::vector<mx::array>& inputs);

}  // namespace mfa
