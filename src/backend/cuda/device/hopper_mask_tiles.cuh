// hopper_mask_tiles.cuh: which tiles of keys a boolean mask shows anything of, so that the forward leaves out the
// others.
#pragma once

#include "hopper_modifiers.cuh"

namespace mfa::cuda::hopper {

// A block finds one word: 32 key tiles of 64 queries. Grid: words of a row of tiles, query tiles, B * Hq; 1 where the
// mask does not vary.
__device__ __forceinline__ void find_shown_tiles(const ForwardParams& params) {
  const Problem& p = params.p;
  const ShownTiles& shown = params.shown;
  const bool per_head = p.mask.stride[1] != 0;
  const int b = per_head ? blockIdx.z / p.Hq : blockIdx.z, h = per_head ? blockIdx.z % p.Hq : 0;
  const int row0 = blockIdx.y * 64, rows = p.mask.stride[2] == 0 ? 1 : min(p.Nq - row0, 64);
  const int key0 = blockIdx.x * 32 * shown.keys, keys = min(p.Nk - key0, 32 * shown.keys);
  const uint8_t* from =
      p.mask.data + b * p.mask.stride[0] + h * p.mask.stride[1] + row0 * p.mask.stride[2] + key0 * p.mask.stride[3];
  __shared__ uint32_t found;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  const bool in_words = mask_has_words(p);
  const int width = in_words ? 16 : 1, groups = (keys + width - 1) / width;
  // Threads that read neighbouring groups of a row are neighbours; where a row has few, others take the next rows.
  const int rows_together = max(static_cast<int>(blockDim.x) / groups, 1), first_row = threadIdx.x / groups;
  if (first_row < rows_together)
    for (int group = threadIdx.x % groups; group < groups; group += blockDim.x) {
      uint32_t any = 0;
#pragma unroll 8
      for (int row = first_row; row < rows; row += rows_together) {
        const uint8_t* at = from + row * p.mask.stride[2];
        if (in_words) {
          const uint4 x = __ldg(reinterpret_cast<const uint4*>(at) + group);
          any |= x.x | x.y | x.z | x.w;
        } else {
          any |= at[group * p.mask.stride[3]];
        }
      }
      if (any) atomicOr(&found, 1u << (group * width / shown.keys));
    }
  __syncthreads();
  if (threadIdx.x == 0)
    shown.words[b * int64_t{shown.stride[0]} + h * int64_t{shown.stride[1]} + blockIdx.y * int64_t{shown.stride[2]} +
                blockIdx.x] = found;
}

}  // namespace mfa::cuda::hopper
