#include "layers/swiglu.h"

#include <algorithm>

#include "common/thread_pool.h"
#include "layers/elementary.h"

namespace mfa {
namespace {

template <typename T, DType kDType>
void activate(const SwigluProblem& p, int64_t begin, int64_t end) {
  const T* gate = static_cast<const T*>(p.gate);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t i = begin; i < end; ++i) {
    const float g = to_float(gate[i]);
    store_from_float(p.out, kDType, i, g / (1.f + fast_exp(-g)) * to_float(x[i]));
  }
}

}  // namespace

void swiglu(const SwigluProblem& p) {
  constexpr int64_t kChunk = 4096;  // about 20 us of work
  const auto task = [&](int64_t index, int) {
    const int64_t begin = index * kChunk, end = std::min(p.size, begin + kChunk);
    if (p.dtype == DType::f32) {
      activate<float, DType::f32>(p, begin, end);
    } else if (p.dtype == DType::f16) {
      activate<float16, DType::f16>(p, begin, end);
    } else {
      activate<bfloat16, DType::bf16>(p, begin, end);
    }
  };
  const int64_t tasks = (p.size + kChunk - 1) / kChunk;
  if (tasks <= 2) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  } else {
    parallel_for(tasks, task);
  }
}

}  // namespace mfa
