#include "backend/cpu/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <vector>

#include "backend/cpu/isa.h"
#include "backend/cpu/scratch.h"
#include "common/thread_pool.h"

namespace mfa::cpu {
namespace {

// Less work than this is done before another thread has woken up and taken its share, or, if it is awake, has taken it.
constexpr double kInlineSeconds = 30e-6, kInlineSecondsAwake = 8e-6;

size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

void run_alone(const MatmulTable& kernels, MatmulJob job) {
  if (job.plan.tasks == 0) return;
  const size_t rows = round_up(kernels.row_bytes(job));
  char* scratch = static_cast<char*>(thread_scratch(rows + kernels.scratch_bytes(job)));
  if (rows > 0) {
    kernels.prepare(job, scratch);
    job.rows = scratch;
  }
  for (int64_t task = 0; task < job.plan.tasks; ++task) kernels.task(job, task, scratch + rows);
}

bool have_same_rows(const MatmulProblem& a, const MatmulProblem& b) {
  return a.x.data == b.x.data && a.x.stride == b.x.stride && a.x.offsets == b.x.offsets && a.M == b.M && a.K == b.K &&
         a.dtype == b.dtype && a.w.affine.bits == b.w.affine.bits && a.w.affine.group_size == b.w.affine.group_size;
}

// Prepares the rows of all jobs in memory of this thread, which stays valid until its next call.
void prepare_rows(const MatmulTable& kernels, std::span<MatmulJob> jobs) {
  static thread_local AlignedBuffer buffer;  // tasks of this thread have thread_scratch() to themselves
  size_t bytes = 0;
  for (const MatmulJob& job : jobs) bytes += round_up(kernels.row_bytes(job));
  if (buffer.bytes() < bytes) buffer = AlignedBuffer(bytes);
  char* rows = static_cast<char*>(buffer.data());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const size_t size = round_up(kernels.row_bytes(jobs[i]));
    if (size == 0) continue;
    for (size_t j = 0; j < i && !jobs[i].rows; ++j)
      if (have_same_rows(*jobs[i].problem, *jobs[j].problem)) jobs[i].rows = jobs[j].rows;
    if (jobs[i].rows) continue;
    kernels.prepare(jobs[i], rows);
    jobs[i].rows = rows;
    rows += size;
  }
}

// As parallel_for(), but each thread has a stretch of neighbouring tasks, and helps others after that. For tasks that
// ask for codes ahead of time: what one asks for past its end is then read by the same thread.
template <typename F>
void for_each_in_stretches(int64_t tasks, int threads, const F& f) {
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t count = std::min<int64_t>(threads, tasks);
  std::vector<Stretch> stretches(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    stretches[i].next.store(i * tasks / count, std::memory_order_relaxed);
    stretches[i].end = (i + 1) * tasks / count;
  }
  parallel_for(count, [&](int64_t own, int) {
    for (int64_t i = 0; i < count; ++i) {
      Stretch& stretch = stretches[(own + i) % count];
      for (int64_t task; (task = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) f(task);
    }
  });
}

bool asks_for_codes(const MatmulJob& job) {
  return job.plan.kernel == MatmulKernel::direct && sums_integers(*job.problem);
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
  const int threads = seconds < (workers_are_awake() ? kInlineSecondsAwake : kInlineSeconds) ? 1 : thread_count();
  const auto for_each = [threads](int64_t tasks, const auto& f) {
    if (threads > 1) return parallel_for(tasks, [&](int64_t task, int) { f(task); });
    for (int64_t task = 0; task < tasks; ++task) f(task);
  };
  // Many products: whole ones are the tasks as that keeps the threads evenly busy.
  if (problems.size() >= 8 * static_cast<size_t>(threads)) {
    return for_each(static_cast<int64_t>(problems.size()), [&](int64_t i) {
      const MatmulProblem& p = problems[static_cast<size_t>(i)];
      run_alone(kernels, {&p, plan_matmul(p, kernels.traits, 1)});
    });
  }
  std::vector<MatmulJob> jobs;
  std::vector<int64_t> first;  // task of each job
  jobs.reserve(problems.size());
  first.reserve(problems.size());
  int64_t tasks = 0;
  size_t scratch = 0;
  for (const MatmulProblem& p : problems) {
    jobs.push_back({&p, plan_matmul(p, kernels.traits, threads)});
    first.push_back(tasks);
    tasks += jobs.back().plan.tasks;
    if (jobs.back().plan.tasks > 0) scratch = std::max(scratch, kernels.scratch_bytes(jobs.back()));
  }
  prepare_rows(kernels, jobs);
  const auto run = [&](int64_t task) {
    const size_t i = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), task) - first.begin()) - 1;
    kernels.task(jobs[i], task - first[i], thread_scratch(scratch));
  };
  if (threads > 1 && std::ranges::all_of(jobs, asks_for_codes)) {
    for_each_in_stretches(tasks, threads, run);
  } else {
    for_each(tasks, run);
  }
}

}  // namespace mfa::cpu
