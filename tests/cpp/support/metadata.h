// metadata.h: the numbers of a problem that are used as addresses, random, and spoiled.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attention/problem.h"
#include "support/random.h"

namespace mfa::testing {

// A problem with arrays of exactly the sizes that their shapes give, on the heap, where AddressSanitizer sees their
// ends.
struct Metadata {
  std::vector<int32_t> query_starts, key_starts, lengths, table, q_positions, k_positions, key_ids, query_ids,
      dropout_keys;
  std::vector<int64_t> offsets, transposed_offsets;
  std::vector<float> cos;
  AttentionProblem p;

  AttentionProblem problem();  // `p` with the pointers set
  std::string error();         // of validate(), "" if there is none
};

// A problem of these sizes, one head and one channel, without metadata.
Metadata sizes(int32_t B, int32_t Nq, int32_t Nk);

// A valid problem of up to 4 short sequences, of any kind: packed or batched queries; packed, paged or batched keys,
// with lengths; rotary tables; block lists.
Metadata random_metadata(Random& random);

// Puts a number somewhere that is wrong, more often than not.
void spoil(Random& random, Metadata& m);

}  // namespace mfa::testing
