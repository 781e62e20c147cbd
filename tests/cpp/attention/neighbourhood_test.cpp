// Neighbourhoods against gna.json (key lists, checksums, tile counts) and against brute force.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention/neighbourhood.h"
#include "attention/neighbourhood_tiles.h"
#include "attention/tile_keys.h"
#include "attention/tiling.h"
#include "support/json.h"
#include "support/random.h"

namespace mfa {
namespace {

using testing::Json;
using testing::Random;

int32_t integer(const Json& x) { return static_cast<int32_t>(x.number()); }

// gna.json's axes, windows that shift and lean left.
Neighbourhood grid(const Json& c) {
  Neighbourhood n;
  n.shifts = n.leans_left = true;
  n.axes = static_cast<int32_t>(c["dims"].size());
  for (int32_t x = 0; x < n.axes; ++x) {
    NeighbourhoodAxis& a = n.axis[x];
    a.size = integer(c["dims"][x]);
    a.window = integer(c["window"][x]);
    a.stride = integer(c["stride"][x]);
    if (c.has("dilation")) a.dilation = integer(c["dilation"][x]);
    if (c.has("causal")) a.causal = c["causal"][x].is_true();
  }
  return n;
}

int32_t tokens_of(const Neighbourhood& n) {
  int32_t tokens = 1;
  for (int32_t x = 0; x < n.axes; ++x) tokens *= n.axis[x].size;
  return tokens;
}

std::vector<int32_t> keys_of(const Neighbourhood& n, int32_t i) {
  std::vector<int32_t> keys;
  for (int32_t j = 0; j < tokens_of(n); ++j)
    if (neighbours(n, i, j)) keys.push_back(j);
  return keys;
}

TEST(Neighbourhood, SizesOfInterleavedSequencesMustFitTheirType) {
  Neighbourhood n;
  n.axes = 1;
  constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();
  n.axis[0] = {.size = kLargest - 7, .window = 3, .dilation = 7};
  EXPECT_NO_THROW(validate(n, "f"));
  const AxisWindow last = axis_window(n, n.axis[0], n.axis[0].size - 1);
  EXPECT_EQ(last.end, (n.axis[0].size - 1) / 7 + 1);
  ++n.axis[0].size;
  EXPECT_THROW(validate(n, "f"), std::invalid_argument);
}

TEST(GoldenNeighbourhood, KeysAlongOneAxisAreExact) {
  const Json golden = Json::golden("gna.json");
  for (const Json& c : golden["one_dim"]) {
    Neighbourhood n;
    n.axes = 1;
    n.axis[0] = {integer(c["L"]), integer(c["window"]), integer(c["stride"]), integer(c["dilation"]),
                 c["causal"].is_true()};
    SCOPED_TRACE("L " + c["L"].text() + " window " + c["window"].text() + " stride " + c["stride"].text());
    n.shifts = n.leans_left = true;
    for (int32_t i = 0; i < n.axis[0].size; ++i) {
      const std::vector<double> keys = c["keys"][i].flat();
      EXPECT_EQ(keys_of(n, i), std::vector<int32_t>(keys.begin(), keys.end())) << "query " << i;
    }
    if (!c.has("truncated_convention")) continue;
    n.shifts = n.leans_left = false;
    for (size_t i = 0; i < c["truncated_convention"].size(); ++i) {
      const std::vector<int32_t> keys = keys_of(n, static_cast<int32_t>(i));
      EXPECT_EQ(keys.front(), integer(c["truncated_convention"][i][0])) << "query " << i;
      EXPECT_EQ(keys.back() + 1, integer(c["truncated_convention"][i][1])) << "query " << i;
    }
  }
}

TEST(GoldenNeighbourhood, KeysOfGridsHaveTheChecksums) {
  const Json golden = Json::golden("gna.json");
  for (const Json& c : golden["three_dim"]) {
    const Neighbourhood n = grid(c);
    const int32_t tokens = tokens_of(n);
    int64_t h = 0;
    for (int32_t i = 0; i < tokens; ++i) {
      const std::vector<int32_t> keys = keys_of(n, i);
      EXPECT_EQ(static_cast<int32_t>(keys.size()), integer(c["keys_per_query"][i])) << "query " << i;
      for (int32_t j : keys) h = (31 * h + int64_t{i} * tokens + j + 1) % 2147483647;
    }
    EXPECT_EQ(h, integer(c["checksum"]));
  }
}

TEST(GoldenNeighbourhood, VisitedTilesAreThoseOfTheSimulator) {
  const Json golden = Json::golden("gna.json");
  for (const Json& c : golden["simulator"]) {
    const Neighbourhood n = grid(c);
    int32_t q_tile[3] = {}, kv_tile[3] = {};
    for (int32_t x = 0; x < n.axes; ++x) {
      q_tile[x] = integer(c["q_tile"][x]);
      kv_tile[x] = integer(c["kv_tile"][x]);
    }
    const TileVisits visits = visited_tiles(n, q_tile, kv_tile);
    EXPECT_EQ(visits.pairs, integer(c["tile_pairs"]));
    EXPECT_EQ(visits.dense_pairs, integer(c["tile_pairs_dense"]));
    EXPECT_EQ(visits.mask_free, c["mask_free"].is_true());
  }
}

Neighbourhood random_grid(Random& random) {
  Neighbourhood n;
  n.axes = static_cast<int32_t>(random.integer(1, 3));
  for (int32_t x = 0; x < n.axes; ++x) {
    NeighbourhoodAxis& a = n.axis[x];
    a.size = static_cast<int32_t>(random.integer(1, n.axes == 1 ? 200 : 9));
    a.dilation = static_cast<int32_t>(random.integer(1, 1 + a.size / 3));
    a.window = static_cast<int32_t>(random.integer(1, (a.size + a.dilation - 1) / a.dilation));
    a.stride = static_cast<int32_t>(random.integer(1, a.window));
    a.causal = random.chance(0.2);
  }
  n.shifts = random.chance(0.5);
  n.leans_left = random.chance(0.5);
  return n;
}

// Every query is a row of one tile, and a tile's lists have the keys that some row sees, each once.
TEST(TileKeys, BoxesAndTheirListsCoverWhatRowsSee) {
  Random random(71);
  for (int round = 0; round < testing::case_count(200); ++round) {
    AttentionProblem p;
    p.neighbourhood = random_grid(random);
    p.B = p.Hkv = 1;
    p.Hq = random.pick({1, 2});
    p.Nq = p.Nk = tokens_of(p.neighbourhood);
    RowTiling t;
    t.heads = p.Hq;
    choose_box(p.neighbourhood, t.heads, random.pick({4, 24, 96}), random.pick({8, 24}), 8, t.box);
    TileKeys keys(p);
    std::vector<int> met(static_cast<size_t>(p.Nq) * p.Hq);
    for (int64_t tile = 0; tile < tile_count(t, p.neighbourhood, p.Nq); ++tile) {
      int32_t query[400], head[400];
      const int32_t rows = fill_rows(t, p, 0, 0, tile, query, head);
      for (int32_t r = 0; r < rows; ++r) ++met[static_cast<size_t>(query[r]) * p.Hq + head[r]];
      if (rows == 0) continue;
      keys.select(0, query, head, rows);
      std::vector<int32_t> listed, wanted;
      for (int32_t k0 = 0; k0 < p.Nk; k0 += kKeyBlock) {
        KeyList list;
        const bool pairs = random.chance(0.5);
        keys.list(k0, std::min(p.Nk, k0 + kKeyBlock), pairs, list);
        for (int32_t c = 0; c < list.count; ++c) {
          if (pairs && !list.contiguous) {
            ASSERT_EQ(list.key[c] % 2, c % 2);
          }
          if (list.padding[c]) continue;
          listed.push_back(list.key[c]);
        }
      }
      for (int32_t j = 0; j < p.Nk; ++j) {
        bool seen = false;
        for (int32_t r = 0; r < rows && !seen; ++r) seen = neighbours(p.neighbourhood, query[r], j);
        if (seen) wanted.push_back(j);
      }
      // A box lists the product of what its rows see along the axes: of one interleaved sequence that is exact.
      ASSERT_EQ(listed, wanted);
    }
    for (int count : met) ASSERT_EQ(count, 1);
  }
}

// Spans and positions say what neighbours() says.
TEST(TileKeys, PositionsWithinSpansAreTheNeighbours) {
  Random random(72);
  for (int round = 0; round < testing::case_count(100); ++round) {
    const Neighbourhood n = random_grid(random);
    const int32_t tokens = tokens_of(n);
    std::vector<int32_t> all(tokens), u[3], first[3], last[3];
    for (int32_t j = 0; j < tokens; ++j) all[j] = j;
    for (int32_t x = 0; x < 3; ++x)
      for (auto* along : {&u[x], &first[x], &last[x]}) along->resize(tokens);
    int32_t* const at[3] = {u[0].data(), u[1].data(), u[2].data()};
    key_positions(n, all.data(), tokens, at);
    // Queries in any order, some of them twice.
    std::vector<int32_t> queries(tokens);
    for (int32_t& i : queries)
      i = random.chance(0.5) ? static_cast<int32_t>(&i - queries.data())
                             : static_cast<int32_t>(random.integer(0, tokens - 1));
    query_spans(n, queries.data(), tokens, {first[0].data(), first[1].data(), first[2].data()},
                {last[0].data(), last[1].data(), last[2].data()});
    for (int32_t i = 0; i < tokens; i += 1 + tokens / 40) {
      for (int32_t j = 0; j < tokens; ++j) {
        bool seen = true;
        for (int32_t x = 0; x < n.axes; ++x) seen = seen && first[x][i] <= u[x][j] && u[x][j] < last[x][i];
        ASSERT_EQ(seen, neighbours(n, queries[i], j)) << queries[i] << " " << j;
      }
    }
  }
}

}  // namespace
}  // namespace mfa
