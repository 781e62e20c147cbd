// attention_case.h: attention problems for tests, from a specification to tensors, with poison where nothing may read.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "support/random.h"
#include "support/tensor.h"

namespace mfa::testing {

constexpr int kAbsent = -1;

// Which axes a bias or a mask has, as bits: 8 = B, 4 = Hq, 2 = Nq, 1 = Nk; it is broadcast along the others.
struct TermSpec {
  int axes = kAbsent;
  bool strided = false;  // every second element of a larger array, and reversed along its first axis
};

struct CaseSpec {
  DType dtype = DType::f32;
  int32_t B = 1, Hq = 1, Hkv = 1, Nq = 1, Nk = 1, D = 8, Dv = 8;
  float scale = 0.f;  // 0: D^-0.5
  float softcap = 0.f;
  bool alibi = false;
  bool sinks = false;
  TermSpec bias;
  DType bias_dtype = DType::f32;
  double bias_minus_infinity = 0;  // share of its entries that are -inf
  bool causal = false;
  int32_t window_left = -1, window_right = -1;
  bool kv_lengths = false;
  TermSpec mask;
  double mask_visible = 0.7;  // share of its entries
  float dropout_p = 0.f;
  bool dlse = false;
  Layout q_layout = Layout::dense, k_layout = Layout::dense, v_layout = Layout::dense, o_layout = Layout::dense;
  bool packed_queries = false, packed_keys = false;  // sequences of random lengths up to Nq and Nk
  int32_t page_size = 0;                             // keys in pages, some of them shared; excludes packed_keys
  int32_t rotary_dim = 0;
  bool interleaved = true, rotates_k = true;
  int32_t block_q = 0, block_k = 0;  // block lists
  bool blocks_by_batch = false, blocks_by_head = false;
  double blocks_visible = 0.5;
  Neighbourhood neighbourhood;
  bool poison = true;  // NaN in keys, values and bias entries that no row sees
};
std::string describe(const CaseSpec& spec);

// A random specification within a budget of work, B * Hq * Nq * Nk * (D + Dv).
CaseSpec random_spec(Random& random, int64_t max_work);
// Adds what only some entry points have: packing, pages, rotary embedding, block lists, neighbourhoods. A neighbourhood
// changes the lengths to those of its grid.
void add_family(Random& random, CaseSpec& spec);

// Block lists of one visibility of tiles, and the transposed lists.
struct BlockLists {
  std::vector<int64_t> offsets, transposed_offsets;
  std::vector<int32_t> key_ids, query_ids;
  // `visible` [lists, query blocks, key blocks]
  BlockLists() = default;
  BlockLists(const std::vector<bool>& visible, int32_t lists, int32_t query_blocks, int32_t key_blocks);
};

// Owns what its problem points to. Moves keep the pointers valid; copies would not.
struct AttentionCase {
  AttentionCase(const CaseSpec& spec, uint64_t seed);
  AttentionCase(AttentionCase&&) = default;
  AttentionCase(const AttentionCase&) = delete;

  CaseSpec spec;
  AttentionProblem problem;
  Tensor q, k, v, d_o;
  std::vector<float> slopes, sinks, dlse;
  std::vector<int32_t> kv_lengths;
  std::vector<uint8_t> bias, mask;
  std::vector<int32_t> query_starts, key_starts, page_table, q_positions, k_positions;
  std::vector<float> cosines, sines;
  BlockLists lists;
  const float* dlse_or_null() const { return dlse.empty() ? nullptr : dlse.data(); }

 private:
  void set_layout(Random& random);
  void poison_keys();
};

// Shapes of tensors like q and k with `width` channels, as dense tensors [batch, heads, rows, width].
std::array<int64_t, 4> query_shape(const AttentionProblem& p, int32_t width);
std::array<int64_t, 4> key_shape(const AttentionProblem& p, int32_t width);
// The row of such a dense tensor, counted over all heads, of key j.
int64_t key_row(const AttentionProblem& p, int32_t b, int32_t kv_head, int32_t j);

// Visibility by every rule, the boolean mask included; a bias of -inf is not looked at.
bool is_visible(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j);

}  // namespace mfa::testing
