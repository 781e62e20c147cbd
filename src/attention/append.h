// append.h: writes the rows of new tokens into a cache of keys or values, rotated if asked, and reads them back.
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace mfa {

// Row t of batch entry b is token starts[b] + t of the entry's sequence: in `cache` [B, H, capacity, D], or, with
// pages, in a pool as PagesRef says of k.
struct CacheRows {
  int32_t B = 0, H = 0, N = 0, D = 0;  // of the rows
  int32_t capacity = 0;                // tokens that a sequence has room for
  DType dtype = DType::f32;
  MutableTensorRef cache;  // read_rows() does not write it
  MutableTensorRef rows;   // [B, H, N, D]; append_rows() does not write them
  const int32_t* starts = nullptr;
  PagesRef pages;
  RopeRef rope;  // of the rows; q_positions are those of row 0. Where cos is null they are not turned, but checked

  // Whether attention over all keys of the sequences follows, what it needs being checked too: if it failed, it would
  // fail with the rows written. rope.rotates_k: it turns the keys, from position 0, and the rows are not turned.
  bool attended = false;
  int32_t queries = 0;
  const int32_t* query_positions = nullptr;  // [B], with rope
};

// Throws std::invalid_argument, "[function] ...", unless all rows have their places: within the capacity, in pages of
// the pool, no page written by two batch entries, positions in the rotary tables; and attention can follow.
void validate(const CacheRows& p, const char* function);

// Writes the rows, turned by their positions, into the cache. The rest of the cache keeps what it holds.
void append_rows(const CacheRows& p);

// The transposed: reads the rows from the cache, turned back.
void read_rows(const CacheRows& p);

}  // namespace mfa
