// neighbourhood_tiles.h: what neighbourhood attention costs when tokens are taken in boxes: the pairs of a query box
// and a key box that some window joins, and whether any of them needs a mask. Source: Hassani et al., arXiv:2504.16922.
#pragma once

#include <cstdint>

#include "attention/neighbourhood.h"

namespace mfa {

struct TileVisits {
  int64_t pairs = 0;        // of a query box and a key box that are visited
  int64_t dense_pairs = 0;  // all of them
  bool mask_free = true;    // every query of a box sees every key of the key boxes visited
};

// `q_tile` and `kv_tile` are the boxes' extents along the axes of `n`; boxes at the end of an axis are cut. The
// interleaved sequences of a dilated axis are cut into boxes each for itself.
TileVisits visited_tiles(const Neighbourhood& n, const int32_t* q_tile, const int32_t* kv_tile);

}  // namespace mfa
