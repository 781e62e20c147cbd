// mask_bias.cpp: biases by the distance of frames, and the tiles in which a bias leaves something visible.
#include <cmath>
#include <cstdlib>
#include <new>
#include <utility>

#include "common/check.h"
#include "common/thread_pool.h"
#include "masks/block_pattern.h"
#include "masks/marking.h"
#include "mfa/masks.h"
#include "mlx/allocator.h"
#include "mlx/request.h"

namespace mfa {

mx::array temporal_distance_bias(int64_t frames, int64_t frame_tokens, const std::vector<double>& rates,
                                 const std::string& decay) {
  constexpr const char* kFunction = "make_temporal_distance_bias";
  constexpr int64_t kMost = int64_t{1} << 31;
  check(frames >= 1 && frame_tokens >= 1 && frames < kMost && frame_tokens < kMost, kFunction,
        "num_frames and spatial_size must be 1 to 2^31 - 1; got ", frames, " and ", frame_tokens);
  check(!rates.empty(), kFunction, "num_heads must be 1 or more; got 0");
  check(decay == "linear" || decay == "exponential" || decay == "log", kFunction,
        "decay_type must be \"linear\", \"exponential\" or \"log\"; got \"", decay, "\"");
  const int64_t N = frames * frame_tokens, H = static_cast<int64_t>(rates.size());
  check(static_cast<double>(N) * static_cast<double>(N) * static_cast<double>(H) * 4 <= 0x1p31, kFunction,
        "the bias may have at most 2 GiB; got ", H, " heads of ", N, " by ", N, " tokens");

  auto data = mx::allocator::malloc(H * N * N * sizeof(float));
  if (data.buffer().ptr() == nullptr) throw std::bad_alloc();
  auto* out = static_cast<float*>(data.buffer().raw_ptr());
  parallel_for(H * frames, [&](int64_t task, int) {  // the rows of one frame of one head are all the same
    const int64_t h = task / frames, f = task % frames;
    float* row = out + (h * N + f * frame_tokens) * N;
    for (int64_t g = 0; g < frames; ++g) {
      const auto d = static_cast<double>(std::abs(f - g));
      const double distance = decay == "linear" ? d : decay == "log" ? std::log1p(d) : std::expm1(d);
      // The nearest frames have no bias whatever the rate, also where distance times an infinite one is NaN.
      std::fill_n(row + g * frame_tokens, frame_tokens, d == 0 ? 0.f : static_cast<float>(-rates[h] * distance));
    }
    for (int64_t i = 1; i < frame_tokens; ++i) std::copy_n(row, N, row + i * N);
  });
  return mx::array(std::move(data), {1, static_cast<int>(H), static_cast<int>(N), static_cast<int>(N)}, mx::float32);
}

BlockMask bias_blocks(const mx::array& bias, float threshold, TileSize tile) {
  constexpr const char* kFunction = "temporal_distance_bias_to_mask";
  check(bias.ndim() >= 2 && bias.ndim() <= 4, kFunction,
        "the bias must be [Nq, Nk], [H, Nq, Nk] or [B, H, Nq, Nk]; got shape ", bias.shape());
  check(bias.dtype() == mx::float32 || bias.dtype() == mx::float16 || bias.dtype() == mx::bfloat16, kFunction,
        "the bias must be float32, float16 or bfloat16; got ", bias.dtype());
  check(!std::isnan(threshold), kFunction, "the threshold must be a number; got NaN");
  const TileGrid grid = checked_grid(kFunction, bias.shape(-2), bias.shape(-1), tile);
  mx::array values = bias;
  values.eval();
  const DType dtype = to_dtype(values.dtype());
  const void* data = values.data<void>();
  const int batch = bias.ndim() == 4 ? bias.shape(0) : 1, heads = bias.ndim() >= 3 ? bias.shape(-3) : 1;
  const int64_t stride_b = bias.ndim() == 4 ? values.strides(0) : 0, stride_i = values.strides(-2);
  const int64_t stride_h = bias.ndim() >= 3 ? values.strides(-3) : 0, stride_j = values.strides(-1);
  const auto reaches = [=](const TokenRange& queries, const TokenRange& keys) {
    for (int64_t l = 0; l < int64_t{batch} * heads; ++l) {
      for (int64_t i = queries.first; i <= queries.last; ++i) {
        const int64_t row = l / heads * stride_b + l % heads * stride_h + i * stride_i;
        for (int64_t j = keys.first; j <= keys.last; ++j) {
          if (load_as_float(data, dtype, row + j * stride_j) >= threshold) return true;
        }
      }
    }
    return false;
  };
  return BlockMask(BlockPattern::from_rows(grid, 1, 1, [&](int32_t, int32_t, int32_t r, uint8_t* row) {
    const TokenRange queries = query_tokens(grid, r);
    for (int32_t c = 0; c < grid.key_blocks(); ++c) row[c] = reaches(queries, key_tokens(grid, c));
  }));
}

}  // namespace mfa
