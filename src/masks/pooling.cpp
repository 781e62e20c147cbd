#include "masks/pooling.h"

#include <algorithm>
#include <cmath>

#include "backend/cpu/isa.h"
#include "backend/cpu/matmul.h"
#include "common/thread_pool.h"

namespace mfa {
namespace {

// Runs tile(b, h, t, rows) for every tile, rows being its number of rows.
template <typename Tile>
void for_tiles(const SelectionOperand& x, int32_t block, const Tile& tile) {
  const int64_t tiles = (int64_t{x.N} + block - 1) / block;
  parallel_for(int64_t{x.B} * x.H * tiles, [&](int64_t task, int) {
    const int64_t t = task % tiles, h = task / tiles % x.H, b = task / tiles / x.H;
    tile(b, h, t, task, static_cast<int32_t>(std::min<int64_t>(block, x.N - t * block)));
  });
}

}  // namespace

std::vector<float> tile_means(const SelectionOperand& x, int32_t block, const std::vector<int32_t>& sizes) {
  const int64_t tiles = (int64_t{x.N} + block - 1) / block;
  std::vector<float> means(int64_t{x.B} * x.H * tiles * x.D);
  for_tiles(x, block, [&](int64_t b, int64_t h, int64_t t, int64_t index, int32_t rows) {
    if (!sizes.empty()) rows = std::min(rows, sizes[t]);
    float* mean = means.data() + index * x.D;
    for (int32_t i = 0; i < rows; ++i) {
      const int64_t row = x.row(b, h, t * block + i);
      for (int32_t d = 0; d < x.D; ++d) mean[d] += load_as_float(x.tensor.data, x.dtype, row + d);
    }
    for (int32_t d = 0; d < x.D && rows > 0; ++d) mean[d] /= static_cast<float>(rows);
  });
  return means;
}

std::vector<float> tile_similarities(const SelectionOperand& x, int32_t block) {
  const int64_t tiles = (int64_t{x.N} + block - 1) / block;
  std::vector<float> similarities(int64_t{x.B} * x.H * tiles);
  for_tiles(x, block, [&](int64_t b, int64_t h, int64_t t, int64_t index, int32_t rows) {
    // The sum of all entries u_i . u_j of unit vectors is |sum u_i|^2.
    std::vector<double> sum(x.D);
    for (int32_t i = 0; i < rows; ++i) {
      const int64_t row = x.row(b, h, t * block + i);
      double square = 0;
      for (int32_t d = 0; d < x.D; ++d) {
        const double value = load_as_float(x.tensor.data, x.dtype, row + d);
        square += value * value;
      }
      if (square == 0) continue;  // points nowhere: similar to nothing
      const double scale = 1 / std::sqrt(square);
      for (int32_t d = 0; d < x.D; ++d) sum[d] += scale * load_as_float(x.tensor.data, x.dtype, row + d);
    }
    double square = 0;
    for (const double value : sum) square += value * value;
    similarities[index] = static_cast<float>(square / (static_cast<double>(rows) * rows));
  });
  return similarities;
}

void product(const float* a, const float* b, int64_t M, int32_t N, int32_t D, float alpha, float* out) {
  if (cpu::selected_kernels()) {
    MatmulProblem p;
    p.M = M;
    p.N = N;
    p.K = D;
    p.dtype = DType::f32;
    p.x.data = a;
    p.x.stride = D;
    p.w.data = b;
    p.w.transposed = true;
    p.w.stride = D;
    p.alpha = alpha;
    p.out = out;
    cpu::matmul({&p, 1});
    return;
  }
  parallel_for(M, [&](int64_t m, int) {
    for (int32_t n = 0; n < N; ++n) {
      float sum = 0;
      for (int32_t d = 0; d < D; ++d) sum += a[m * D + d] * b[int64_t{n} * D + d];
      out[m * N + n] = alpha * sum;
    }
  });
}

}  // namespace mfa
