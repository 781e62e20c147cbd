// plan.h: how a problem is cut into work for the CPU kernels: pure functions of shapes, tested by tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "attention/tiling.h"

namespace mfa {

// Keys per block. Part of the numerical definition of the CPU kernels: each block of a row is reduced on its own and
// the blocks are merged in order, so a row has the same bits whatever batch, chunk, split or thread computes it.
inline constexpr int32_t kKeyBlock = 256;

// Most tiles that decode together.
inline constexpr int32_t kMostTogether = 64;

// What an instruction set offers to the planner.
struct CpuKernelTraits {
  const char* isa = "";             // "avx2", "avx512", "avx512_bf16", "neon"
  int32_t lanes = 0;                // float32 lanes of a vector
  int32_t tile_vectors = 0;         // vectors across a full register tile: a column group has lanes * tile_vectors rows
  int32_t max_row_tile = 0;         // most query rows of a task
  int32_t row_tile_floats = 0;      // of q and o of a task: read once a block of keys, which they share the caches with
  int32_t backward_row_tile = 0;    // query rows of a step of the backward
  int32_t max_decode_rows = 0;      // up to this many rows, the decode kernel is the faster where there are many keys
  int32_t few_key_decode_rows = 0;  // and where there are few
  bool native_bf16 = false;         // multiplies bfloat16 pairs without widening them
};

enum class ForwardKernel : uint8_t {
  empty,   // no work: an empty output, or only zero rows
  tiled,   // lanes = query rows
  decode,  // few query rows: lanes = keys for the scores, channels for the output
};
const char* name_of(ForwardKernel kernel);

struct ForwardPlan {
  ForwardKernel kernel = ForwardKernel::empty;
  bool native_bf16 = false;  // products of bfloat16 pairs
  int64_t rows = 0;          // query rows of one KV head of the longest sequence: G * Nq
  int32_t row_tile = 0;      // most rows of a task
  int64_t row_tiles = 0;     // tasks along the rows of one KV head of the longest sequence
  int32_t row_width = 0;     // row_tile, padded to whole vectors
  int32_t key_splits = 1;    // tasks along the keys; > 1 stores a partial result a block, merged afterwards
  int32_t split_blocks = 0;  // key blocks per split
  int32_t batch = 1;         // row tiles of a task: more where there are thousands of short sequences
  int32_t together = 1;      // tiles of a task that take each step of the keys together: heads of the same pages
  int64_t tasks = 0;         // row tiles of all sequences and KV heads / batch * key_splits
  RowTiling tiling;
  TileMap tiles;
};
ForwardPlan plan_forward(const AttentionProblem& p, const CpuKernelTraits& cpu, int threads, bool wants_probs);

struct BackwardPlan {
  bool native_bf16 = false;  // products of bfloat16 pairs
  int64_t rows = 0;
  int32_t row_tile = 0;
  int64_t row_tiles = 0;
  int32_t key_partitions = 1;  // key ranges with their own dq partial, summed in order; a function of the shape only
  int32_t partition_blocks = 0;
  int64_t tasks = 0;  // B * Hkv * key_partitions
  RowTiling tiling;
  TileMap tiles;
  // Rows of the dq partials of a KV head in one partition, padded tiles of `row_tile` rows (a single tile: of its own
  // size), and packed those before each sequence: all of one (sequence, KV head) lie together, partition by partition.
  int64_t partial_rows = 0;
  std::vector<int64_t> partial_starts;

  int64_t partial_rows_of(const AttentionProblem& p, int32_t b) const;
  // The first row of the partials of `tile`; partial_row_count() is their number.
  int64_t partial_row(const AttentionProblem& p, int32_t b, int32_t kv_head, int32_t partition, int64_t tile) const;
  int64_t partial_row_count(const AttentionProblem& p) const;
};
BackwardPlan plan_backward(const AttentionProblem& p, const CpuKernelTraits& cpu);

// Why the CPU kernels cannot run `p`, or nullopt. Routing, explain() and the error of a forced backend print it.
std::optional<std::string> unsupported(const AttentionProblem& p, const CpuKernelTraits& cpu);

}  // namespace mfa
