#include "attention/visibility.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <ostream>
#include <vector>

namespace mfa {
namespace {

constexpr int32_t kHuge = std::numeric_limits<int32_t>::max();

struct Row {
  const char* why;
  int32_t Nq, Nk;
  bool causal;
  int32_t left, right;
  int32_t row;
  int32_t begin, end;  // expected; 0, 0 for none
};

void PrintTo(const Row& row, std::ostream* out) { *out << row.why; }

class VisibleKeys : public ::testing::TestWithParam<Row> {};

TEST_P(VisibleKeys, AreThoseOfTheTable) {
  const Row& row = GetParam();
  AttentionProblem p;
  p.B = 1;
  p.Nq = row.Nq;
  p.Nk = row.Nk;
  p.causal = row.causal;
  p.window_left = row.left;
  p.window_right = row.right;
  const KeyRange range = visible_keys(p, 0, row.row);
  EXPECT_EQ(range.begin, row.begin);
  EXPECT_EQ(range.end, row.end);
}

INSTANTIATE_TEST_SUITE_P(
    Table, VisibleKeys,
    ::testing::Values(
        Row{"no limit", 3, 5, false, -1, -1, 0, 0, 5}, Row{"no keys", 3, 0, false, -1, -1, 0, 0, 0},
        Row{"no keys, causal", 3, 0, true, -1, -1, 2, 0, 0},
        Row{"causal, first of as many", 5, 5, true, -1, -1, 0, 0, 1},
        Row{"causal, last of as many", 5, 5, true, -1, -1, 4, 0, 5},
        Row{"causal, more keys: bottom right", 3, 5, true, -1, -1, 0, 0, 3},
        Row{"causal, more keys, last row", 3, 5, true, -1, -1, 2, 0, 5},
        Row{"causal, fewer keys: the offset is clamped at 0", 5, 3, true, -1, -1, 0, 0, 1},
        Row{"causal, fewer keys, row past them", 5, 3, true, -1, -1, 4, 0, 3},
        Row{"causal, one query sees all", 1, 1000, true, -1, -1, 0, 0, 1000},
        Row{"window, inside", 8, 8, false, 2, 1, 4, 2, 6}, Row{"window, cut at the start", 8, 8, false, 2, 1, 0, 0, 2},
        Row{"window, cut at the end", 8, 8, false, 2, 1, 7, 5, 8}, Row{"window, more keys", 4, 6, false, 2, 1, 0, 0, 4},
        Row{"window of the diagonal", 4, 6, false, 0, 0, 1, 3, 4}, Row{"window left only", 8, 8, false, 3, -1, 5, 2, 8},
        Row{"window right only", 8, 8, false, -1, 2, 3, 0, 6},
        Row{"causal beats the right window", 8, 8, true, 2, 5, 4, 2, 5},
        Row{"causal with a right window of 0", 8, 8, true, -1, 0, 4, 0, 5},
        Row{"window past the last key: none", 9, 3, false, 2, 1, 8, 0, 0},
        Row{"window that just reaches the last key", 9, 3, false, 2, 1, 4, 2, 3},
        Row{"huge windows are open", 8, 8, false, kHuge, kHuge, 4, 0, 8},
        Row{"huge windows at huge positions do not overflow", 4, kHuge, false, kHuge, kHuge, 3, 0, kHuge},
        Row{"causal at huge positions", 4, kHuge, true, 1, -1, 3, kHuge - 2, kHuge}));

TEST(Visibility, LengthsAreClampedAndMoveThePositions) {
  const std::vector<int32_t> lengths = {4, 0, -3, 9, 7};
  AttentionProblem p;
  p.B = 5;
  p.Nq = 2;
  p.Nk = 7;
  p.causal = true;
  p.kv_lengths = lengths.data();
  const std::vector<int32_t> counts = {4, 0, 0, 7, 7}, offsets = {2, 0, 0, 5, 5};
  for (int32_t b = 0; b < p.B; ++b) {
    EXPECT_EQ(key_count(p, b), counts[b]);
    EXPECT_EQ(position_offset(p, b), offsets[b]);
    for (int32_t i = 0; i < p.Nq; ++i) {
      const KeyRange range = visible_keys(p, b, i);
      EXPECT_EQ(range.begin, 0);
      EXPECT_EQ(range.end, counts[b] == 0 ? 0 : offsets[b] + i + 1) << b << " " << i;
    }
  }
}

// Every small setting against the definition, key by key.
TEST(Visibility, TheIntervalIsExactlyTheDefinition) {
  for (int32_t Nq = 1; Nq <= 5; ++Nq) {
    for (int32_t Nk = 0; Nk <= 5; ++Nk) {
      for (int32_t length = 0; length <= Nk; ++length) {
        for (int32_t left = -1; left <= 3; ++left) {
          for (int32_t right = -1; right <= 3; ++right) {
            for (bool causal : {false, true}) {
              AttentionProblem p;
              p.B = 1;
              p.Nq = Nq;
              p.Nk = Nk;
              p.causal = causal;
              p.window_left = left;
              p.window_right = right;
              p.kv_lengths = &length;
              for (int32_t i = 0; i < Nq; ++i) {
                const KeyRange range = visible_keys(p, 0, i);
                const int32_t pos = i + std::max(0, length - Nq);
                for (int32_t j = 0; j < Nk; ++j) {
                  const bool seen = j < length && (!causal || j <= pos) && (left < 0 || j >= pos - left) &&
                                    (right < 0 || j <= pos + right);
                  ASSERT_EQ(range.begin <= j && j < range.end, seen)
                      << "Nq " << Nq << " length " << length << " left " << left << " right " << right << " causal "
                      << causal << " i " << i << " j " << j;
                }
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace mfa
