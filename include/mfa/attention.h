// attention.h: softmax attention on MLX arrays, forward and backward, without storing the scores.
//
//   s[i,j] = softcap(scale * q_i . k_j) + slope_h * (j - pos(i)) + bias[i,j]       for visible (i, j), else -inf
//   p[i,:] = exp(s[i,:]) / (sum_j exp(s[i,j]) + exp(sink_h))
//   o_i    = sum_j p[i,j] z[i,j] v_j,     lse_i = log(sum_j exp(s[i,j]) + exp(sink_h))
//
// with pos(i) = i + max(0, Nk_b - Nq), Nk_b the keys of batch entry b, and z the dropout factor. All options combine.
// A row that sees no key gives o = 0 and lse = -inf (or the sink), and no gradient.
// Sources: Dao et al., arXiv:2205.14135; Milakov and Gimelshein, arXiv:1805.02867.
#pragma once

#include <optional>
#include <string_view>
#include <utility>

#include "mfa/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mfa {

// Which implementation computes a call.
enum class Backend {
  automatic,  // the first that covers the problem: this library's kernels, MLX's op, the composed graph
  mfa,        // this library's kernels; std::runtime_error with the reason if they cannot run the problem
  sdpa,       // mlx::core::fast::scaled_dot_product_attention where it means exactly the same, else composed
  composed,   // a graph of MLX operations that stores the scores: the readable definition, O(Nq Nk) memory
};

// "auto", "mfa", "sdpa" or "composed". Throws std::invalid_argument for anything else.
MFA_API Backend parse_backend(std::string_view name);

struct AttentionOptions {
  // Multiplies q . k; default D^-0.5. Must be finite.
  std::optional<float> scale;

  // Query i sees keys j <= pos(i).
  bool causal = false;

  // Query i sees keys pos(i) - window_left <= j <= pos(i) + window_right; -1 leaves a side open.
  int window_left = -1;
  int window_right = -1;

  // s = softcap * tanh(s / softcap), before ALiBi, bias and masks; 0 = off. Must be finite and not negative.
  float softcap = 0.f;

  // [Hq], any real dtype, used in float32: adds slope[h] * (j - pos(i)). Differentiable.
  std::optional<mlx::core::array> alibi_slopes;

  // Added to the scores; floating, broadcastable to [B, Hq, Nq, Nk], never expanded in memory; entries of -inf hide a
  // key. Differentiable.
  std::optional<mlx::core::array> bias;

  // bool, broadcastable to [B, Hq, Nq, Nk], never expanded in memory; true = visible.
  std::optional<mlx::core::array> mask;

  // [Hq], any real dtype, used in float32: one more logit a head, with no value. Differentiable.
  std::optional<mlx::core::array> sinks;

  // [B], integer: the keys of each batch entry, the first kv_lengths[b] of Nk. Values outside [0, Nk] are refused when
  // the array already holds data, and clamped when it is still to be computed.
  std::optional<mlx::core::array> kv_lengths;

  // Probability of dropping a softmax weight, in [0, 1]; kept weights are divided by 1 - p.
  float dropout_p = 0.f;

  // uint32 [2], the low and the high word of the Philox key: the same mask for the same seed on every backend. By
  // default drawn from MLX's global random state. Ignored when dropout_p is 0.
  std::optional<mlx::core::array> dropout_seed;

  // attention_with_lse also returns the probabilities, before dropout.
  bool return_probs = false;

  Backend backend = Backend::automatic;

  // Stands for the name of the function in errors and explanations: a string that outlives the graph.
  const char* function = nullptr;
};

struct AttentionResult {
  mlx::core::array out;                   // [B, Hq, Nq, Dv], dtype of q
  mlx::core::array lse;                   // [B, Hq, Nq], float32, natural log; differentiable
  std::optional<mlx::core::array> probs;  // [B, Hq, Nq, Nk], float32, if options.return_probs; differentiable
};

// Attention of `q` [B, Hq, Nq, D] over `k` [B, Hkv, Nk, D] and `v` [B, Hkv, Nk, Dv]; returns [B, Hq, Nq, Dv] in the
// dtype of q. Hq is a multiple of Hkv: query head h reads KV head h / (Hq / Hkv). D and Dv are 1 to 576; lengths and
// the batch may be 0. q is float32, float16 or bfloat16; k and v of another floating dtype are cast to it; sums are
// float32. Arrays with a dense last axis are read in place whatever their other strides. Lazy; supports vjp, vmap,
// compile and checkpoint. On a GPU stream, where there is no kernel, the graph is MLX's own op or the composed one.
//
// Throws std::invalid_argument, before anything is allocated, if shapes, dtypes or options are not as said here.
MFA_API mlx::core::array attention(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                                   const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row and, if options.return_probs, the probabilities.
MFA_API AttentionResult attention_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                           const mlx::core::array& v, const AttentionOptions& options = {},
                                           mlx::core::StreamOrDevice s = {});

// The base of the logarithms that merge_attention_states() takes and returns.
enum class LogBase { e, two };

// The attention over the union of two disjoint sets of keys from the attention over each: returns (o, lse). `o_a` and
// `o_b` [..., Dv] have one floating dtype, `lse_a` and `lse_b` [...] another. A part with lse = -inf is empty and its o
// is not read; both empty gives o = 0 and lse = -inf. o has the dtype of o_a, lse is float32. Differentiable, with
// finite gradients. Throws std::invalid_argument if shapes or dtypes disagree.
MFA_API std::pair<mlx::core::array, mlx::core::array> merge_attention_states(
    const mlx::core::array& o_a, const mlx::core::array& lse_a, const mlx::core::array& o_b,
    const mlx::core::array& lse_b, mlx::core::StreamOrDevice s = {}, LogBase base = LogBase::e);

}  // namespace mfa
