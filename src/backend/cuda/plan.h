// plan.h: how a problem is cut into launches on a CUDA device: pure functions of shapes and of the device's traits,
// tested by tables without one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "attention/problem.h"
#include "backend/cuda/params.h"

namespace mfa::cuda {

struct DeviceTraits {
  int compute_capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // most that a block may have
};

// Kernels by the stem of their names, <stem>_<dtype> or, if they are tiled, <stem>_<dtype>_<DP>.
enum class Kernel : uint8_t {
  forward_tiled,
  forward_few_rows,
  forward_decode,
  merge_splits,
  backward_rows,
  backward_queries,
  backward_keys,
  bias_gradient,
  slope_rows,
  head_gradients,
  count,
};
const char* stem_of(Kernel kernel);
bool is_tiled(Kernel kernel);

struct Launch {
  Kernel kernel = Kernel::count;
  Element dtype = Element::f32;
  int head_dim = 0;  // index into kHeadDims
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
};
std::string name_of(const Launch& launch);

struct ForwardPlan {
  Launch attention;
  Launch merge;  // if splits > 1
  int row_tile = 0, key_tile = 0;
  int splits = 1, split_keys = 0;
};
ForwardPlan plan_forward(const AttentionProblem& p, const DeviceTraits& device);

// Which of the axes of the bias are summed in its gradient.
struct BiasAxes {
  bool summed[4] = {};
};
struct BackwardPlan {
  Launch rows, queries, keys, bias, slopes, heads;
  int Nq_padded = 0;
};
BackwardPlan plan_backward(const AttentionProblem& p, const BiasAxes& bias, const DeviceTraits& device);

// Why the kernels cannot run `p`, or nullopt. Routing, explain() and the error of a forced backend print it.
std::optional<std::string> unsupported(const AttentionProblem& p, const DeviceTraits& device);

Element element_of(DType dtype);

}  // namespace mfa::cuda
