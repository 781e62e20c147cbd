#include "backend/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include "backend/cuda/tiles.h"

namespace mfa::cuda {
namespace {

constexpr DeviceTraits kH100{90, 132, 232448};
constexpr DeviceTraits kA100{80, 108, 166912};
constexpr CallTraits kTiled{.mapped = false};  // arrays that tensor copies cannot read
constexpr DeviceTraits kL4{89, 58, 101376};

AttentionProblem shape(int32_t B, int32_t Hq, int32_t Hkv, int32_t Nq, int32_t Nk, int32_t D, DType dtype) {
  AttentionProblem p;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Nq = Nq, p.Nk = Nk, p.D = p.Dv = D, p.dtype = dtype;
  return p;
}

template <typename Visit>
void for_each_shape(Visit visit) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (int32_t D : {1, 64, 65, 128, 200, 256, 512, 576})
      for (int32_t B : {1, 3, 64})
        for (int32_t Hkv : {1, 8})
          for (int32_t G : {1, 4, 8})
            for (int32_t Nq : {1, 2, 16, 17, 129, 65536})
              for (int32_t Nk : {0, 1, 63, 64, 65, 4096, 1 << 20}) visit(shape(B, G * Hkv, Hkv, Nq, Nk, D, dtype));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

TEST(CudaTiles, FitTheDevice) {
  for (const auto& tile : kForward16) EXPECT_LE(tile.shared_bytes(2), kH100.shared_bytes);
  for (const auto& tile : kForward32) EXPECT_LE(tile.shared_bytes(4), kH100.shared_bytes);
  for (const auto& tile : kForwardFewRows16) EXPECT_LE(tile.shared_bytes(2), kH100.shared_bytes);
  for (const auto& tile : kForwardFewRows32) EXPECT_LE(tile.shared_bytes(4), kH100.shared_bytes);
  for (const auto& tile : kDecode16) EXPECT_LE(tile.shared_bytes(2), kH100.shared_bytes);
  for (const auto& tile : kBackward16) EXPECT_LE(tile.shared_bytes(2), kH100.shared_bytes);
  for (const auto& tile : kBackward32) EXPECT_LE(tile.shared_bytes(4), kH100.shared_bytes);
}

TEST(CudaTiles, GridsOfWarpsAgree) {
  for (const BackwardTile* table : {kBackward16, kBackward32})
    for (int n = 0; n < 4; ++n) {
      EXPECT_EQ(table[n].DP, kHeadDims[n]);
      EXPECT_EQ(table[n].WM * table[n].WN, table[n].KM * table[n].KN);
      EXPECT_LE(table[n].SM * table[n].SN, table[n].WM * table[n].WN);
    }
}

TEST(CudaTiles, TheSmallestThatHoldsBothHeadDims) {
  EXPECT_EQ(tile_index(1, 1), 0);
  EXPECT_EQ(tile_index(64, 65), 1);
  EXPECT_EQ(tile_index(192, 128), 2);
  EXPECT_EQ(tile_index(576, 512), 3);
  EXPECT_EQ(tile_index(577, 8), -1);
}

TEST(CudaPlanForward, CoversEveryRowAndKey) {
  for_each_shape([](const AttentionProblem& p) {
    // Of a device without Hopper's kernels, as of arrays that those cannot read.
    const ForwardPlan plan = plan_forward(p, kTiled, p.dtype == DType::f32 ? kA100 : kH100);
    SCOPED_TRACE(::testing::Message() << name_of(plan.attention) << " B " << p.B << " Hq " << p.Hq << " Nq " << p.Nq
                                      << " Nk " << p.Nk);
    const int64_t rows = int64_t{p.Hq / p.Hkv} * p.Nq;
    ASSERT_EQ(plan.attention.grid[0], int64_t{p.B} * p.Hkv * ceil_div(rows, plan.row_tile));
    ASSERT_EQ(plan.attention.grid[2], static_cast<uint32_t>(plan.splits));
    ASSERT_LE(plan.splits, 65535);
    ASSERT_EQ(plan.attention.threads % 32, 0u);
    if (plan.splits > 1) {
      ASSERT_EQ(plan.split_keys % plan.key_tile, 0);
      ASSERT_GE(int64_t{plan.split_keys} * plan.splits, p.Nk);
      ASSERT_LT(int64_t{plan.split_keys} * (plan.splits - 1), p.Nk) << "no split is empty";
      ASSERT_EQ(plan.merge.kernel, Kernel::merge_splits);
    }
  });
}

TEST(CudaPlanForward, DecodeFillsTheDevice) {
  const ForwardPlan one = plan_forward(shape(1, 32, 8, 1, 8192, 128, DType::bf16), {}, kH100);
  EXPECT_EQ(one.attention.kernel, Kernel::forward_decode);
  EXPECT_GE(one.attention.grid[0] * one.splits, 132u);
  const ForwardPlan many = plan_forward(shape(32, 32, 8, 1, 8192, 128, DType::bf16), {}, kH100);
  EXPECT_EQ(many.splits, 4) << "several waves of long splits";
  EXPECT_EQ(plan_forward(shape(32, 32, 8, 1, 2048, 128, DType::bf16), {}, kH100).splits, 1) << "too short to split";
  EXPECT_EQ(plan_forward(shape(128, 32, 8, 1, 8192, 128, DType::bf16), {}, kH100).splits, 1) << "many waves already";
  EXPECT_EQ(plan_forward(shape(1, 32, 8, 1, 100, 128, DType::bf16), {}, kH100).splits, 1);
}

TEST(CudaPlanForward, DecodeRingsThatDoNotFitLeaveTheTiledKernel) {
  const AttentionProblem p = shape(1, 32, 8, 1, 8192, 128, DType::bf16);
  const ForwardPlan plan = plan_forward(p, {}, kL4);
  EXPECT_EQ(plan.attention.kernel, Kernel::forward_tiled);
  EXPECT_LE(plan.attention.shared_bytes, uint32_t(kL4.shared_bytes));
  EXPECT_GT(plan.splits, 1);
  EXPECT_EQ(plan_forward(p, {}, kA100).attention.kernel, Kernel::forward_decode);
}

TEST(CudaPlanForward, PacksAFewQueriesOfManyHeads) {
  AttentionProblem p = shape(1, 128, 1, 1, 8192, 576, DType::bf16);
  p.Dv = 512;
  const ForwardPlan latent = plan_forward(p, {}, kH100);
  EXPECT_EQ(name_of(latent.attention), "forward_tiled_bf16_576");
  EXPECT_GE(latent.attention.grid[0] * latent.splits, 100u);
  const ForwardPlan multi_query = plan_forward(shape(32, 32, 1, 1, 8192, 128, DType::bf16), {}, kH100);
  EXPECT_EQ(name_of(multi_query.attention), "forward_tiled_bf16_128");
  EXPECT_GT(multi_query.splits, 1);
  EXPECT_EQ(name_of(plan_forward(shape(32, 32, 1, 17, 8192, 128, DType::bf16), {}, kH100).attention),
            "hopper_forward_128_bf16");
  EXPECT_EQ(name_of(plan_forward(shape(32, 32, 32, 17, 8192, 128, DType::bf16), {}, kH100).attention),
            "hopper_forward_128_bf16");
}

TEST(CudaPlanForward, NamesTheKernel) {
  EXPECT_EQ(name_of(plan_forward(shape(1, 8, 8, 1000, 1000, 80, DType::bf16), kTiled, kH100).attention),
            "forward_tiled_bf16_128");
  EXPECT_EQ(name_of(plan_forward(shape(1, 8, 8, 1000, 1000, 80, DType::bf16), {}, kA100).attention),
            "forward_tiled_bf16_128");
  EXPECT_EQ(name_of(plan_forward(shape(1, 8, 8, 1000, 1000, 64, DType::f32), {}, kA100).attention),
            "forward_tiled_f32_64");
  EXPECT_EQ(name_of(plan_forward(shape(1, 8, 8, 1, 1000, 576, DType::f16), {}, kH100).attention),
            "forward_few_rows_f16_576");
  EXPECT_EQ(name_of(plan_forward(shape(1, 8, 1, 2, 1000, 96, DType::f16), {}, kH100).attention),
            "forward_decode_f16_128");
}

TEST(CudaPlanBackward, CoversEveryRowAndKey) {
  for_each_shape([](const AttentionProblem& p) {
    const BackwardPlan plan = plan_backward(p, kTiled, {}, kH100);
    const BackwardTile& tile = (p.dtype == DType::f32 ? kBackward32 : kBackward16)[tile_index(p.D, p.Dv)];
    const int64_t rows = int64_t{p.Hq / p.Hkv} * p.Nq, heads = int64_t{p.B} * p.Hkv;
    ASSERT_EQ(plan.queries.grid[0], heads * ceil_div(rows, tile.BQ));
    ASSERT_EQ(plan.keys.grid[0], heads * ceil_div(p.Nk, tile.BK));
    ASSERT_GE(plan.Nq_padded, p.Nq);
    ASSERT_EQ(plan.Nq_padded % 128, 0);
  });
}

TEST(CudaPlanBackward, ABiasSumsOverItsBroadcastAxes) {
  const AttentionProblem p = shape(2, 4, 4, 100, 200, 64, DType::bf16);
  EXPECT_EQ(plan_backward(p, kTiled, {{false, false, false, false}}, kH100).bias.grid[0], 2u * 4 * 2 * 4);
  EXPECT_EQ(plan_backward(p, kTiled, {{true, false, true, false}}, kH100).bias.grid[0], 4u * 4);
  EXPECT_EQ(plan_backward(p, kTiled, {{true, true, true, true}}, kH100).bias.grid[0], 1u);
}

TEST(CudaPlanHopper, TakesWhatItsKernelsKnow) {
  auto name = [](const AttentionProblem& p, const CallTraits& call) {
    return name_of(plan_forward(p, call, kH100).attention);
  };
  AttentionProblem p = shape(2, 8, 8, 1000, 1000, 80, DType::bf16);
  EXPECT_EQ(name(p, {}), "hopper_forward_96_bf16");
  EXPECT_EQ(name(p, {.lengths = true}), "hopper_forward_96_bf16");
  EXPECT_EQ(name(p, {.mask = true}), "hopper_forward_mask_96_bf16");
  EXPECT_EQ(name(p, {.mask = true, .mask_in_words = false}), "hopper_forward_modified_96_bf16");
  EXPECT_EQ(name(p, {.bias = true, .mask = true}), "hopper_forward_modified_96_bf16");
  p.softcap = 3.f;
  EXPECT_EQ(name(p, {}), "hopper_forward_modified_96_bf16");
  p.softcap = 0.f;
  p.scale = -1.f;
  EXPECT_EQ(name(p, {}), "forward_tiled_bf16_128");
  EXPECT_EQ(name(p, {.bias = true}), "hopper_forward_modified_96_bf16");
  p.scale = 1.f;
  p.Dv = 200;
  EXPECT_EQ(name(p, {}), "hopper_forward_256_bf16");
  p.Dv = 60;
  EXPECT_EQ(name(p, {}), "forward_tiled_bf16_128");
  p.D = 192;
  p.Dv = 128;
  EXPECT_EQ(name(p, {}), "hopper_forward_192x128_bf16");
  EXPECT_EQ(name(p, {.mask = true}), "hopper_forward_mask_192_bf16");
  EXPECT_EQ(name(shape(2, 8, 8, 1000, 1000, 100, DType::bf16), {}), "forward_tiled_bf16_128");
  p.D = p.Dv = 264;
  EXPECT_EQ(name(p, {}), "hopper_forward_512_bf16");
  EXPECT_EQ(name(p, {.mask = true}), "hopper_forward_modified_512_bf16");
  p.D = 576;
  EXPECT_EQ(name(p, {}), "hopper_forward_576x512_bf16");
  EXPECT_EQ(name(p, {.bias = true}), "hopper_forward_modified_576x512_bf16");
  EXPECT_EQ(plan_backward(p, {}, {}, kH100).queries.kernel, Kernel::backward_queries);
  p.Dv = 576;
  EXPECT_EQ(name(p, {}), "forward_tiled_bf16_576");
}

TEST(CudaPlanHopper, SplitsPlainFloat32) {
  auto name = [](const AttentionProblem& p, const CallTraits& call) {
    return name_of(plan_forward(p, call, kH100).attention);
  };
  for (const auto& [D, Dv, columns] : {std::tuple{1, 1, 64}, {64, 64, 64}, {33, 65, 128}, {128, 7, 128}}) {
    AttentionProblem p = shape(2, 8, 4, 1000, 700, D, DType::f32);
    p.Dv = Dv;
    // Inputs are copied, so tensor copies need not be able to read them.
    const ForwardPlan plan = plan_forward(p, {.mapped = false}, kH100);
    EXPECT_EQ(name_of(plan.attention), "hopper_forward_" + std::to_string(columns) + "_f32");
    EXPECT_EQ(name_of(plan.split), "hopper_split_" + std::to_string(columns) + "_f32");
    EXPECT_EQ(plan.split_columns, columns);
    EXPECT_EQ(plan.split.grid[0], 2u * 8 * 16 + 2u * 2 * 4 * 11);
    EXPECT_EQ(plan.attention.schedule.tiles, 2 * 8 * ceil_div(1000, plan.row_tile));
    EXPECT_LE(plan.attention.shared_bytes, uint32_t(kH100.shared_bytes));
    // Gradients come from scores that the tiled kernels sum, and need the lse of those.
    const Launch lse = plan_backward(p, {}, {}, kH100).lse;
    EXPECT_EQ(lse.kernel, Kernel::forward_tiled);
    EXPECT_EQ(lse.grid[0], plan_forward(p, {}, kA100).attention.grid[0]);
    EXPECT_EQ(plan_backward(p, {}, {}, kA100).lse.threads, 0u);
  }
  AttentionProblem p = shape(2, 8, 8, 1000, 1000, 64, DType::f32);
  EXPECT_EQ(name(p, {.lengths = true}), "hopper_forward_64_f32");
  EXPECT_EQ(name(p, {.mask = true}), "hopper_forward_modified_64_f32");
  p.softcap = 2.f;
  EXPECT_EQ(name(p, {}), "forward_tiled_f32_64");
  EXPECT_EQ(plan_forward(p, {}, kH100).split.threads, 0u);
  p.softcap = 0.f;
  p.scale = -1.f;
  EXPECT_EQ(name(p, {}), "forward_tiled_f32_64");
  EXPECT_EQ(name(p, {.bias = true}), "hopper_forward_modified_64_f32");
  EXPECT_EQ(name(shape(2, 8, 8, 1000, 1000, 129, DType::f32), {}), "forward_tiled_f32_256");
  EXPECT_EQ(name(shape(2, 8, 8, 1, 1000, 64, DType::f32), {}), "forward_few_rows_f32_64");
}

TEST(CudaPlanHopper, SchedulesCoverEveryTile) {
  for (int32_t D : {64, 96, 128, 192, 256, 512, 576})
    for (int32_t Nq : {17, 128, 1000, 16384}) {
      AttentionProblem p = shape(2, 16, 4, Nq, 4096, D, DType::f16);
      p.Dv = std::min(D, 512);
      const Launch forward = plan_forward(p, {}, kH100).attention;
      EXPECT_TRUE(is_hopper(forward.kernel));
      EXPECT_EQ(forward.schedule.tiles, 2 * 16 * ceil_div(Nq, plan_forward(p, {}, kH100).row_tile));
      EXPECT_LE(forward.grid[0], 132u);
      EXPECT_LE(forward.shared_bytes, uint32_t(kH100.shared_bytes));
      if (D > 256) continue;
      const BackwardPlan backward = plan_backward(p, {}, {}, kH100);
      const BackwardPlan masked = plan_backward(p, {.mask = true}, {}, kH100);
      EXPECT_EQ(masked.queries.kernel, Kernel::hopper_dq_modified);
      for (const Launch& launch : {forward, backward.queries, backward.keys, masked.queries, masked.keys}) {
        EXPECT_TRUE(is_hopper(launch.kernel));
        EXPECT_LE(launch.shared_bytes, uint32_t(kH100.shared_bytes));
        EXPECT_GT(launch.query_box * launch.key_box, 0);
        EXPECT_LE(std::max(launch.query_box, launch.key_box), 256);
      }
    }
}

TEST(CudaPlan, BatchInvariantSplitsDependOnTheKeysAlone) {
  DeviceTraits device = kH100;
  device.batch_invariant = true;
  std::set<int> sizes;
  for (const int B : {1, 3, 64})
    for (const int heads : {1, 8}) {
      const ForwardPlan plan = plan_forward(shape(B, 4 * heads, heads, 1, 5000, 128, DType::bf16), {}, device);
      sizes.insert(plan.split_keys);
      EXPECT_EQ(plan.splits, 5);
    }
  EXPECT_EQ(sizes.size(), 1u);
  const ForwardPlan longest = plan_forward(shape(1, 4, 1, 1, 1 << 20, 128, DType::bf16), {}, device);
  EXPECT_LE(longest.splits, 128);
  EXPECT_GE(int64_t{longest.splits} * longest.split_keys, 1 << 20);
}

// A pass over the mask pays where heads share it.
TEST(CudaPlanHopper, SharedMasksAreSearchedForHiddenTiles) {
  AttentionProblem p = shape(2, 8, 8, 1000, 3000, 64, DType::bf16);
  CallTraits call{.mask = true};
  const auto words = [&] { return plan_forward(p, call, kH100).mask_tiles; };
  call.mask_varies[2] = true;
  const ForwardPlan plan = plan_forward(p, call, kH100);
  EXPECT_EQ(name_of(plan.mask_tiles), "hopper_mask_tiles");
  EXPECT_EQ(plan.mask_tiles.grid[0], uint32_t(ceil_div(3000, 32 * plan.key_tile)));
  EXPECT_EQ(plan.mask_tiles.grid[1], 16u);
  EXPECT_EQ(plan.mask_tiles.grid[2], 1u);
  EXPECT_EQ(plan.shown_words(), int(plan.mask_tiles.grid[0] * 16));
  call.mask_varies[2] = false;
  EXPECT_EQ(words().grid[1], 1u);
  call.mask_varies[0] = true;
  EXPECT_EQ(words().grid[2], 2u);
  call.mask_varies[1] = true;
  EXPECT_EQ(words().threads, 0u);
  call.mask_varies[0] = call.mask_varies[1] = false;
  p.Nk = 64;
  EXPECT_EQ(words().threads, 0u);
  p.Nk = 3000;
  call.mask = false;
  EXPECT_EQ(words().threads, 0u);
}

TEST(CudaPlanHopper, TheBackwardNamesItsKernels) {
  auto names = [](const AttentionProblem& p, const CallTraits& call) {
    const BackwardPlan plan = plan_backward(p, call, {}, kH100);
    return name_of(plan.rows) + " " + name_of(plan.queries) + " " + name_of(plan.keys);
  };
  AttentionProblem p = shape(2, 8, 8, 1000, 1000, 80, DType::bf16);
  const std::string prepare = "hopper_backward_prepare_bf16 ";
  EXPECT_EQ(names(p, {}), prepare + "hopper_dq_96_bf16 hopper_dkv_96_bf16");
  for (const CallTraits& call : {CallTraits{.alibi = true}, CallTraits{.bias = true}, CallTraits{.mask = true},
                                 CallTraits{.mask = true, .mask_in_words = false}, CallTraits{.dropout = true}})
    EXPECT_EQ(names(p, call), prepare + "hopper_dq_modified_96_bf16 hopper_dkv_modified_96_bf16");
  EXPECT_EQ(plan_backward(p, {}, {}, kH100).fused.threads, 0u);
  p.softcap = 2.f;
  EXPECT_EQ(names(p, {}), prepare + "hopper_dq_modified_96_bf16 hopper_dkv_modified_96_bf16");
  p.D = 200;
  EXPECT_EQ(names(p, {}), prepare + "hopper_dq_modified_256_bf16 hopper_dkv_shared_modified_256_bf16");
  EXPECT_EQ(names(p, kTiled), "backward_rows_bf16 backward_queries_bf16_256 backward_keys_bf16_256");
}

TEST(CudaPlanHopper, AllGradientsComeInOnePassFor64And128Columns) {
  AttentionProblem p = shape(2, 16, 4, 1000, 3000, 104, DType::bf16);
  const BackwardPlan plan = plan_backward(p, {}, {}, kH100);
  EXPECT_EQ(name_of(plan.fused), "hopper_backward_fused_128_bf16");
  EXPECT_LE(plan.fused.shared_bytes, uint32_t(kH100.shared_bytes));
  EXPECT_EQ(plan.fused.schedule.tiles, 2 * 4 * ceil_div(3000, 128));
  DeviceTraits few = kH100;
  few.multiprocessors = hopper::fused_group;  // blocks of a group wait for each other
  EXPECT_EQ(plan_backward(p, {}, {}, few).fused.threads, 0u);
  EXPECT_EQ(plan_backward(p, {.bias = true}, {}, kH100).fused.threads, 0u);
  p.D = p.Dv = 64;
  const BackwardPlan narrow = plan_backward(p, {}, {}, kH100);
  EXPECT_EQ(name_of(narrow.fused), "hopper_backward_fused_64_bf16");
  EXPECT_LE(narrow.fused.shared_bytes, uint32_t(kH100.shared_bytes));
  p.D = p.Dv = 80;
  EXPECT_EQ(plan_backward(p, {}, {}, kH100).fused.threads, 0u);
}

TEST(CudaPlanHopper, EveryKeyTileOfEveryHeadIsDrawnOnceInGroups) {
  for (const int tiles : {1, 7, 8, 9, 40}) {
    const HopperSchedule s{6 * tiles, tiles, 0, 0, 0};
    std::set<std::pair<int, int>> seen;
    for (int id = 0; id < s.tiles; ++id) {
      const hopper::WorkItem item = hopper::fused_item(s, 6, 3, id);
      EXPECT_LT(item.b, 2);
      EXPECT_LT(item.h, 3);
      EXPECT_LT(item.tile, tiles);
      seen.insert({item.b * 3 + item.h, item.tile});
      if (item.tile % hopper::fused_group > 0) {  // its group is being drawn
        EXPECT_EQ(hopper::fused_item(s, 6, 3, id - 1).tile, item.tile - 1);
      }
      const auto group_of = [&](int other) {
        const hopper::WorkItem of = hopper::fused_item(s, 6, 3, other);
        return std::tuple(of.b, of.h, of.tile / hopper::fused_group);
      };
      const int end = hopper::fused_group_end(s, item.tile, id);
      EXPECT_GT(end, id);
      EXPECT_EQ(group_of(end - 1), group_of(id));
      if (end < s.tiles) {
        EXPECT_NE(group_of(end), group_of(id));
      }
    }
    EXPECT_EQ(static_cast<int>(seen.size()), s.tiles);
  }
}

// A query tile counts the key tiles that add to it by `key_tiles`, and those visit it by `query_tiles`.
TEST(CudaPlanHopper, QueryTilesAndKeyTilesSeeEachOther) {
  std::mt19937 random(1);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 20000; ++round) {
    const int Nq = 1 + below(700), Nk = below(900), keys = below(2) ? Nk : below(Nk + 1);
    const auto side = [&] { return below(3) ? -1 : std::min(below(900), Nq + Nk); };
    const hopper::Visibility see{keys, std::max(0, keys - Nq), side(), below(3) ? side() : 0};
    for (int n = 0; n < ceil_div(Nq, 64); ++n) {
      const auto of_queries = hopper::key_tiles<128>(see, n * 64, std::min(n * 64 + 64, Nq));
      for (int t = 0; t < ceil_div(Nk, 128); ++t) {
        const auto of_keys = hopper::query_tiles<64>(see, Nq, t * 128, 128, 0);
        ASSERT_EQ(n >= of_keys.first && n < of_keys.last, t >= of_queries.first && t < of_queries.last)
            << "Nq " << Nq << " Nk " << Nk << " keys " << keys << " left " << see.left << " right " << see.right;
      }
    }
  }
}

TEST(CudaProblem, WindowsAreNoWiderThanEverything) {
  Problem p{};
  p.Nq = 100, p.Nk = 200;
  set_windows(p, false, -1, -1);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, -1);
  set_windows(p, false, 2147483647, 299);
  EXPECT_EQ(p.window_left, 300);
  EXPECT_EQ(p.window_right, 299);
  set_windows(p, true, 5, 7);
  EXPECT_EQ(p.window_left, 5);
  EXPECT_EQ(p.window_right, 0);
  p.Nq = p.Nk = 2147483647;
  set_windows(p, false, 2147483647, -1);
  EXPECT_EQ(p.window_left, 2147483647);
}

