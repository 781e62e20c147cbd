// layers.h: small layers of a transformer that MLX evaluates on the CPU as a dozen operations or more; here each is
// one. Computed in float32 and rounded once. On a GPU stream these are MLX's own operations.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "mfa/api.h"
#include "mlx/array.h"
#include "mlx/utils.h"

namespace mfa {

// x / sqrt(mean(x^2) + eps) * weight over the last axis; float32, float16 or bfloat16, weight [D] of the dtype of x.
// Arguments outside that are left to mlx::core::fast::rms_norm, which reports what is wrong.
MFA_API mlx::core::array rms_norm(const mlx::core::array& x, const std::optional<mlx::core::array>& weight, float eps,
                                  mlx::core::StreamOrDevice s = {});

// Rotary position encoding of x [B, ..., T, D] with the arguments of mlx::core::fast::rope (arXiv:2104.09864); angles
// are float64. `offset` is an integer array of one element or [B]. Arguments outside that are left to MLX's function.
MFA_API mlx::core::array rope(const mlx::core::array& x, int dims, bool traditional, std::optional<float> base,
                              float scale, const mlx::core::array& offset,
                              const std::optional<mlx::core::array>& freqs = std::nullopt,
                              mlx::core::StreamOrDevice s = {});

// silu(gate) * x, element by element, of one shape and dtype: float32, float16 or bfloat16 (arXiv:2002.05202). Other
// arguments are left to a composition of MLX's operations.
MFA_API mlx::core::array swiglu(const mlx::core::array& gate, const mlx::core::array& x,
                                mlx::core::StreamOrDevice s = {});

// mlx::core::logsumexp and argmax over the last axis or, without `axis`, over all elements; nullopt for what MLX
// reduces as fast or this library does not cover: other axes and dtypes, rows of less than 256 elements, GPU streams.
MFA_API std::optional<mlx::core::array> try_logsumexp(const mlx::core::array& x, std::optional<int> axis, bool keepdims,
                                                      mlx::core::StreamOrDevice s = {});
MFA_API std::optional<mlx::core::array> try_argmax(const mlx::core::array& x, std::optional<int> axis, bool keepdims,
                                                   mlx::core::StreamOrDevice s = {});

// Whether rms_norm(), rope() and swiglu() run as one operation of this library.
MFA_API bool fuses_rms_norm(const mlx::core::array& x, const std::optional<mlx::core::array>& weight,
                            mlx::core::StreamOrDevice s = {});
MFA_API bool fuses_rope(const mlx::core::array& x, int dims, std::optional<float> base, const mlx::core::array& offset,
                        const std::optional<mlx::core::array>& freqs, mlx::core::StreamOrDevice s = {});

MFA_API bool fuses_swiglu(const mlx::core::array& gate, const mlx::core::array& x, mlx::core::StreamOrDevice s = {});

// A layer of a llama-like decoder: two RMS norms, seven products, rotary encoding of q and k, attention over a cache,
// SwiGLU and the two sums. For a few new tokens that is one operation, with the bits of these one by one.
enum DecoderProjection { kQ, kK, kV, kO, kGate, kUp, kDown, kProjections };

struct DecoderLayerShape {
  int Hq = 0, Hkv = 0, D = 0;
  float scale = 1.f;      // of scores
  float eps[2] = {0, 0};  // of the norms before attention and before the MLP
  int rope_dims = 0;
  bool traditional = false;
  float rope_base = 0.f, rope_scale = 1.f;  // the base is not used if there are frequencies
};

struct ProjectionWeights {
  std::vector<mlx::core::array> arrays;  // w [out, in], or the three of affine quantisation
  int bits = 0, group_size = 0;          // 0: dense
};

struct DecoderLayerWeights {
  mlx::core::array attention_norm, mlp_norm;
  std::optional<mlx::core::array> freqs;  // as rope() takes them
  std::array<ProjectionWeights, kProjections> projections;
};

struct DecoderLayer {
  DecoderLayerShape shape;
  DecoderLayerWeights weights;
};

// Layers that follow each other, checked and brought into the kernels' terms once for all tokens. It keeps the weights
// as they were then.
class DecoderStack;

// Null if there is anything that decoder_layers() does not cover: weights that are being traced, not evaluated or not
// dense, shapes and dtypes that do not fit each other.
MFA_API std::shared_ptr<const DecoderStack> prepare_decoder(std::vector<DecoderLayer> layers);

struct LayerCache {
  mlx::core::array keys, values;  // the whole cache, [B, Hkv, capacity, D] each
  int offset = 0;                 // tokens in it before the new ones
};

struct DecoderOutputs {
  mlx::core::array x;                                                 // of the last layer
  std::vector<std::pair<mlx::core::array, mlx::core::array>> caches;  // keys and values of every layer
};

// The layers of x [B, T, width], a cache for each; causal, or every new token sees all keys. Nullopt if there is
// anything that this does not cover: more than 8 tokens, a cache without room for them, arrays that are being traced,
// shapes and dtypes that do not fit the layers, GPU streams. Caches are written in place where nothing else refers to
// them.
MFA_API std::optional<DecoderOutputs> decoder_layers(const mlx::core::array& x, const DecoderStack& stack,
                                                     const std::vector<LayerCache>& caches, bool causal,
                                                     mlx::core::StreamOrDevice s = {});

}  // namespace mfa
