// philox.h: the counter-based random numbers of dropout, the same on every backend.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace mfa {

using PhiloxWords = std::array<uint32_t, 4>;

[[gnu::always_inline]] inline PhiloxWords philox4x32(PhiloxWords counter, uint64_t key, int rounds = 10) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < rounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// A key is kept iff its word is at least this: floor(p * 2^32), 2^32 for p = 1.
[[gnu::always_inline]] inline uint64_t dropout_threshold(float p) {
  return static_cast<uint64_t>(std::floor(double{p} * 4294967296.0));
}

// The words of keys 4 * (key / 4) .. + 3 for one query row; `row_head` is b * Hq + h, `query` the row in its sequence.
[[gnu::always_inline]] inline PhiloxWords dropout_words(uint64_t seed, uint32_t row_head, uint32_t query, uint32_t key,
                                                        uint32_t offset = 0) {
  return philox4x32({key >> 2, query, row_head, offset}, seed);
}

}  // namespace mfa
