// gpu.h: what a library of GPU kernels offers to the primitives. Such a library is built against MLX's build for that
// kind of GPU, lies beside this one and is loaded when that MLX runs.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "mlx/attention.h"
#include "mlx/request.h"

namespace mfa {

struct GpuKernel {  // what runs a problem, for explain()
  std::string name;
  int row_tile = 0, key_tile = 0, splits = 1;
  int64_t blocks = 0;
};

class GpuAttention {
 public:
  virtual ~GpuAttention() = default;

  // Why the kernels cannot run `p`, whose pointers are null. Never throws.
  virtual std::optional<std::string> refusal(const AttentionProblem& p) = 0;
  // What runs the forward if the arrays are dense.
  virtual GpuKernel kernel(const AttentionParams& params, const AttentionProblem& p) = 0;

  // As eval_gpu of the primitives: allocate the outputs and launch on the stream.
  virtual void forward(const AttentionParams& params, const AttentionProblem& p, const std::vector<mx::array>& inputs,
                       std::vector<mx::array>& outputs, mx::Stream stream) = 0;
  virtual void backward(const AttentionParams& params, const WantedGradients& wanted, const AttentionProblem& p,
                        const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs, mx::Stream stream) = 0;
};

// The library for the GPU of this MLX, or nullptr and why there is none.
GpuAttention* gpu_attention(std::string* reason = nullptr);

}  // namespace mfa
