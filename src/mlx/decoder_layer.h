// decoder_layer.h: layers of a llama-like decoder as one MLX primitive on a CPU stream, for few tokens.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "layers/decoder_layer.h"
#include "mfa/layers.h"
#include "mlx/operands.h"
#include "mlx/primitives.h"

namespace mfa {

class DecoderStack {
 public:
  struct Layer {
    DecoderLayerProblem problem;  // all but what differs from call to call
    DecoderLayerWeights weights;  // which it points to
  };
  // Layers of one operation.
  using Part = std::shared_ptr<const std::vector<Layer>>;

  mlx::core::Dtype dtype = mlx::core::float32;
  int width = 0;
  size_t size = 0;  // layers
  std::vector<Part> parts;
};

// Inputs: x, then keys and values of every layer. Outputs: as x, and the caches with the new rows, in place where
// nothing else refers to them. Weights are constants of the primitive: inputs of their own, which every output has a
// list of, would cost more to build than the rest of a layer.
class DecoderLayers : public mx::Primitive {
 public:
  DecoderLayers(mx::Stream stream, DecoderStack::Part layers, std::vector<int> offsets, bool causal)
      : Primitive(stream), layers_(std::move(layers)), offsets_(std::move(offsets)), causal_(causal) {}

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
  DecoderStack::Part layers_;
  std::vector<int> offsets_;  // of each layer's cache
  bool causal_;
};

}  // namespace mfa
