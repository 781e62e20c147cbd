// tree.h: trees of draft tokens: which node sees which.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace mfa {

// A node sees its ancestors and itself. Of `trees` trees of `nodes` nodes each, one after another.
struct TreeVisibility {
  std::vector<int32_t> depths;      // [trees, nodes]
  std::unique_ptr<bool[]> visible;  // [trees, nodes, nodes]: row i, column j: node i sees node j
  std::vector<uint32_t> bits;       // [trees, nodes, ceil(nodes / 32)]: the same, node j as bit j % 32 of word j / 32
};

// `parents` [trees, nodes]: a node before the node itself, or -1. Throws std::invalid_argument, "[function] ...".
TreeVisibility tree_visibility(std::span<const int64_t> parents, int32_t trees, int32_t nodes, const char* function);

}  // namespace mfa
