// neighbourhood.h: which tokens of a grid see each other in neighbourhood attention, by coordinates along each axis.
//
// A query of coordinate c sees a window of keys along each axis, the product of which it attends to. `stride` queries
// share a window; with dilation the axis is that many interleaved sequences, each with the rule for itself. Sources:
// Hassani et al., arXiv:2204.07143 and arXiv:2504.16922.
#pragma once

#include <cstdint>

namespace mfa {

struct NeighbourhoodAxis {
  int32_t size = 1;    // tokens along the axis
  int32_t window = 1;  // keys of a query, at least `stride`
  int32_t stride = 1;
  int32_t dilation = 1;
  bool causal = false;  // the window ends at the query
  bool operator==(const NeighbourhoodAxis&) const = default;
};

struct Neighbourhood {
  int32_t axes = 0;  // 0: no neighbourhood; tokens are numbered row-major over the axes
  NeighbourhoodAxis axis[3];
  bool shifts = false;      // at borders the window moves inside and keeps its size; else it is cut
  bool leans_left = false;  // an even window with an odd stride has the key more on the left, else on the right
  bool operator==(const Neighbourhood&) const = default;
};

// Throws std::invalid_argument, "[function] ...", unless there are 1 to 3 axes, sizes and windows are positive, strides
// are 1 to the window and dilations 1 to the size, and size and dilation together are below 2^31.
void validate(const Neighbourhood& n, const char* function);

// The keys [begin, end) of one of the interleaved sequences: key t is coordinate phase + t * dilation.
struct AxisWindow {
  int32_t begin = 0, end = 0, phase = 0;
};

inline AxisWindow axis_window(const Neighbourhood& n, const NeighbourhoodAxis& a, int32_t coordinate) {
  const bool whole = a.dilation == 1;  // mostly so, and divisions take their time
  const int32_t phase = whole ? 0 : coordinate % a.dilation, c = whole ? coordinate : coordinate / a.dilation;
  const int32_t size = whole ? a.size : (a.size - phase + a.dilation - 1) / a.dilation;
  const int64_t first = a.stride == 1 ? c : int64_t{c / a.stride} * a.stride;  // of the queries that share the window
  int64_t begin = 0, end = 0;
  if (a.causal) {
    const int64_t leader = first + a.stride - 1 < size - 1 ? first + a.stride - 1 : size - 1;
    begin = leader - a.window + 1;
    end = int64_t{c} + 1;
  } else {
    begin = first - (a.window - a.stride) / 2;
    if (n.leans_left && a.window % 2 == 0 && a.stride % 2 == 1) --begin;
    end = begin + a.window;
    if (n.shifts && end > size) {
      begin -= end - size;
      end = size;
    }
    if (n.shifts && begin < 0) {
      end -= begin;
      begin = 0;
    }
  }
  if (begin < 0) begin = 0;
  if (end > size) end = size;
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end), phase};
}

// Whether the query at `coordinate` sees the key at `other` along the axis.
inline bool axis_sees(const Neighbourhood& n, const NeighbourhoodAxis& a, int32_t coordinate, int32_t other) {
  const AxisWindow w = axis_window(n, a, coordinate);
  const int32_t t = other / a.dilation;
  return other % a.dilation == w.phase && w.begin <= t && t < w.end;
}

// Whether token i sees token j.
inline bool neighbours(const Neighbourhood& n, int32_t i, int32_t j) {
  for (int32_t x = n.axes - 1; x >= 0; --x) {
    const int32_t size = n.axis[x].size;
    if (!axis_sees(n, n.axis[x], i % size, j % size)) return false;
    i /= size;
    j /= size;
  }
  return true;
}

}  // namespace mfa
