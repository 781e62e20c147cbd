// decoder_layer.h: a layer of a llama-like decoder as one MLX primitive on a CPU stream, for few tokens.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "mfa/layers.h"
#include "mlx/operands.h"
#include "mlx/primitives.h"

namespace mfa {

// Inputs: x, keys, values. Outputs: as x, and the cache's keys and values with the new rows, in place where nothing
// else refers to them. Weights are constants of the primitive: three outputs of 23 more inputs each would cost more to
// build than the rest of a layer.
class DecoderLayer : public mx::Primitive {
 public:
  DecoderLayer(mx::Stream stream, const DecoderLayerShape& shape, std::shared_ptr<const DecoderLayerWeights> weights)
      : Primitive(stream), shape_(shape), weights_(std::move(weights)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "MfaDecoderLayer"; }
  bool is_equivalent(const Primitive&) const override { return false; }  // it writes into its inputs' memory
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

 private:
  DecoderLayerShape shape_;
  std::shared_ptr<const DecoderLayerWeights> weights_;
};

}  // namespace mfa
