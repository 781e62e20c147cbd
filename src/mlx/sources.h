// sources.h: what an entry point of the attention family adds to a plain call: where rows lie and which keys they see.
#pragma once

#include <cstdint>
#include <optional>

#include "attention/neighbourhood.h"
#include "mlx/array.h"

namespace mfa {

namespace mx = mlx::core;

// Sequences stored one after another: q is [1, Hq, packed queries, D], and with key_starts k and v are [1, Hkv, packed
// keys, *]. Sequence b has rows starts[b] .. starts[b + 1] - 1; the bias, the mask and everything "of each batch entry"
// count sequences and their own rows. Keys may be packed, in pages, or (B sequences of) a batch.
struct PackedRows {
  mx::array query_starts;               // int32 [B + 1]
  std::optional<mx::array> key_starts;  // int32 [B + 1]
  int longest_query = 0;                // no sequence has more
  int longest_key = 0;                  // ditto; of packed keys
};

// k and v are pools [pages, page_size, Hkv, D or Dv]; the lengths of the sequences are the call's kv_lengths.
struct PagedKeys {
  mx::array table;  // int32 [B, pages of a sequence]
};

// Rotary embedding at load. Positions count from q_positions[b] and k_positions[b]; none: from 0.
struct Rotary {
  mx::array cos, sin;  // float32 [positions, rotary_dim / 2]
  bool interleaved = true;
  bool rotates_k = true;
  std::optional<mx::array> q_positions, k_positions;  // int32 [B]
};

// Lists of visible tiles, as BlockListRef says. `lists_b` and `lists_h`: whether there is one for each batch entry and
// for each query head.
struct BlockLists {
  int block_q = 0, block_k = 0;
  bool lists_b = false, lists_h = false;
  mx::array offsets, key_ids;               // int64, int32
  mx::array transposed_offsets, query_ids;  // int64, int32
};

struct AttentionSources {
  const char* function = "flash_attention";  // in the messages of errors
  const char* lengths_name = "kv_lengths";   // ditto
  std::optional<PackedRows> packed;
  std::optional<PagedKeys> paged;
  std::optional<Rotary> rotary;
  std::optional<BlockLists> blocks;
  Neighbourhood neighbourhood;
  std::optional<mx::array> score_floor;         // float32, shaped as lse
  std::optional<mx::array> dropout_first_keys;  // int32 [B], as AttentionProblem says
};

}  // namespace mfa
