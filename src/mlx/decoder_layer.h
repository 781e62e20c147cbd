// decoder_layer.h: layers of a llama-like decoder as one MLX primitive on a CPU stream, for few tokens.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "mfa/layers.h"
#include "mlx/operands.h"
#include "mlx/primitives.h"

namespace mfa {

// Inputs: x, then keys and values of every layer. Outputs: as x, and the caches with the new rows, in place where
// nothing else refers to them. Weights are constants of the primitive: inputs of their own, which every output has a
// list of, would cost more to build than the rest of a layer.
class DecoderLayers : public mx::Primitive {
 public:
  struct Layer {
    DecoderLayerShape shape;
    DecoderLayerWeights weights;
  };

  DecoderLayers(mx::Stream stream, std::vector<Layer> layers)
      : Primitive(stream), layers_(std::make_shared<const std::vector<Layer>>(std::move(layers))) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "MfaDecoderLayers"; }
  bool is_equivalent(const Primitive&) const override { return false; }  // it writes into its inputs' memory
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    std::vector<mx::Shape> shapes;
    for (const mx::array& input : inputs) shapes.push_back(input.shape());
    return shapes;
  }

 private:
  std::shared_ptr<const std::vector<Layer>> layers_;
};

}  // namespace mfa
