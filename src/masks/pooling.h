// pooling.h: what selectors read of q and k: means and self-similarities of tiles, and the products of scored rows.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/problem.h"

namespace mfa {

// [B, H, N, D] by its strides, the last axis dense.
struct SelectionOperand {
  TensorRef tensor;
  DType dtype = DType::f32;
  int32_t B = 0, H = 0, N = 0, D = 0;
  int64_t row(int64_t b, int64_t h, int64_t n) const {  // where row n starts, in elements
    return b * tensor.stride[0] + h * tensor.stride[1] + n * tensor.stride[2];
  }
};

// Means of tiles of `block` rows, float32 [B, H, tiles, D]. `sizes`, one number a tile, or empty: the rows of each
// tile that count, the first ones; a tile of none has the mean 0.
std::vector<float> tile_means(const SelectionOperand& x, int32_t block, const std::vector<int32_t>& sizes = {});

// The mean entry of the matrix of cosines between the rows of a tile, [B, H, tiles]: 1 if all point the same way.
std::vector<float> tile_similarities(const SelectionOperand& x, int32_t block);

// out[m][n] = alpha * sum_d a[m][d] b[n][d], float32, all dense. With this library's kernels where there are any.
void product(const float* a, const float* b, int64_t M, int32_t N, int32_t D, float alpha, float* out);

}  // namespace mfa
