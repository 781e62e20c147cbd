#include "backend/cpu/attention.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "attention/layout.h"
#include "attention/visibility.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/scratch.h"
#include "common/thread_pool.h"

namespace mfa::cpu {
namespace {

// Work below this many multiply-adds is done before a sleeping thread would have woken up, or one that is awake has
// taken its share.
constexpr double kInlineWork = 2e6, kInlineWorkAwake = 2e5;
bool runs_inline(double work) { return work < (workers_are_awake() ? kInlineWorkAwake : kInlineWork); }

// Runs the tasks on the pool, or here when there is too little to share.
void run(double work, int64_t tasks, TaskRef task) {
  if (tasks == 1 || runs_inline(work)) {
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
  } else {
    parallel_for(tasks, task);
  }
}

double forward_work(const AttentionProblem& p) {
  double pairs = double(p.B) * p.Nq * p.Nk;
  if (p.query_starts) {
    pairs = 0;
    for (int b = 0; b < p.B; ++b) pairs += double(query_count(p, b)) * key_count(p, b);
  }
  return pairs * p.Hq * (double(p.D) + p.Dv);
}

size_t checked_product(std::initializer_list<size_t> factors) {
  size_t product = 1;
  for (const size_t f : factors)
    if (__builtin_mul_overflow(product, f, &product)) throw std::bad_alloc();
  return product;
}

// A forward on its way: the job, and the memory that it works in.
struct Forward {
  ForwardJob job;
  AlignedBuffer partials;
  size_t scratch = 0;
  int64_t tasks = 0, merges = 0;  // merges follow all tasks

  Forward(const ForwardCall& call, const KernelTable& kernels, int threads)
      : job{.problem = &call.problem,
            .out = &call.out,
            .plan = plan_forward(call.problem, kernels.traits, threads, call.out.probs != nullptr),
            .partials = {}} {
    if (job.plan.kernel == ForwardKernel::empty) return;
    tasks = job.plan.tasks;
    if (job.plan.key_splits > 1) split(call.problem);
    scratch = kernels.forward_scratch_bytes(job);
  }

  // Memory for the results of single key blocks.
  void split(const AttentionProblem& p) {
    const int32_t blocks = (p.Nk + kKeyBlock - 1) / kKeyBlock;
    const size_t padded_dv = (static_cast<size_t>(p.Dv) + 15) / 16 * 16;
    merges = job.plan.tiles.count();
    const size_t rows = checked_product(
        {static_cast<size_t>(merges), static_cast<size_t>(blocks), static_cast<size_t>(job.plan.row_width)});
    const size_t padded_rows = (rows + 15) / 16 * 16;
    partials = AlignedBuffer(checked_product({padded_rows, padded_dv + 2, sizeof(float)}));
    job.partials = {partials.floats(),
                    partials.floats() + padded_rows,
                    partials.floats() + 2 * padded_rows,
                    static_cast<int64_t>(padded_dv),
                    job.plan.row_width,
                    blocks};
  }
};

// Runs task(forward, i) for all i below `count` of each forward.
template <typename Task>
void run_all(double work, const std::vector<Forward>& forwards, int64_t Forward::* count, const Task& task) {
  int64_t total = 0;
  for (const Forward& f : forwards) total += f.*count;
  if (total == 0) return;
  run(work, total, [&](int64_t i, int) {
    const Forward* f = forwards.data();
    for (; i >= f->*count; ++f) i -= f->*count;
    task(*f, i);
  });
}

// dsink_h = -sum_(b,i) exp(sink_h - lse_i) (sum_d dO O - dlse_i), in a fixed order.
void sink_gradient(const AttentionProblem& p, const AttentionGradientInputs& in, const float* delta, float* dsinks) {
  const double to_natural = in.lse_base2 ? 0.693147180559945309417 : 1.0;
  for (int h = 0; h < p.Hq; ++h) {
    double sum = 0;
    for (int b = 0; b < p.B; ++b) {
      const int64_t first = row_index(p, b, h, 0);
      for (int64_t i = first; i < first + query_count(p, b); ++i)
        if (p.sinks[h] != -INFINITY) sum -= std::exp(double(p.sinks[h]) - in.lse[i] * to_natural) * delta[i];
    }
    dsinks[h] = static_cast<float>(sum);
  }
}

// Sums the rows' parts over batch, partition and query, in a fixed order.
void slope_gradient(const AttentionProblem& p, const BackwardPlan& plan, const float* rows, float* dslopes) {
  for (int h = 0; h < p.Hq; ++h) {
    double sum = 0;
    for (int b = 0; b < p.B; ++b)
      for (int part = 0; part < plan.key_partitions; ++part) {
        const float* from = rows + part * row_count(p) + row_index(p, b, h, 0);
        for (int64_t i = 0; i < query_count(p, b); ++i) sum += from[i];
      }
    dslopes[h] = static_cast<float>(sum);
  }
}

// The gradients of pages, by batch entry before they are summed, and where each page is used.
struct PageGradients {
  std::vector<int64_t> key_offsets, page_starts;
  std::vector<PageUse> uses;
  AlignedBuffer dk, dv;

