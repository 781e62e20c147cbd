// layers.h: layers as MLX primitives on a CPU stream. Their derivatives and maps are those of MLX's composition.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace mfa {

namespace mx = mlx::core;

using Composition = std::function<std::vector<mx::array>(const std::vector<mx::array>&)>;

// A primitive with one output, of the shape of its first input unless it says otherwise.
class FusedLayer : public mx::UnaryPrimitive {
 public:
  FusedLayer(mx::Stream stream, Composition composition)
      : UnaryPrimitive(stream), composition_(std::move(composition)) {}

  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  Composition with_fixed(const std::vector<mx::array>& primals, const std::vector<int>& argnums) const;
  Composition composition_;
};

// Inputs: x [..., D] and, if there is one, weight [D].
class RmsNorm : public FusedLayer {
 public:
  RmsNorm(mx::Stream stream, Composition composition, float eps)
      : FusedLayer(stream, std::move(composition)), eps_(eps) {}
  using FusedLayer::eval_cpu;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  const char* name() const override { return "MfaRmsNorm"; }
  bool is_equivalent(const Primitive& other) const override;

 private:
  float eps_;
};

// Inputs: gate and x, of one shape.
class Swiglu : public FusedLayer {
 public:
  using FusedLayer::eval_cpu;
  using FusedLayer::FusedLayer;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  const char* name() const override { return "MfaSwiglu"; }
  bool is_equivalent(const Primitive&) const override { return true; }
};

// Input: x. Output: one value for each row along the last axis, or for all of x; the log-sum-exp, or the uint32 place
// of the largest element.
class Reduction : public FusedLayer {
 public:
  Reduction(mx::Stream stream, Composition composition, bool arg_max, bool all, bool keepdims)
      : FusedLayer(stream, std::move(composition)), arg_max_(arg_max), all_(all), keepdims_(keepdims) {}
  using FusedLayer::eval_cpu;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  const char* name() const override { return arg_max_ ? "MfaArgMax" : "MfaLogSumExp"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  bool arg_max_, all_, keepdims_;
};

struct RopeParams {
  int dims = 0;
  bool traditional = false;
  float base = 0.f, scale = 1.f;
  bool operator==(const RopeParams&) const = default;
};

// Inputs: x [B, ..., T, D], offset int32 [1] or [B] and, if there are some, freqs float32 [dims / 2].
class Rope : public FusedLayer {
 public:
  Rope(mx::Stream stream, Composition composition, const RopeParams& params)
      : FusedLayer(stream, std::move(composition)), params_(params) {}
  using FusedLayer::eval_cpu;
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  const char* name() const override { return "MfaRope"; }
  bool is_equivalent(const Primitive& other) const override;

 private:
  RopeParams params_;
};

}  // namespace mfa
