#include "linear/plan.h"

#include <algorithm>
#include <limits>

#include "common/ceil_div.h"

namespace mfa {
namespace {

// How tiled tasks are cut: most rows and columns of one, into how many splits the rows of several threads may be cut,
// and what a panel of weights and three rows of x cost a task, in products of a panel with a row.
struct TiledLimits {
  int64_t rows, columns, splits, panel_cost, row_cost;
};
// With as many rows, bringing panels of weights in costs 2 % of the products made with them; sums and panels of as many
// columns take a megabyte each.
constexpr TiledLimits kPlainLimits = {768, 336, 8, 12, 1};
// Weights packed ahead: as many rows as are packed at a time, for as many columns as share them without their sums
// filling the second cache.
constexpr TiledLimits kPackedLimits = {104, 1056, 4, 0, 1};
// Sums of integers: rows of x and a part of the sums share the second cache. Rows become integers in every task.
constexpr TiledLimits kIntegerLimits = {192, 672, 4, 4, 3};
// Weights of a direct task: less than this is read in the time it takes to hand out a task, and of so much the streams
// in which it is read are long.
constexpr int64_t kMinDirectBytes = 32 << 10, kLongDirectBytes = 512 << 10;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A product of a few rows is a single pass over the weights; the widths of codes that models use have code for it.
// Integer tiles take over sooner: unpacking a panel costs what multiplying two rows costs.
bool goes_direct(const MatmulProblem& p, const MatmulTraits& cpu) {
  if (sums_integers(p)) return p.M <= kDirectRowsInteger;
  const int32_t in_place = cpu.lanes >= 16 && !p.w.quantised() ? kDirectRowsWide : kDirectRowsTransposed;
  if (p.M > (p.w.transposed && !p.w.packed ? in_place : kDirectRows)) return false;
  return !p.w.quantised() || (p.w.transposed && (p.w.affine.bits == 4 || p.w.affine.bits == 8));
}

void plan_direct(const MatmulProblem& p, const MatmulTraits& cpu, int threads, MatmulPlan& plan) {
  // Four vectors of columns are in flight at a time. Several tasks a thread, since neighbours of this process may hold
  // one of them up: four of large weights, two of those that take some 20 us.
  const int64_t unit = 4 * cpu.lanes;
  const int64_t bytes_a_column = std::max<int64_t>(1, weight_bytes(p) / p.N);
  const int64_t few = std::min(ceil_div(p.N, 2 * threads), kLongDirectBytes / bytes_a_column);
  const int64_t wanted = threads == 1 ? p.N : std::max(ceil_div(p.N, 4 * threads), few);
  const int64_t columns = std::max(wanted, ceil_div(kMinDirectBytes, bytes_a_column));
  plan.row_block = static_cast<int32_t>(p.M);
  plan.row_blocks = 1;
  plan.column_block =
      static_cast<int32_t>(std::min<int64_t>(round_up(std::min<int64_t>(columns, 2048), unit), round_up(p.N, unit)));
  plan.column_blocks = ceil_div(p.N, plan.column_block);
}

void plan_tiled(const MatmulProblem& p, const MatmulTraits& cpu, int threads, MatmulPlan& plan) {
  const bool integers = sums_integers(p);
  const TiledLimits& most = p.w.packed ? kPackedLimits : integers ? kIntegerLimits : kPlainLimits;
  const int64_t panel = integers ? cpu.integer_panel : cpu.panel;
  const int64_t panels = ceil_div(p.N, panel), most_panels = std::max<int64_t>(1, most.columns / panel);
  double best = std::numeric_limits<double>::infinity();
  for (int64_t splits = 1; splits <= (threads == 1 ? 1 : most.splits); ++splits) {
    const int64_t rows = std::min(p.M, round_up(ceil_div(p.M, ceil_div(p.M, most.rows) * splits), 8));
    const int64_t row_blocks = ceil_div(p.M, rows);
    for (int64_t width = std::min(panels, most_panels); width >= 1; --width) {
      const int64_t tasks = row_blocks * ceil_div(panels, width);
      // Time of the busiest thread: products of a row and a panel, plus what each panel and each row cost once a task.
      const double task = static_cast<double>(rows * width + most.panel_cost * width + most.row_cost * rows / 3 + 16);
      const double time = task * static_cast<double>(ceil_div(tasks, threads));
      if (time >= best) continue;
      best = time;
      plan.row_block = static_cast<int32_t>(rows);
      plan.row_blocks = row_blocks;
      plan.column_block = static_cast<int32_t>(width * panel);
      plan.column_blocks = ceil_div(panels, width);
    }
  }
}

}  // namespace

const char* name_of(MatmulKernel kernel) {
  switch (kernel) {
    case MatmulKernel::empty:
      return "empty";
    case MatmulKernel::direct:
      return "direct";
    case MatmulKernel::tiled:
      return "tiled";
  }
  return "unknown";
}

MatmulPlan plan_matmul(const MatmulProblem& p, const MatmulTraits& cpu, int threads) {
  MatmulPlan plan;
  if (p.M == 0 || p.N == 0) return plan;
  if (goes_direct(p, cpu)) {
    plan.kernel = MatmulKernel::direct;
    plan_direct(p, cpu, threads, plan);
  } else {
    plan.kernel = MatmulKernel::tiled;
    plan_tiled(p, cpu, threads, plan);
  }
  plan.tasks = plan.row_blocks * plan.column_blocks;
  return plan;
}

int64_t weight_bytes(const MatmulProblem& p) {
  const int64_t elements = int64_t{p.N} * p.K;
  if (!p.w.quantised()) return elements * static_cast<int64_t>(size_of(p.dtype));
  const auto& affine = p.w.affine;
  return elements * affine.bits / 8 + 2 * elements / affine.group_size * static_cast<int64_t>(size_of(p.dtype));
}

double estimated_seconds(const MatmulProblem& p) {
  const double products = static_cast<double>(p.M) * p.N * p.K;
  return std::max(static_cast<double>(weight_bytes(p)) / 10e9, products / 40e9);
}

}  // namespace mfa
