// attention_case.h: attention problems for tests, from a specification to tensors, with poison where nothing may read.
#pragma once

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
  bool poison = true;  // NaN in keys, values and bias entries that no row sees
};
std::string describe(const CaseSpec& spec);

// A random specification within a budget of work, B * Hq * Nq * Nk * (D + Dv).
CaseSpec random_spec(Random& random, int64_t max_work);

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
  const float* dlse_or_null() const { return dlse.empty() ? nullptr : dlse.data(); }
};

// Visibility by every rule, the boolean mask included; a bias of -inf is not looked at.
bool is_visible(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j);

}  // namespace mfa::testing
