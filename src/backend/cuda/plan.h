// plan.h: how a problem is cut into launches on a CUDA device: pure functions of shapes and of the device's traits,
// tested by tables without one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "attention/problem.h"
#include "backend/cuda/device/hopper_tiles.cuh"
#include "backend/cuda/params.h"

namespace mfa::cuda {

struct DeviceTraits {
  int compute_capability = 0;  // 10 * major + minor
  int multiprocessors = 0;
  int shared_bytes = 0;  // most that a block may have
  // A problem's results must not depend on how many heads and batch entries travel with it: keys are split by their
  // number alone. MFA_BATCH_INVARIANT.
  bool batch_invariant = false;
};

// What a plan depends on beside shapes and options: which arrays there are, and how they lie in memory.
struct CallTraits {
  bool alibi = false, bias = false, mask = false, lengths = false, dropout = false;
  bool mapped = true;         // tensor copies can read q, k, v and, for the backward, o and d_o
  bool mask_in_words = true;  // the mask's rows are dense and aligned to 16 bytes
  bool mask_varies[3] = {};   // the mask does, over the axes of B, Hq, Nq
};

// Kernels by the stem of their names: <stem>_<dtype>, <stem>_<dtype>_<DP> if they are tiled, <stem>_<columns>_<dtype>
// if they are Hopper's.
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
  hopper_forward,
  hopper_forward_mask,
  hopper_forward_modified,
  hopper_split,
  hopper_mask_tiles,
  hopper_backward_prepare,
  hopper_dq,
  hopper_dkv,
  hopper_dkv_shared,
  hopper_dq_modified,
  hopper_dkv_modified,
  hopper_dkv_shared_modified,
  hopper_backward_fused,
  count,
};
const char* stem_of(Kernel kernel);
bool is_tiled(Kernel kernel);
bool is_hopper(Kernel kernel);

struct Launch {
  Kernel kernel = Kernel::count;
  Element dtype = Element::f32;
  int head_dim = 0;  // index into kHeadDims or kHopperColumns
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
  // Hopper kernels: how tiles are handed to blocks (the slot is the launcher's), and the rows of the boxes in which q
  // and d_o, and k and v, are copied; 0 if there are no such copies.
  HopperSchedule schedule{};
  int query_box = 0, key_box = 0;
};
std::string name_of(const Launch& launch);

struct ForwardPlan {
  Launch split;       // of float32 inputs into parts, where `attention` reads those
  Launch mask_tiles;  // finds tiles that a mask hides, where that is cheap and `attention` leaves them out
  Launch attention;
  Launch merge;  // if splits > 1
  int row_tile = 0, key_tile = 0;
  int splits = 1, split_keys = 0;
  int split_columns = 0;  // of the parts
  // Of the words that mask_tiles writes.
  int shown_words() const { return static_cast<int>(mask_tiles.grid[0] * mask_tiles.grid[1] * mask_tiles.grid[2]); }
};
ForwardPlan plan_forward(const AttentionProblem& p, const CallTraits& call, const DeviceTraits& device);

// Which of the axes of the bias are summed in its gradient.
struct BiasAxes {
  bool summed[4] = {};
};
struct BackwardPlan {
  Launch rows, queries, keys, bias, slopes, heads;
  Launch fused;  // dq, dk and dv in one pass instead of `queries` and `keys`; no blocks if there is no such kernel
  Launch lse;  // computes it again, where the forward's kernel sums scores in another order than these; else no blocks
  int Nq_padded = 0;
  int fused_columns = 0;  // of its sums of dq
};
BackwardPlan plan_backward(const AttentionProblem& p, const CallTraits& call, const BiasAxes& bias,
                           const DeviceTraits& device);

// Why the kernels cannot run `p`, or nullopt. Routing, explain() and the error of a forced backend print it.
std::optional<std::string> unsupported(const AttentionProblem& p, const DeviceTraits& device);

Element element_of(DType dtype);

}  // namespace mfa::cuda
