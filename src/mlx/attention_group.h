// attention_group.h: several calls of attention as one node, whose tasks the threads share.
#pragma once

#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/request.h"

namespace mfa {

// Inputs: those of each Attention, one after another. Outputs: the two of each. On CPU streams only; without returned
// probabilities.
class AttentionGroup : public mx::Primitive {
 public:
  AttentionGroup(mx::Stream stream, std::vector<AttentionParams> calls) : Primitive(stream), calls_(std::move(calls)) {}

  // The outputs of a new node, those of each request.
  static std::vector<std::vector<mx::array>> make(mx::Stream stream, const std::vector<Request>& requests);

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaAttentionGroup"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  std::vector<AttentionParams> calls_;
};

}  // namespace mfa