TEST(CudaUnsupported, SaysWhy) {
  EXPECT_EQ(unsupported(shape(1, 8, 8, 100, 100, 576, DType::bf16), kH100), std::nullopt);
  EXPECT_EQ(unsupported(shape(1, 8, 8, 100, 100, 576, DType::f32), kA100), std::nullopt);
  EXPECT_EQ(unsupported(shape(1, 8, 8, 100, 100, 128, DType::bf16), kL4), std::nullopt);
  EXPECT_EQ(unsupported(shape(1, 8, 8, 100, 100, 256, DType::bf16), kL4).value_or("").find("head dims 256"), 0u);
  EXPECT_EQ(unsupported(shape(1, 8, 8, 100, 100, 64, DType::bf16), kL4), std::nullopt);
  const auto old = unsupported(shape(1, 8, 8, 100, 100, 64, DType::bf16), {75, 40, 65536});
  ASSERT_TRUE(old);
  EXPECT_NE(old->find("compute capability 8.0; got 7.5"), std::string::npos);
  const auto large = unsupported(shape(1, 8, 8, 100, 100, 577, DType::bf16), kH100);
  ASSERT_TRUE(large);
  EXPECT_NE(large->find("got 577"), std::string::npos);
  EXPECT_TRUE(unsupported(shape(1, 8, 8, 2147483647, 100, 64, DType::bf16), kH100));
}

}  // namespace
}  // namespace mfa::cuda
