#include "attention/neighbourhood_tiles.h"

#include "common/ceil_div.h"

namespace mfa {
namespace {

TileVisits visits_along(const Neighbourhood& n, const NeighbourhoodAxis& a, int32_t q_tile, int32_t kv_tile) {
  TileVisits visits;
  for (int32_t phase = 0; phase < a.dilation && phase < a.size; ++phase) {
    const int32_t size = (a.size - phase + a.dilation - 1) / a.dilation;
    const auto window = [&](int32_t c) { return axis_window(n, a, phase + c * a.dilation); };
    for (int32_t q = 0; q < size; q += q_tile) {
      const int32_t end = size - q < q_tile ? size : q + q_tile;
      const AxisWindow first = window(q), last = window(end - 1);  // windows do not move back
      visits.pairs += ceil_div(last.end, kv_tile) - first.begin / kv_tile;
      const bool one_window = first.begin == last.begin && first.end == last.end;
      visits.mask_free = visits.mask_free && one_window && first.begin % kv_tile == 0 &&
                         (first.end % kv_tile == 0 || first.end == size);
    }
    // Sequences see only themselves, but a dense call would pair all of them.
    for (int32_t other = 0; other < a.dilation && other < a.size; ++other)
      visits.dense_pairs += ceil_div(size, q_tile) * ceil_div((a.size - other + a.dilation - 1) / a.dilation, kv_tile);
  }
  return visits;
}

}  // namespace

TileVisits visited_tiles(const Neighbourhood& n, const int32_t* q_tile, const int32_t* kv_tile) {
  TileVisits visits{1, 1, true};
  for (int32_t x = 0; x < n.axes; ++x) {
    const TileVisits along = visits_along(n, n.axis[x], q_tile[x], kv_tile[x]);
    visits.pairs *= along.pairs;
    visits.dense_pairs *= along.dense_pairs;
    visits.mask_free = visits.mask_free && along.mask_free;
  }
  return visits;
}

}  // namespace mfa
