// decoder_layer.h: a layer of a llama-like decoder as one MLX primitive on a CPU stream, for few tokens.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "mfa/layers.h"
#include "mlx/operands.h"
#include "mlx/primitives.h"

namespace mfa {

// Everything that is not an array, and the places of those that may be absent.
struct DecoderLayerParams {
  DecoderLayerShape shape;
  std::array<Quantisation, kProjections> quantisations;  // bits = 0: dense
  bool has_freqs = false;
  bool operator==(const DecoderLayerParams&) const = default;
};

// Inputs: x, keys, values, both norms' weights, freqs if there are, then each projection's one or three arrays.
// Outputs: as x, and the cache's keys and values with the new rows, in place where nothing else refers to them.
class DecoderLayer : public mx::Primitive {
 public:
  DecoderLayer(mx::Stream stream, const DecoderLayerParams& params) : Primitive(stream), params_(params) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  const char* name() const override { return "MfaDecoderLayer"; }
  bool is_equivalent(const Primitive& other) const override {
    return params_ == static_cast<const DecoderLayer&>(other).params_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

 private:
  DecoderLayerParams params_;
};

}  // namespace mfa
