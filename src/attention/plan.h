// plan.h: how a problem is cut into work for the CPU kernels: pure functions of shapes, tested by tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "attention/problem.h"

namespace mfa {

// Keys per block. Part of the numerical definition of the CPU kernels: each block of a row is reduced on its own and
// the blocks are merged in order, so a row has the same bits whatever batch, chunk, split or thread computes it.
inline constexpr int32_t kKeyBlock = 256;

// What an instruction set offers to the planner.
struct CpuKernelTraits {
  const char* isa = "";           // "avx2", "avx512", "avx512_bf16", "neon"
  int32_t lanes = 0;              // float32 lanes of a vector
  int32_t tile_vectors = 0;       // vectors across a full register tile: a column group has lanes * tile_vectors rows
  int32_t max_row_tile = 0;       // most query rows of a task
  int32_t row_tile_floats = 0;    // of q and o of a task: they share the L2 cache with a block of keys and values
  int32_t backward_row_tile = 0;  // query rows of a step of the backward
  int32_t max_decode_rows = 0;    // up to this many rows, the decode kernel is the faster
  bool native_bf16 = false;       // multiplies bfloat16 pairs without widening them
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
  int64_t rows = 0;          // query rows of one KV head: G * Nq, row r = (query r / G, head r % G of the group)
  int32_t row_tile = 0;      // rows per task
  int32_t row_tiles = 0;     // tasks along the rows of one KV head
  int32_t row_width = 0;     // row_tile, padded to whole vectors
  int32_t key_splits = 1;    // tasks along the keys; > 1 stores a partial result a block, merged afterwards
  int32_t split_blocks = 0;  // key blocks per split
  int64_t tasks = 0;         // B * Hkv * row_tiles * key_splits
};
ForwardPlan plan_forward(const AttentionProblem& p, const CpuKernelTraits& cpu, int threads, bool wants_probs);

struct BackwardPlan {
  bool native_bf16 = false;
  int64_t rows = 0;
  int32_t row_tile = 0;
  int32_t row_tiles = 0;
  int32_t key_partitions = 1;  // key ranges with their own dq partial, summed in order; a function of the shape only
  int32_t partition_blocks = 0;
  int64_t tasks = 0;  // B * Hkv * key_partitions
};
BackwardPlan plan_backward(const AttentionProblem& p, const CpuKernelTraits& cpu);

// Why the CPU kernels cannot run `p`, or nullopt. Routing, explain() and the error of a forced backend print it.
std::optional<std::string> unsupported(const AttentionProblem& p, const CpuKernelTraits& cpu);

}  // namespace mfa
