// attention.h: attention and its backward as MLX primitives, on CPU and CUDA streams.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/request.h"

namespace mfa {

// Inputs: as InputLayout says. Outputs: o [B, Hq, Nq, Dv], if params.returns_lse lse / ln 2 float32 [B, Hq, Nq], if
// params.returns_probs (which wants lse too) probs float32 [B, Hq, Nq, Nk].
class Attention : public mx::Primitive {
 public:
  Attention(mx::Stream stream, const AttentionParams& params) : Primitive(stream), params_(params) {}

  // The outputs of a new node.
  static std::vector<mx::array> make(mx::Stream stream, const AttentionParams& params, std::vector<mx::array> inputs);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaAttention"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  AttentionParams params_;
};

// The gradients that can be asked for, in the order of the outputs of AttentionBackward.
enum class Gradient { q, k, v, bias, sinks, alibi };
inline constexpr int kGradients = 6;
using WantedGradients = std::array<bool, kGradients>;

// Inputs: those of Attention, then o, lse and the cotangents of both, that of lse empty if it is zero. Outputs: the
// wanted gradients, in the shapes of their inputs; q, k, v in their dtype, the others float32.
class AttentionBackward : public mx::Primitive {
 public:
  AttentionBackward(mx::Stream stream, const AttentionParams& params, const WantedGradients& wanted)
      : Primitive(stream), params_(params), wanted_(wanted) {}

  static std::vector<mx::array> make(mx::Stream stream, const AttentionParams& params, const WantedGradients& wanted,
                                     std::vector<mx::array> inputs);

  // The input that gradient `g` belongs to; -1 if the call has none.
  static int input_of(Gradient g, const InputLayout& layout);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaAttentionBackward"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  AttentionParams params_;
  WantedGradients wanted_;
};

}  // namespace mfa
