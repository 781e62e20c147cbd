#include "attention/tree.h"

#include <algorithm>

#include "common/check.h"

namespace mfa {

TreeVisibility tree_visibility(std::span<const int64_t> parents, int32_t trees, int32_t nodes, const char* function) {
  const auto N = static_cast<size_t>(nodes), words = (N + 31) / 32;
  TreeVisibility tree;
  tree.depths.resize(static_cast<size_t>(trees) * N);
  tree.visible = std::make_unique<bool[]>(tree.depths.size() * N);  // zeros; vector<bool> has no data()
  tree.bits.resize(tree.depths.size() * words);
  for (size_t first = 0; first < tree.depths.size(); first += N) {
    for (size_t i = 0; i < N; ++i) {
      const int64_t parent = parents[first + i];
      check(parent >= -1 && parent < static_cast<int64_t>(i), function, "the parent of node ", i,
            " must be a node before it or -1; got ", parent);
      bool* row = &tree.visible[(first + i) * N];
      uint32_t* row_bits = &tree.bits[(first + i) * words];
      if (parent >= 0) {
        const size_t up = first + static_cast<size_t>(parent);
        tree.depths[first + i] = tree.depths[up] + 1;
        std::copy_n(&tree.visible[up * N], N, row);
        std::copy_n(&tree.bits[up * words], words, row_bits);
      }
      row[i] = true;
      row_bits[i / 32] |= uint32_t{1} << (i % 32);
    }
  }
  return tree;
}

}  // namespace mfa
