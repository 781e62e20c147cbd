#include "attention/tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/random.h"

namespace mfa {
namespace {

using testing::Random;

TEST(Tree, ANodeSeesItsAncestorsAndItself) {
  const std::vector<int64_t> parents = {-1, 0, 0, 1};
  const TreeVisibility tree = tree_visibility(parents, 1, 4, "f");
  EXPECT_EQ(tree.depths, (std::vector<int32_t>{0, 1, 1, 2}));
  EXPECT_EQ(tree.bits, (std::vector<uint32_t>{0b0001, 0b0011, 0b0101, 0b1011}));
  for (size_t i = 0; i < 4; ++i)
    for (size_t j = 0; j < 4; ++j) EXPECT_EQ(tree.visible[4 * i + j], (tree.bits[i] >> j & 1) == 1);
}

TEST(Tree, RandomParentsAreRefusedOrMakeATree) {
  Random random(31);
  int refused = 0;
  const int cases = 10000;
  for (int n = 0; n < cases; ++n) {
    const auto trees = static_cast<int32_t>(random.integer(0, 3));
    const auto nodes = static_cast<int32_t>(random.pick({0, 1, 2, 5, 31, 32, 33, 40}));
    std::vector<int64_t> parents;
    for (int32_t t = 0; t < trees; ++t)
      for (int32_t i = 0; i < nodes; ++i) parents.push_back(random.integer(-1, i - 1));
    if (!parents.empty() && random.chance(0.5)) {
      parents[static_cast<size_t>(random.integer(0, static_cast<int64_t>(parents.size()) - 1))] =
          random.pick({int64_t{-2}, int64_t{0}, int64_t{31}, int64_t{40}, int64_t{1} << 32,
                       std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()});
    }
    bool valid = true;
    for (size_t i = 0; i < parents.size(); ++i)
      valid &= parents[i] >= -1 && parents[i] < static_cast<int64_t>(i % static_cast<size_t>(nodes));
    try {
      const TreeVisibility tree = tree_visibility(parents, trees, nodes, "f");
      ASSERT_TRUE(valid);
      for (size_t i = 0; i < parents.size(); ++i) {
        const bool* row = &tree.visible[i * static_cast<size_t>(nodes)];
        ASSERT_EQ(std::count(row, row + nodes, true), tree.depths[i] + 1);
      }
    } catch (const std::invalid_argument& error) {
      ASSERT_FALSE(valid);
      ASSERT_EQ(std::string(error.what()).substr(0, 4), "[f] ");
      ++refused;
    }
  }
  EXPECT_GT(refused, cases / 10);
}

}  // namespace
}  // namespace mfa
