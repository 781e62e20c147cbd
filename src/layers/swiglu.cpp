#include "layers/swiglu.h"

#include <algorithm>

#include "backend/cpu/isa.h"
#include "common/thread_pool.h"

namespace mfa {

void swiglu(const SwigluProblem& p) {
  const cpu::LayerTable& kernels = cpu::require_kernels().layers();
  constexpr int64_t kChunk = 16384;  // about 20 us of work
  const auto task = [&](int64_t index, int) {
    const int64_t begin = index * kChunk, at = begin * static_cast<int64_t>(size_of(p.dtype));
    kernels.swiglu(p.dtype, static_cast<const char*>(p.gate) + at, static_cast<const char*>(p.x) + at,
                   std::min(kChunk, p.size - begin), static_cast<char*>(p.out) + at);
  };
  const int64_t tasks = (p.size + kChunk - 1) / kChunk;
  if (tasks <= 2) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0);
  } else {
    parallel_for(tasks, task);
  }
}

}  // namespace mfa
