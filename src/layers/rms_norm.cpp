#include "layers/rms_norm.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/isa.h"
#include "common/thread_pool.h"

namespace mfa {
namespace {

const char* element(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(dtype));
}

std::vector<char> dense_weight(const RmsNormProblem& p) {
  const size_t size = size_of(p.dtype);
  std::vector<char> dense(static_cast<size_t>(p.D) * size);
  for (int32_t i = 0; i < p.D; ++i)
    std::memcpy(dense.data() + i * size, element(p.weight, p.dtype, i * p.weight_stride), size);
  return dense;
}

}  // namespace

void rms_norm(const RmsNormProblem& p) {
  const cpu::LayerTable& kernels = cpu::require_kernels().layers();
  std::vector<char> dense;
  if (p.weight && p.weight_stride != 1) dense = dense_weight(p);
  const void* weight = dense.empty() ? p.weight : dense.data();
  const int64_t chunk = std::max<int64_t>(1, 65536 / std::max(1, p.D));  // about 10 us of work
  const auto task = [&](int64_t index, int) {
    const int64_t end = std::min(p.rows, (index + 1) * chunk);
    for (int64_t row = index * chunk; row < end; ++row)
      kernels.norm_row(p.dtype, element(p.x, p.dtype, row * p.stride), weight, p.D, p.eps,
                       const_cast<char*>(element(p.out, p.dtype, row * p.D)));
  };
  const int64_t tasks = (p.rows + chunk - 1) / chunk;
  if (tasks <= 4) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  } else {
    parallel_for(tasks, task);
  }
}

}  // namespace mfa
