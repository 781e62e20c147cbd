#include "attention/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "support/random.h"

namespace mfa {
namespace {

CpuKernelTraits traits(int32_t lanes, int32_t tile_vectors, int32_t max_row_tile, int32_t max_decode_rows, bool bf16) {
  CpuKernelTraits cpu;
  cpu.isa = "test";
  cpu.lanes = lanes;
  cpu.tile_vectors = tile_vectors;
  cpu.max_row_tile = cpu.backward_row_tile = max_row_tile;
  cpu.row_tile_floats = 48 << 10;
  cpu.max_decode_rows = max_decode_rows;
  cpu.few_key_decode_rows = std::max(1, max_decode_rows / 2);
  cpu.native_bf16 = bf16;
  return cpu;
}

const std::vector<CpuKernelTraits>& all_traits() {
  static const std::vector<CpuKernelTraits> all = {traits(8, 3, 192, 8, false), traits(16, 3, 192, 16, true),
                                                   traits(4, 4, 96, 4, false)};
  return all;
}

AttentionProblem shape(int32_t B, int32_t Hq, int32_t Hkv, int32_t Nq, int32_t Nk, int32_t D = 64) {
  AttentionProblem p;
  p.B = B;
  p.Hq = Hq;
  p.Hkv = Hkv;
  p.Nq = Nq;
  p.Nk = Nk;
  p.D = p.Dv = D;
  return p;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls `visit` for shapes that straddle tiles, blocks and splits.
template <typename Visit>
void for_each_shape(Visit visit) {
  for (int32_t B : {1, 3, 64})
    for (int32_t Hkv : {1, 2, 8})
      for (int32_t G : {1, 4, 8})
        for (int32_t Nq : {1, 2, 7, 8, 9, 24, 25, 96, 97, 192, 193, 1000, 65536})
          for (int32_t Nk : {0, 1, 255, 256, 257, 511, 512, 513, 4096, 32768, 1 << 20})
            visit(shape(B, G * Hkv, Hkv, Nq, Nk));
}

TEST(PlanForward, SmallerTilesComeLastWhereRowsSeeAsManyKeys) {
  for (int variant = 0; variant < 3; ++variant) {
    AttentionProblem p = shape(2, 8, 4, 2000, 4096);
    p.causal = variant > 0;
    if (variant == 2) p.window_left = 256;
    const ForwardPlan plan = plan_forward(p, all_traits()[0], 2, false);
    ASSERT_NE(plan.rows % plan.row_tile, 0);
    std::vector<int64_t> met(static_cast<size_t>(plan.tiles.count()));
    for (int64_t index = 0; index < plan.tiles.count(); ++index) {
      const TileMap::Place place = plan.tiles.locate(index);
      ++met[static_cast<size_t>((place.b * p.Hkv + place.kv_head) * plan.row_tiles + place.tile)];
      const bool smaller = place.tile == plan.row_tiles - 1;
      EXPECT_EQ(smaller, variant == 1 ? index % plan.row_tiles == 0 : index >= plan.tiles.count() - 8) << index;
    }
    for (int64_t count : met) EXPECT_EQ(count, 1);
  }
}

TEST(PlanForward, TasksCoverEveryRowAndKeyBlockOnce) {
  for_each_shape([](const AttentionProblem& p) {
    for (const CpuKernelTraits& cpu : all_traits()) {
      for (int threads : {1, 2, 3, 64}) {
        for (bool wants_probs : {false, true}) {
          const ForwardPlan plan = plan_forward(p, cpu, threads, wants_probs);
          SCOPED_TRACE(::testing::Message() << "B " << p.B << " Hq " << p.Hq << " Hkv " << p.Hkv << " Nq " << p.Nq
                                            << " Nk " << p.Nk << " lanes " << cpu.lanes << " threads " << threads);
          ASSERT_NE(plan.kernel, ForwardKernel::empty);
          ASSERT_EQ(plan.rows, int64_t{p.Hq / p.Hkv} * p.Nq);
          // Row tiles: enough, none empty, each within the kernel's limit and padded to whole vectors.
          ASSERT_GE(plan.row_tile, 1);
          ASSERT_EQ(plan.row_tiles, ceil_div(plan.rows, plan.row_tile));
          if (plan.kernel == ForwardKernel::tiled) {
            ASSERT_LE(plan.row_tile, cpu.max_row_tile);
            ASSERT_EQ(plan.row_width, ceil_div(plan.row_tile, cpu.lanes) * cpu.lanes);
          } else {
            ASSERT_LE(plan.rows, cpu.max_decode_rows);
            ASSERT_EQ(plan.row_tiles, 1);
            ASSERT_GE(plan.row_width, plan.row_tile);
          }
          // Key splits: enough, none empty.
          const int64_t blocks = ceil_div(p.Nk, kKeyBlock);
          ASSERT_GE(plan.split_blocks, 1);
          ASSERT_GE(int64_t{plan.key_splits} * plan.split_blocks, blocks);
          ASSERT_LT(int64_t{plan.key_splits - 1} * plan.split_blocks, std::max<int64_t>(blocks, 1));
          ASSERT_EQ(plan.tasks, ceil_div(int64_t{p.B} * p.Hkv * plan.row_tiles, plan.batch) * plan.key_splits);
          if (wants_probs) {
            ASSERT_EQ(plan.kernel, ForwardKernel::tiled);
            ASSERT_EQ(plan.key_splits, 1);
          }
          ASSERT_TRUE(threads > 1 || plan.key_splits == 1) << "nothing to share";
        }
      }
    }
  });
}

// Packed sequences, some of them empty, with and without block lists: every row of every head is in one tile.
TEST(PlanForward, TilesOfPackedSequencesHaveEveryRowOnce) {
  testing::Random random(81);
  for (int round = 0; round < 60; ++round) {
    AttentionProblem p = shape(static_cast<int32_t>(random.integer(1, 40)), 6, 3, 0, 600);
    std::vector<int32_t> starts = {0};
    for (int32_t b = 0; b < p.B; ++b) {
      const auto length = static_cast<int32_t>(random.chance(0.2) ? 0 : random.integer(0, random.pick({5, 100, 900})));
      p.Nq = std::max(p.Nq, length);
      starts.push_back(starts.back() + length);
    }
    p.query_starts = starts.data();
    p.packed_queries = starts.back();
    p.q.stride[1] = random.pick({1, 100});  // the order of the tiles follows from what lies together
    p.q.stride[2] = 10;
    const int64_t offsets[1] = {0};
    if (random.chance(0.5)) {
      p.blocks.offsets = offsets;  // only its shape is looked at
      p.blocks.block_q = random.pick({16, 64, 128});
      p.blocks.stride_h = random.pick({0, 1});
    }
    for (const CpuKernelTraits& cpu : all_traits()) {
      const int threads = random.pick({1, 2, 8});
      const ForwardPlan plan = plan_forward(p, cpu, threads, random.chance(0.3));
      if (p.Nq == 0) {
        EXPECT_EQ(plan.kernel, ForwardKernel::empty);
        continue;
      }
      EXPECT_EQ(plan.tasks, ceil_div(plan.tiles.count(), plan.batch) * plan.key_splits);
      const BackwardPlan backward = plan_backward(p, cpu);
      const auto expect_all_rows = [&](const RowTiling& tiling, const TileMap& tiles, int32_t most_rows) {
        std::vector<int> met(static_cast<size_t>(p.packed_queries) * static_cast<size_t>(p.Hq));
        for (int64_t index = 0; index < tiles.count(); ++index) {
          const TileMap::Place place = tiles.locate(index);
          int32_t query[512], head[512];
          const int32_t rows = fill_rows(tiling, p, place.b, place.kv_head, place.tile, query, head);
          ASSERT_GE(rows, 1);
          ASSERT_LE(rows, most_rows);
          for (int32_t r = 0; r < rows; ++r) {
            ASSERT_EQ(head[r] / 2, place.kv_head);
            ++met[static_cast<size_t>(head[r]) * static_cast<size_t>(p.packed_queries) +
                  static_cast<size_t>(starts[static_cast<size_t>(place.b)] + query[r])];
          }
        }
        for (int count : met) ASSERT_EQ(count, 1);
      };
      expect_all_rows(plan.tiling, plan.tiles, std::max(plan.row_tile, cpu.max_decode_rows));
      expect_all_rows(backward.tiling, backward.tiles, backward.row_tile);
      // The partials of dq do not overlap.
      std::vector<std::pair<int64_t, int64_t>> ranges;
      for (int64_t index = 0; index < backward.tiles.count(); ++index) {
        const TileMap::Place place = backward.tiles.locate(index);
        int32_t query[512], head[512];
        const int64_t rows = fill_rows(backward.tiling, p, place.b, place.kv_head, place.tile, query, head);
        for (int32_t part = 0; part < backward.key_partitions; ++part) {
          const int64_t first = backward.partial_row(p, place.b, place.kv_head, part, place.tile);
          ranges.emplace_back(first, first + ceil_div(rows, cpu.lanes) * cpu.lanes);
        }
      }
      std::sort(ranges.begin(), ranges.end());
      for (size_t i = 1; i < ranges.size(); ++i) ASSERT_GE(ranges[i].first, ranges[i - 1].second);
      ASSERT_LE(ranges.empty() ? 0 : ranges.back().second, backward.partial_row_count(p));
    }
  }
}

TEST(PlanForward, AnEmptyOutputHasNoTasks) {
  for (const AttentionProblem& p : {shape(0, 4, 4, 5, 5), shape(2, 0, 0, 5, 5), shape(2, 4, 4, 0, 5)}) {
    const ForwardPlan plan = plan_forward(p, all_traits()[0], 2, false);
    EXPECT_EQ(plan.kernel, ForwardKernel::empty);
    EXPECT_EQ(plan.tasks, 0);
  }
}

TEST(PlanForward, DecodeIsForFewRowsOfAKeyHead) {
  const CpuKernelTraits& cpu = all_traits()[0];
  EXPECT_EQ(plan_forward(shape(1, 8, 8, 1, 4096), cpu, 2, false).kernel, ForwardKernel::decode);
  EXPECT_EQ(plan_forward(shape(1, 8, 1, 1, 4096), cpu, 2, false).kernel, ForwardKernel::decode);
  EXPECT_EQ(plan_forward(shape(1, 4, 1, 1, 16), cpu, 2, false).kernel, ForwardKernel::decode);
  EXPECT_EQ(plan_forward(shape(1, 8, 1, 1, 16), cpu, 2, false).kernel, ForwardKernel::tiled);
  EXPECT_EQ(plan_forward(shape(1, 8, 1, 2, 4096), cpu, 2, false).kernel, ForwardKernel::tiled);
  EXPECT_EQ(plan_forward(shape(1, 8, 8, 4096, 4096), cpu, 2, false).kernel, ForwardKernel::tiled);
  EXPECT_EQ(plan_forward(shape(1, 8, 8, 1, 4096), cpu, 2, true).kernel, ForwardKernel::tiled);
}

TEST(PlanForward, QueriesAndOutputsOfATileShareTheCacheWithKeys) {
  const CpuKernelTraits cpu = traits(8, 3, 384, 8, false);
  const auto tile = [&](int32_t D) {
    AttentionProblem p = shape(1, 8, 8, 4096, 4096);
    p.D = p.Dv = D;
    return plan_forward(p, cpu, 1, false).row_tile;
  };
  EXPECT_EQ(tile(32), 384);
  EXPECT_EQ(tile(64), 384);
  EXPECT_EQ(tile(128), 192);
  EXPECT_EQ(tile(576), 24);  // never less than a full column group
}

TEST(PlanForward, LongKeysOfFewRowsAreSharedByTheThreads) {
  const ForwardPlan plan = plan_forward(shape(1, 1, 1, 1, 32768), all_traits()[0], 2, false);
  EXPECT_GE(plan.tasks, 2);
  EXPECT_GT(plan_forward(shape(1, 1, 1, 1, 32768), all_traits()[0], 16, false).tasks, 15);
}

TEST(PlanForward, HeadsOfPagesDecodeTogether) {
  const int32_t table[2048] = {};
  const auto paged = [&](int32_t heads, int32_t group, int32_t D) {
    AttentionProblem p = shape(1, heads * group, heads, 1, 32768, D);
    p.pages.page_size = 16;
    p.pages.table = table;
    return p;
  };
  for (const CpuKernelTraits& cpu : all_traits()) {
    const auto together = [&](const AttentionProblem& p) {
      const ForwardPlan plan = plan_forward(p, cpu, 1, false);
      EXPECT_EQ(plan.batch % plan.together, 0);
      EXPECT_EQ(plan.tiles.count() % plan.batch, 0);
      EXPECT_EQ(plan.key_splits, 1);
      return plan.together;
    };
    AttentionProblem p = paged(8, 1, 64);
    EXPECT_EQ(together(p), 8);
    EXPECT_EQ(plan_forward(p, cpu, 2, false).tasks, plan_forward(p, cpu, 2, false).key_splits);
    EXPECT_GT(plan_forward(p, cpu, 2, false).key_splits, 1) << "one task would leave a thread idle";
    EXPECT_EQ(together(paged(1, 1, 64)), 1);
    EXPECT_EQ(together(paged(12, 1, 128)), 4) << "a divisor of the heads whose rows fit";
    EXPECT_EQ(together(paged(7, 1, 128)), 1);
    EXPECT_EQ(together(paged(64, 2, 16)), 32) << "rows of a task";
    const int64_t offsets[2] = {0, 1};
    p.blocks.offsets = offsets;
    p.blocks.block_q = p.blocks.block_k = 64;
    EXPECT_EQ(together(p), 1) << "a list is of one tile";
    p.blocks = BlockListRef{};
    p.pages = PagesRef{};
    EXPECT_EQ(together(p), 1) << "without pages a head's keys are one range of memory";
  }
}

TEST(PlanForward, Bfloat16ProductsNeedTheInstructionAndTheType) {
  AttentionProblem p = shape(1, 8, 8, 128, 128);
  EXPECT_FALSE(plan_forward(p, all_traits()[1], 2, false).native_bf16);
  p.dtype = DType::bf16;
  EXPECT_TRUE(plan_forward(p, all_traits()[1], 2, false).native_bf16);
  EXPECT_FALSE(plan_forward(p, all_traits()[0], 2, false).native_bf16);
}

// The products' kind decides the bits of a row, so neither batch, lengths nor threads may change it.
TEST(PlanForward, TheKindOfProductsDependsOnTypeAndHeadDimAlone) {
  for (int32_t D : {1, 7, 8, 63, 64, 127, 128, 576}) {
    AttentionProblem first = shape(1, 1, 1, 1, 1, D);
    first.dtype = DType::bf16;
    const bool native = plan_forward(first, all_traits()[1], 1, false).native_bf16;
    for_each_shape([&](AttentionProblem p) {
      p.D = p.Dv = D;
      p.dtype = DType::bf16;
      for (int threads : {1, 2, 64})
        ASSERT_EQ(plan_forward(p, all_traits()[1], threads, false).native_bf16, native) << "D " << D;
    });
  }
}

TEST(PlanBackward, Bfloat16ProductsNeedTheInstructionTheTypeAndWholePairs) {
  AttentionProblem p = shape(1, 8, 8, 128, 128);
  EXPECT_FALSE(plan_backward(p, all_traits()[1]).native_bf16);
  p.dtype = DType::bf16;
  EXPECT_TRUE(plan_backward(p, all_traits()[1]).native_bf16);
  EXPECT_FALSE(plan_backward(p, all_traits()[0]).native_bf16);
  p.Dv = 63;
  EXPECT_FALSE(plan_backward(p, all_traits()[1]).native_bf16) << "pairs of channels of the values";
  p.Dv = 64;
  p.Nk = 2;
  EXPECT_FALSE(plan_backward(p, all_traits()[1]).native_bf16) << "few keys";
  p.Nk = 128;
  const float cosine = 1.f;
  p.rope.cos = &cosine;
  EXPECT_FALSE(plan_backward(p, all_traits()[1]).native_bf16) << "rotated rows would have to be rounded";
}

TEST(PlanBackward, TasksCoverEveryKeyBlockOnce) {
  for_each_shape([](const AttentionProblem& p) {
    for (const CpuKernelTraits& cpu : all_traits()) {
      const BackwardPlan plan = plan_backward(p, cpu);
      const int64_t blocks = ceil_div(p.Nk, kKeyBlock);
      ASSERT_EQ(plan.rows, int64_t{p.Hq / p.Hkv} * p.Nq);
      ASSERT_EQ(plan.row_tiles, ceil_div(plan.rows, plan.row_tile));
      ASSERT_GE(plan.partition_blocks, 1);
      ASSERT_GE(int64_t{plan.key_partitions} * plan.partition_blocks, blocks);
      ASSERT_LT(int64_t{plan.key_partitions - 1} * plan.partition_blocks, std::max<int64_t>(blocks, 1));
      ASSERT_EQ(plan.tasks, int64_t{p.B} * p.Hkv * plan.key_partitions);
      ASSERT_LE(plan.key_partitions, 8) << "each holds a float32 copy of dq";
    }
  });
}

// Two instruction sets may differ in their tiles; the summation order of dq may not.
TEST(PlanBackward, TheKeyPartitionIsAFunctionOfTheShape) {
  for_each_shape([](const AttentionProblem& p) {
    const BackwardPlan first = plan_backward(p, all_traits()[0]);
    for (const CpuKernelTraits& cpu : all_traits()) {
      const BackwardPlan plan = plan_backward(p, cpu);
      ASSERT_EQ(plan.key_partitions, first.key_partitions);
      ASSERT_EQ(plan.partition_blocks, first.partition_blocks);
    }
  });
}

TEST(Unsupported, HeadDimsFrom1To576AreSupported) {
  const CpuKernelTraits& cpu = all_traits()[0];
  for (int32_t D : {1, 2, 7, 64, 575, 576}) EXPECT_EQ(unsupported(shape(1, 1, 1, 1, 1, D), cpu), std::nullopt) << D;
  for (int32_t D : {0, -1, 577, 1024}) {
    const std::optional<std::string> reason = unsupported(shape(1, 1, 1, 1, 1, D), cpu);
    ASSERT_TRUE(reason.has_value()) << D;
    EXPECT_NE(reason->find("576"), std::string::npos) << *reason;
    EXPECT_NE(reason->find(std::to_string(D)), std::string::npos) << *reason;
  }
  AttentionProblem p = shape(1, 1, 1, 1, 1);
  p.Dv = 600;
  ASSERT_TRUE(unsupported(p, cpu).has_value());
  EXPECT_NE(unsupported(p, cpu)->find("600"), std::string::npos);
}

TEST(Unsupported, WithoutKernelsThereIsAReason) {
  ASSERT_TRUE(unsupported(shape(1, 1, 1, 1, 1), CpuKernelTraits{}).has_value());
  EXPECT_FALSE(unsupported(shape(1, 1, 1, 1, 1), CpuKernelTraits{})->empty());
}

TEST(ForwardKernelNames, AreDistinct) {
  EXPECT_EQ(std::string(name_of(ForwardKernel::empty)), "empty");
  EXPECT_EQ(std::string(name_of(ForwardKernel::tiled)), "tiled");
  EXPECT_EQ(std::string(name_of(ForwardKernel::decode)), "decode");
}

TEST(Tiling, FindsTheListedQueryBlocksOfKeys) {
  // Two lists of 3 key blocks of 4 keys: query blocks {1, 3}, {}, {0, 3} and {}, {2}, {}.
  const int64_t offsets[] = {0, 2, 2, 4, 4, 4, 5, 5};
  const int32_t queries[] = {1, 3, 0, 3, 2};
  AttentionProblem p;
  p.blocks.block_q = p.blocks.block_k = 4;
  p.blocks.query_blocks = 4;
  p.blocks.key_blocks = 3;
  p.blocks.stride_h = 1;
  p.blocks.transposed_offsets = offsets;
  p.blocks.query_ids = queries;
  const auto found = [&](int32_t head, int64_t k0, int32_t keys) {
    std::vector<int64_t> blocks;
    for (int64_t block = 0; (block = listed_query_block(p, 0, head, k0, keys, block)) < p.blocks.query_blocks; ++block)
      blocks.push_back(block);
    return blocks;
  };
  using Blocks = std::vector<int64_t>;
  EXPECT_EQ(found(0, 0, 12), (Blocks{0, 1, 3})) << "lists are merged, each block once";
  EXPECT_EQ(found(0, 0, 4), (Blocks{1, 3}));
  EXPECT_EQ(found(0, 4, 4), Blocks{});
  EXPECT_EQ(found(0, 7, 2), (Blocks{0, 3})) << "a key of two blocks each";
  EXPECT_EQ(found(0, 8, 100), (Blocks{0, 3})) << "keys past the last block";
  EXPECT_EQ(found(1, 3, 2), Blocks{2});
}

}  // namespace
}  // namespace mfa