  PageGradients(const AttentionProblem& p, const AttentionGradients& out) {
    const int64_t size = p.pages.page_size;
    key_offsets.assign(static_cast<size_t>(p.B) + 1, 0);
    page_starts.assign(static_cast<size_t>(p.pages.pages) + 1, 0);
    const auto for_each_use = [&](const auto& visit) {
      for (int32_t b = 0; b < p.B; ++b)
        for (int64_t slot = 0; slot * size < key_count(p, b); ++slot)
          visit(static_cast<size_t>(p.pages.table[b * p.pages.table_stride + slot]), PageUse{b, slot});
    };
    for (int32_t b = 0; b < p.B; ++b)
      key_offsets[static_cast<size_t>(b) + 1] = key_offsets[static_cast<size_t>(b)] + key_count(p, b);
    for_each_use([&](size_t page, const PageUse&) { ++page_starts[page + 1]; });
    for (size_t i = 1; i < page_starts.size(); ++i) page_starts[i] += page_starts[i - 1];
    uses.resize(static_cast<size_t>(page_starts.back()));
    std::vector<int64_t> next = page_starts;
    for_each_use([&](size_t page, const PageUse& use) { uses[static_cast<size_t>(next[page]++)] = use; });
    const auto buffer = [&](int32_t width) {
      return AlignedBuffer(checked_product({static_cast<size_t>(key_offsets.back()), static_cast<size_t>(p.Hkv),
                                            static_cast<size_t>(width), sizeof(float)}));
    };
    if (out.dk.data) dk = buffer(p.D);
    if (out.dv.data) dv = buffer(p.Dv);
  }
  void give_to(BackwardJob& job) const {
    job.dk_rows = dk.floats();
    job.dv_rows = dv.floats();
    job.key_offsets = key_offsets.data();
    job.page_starts = page_starts.data();
    job.page_uses = uses.data();
  }
};

}  // namespace

std::optional<CpuKernelTraits> kernel_traits(std::string* reason) {
  const KernelTable* table = selected_kernels(reason);
  if (!table) return std::nullopt;
  return table->traits;
}

void attention_forward(std::span<const ForwardCall> calls) {
  const KernelTable& kernels = require_kernels();
  double work = 0;
  for (const ForwardCall& call : calls) work += forward_work(call.problem);
  const int threads = runs_inline(work) ? 1 : thread_count();
  std::vector<Forward> forwards;
  forwards.reserve(calls.size());
  for (const ForwardCall& call : calls) forwards.emplace_back(call, kernels, threads);
  run_all(work, forwards, &Forward::tasks,
          [&](const Forward& f, int64_t task) { kernels.forward_task(f.job, task, thread_scratch(f.scratch)); });
  run_all(work, forwards, &Forward::merges,
          [&](const Forward& f, int64_t tile) { kernels.merge_task(f.job, tile, thread_scratch(f.scratch)); });
}

void attention_forward(const AttentionProblem& p, const AttentionOutputs& out) {
  const ForwardCall call{p, out};
  attention_forward({&call, 1});
}

void score_floors(const AttentionProblem& p, const int32_t* keep, float* floors) {
  const KernelTable& kernels = require_kernels();
  const double work = forward_work(p);
  // The scores of a problem with floors, none of which hides a key yet.
  AttentionProblem scored = p;
  const std::vector<float> open(static_cast<size_t>(row_count(p)), -INFINITY);
  scored.score_floor = open.data();
  ForwardJob job{.problem = &scored,
                 .out = nullptr,
                 .plan = plan_forward(scored, kernels.traits, thread_count(), true),
                 .partials = {},
                 .floors = floors};
  if (job.plan.kernel == ForwardKernel::empty) return;
  // Narrow tiles: the buffers of their rows share the cache.
  ForwardPlan& plan = job.plan;
  if (!plan.tiling.in_boxes()) {
    plan.tiling.tile = std::min(plan.tiling.tile, kernels.traits.lanes * kernels.traits.tile_vectors);
    plan.row_tile = plan.tiling.tile;
    plan.row_width = (plan.row_tile + kernels.traits.lanes - 1) / kernels.traits.lanes * kernels.traits.lanes;
    plan.tiles = TileMap(scored, plan.tiling);
    plan.batch = 1;
    plan.tasks = plan.tiles.count();
  }
  std::vector<int32_t> kept;
  for (int32_t b = 0; b < p.B; ++b) kept.push_back(std::max(1, std::min(keep[b], key_count(p, b))));
  job.kept = kept.data();
  job.most_kept = kept.empty() ? 0 : *std::max_element(kept.begin(), kept.end());
  const size_t scratch = kernels.forward_scratch_bytes(job);
  run(work, plan.tasks, [&](int64_t task, int) { kernels.forward_task(job, task, thread_scratch(scratch)); });
}

void attention_backward(const AttentionProblem& p, const AttentionGradientInputs& in, const AttentionGradients& out) {
  const KernelTable& kernels = require_kernels();
  const double work = 2.5 * forward_work(p);
  BackwardJob job{.problem = &p, .in = &in, .out = &out, .plan = plan_backward(p, kernels.traits)};
  const BackwardPlan& plan = job.plan;
  const auto rows = static_cast<size_t>(row_count(p));

  const AlignedBuffer delta(checked_product({rows, sizeof(float)}));
  const int64_t chunk = 1024, row_count = static_cast<int64_t>(rows);
  run(work, (row_count + chunk - 1) / chunk, [&](int64_t i, int) {
    kernels.delta_rows(job, i * chunk, std::min(row_count, (i + 1) * chunk), delta.floats());
  });
  job.delta = delta.floats();
  if (out.dsinks) sink_gradient(p, in, job.delta, out.dsinks);

  const size_t partitions = static_cast<size_t>(plan.key_partitions);
  AlignedBuffer dq_partials, dslope_rows, ds_rows;
  if (out.dq.data) {
    dq_partials = AlignedBuffer(
        checked_product({static_cast<size_t>(plan.partial_row_count(p)), static_cast<size_t>(p.D), sizeof(float)}));
    job.dq_partials = dq_partials.floats();
    // float32 keeps its outputs exactly enough; the softcap's derivative hides what the rows of dS sum to.
    if (p.dtype != DType::f32 && p.softcap == 0.f) {
      ds_rows = AlignedBuffer(checked_product({partitions, rows, sizeof(float)}));
      job.ds_rows = ds_rows.floats();
    }
  }
  if (out.dalibi_slopes) {
    dslope_rows = AlignedBuffer(checked_product({partitions, rows, sizeof(float)}));
    job.dslope_rows = dslope_rows.floats();
  }
  std::optional<PageGradients> pages;
  if (p.pages.table && (out.dk.data || out.dv.data)) {
    pages.emplace(p, out);
    pages->give_to(job);
  }
  const size_t scratch = kernels.backward_scratch_bytes(job);
  if (out.dq.data || out.dk.data || out.dv.data || out.dalibi_slopes)
    run(work, plan.tasks, [&](int64_t task, int) { kernels.backward_task(job, task, thread_scratch(scratch)); });
  if (pages) run(work, int64_t{p.pages.pages} * p.Hkv, [&](int64_t task, int) { kernels.page_task(job, task); });
  if (out.dq.data)
    run(work, plan.tiles.count(), [&](int64_t tile, int) { kernels.dq_task(job, tile, thread_scratch(scratch)); });
  if (out.dalibi_slopes) slope_gradient(p, plan, dslope_rows.floats(), out.dalibi_slopes);
  if (out.dbias)
    run(work, kernels.bias_tasks(p), [&](int64_t task, int) { kernels.bias_task(job, task, thread_scratch(scratch)); });
}

double peak_gflops(bool native_bf16) {
  const KernelTable& kernels = require_kernels();
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const double operations = kernels.peak_flops(native_bf16, 200000);
  return operations / std::chrono::duration<double>(Clock::now() - start).count() * 1e-9;
}

double read_bandwidth_gbps(size_t bytes) {
  const KernelTable& kernels = require_kernels();
  const size_t count = bytes / sizeof(float), chunk = size_t{1} << 18;
  const AlignedBuffer buffer(bytes);
  const int64_t tasks = static_cast<int64_t>((count + chunk - 1) / chunk);
  const auto at = [&](int64_t task) { return buffer.floats() + static_cast<size_t>(task) * chunk; };
  const auto size = [&](int64_t task) { return std::min(chunk, count - static_cast<size_t>(task) * chunk); };
  parallel_for(tasks, [&](int64_t task, int) { std::fill_n(at(task), size(task), 1.f); });
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  parallel_for(tasks, [&](int64_t task, int) {
    volatile double sum = kernels.read_sum(at(task), size(task));
    static_cast<void>(sum);
  });
  return double(bytes) / std::chrono::duration<double>(Clock::now() - start).count() * 1e-9;
}

}  // namespace mfa::cpu
