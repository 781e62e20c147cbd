#include "backend/cpu/matmul.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/scratch.h"
#include "common/thread_pool.h"

namespace mfa::cpu {
namespace {

// Less work than this is done before another thread has taken its share and its caches have the operands.
constexpr double kInlineSeconds = 30e-6;

void run_alone(const MatmulTable& kernels, const MatmulJob& job) {
  if (job.plan.tasks == 0) return;
  void* scratch = thread_scratch(kernels.scratch_bytes(job));
  for (int64_t task = 0; task < job.plan.tasks; ++task) kernels.task(job, task, scratch);
}

}  // namespace

MatmulTraits matmul_traits() { return require_kernels().matmul().traits; }

size_t packed_weight_bytes(const MatmulProblem& p) { return require_kernels().matmul().packed_bytes(p); }

void pack_weights(const MatmulProblem& p, void* packed) {
  const MatmulTable& kernels = require_kernels().matmul();
  const int64_t panels = (int64_t{p.N} + kernels.traits.panel - 1) / kernels.traits.panel;
  parallel_for(panels, [&](int64_t task, int) { kernels.pack(p, task, packed); });
}

void matmul(std::span<const MatmulProblem> problems) {
  if (problems.empty()) return;
  const MatmulTable& kernels = require_kernels().matmul();
  double seconds = 0;
  for (const MatmulProblem& p : problems) seconds += estimated_seconds(p);
  const int threads = seconds < kInlineSeconds ? 1 : thread_count();
  const auto plan = [&](const MatmulProblem& p, int share) {
    return MatmulJob{&p, plan_matmul(p, kernels.traits, share)};
  };
  if (threads == 1) {
    for (const MatmulProblem& p : problems) run_alone(kernels, plan(p, 1));
    return;
  }
  if (problems.size() == 1) {
    const MatmulJob job = plan(problems[0], threads);
    if (job.plan.tasks == 0) return;
    const size_t scratch = kernels.scratch_bytes(job);
    parallel_for(job.plan.tasks, [&](int64_t task, int) { kernels.task(job, task, thread_scratch(scratch)); });
    return;
  }
  // Many products: whole ones are the tasks as long as that keeps the threads evenly busy.
  const int share = static_cast<int>(problems.size()) >= 8 * threads ? 1 : threads;
  std::vector<MatmulJob> jobs;
  std::vector<int64_t> first;  // task of each job
  jobs.reserve(problems.size());
  first.reserve(problems.size());
  int64_t tasks = 0;
  for (const MatmulProblem& p : problems) {
    jobs.push_back(plan(p, share));
    first.push_back(tasks);
    tasks += share == 1 ? 1 : jobs.back().plan.tasks;
  }
  parallel_for(tasks, [&](int64_t task, int) {
    const size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), task) - first.begin()) - 1;
    if (share == 1) return run_alone(kernels, jobs[i]);
    kernels.task(jobs[i], task - first[i], thread_scratch(kernels.scratch_bytes(jobs[i])));
  });
}

}  // namespace mfa::cpu
