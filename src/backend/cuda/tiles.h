// tiles.h: the tile sizes of every tiled kernel: one table, read by the kernels, the planner and the tests.
#pragma once

#include <cstdint>

#include "backend/cuda/params.h"

namespace mfa::cuda {

constexpr int element_size(Element e) { return e == Element::f32 ? 4 : 2; }
constexpr int pitch_of(int columns, int size) { return columns + 16 / size; }  // see kPitch in device/tile.cuh

// DP bounds D and Dv. Forward: WM x WN warps share a tile of scores [BQ, BK] and of outputs [BQ, DP] alike.
struct ForwardTile {
  int DP, BQ, BK, WM, WN;
  int resident = 1;  // blocks of a multiprocessor that the compiler must leave registers for

  constexpr int threads() const { return 32 * WM * WN; }
  // Q, K, V, P, then the warps' row statistics and the bits of the mask.
  constexpr int shared_bytes(int size) const {
    return size * (pitch_of(DP, size) * (BQ + 2 * BK) + pitch_of(BK, size) * BQ) + 4 * WN * BQ + BQ * BK / 8;
  }
};

// Decode: each of `warps` walks tiles of 16 keys on its own, `stages` of them on their way; up to 16 packed rows.
struct DecodeTile {
  int DP, stages, warps;

  static constexpr int kRows = 16, kKeys = 16;
  constexpr int threads() const { return 32 * warps; }
  // Q, then the warps' rings of K and V tiles, in whose place the warps' results are merged.
  constexpr int shared_bytes(int size) const {
    return size * pitch_of(DP, size) * (kRows + warps * stages * 2 * kKeys);
  }
};

// Backward: dQ [BQ, DP] from WM x WN warps; dK and dV [BK, DP] from KM x KN; scores [BQ, BK] from SM x SN of them.
struct BackwardTile {
  int DP, BQ, BK, SM, SN, WM, WN, KM, KN;

  constexpr int threads() const { return 32 * WM * WN; }
  // Q, dO, K, V, P, dS, the bits of the mask.
  constexpr int shared_bytes(int size) const {
    return size * (pitch_of(DP, size) * 2 * (BQ + BK) + pitch_of(BK, size) * 2 * BQ) + BQ * BK / 8;
  }
};

inline constexpr int kHeadDims[] = {64, 128, 256, 576};  // the values of DP

inline constexpr ForwardTile kForward16[] = {
    {64, 64, 64, 4, 1, 3}, {128, 64, 64, 4, 1}, {256, 64, 64, 4, 2}, {576, 32, 32, 2, 4}};
inline constexpr ForwardTile kForward32[] = {
    {64, 128, 64, 4, 2}, {128, 128, 48, 4, 2}, {256, 64, 32, 4, 1}, {576, 32, 16, 2, 2}};
// Few rows, as in decode: the warps share the keys.
inline constexpr ForwardTile kForwardFewRows16[] = {
    {64, 16, 128, 1, 4}, {128, 16, 64, 1, 4}, {256, 16, 64, 1, 4}, {576, 16, 32, 1, 4}};
inline constexpr ForwardTile kForwardFewRows32[] = {
    {64, 16, 64, 1, 4}, {128, 16, 64, 1, 4}, {256, 16, 32, 1, 4}, {576, 16, 16, 1, 2}};

inline constexpr DecodeTile kDecode16[] = {{64, 4, 4}, {128, 3, 4}, {256, 3, 4}};
inline constexpr int kDecodeSizes = 3;  // larger head dims leave too few registers for a warp's outputs

inline constexpr BackwardTile kBackward16[] = {{64, 64, 64, 4, 1, 4, 1, 4, 1},
                                               {128, 64, 64, 4, 2, 4, 2, 4, 2},
                                               {256, 64, 64, 4, 2, 4, 2, 4, 2},
                                               {576, 32, 32, 2, 4, 2, 4, 2, 4}};
inline constexpr BackwardTile kBackward32[] = {{64, 64, 64, 4, 1, 4, 1, 4, 1},
                                               {128, 32, 64, 2, 4, 2, 4, 4, 2},
                                               {256, 32, 32, 2, 4, 2, 4, 2, 4},
                                               {576, 16, 16, 1, 2, 1, 8, 1, 8}};

// The index of the smallest table row that holds both head dims; -1 if none does.
constexpr int tile_index(int D, int Dv) {
  for (int n = 0; n < 4; ++n)
    if (D <= kHeadDims[n] && Dv <= kHeadDims[n]) return n;
  return -1;
}

}  // namespace mfa::cuda
