#include "attention/tiling.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>

#include "attention/visibility.h"
#include "common/ceil_div.h"

namespace mfa {
namespace {

// Tokens of an axis that one of its interleaved sequences has at most.
int32_t phase_size(const NeighbourhoodAxis& a) { return static_cast<int32_t>(ceil_div(a.size, a.dilation)); }

int64_t boxes_of(const NeighbourhoodAxis& a, int32_t extent) { return a.dilation * ceil_div(phase_size(a), extent); }

// The coordinates first, first + step .. of a box along an axis.
struct Side {
  int32_t first = 0, step = 1, count = 0;
};
Side side_of(const NeighbourhoodAxis& a, int32_t extent, int64_t box) {
  const int64_t boxes = ceil_div(phase_size(a), extent);
  const auto phase = static_cast<int32_t>(box / boxes);
  const auto begin = static_cast<int32_t>(box % boxes * extent);
  const int32_t size = (a.size - phase + a.dilation - 1) / a.dilation;
  return {phase + begin * a.dilation, a.dilation, std::clamp(size - begin, 0, extent)};
}

int32_t fill_box(const RowTiling& t, const Neighbourhood& n, int64_t box, int32_t first_head, int32_t* query,
                 int32_t* head) {
  Side sides[3];
  for (int32_t x = n.axes - 1; x >= 0; --x) {
    const int64_t boxes = boxes_of(n.axis[x], t.box[x]);
    sides[x] = side_of(n.axis[x], t.box[x], box % boxes);
    box /= boxes;
  }
  for (int32_t x = n.axes; x < 3; ++x) sides[x] = {0, 1, 1};
  const auto size = [&](int32_t x) { return x < n.axes ? n.axis[x].size : 1; };
  int32_t row = 0;
  for (int32_t i = 0; i < sides[0].count; ++i)
    for (int32_t j = 0; j < sides[1].count; ++j)
      for (int32_t k = 0; k < sides[2].count; ++k) {
        const int32_t c[3] = {sides[0].first + i * sides[0].step, sides[1].first + j * sides[1].step,
                              sides[2].first + k * sides[2].step};
        for (int32_t h = 0; h < t.heads; ++h, ++row) {
          query[row] = (c[0] * size(1) + c[1]) * size(2) + c[2];
          head[row] = first_head + h;
        }
      }
  return row;
}

// What `count` consecutive queries of a box, whose last axis is the fastest, span along each axis.
void group_extents(const int32_t (&box)[3], int32_t count, int32_t (&extent)[3]) {
  for (int32_t x = 2; x >= 0; --x) {
    const bool aligned = box[x] % count == 0 || count % box[x] == 0;  // else they may begin anywhere
    extent[x] = aligned ? std::min(count, box[x]) : box[x];
    count = (count + box[x] - 1) / box[x] + (aligned ? 0 : 1);
  }
}

// Keys along an axis that the queries of a box see together.
double union_of(const NeighbourhoodAxis& a, int32_t extent) {
  const int64_t stride = a.stride;  // up to 2^31 - 1
  const int64_t groups = extent % stride == 0 ? extent / stride - 1 : (extent + stride - 2) / stride;
  return std::min<double>(phase_size(a), a.window + double(groups) * double(stride));
}

}  // namespace

int64_t tile_count(const RowTiling& t, const Neighbourhood& n, int32_t queries) {
  const int64_t rows = part_rows(t, queries);
  if (rows == 0) return 0;
  if (is_decode(t, queries)) return t.parts;
  if (t.in_boxes()) {
    int64_t boxes = t.parts;
    for (int32_t x = 0; x < n.axes; ++x) boxes *= boxes_of(n.axis[x], t.box[x]);
    return boxes;
  }
  if (t.unit == 0) return t.parts * ceil_div(rows, t.tile);
  return t.parts * (rows / t.unit * ceil_div(t.unit, t.tile) + ceil_div(rows % t.unit, t.tile));
}

int32_t fill_rows(const RowTiling& t, const AttentionProblem& p, int32_t b, int32_t kv_head, int64_t tile,
                  int32_t* query, int32_t* head) {
  const int32_t queries = query_count(p, b);
  const int64_t tiles = tile_count(t, p.neighbourhood, queries) / t.parts, rows = part_rows(t, queries);
  const auto part = static_cast<int32_t>(tile / tiles);
  const int32_t first_head = kv_head * (p.Hq / p.Hkv) + part * t.heads;
  tile %= tiles;
  int64_t first = 0, last = rows;
  if (!is_decode(t, queries)) {
    if (t.in_boxes()) return fill_box(t, p.neighbourhood, tile, first_head, query, head);
    if (t.unit == 0) {
      first = tile * t.tile;
    } else {
      const int64_t pieces = ceil_div(t.unit, t.tile), unit = tile / pieces;
      first = unit * t.unit + tile % pieces * t.tile;
      last = std::min(rows, (unit + 1) * t.unit);
    }
    last = std::min(last, first + t.tile);
  }
  auto i = static_cast<int32_t>(first / t.heads), h = static_cast<int32_t>(first % t.heads);
  const auto count = static_cast<int32_t>(last - first);
  for (int32_t r = 0; r < count; ++r) {
    query[r] = i;
    head[r] = first_head + h;
    if (++h == t.heads) {
      h = 0;
      ++i;
    }
  }
  return count;
}

void choose_box(const Neighbourhood& n, int32_t heads, int32_t most_rows, int32_t group_rows, int32_t lanes,
                int32_t (&box)[3]) {
  constexpr double kLoadRows = 20;  // bringing a key in costs as much as this many rows that see it
  double best = 0;
  // By axis and extent: the keys of a box, and its queries. Boxes at the end of an axis are cut: the mean.
  std::vector<double> keys_of[3], queries_of[3];
  const auto most_of = [&](int32_t x) {
    return x < n.axes ? std::max(1, std::min(phase_size(n.axis[x]), most_rows / heads)) : 1;
  };
  for (int32_t x = 0; x < 3; ++x)
    for (int32_t extent = 0; extent <= most_of(x); ++extent) {
      const bool real = x < n.axes && extent > 0;
      keys_of[x].push_back(real ? union_of(n.axis[x], extent) : 1);
      queries_of[x].push_back(real ? double(n.axis[x].size) / double(boxes_of(n.axis[x], extent)) : 1);
    }
  const auto product = [](const std::vector<double>(&of)[3], const int32_t (&extent)[3]) {
    return of[0][static_cast<size_t>(extent[0])] * of[1][static_cast<size_t>(extent[1])] *
           of[2][static_cast<size_t>(extent[2])];
  };
  for (int32_t x = 1; x <= most_of(0); ++x)
    for (int32_t y = 1; y <= most_of(1); ++y)
      for (int32_t z = 1; z <= most_of(2); ++z) {
        const int64_t rows = int64_t{x} * y * z * heads;
        if (rows > most_rows && x * y * z > 1) break;
        const int32_t candidate[3] = {x, y, z};
        int32_t group[3];
        group_extents(candidate, (group_rows + heads - 1) / heads, group);
        const double padded = double(ceil_div(rows, lanes) * lanes);
        const double cost = (product(keys_of, group) * padded + product(keys_of, candidate) * kLoadRows) /
                            product(queries_of, candidate);
        if (best == 0 || cost < best) {
          best = cost;
          std::copy_n(candidate, 3, box);
        }
      }
}

int64_t listed_query_block(const AttentionProblem& p, int32_t b, int32_t head, int64_t k0, int32_t keys,
                           int64_t block) {
  const BlockListRef& l = p.blocks;
  const int64_t first = k0 / l.block_k, last = std::min<int64_t>(l.key_blocks, (k0 + keys - 1) / l.block_k + 1);
  const int64_t* offsets = l.transposed_offsets + (b * l.stride_b + head * l.stride_h) * (int64_t{l.key_blocks} + 1);
  int64_t next = l.query_blocks;
  for (int64_t c = first; c < last; ++c) {
    const int32_t *end = l.query_ids + offsets[c + 1], *at = std::lower_bound(l.query_ids + offsets[c], end, block);
    if (at != end) next = std::min<int64_t>(next, *at);
  }
  return next;
}

bool covers_grid(const AttentionProblem& p) {
  if (p.neighbourhood.axes == 0) return false;
  int64_t tokens = 1;
  for (int32_t x = 0; x < p.neighbourhood.axes; ++x) tokens *= p.neighbourhood.axis[x].size;
  for (int32_t b = 0; b < (p.query_starts ? p.B : 1); ++b) {
    const int32_t queries = query_count(p, b);
    if (queries != tokens && queries != 0) return false;
  }
  return true;
}

TileMap::TileMap(const AttentionProblem& p, const RowTiling& t) : heads_(p.Hkv) {
  if (!p.query_starts) {
    uniform_ = tile_count(t, p.neighbourhood, p.Nq);
    count_ = uniform_ * p.B * p.Hkv;
    const bool alike = !p.causal || p.window_left >= 0;
    const bool in_order = t.parts == 1 && t.unit == 0 && !t.in_boxes() && !is_decode(t, p.Nq);
    if (alike && in_order && part_rows(t, p.Nq) % t.tile != 0) whole_ = uniform_ - 1;
    return;
  }
  heads_first_ = !p.pages.table && std::abs(p.q.stride[1]) > std::abs(p.q.stride[2]);
  order_.resize(static_cast<size_t>(p.B));
  std::iota(order_.begin(), order_.end(), 0);
  const auto work = [&](int32_t b) { return int64_t{query_count(p, b)} * key_count(p, b); };
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return work(a) > work(b); });
  first_.reserve(order_.size() + 1);
  int64_t tiles = 0;
  for (const int32_t b : order_) {
    first_.push_back(tiles);
    tiles += tile_count(t, p.neighbourhood, query_count(p, b));
  }
  first_.push_back(tiles);
  count_ = tiles * heads_;
}

TileMap::Place TileMap::locate(int64_t index) const {
  if (order_.empty()) {
    const auto at = [&](int64_t head, int64_t tile) {
      return Place{static_cast<int32_t>(head / heads_), static_cast<int32_t>(head % heads_), tile};
    };
    if (whole_ == 0) return at(index / uniform_, uniform_ - 1 - index % uniform_);
    const int64_t first_last = count_ / uniform_ * whole_;
    if (index >= first_last) return at(index - first_last, whole_);
    return at(index / whole_, whole_ - 1 - index % whole_);
  }
  const int64_t tiles = first_.back();
  const int64_t at = heads_first_ ? index % tiles : index / heads_;  // tiles of one head before it, or a bit more
  // Sequences without rows share their first tile with the next: the last of them has it.
  const auto next = std::upper_bound(first_.begin(), first_.end(), at);
  const int32_t b = order_[static_cast<size_t>(next - first_.begin()) - 1];
  const int64_t own = *next - next[-1];
  if (heads_first_) return {b, static_cast<int32_t>(index / tiles), own - 1 - (at - next[-1])};
  const int64_t rest = index - next[-1] * heads_;
  return {b, static_cast<int32_t>(rest / own), own - 1 - rest % own};
}

}  // namespace mfa
