// masks.h: block masks on MLX arrays: which tiles of queries and keys block-sparse attention computes.
//
// A mask comes from a dense tensor, from a rule of block_rules.h, or from the content of q and k. Everything here reads
// its arrays at once: it evaluates them, and they must not be tracers of a transformation. Selection is piecewise
// constant, so nothing here has a gradient.
//
// Each throws std::invalid_argument, "[function] what was expected; got what", if arguments are not as said here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mfa/api.h"
#include "mfa/block_rules.h"
#include "mlx/array.h"

namespace mfa {

class BlockPattern;

// The lists of visible tiles, built once and shared by copies; immutable.
class MFA_API BlockMask {
 public:
  // `mask`: bool [NQ, NK], [H, NQ, NK] or [B, H, NQ, NK], with NQ = ceil(Nq / block_q) and NK = ceil(Nk / block_k).
  static BlockMask from_dense(const mlx::core::array& mask, int64_t Nq, int64_t Nk, TileSize tile);
  static BlockMask from_rule(const BlockRule& rule);
  explicit BlockMask(BlockPattern pattern);

  const TileGrid& grid() const;
  int batch() const;  // 1: the same tiles for every batch entry
  int heads() const;  // 1: the same tiles for every head
  int64_t count() const;
  double density() const;           // visible tiles / all tiles
  mlx::core::array counts() const;  // int32 [batch, heads, NQ]: key blocks of each query block
  mlx::core::array to_dense()
      const;  // bool [NQ, NK], [H, NQ, NK] if heads differ, or [B, H, NQ, NK] if batch entries do

  // The same pairs of tokens in smaller tiles; the sides must divide those of this mask.
  BlockMask refined(TileSize tile) const;

  // The lists as the attention primitive takes them: with l = b * heads() + h (0 along an axis of extent 1), query
  // block r has the key blocks key_ids[offsets[i]] .. key_ids[offsets[i + 1] - 1], i = l * (NQ + 1) + r; the query
  // blocks of key block c are found likewise, i = l * (NK + 1) + c.
  const mlx::core::array& offsets() const;             // int64 [batch * heads * (NQ + 1)]
  const mlx::core::array& key_ids() const;             // int32 [count]
  const mlx::core::array& transposed_offsets() const;  // int64 [batch * heads * (NK + 1)]
  const mlx::core::array& query_ids() const;           // int32 [count]
  const BlockPattern& pattern() const;                 // the same for kernels, with ref()

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// The masks of a rule as bool arrays: tiles [NQ, NK] and tokens [Nq, Nk]. At most 2^32 elements.
MFA_API mlx::core::array tile_mask(const BlockRule& rule);
MFA_API mlx::core::array token_mask(const BlockRule& rule);

// ---- biases by the distance of frames -------------------------------------------------------------------------------
// float32 [1, rates, N, N] with N = frames * frame_tokens: with d the distance of the frames of two tokens and r the
// rate of the head, "linear" is -r d, "exponential" -r (e^d - 1), "log" -r ln(1 + d). At most 2 GiB.
MFA_API mlx::core::array temporal_distance_bias(int64_t frames, int64_t frame_tokens, const std::vector<double>& rates,
                                                const std::string& decay);

// The tiles in which some pair of tokens has a bias of at least `threshold` for some head and batch entry. `bias` is
// floating, [Nq, Nk] with up to two axes before.
MFA_API BlockMask bias_blocks(const mlx::core::array& bias, float threshold, TileSize tile);

}  // namespace mfa
