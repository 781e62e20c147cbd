// neighbourhood.h: neighbourhood attention: each token of a grid attends to a window of the grid around it.
//
// A query sees the product of one window of keys for each axis. Along an axis `stride` queries share the window of
// `window` keys around them; with dilation d the axis is d interleaved sequences, each with that rule for itself.
// Sources: Hassani et al., arXiv:2204.07143 and arXiv:2504.16922.
#pragma once

#include <vector>

#include "mfa/attention.h"

namespace mfa {

struct NeighbourhoodSpec {
  std::vector<int> shape;     // 1 to 3 extents of the grid; tokens are numbered row-major
  std::vector<int> window;    // for each axis: keys of a window
  std::vector<int> stride;    // queries that share a window, at most `window`
  std::vector<int> dilation;  // at most the extent; empty: 1
  std::vector<bool> causal;   // the window ends at the query; empty: false

  // At a border the window moves inside and keeps its size; else it is cut.
  bool shifts = false;
  // An even window with an odd stride has one key more on the left; else on the right.
  bool leans_left = false;
};

// attention() with the visibility of `spec` beside that of the options. q, k and v have as many tokens as the grid.
// Throws std::invalid_argument if they have not or the spec is not as said, and as attention(); std::runtime_error
// where no kernel runs.
MFA_API mlx::core::array attention_gna(const mlx::core::array& q, const mlx::core::array& k, const mlx::core::array& v,
                                       const NeighbourhoodSpec& spec, const AttentionOptions& options = {},
                                       mlx::core::StreamOrDevice s = {});

// The same with the log-sum-exp of each row.
MFA_API AttentionResult attention_gna_with_lse(const mlx::core::array& q, const mlx::core::array& k,
                                               const mlx::core::array& v, const NeighbourhoodSpec& spec,
                                               const AttentionOptions& options = {}, mlx::core::StreamOrDevice s = {});

}  // namespace mfa
