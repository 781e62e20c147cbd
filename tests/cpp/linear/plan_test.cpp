// How matrix products are cut: a table of shapes.
#include "linear/plan.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <utility>
#include <vector>

namespace mfa {
namespace {

constexpr MatmulTraits kWide{.lanes = 16, .panel = 48, .integer_panel = 48};
constexpr MatmulTraits kNarrow{.lanes = 8, .panel = 24, .integer_panel = 16};

MatmulProblem problem(int64_t M, int32_t N, int32_t K, DType dtype = DType::bf16) {
  MatmulProblem p;
  p.M = M;
  p.N = N;
  p.K = K;
  p.dtype = dtype;
  p.w.transposed = true;
  return p;
}

TEST(MatmulPlan, FewRowsGoDirect) {
  for (const bool transposed : {true, false}) {
    MatmulProblem p = problem(1, 576, 576);
    p.w.transposed = transposed;
    const int64_t most = transposed ? kDirectRowsTransposed : kDirectRows;
    for (p.M = 1; p.M <= most; ++p.M) EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::direct);
    EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::tiled);
  }
}

TEST(MatmulPlan, WideVectorsReadDenseWeightsInPlaceForMoreRows) {
  MatmulProblem p = problem(1, 576, 576);
  for (p.M = 1; p.M <= kDirectRowsWide; ++p.M) EXPECT_EQ(plan_matmul(p, kWide, 2).kernel, MatmulKernel::direct);
  EXPECT_EQ(plan_matmul(p, kWide, 2).kernel, MatmulKernel::tiled);
  p.M = kDirectRowsWide;
  p.w.affine = {.bits = 4, .group_size = 64};
  EXPECT_EQ(plan_matmul(p, kWide, 2).kernel, MatmulKernel::tiled);
}

TEST(MatmulPlan, WeightsPackedAheadAreReadByTilesFromFiveRowsOn) {
  const int packed = 0;
  MatmulProblem p = problem(1, 576, 576);
  p.w.packed = &packed;
  for (p.M = 1; p.M <= kDirectRows; ++p.M) EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::direct);
  EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::tiled);
}

TEST(MatmulPlan, QuantisedRowsGoDirectWhereTheKernelHasTheirWidth) {
  MatmulProblem p = problem(1, 1024, 1024);
  p.w.affine.group_size = 64;
  for (const int32_t bits : {4, 8}) {
    p.w.affine.bits = bits;
    EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::direct);
  }
  for (const int32_t bits : {2, 3, 5, 6}) {
    p.w.affine.bits = bits;
    EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::tiled);
  }
  p.w.affine.bits = 4;
  p.w.transposed = false;
  EXPECT_EQ(plan_matmul(p, kNarrow, 2).kernel, MatmulKernel::tiled);
}

TEST(MatmulPlan, NoOutputIsNoWork) {
  EXPECT_EQ(plan_matmul(problem(0, 5, 5), kNarrow, 2).tasks, 0);
  EXPECT_EQ(plan_matmul(problem(5, 0, 5), kNarrow, 2).tasks, 0);
  EXPECT_EQ(plan_matmul(problem(9, 5, 0), kNarrow, 2).kernel, MatmulKernel::tiled);
}

TEST(MatmulPlan, TasksCoverTheResultOnce) {
  for (const MatmulTraits& cpu : {kNarrow, kWide})
    for (const int64_t M : {1, 3, 4, 5, 8, 9, 31, 64, 191, 192, 193, 512, 4096})
      for (const int32_t N : {1, 23, 24, 25, 512, 576, 1536, 49152})
        for (const int32_t K : {1, 576, 4096})
          for (const int threads : {1, 2, 3, 16, -16, 64}) {  // negative: weights packed ahead
            MatmulProblem p = problem(M, N, K);
            if (threads < 0) p.w.packed = &kNarrow;
            const MatmulPlan plan = plan_matmul(p, cpu, std::abs(threads));
            SCOPED_TRACE(::testing::Message() << M << " x " << N << " x " << K << ", " << threads << " threads");
            ASSERT_GT(plan.row_block, 0);
            ASSERT_GT(plan.column_block, 0);
            EXPECT_EQ(plan.tasks, plan.row_blocks * plan.column_blocks);
            EXPECT_GE(plan.row_block * plan.row_blocks, M);
            EXPECT_LT(plan.row_block * (plan.row_blocks - 1), M);
            EXPECT_GE(plan.column_block * plan.column_blocks, N);
            EXPECT_LT(plan.column_block * (plan.column_blocks - 1), N);
            if (plan.kernel == MatmulKernel::tiled) {
              EXPECT_EQ(plan.column_block % cpu.panel, 0);
            } else {
              EXPECT_LE(plan.row_block, cpu.lanes >= 16 ? kDirectRowsWide : kDirectRowsTransposed);
            }
          }
}

TEST(MatmulPlan, LargeProductsKeepAllThreadsBusy) {
  for (const int threads : {2, 3, 8, 16})
    for (const int64_t M : {64, 512, 4096})
      for (const auto& [N, packed] : {std::pair(576, false), {1536, false}, {4096, false}, {576, true}, {4096, true}}) {
        MatmulProblem p = problem(M, N, 1024);
        if (packed) p.w.packed = &kNarrow;
        const MatmulPlan plan = plan_matmul(p, kNarrow, threads);
        const int64_t rounds = (plan.tasks + threads - 1) / threads;
        // The busiest thread has at most 40 % more than its share; that much only where there is little to share.
        EXPECT_LE(static_cast<double>(rounds * plan.row_block * plan.column_block),
                  1.4 * static_cast<double>(M) * N / threads)
            << M << " x " << N << ", " << threads << " threads";
      }
}

}  // namespace
}  // namespace mfa
