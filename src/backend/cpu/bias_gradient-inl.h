// bias_gradient-inl.h: the gradient of an additive bias, dS summed over the axes that the bias is broadcast along.
//
// A task owns a region of the gradient and walks everything that is broadcast onto it in a fixed order, recomputing dS,
// so the result needs no memory beyond itself and does not depend on the number of threads.

namespace mfa::cpu::MFA_ISA {
namespace {

// How the gradient is cut: extents of its axes and of the regions.
struct BiasRegions {
  int64_t batches, heads, queries,
      keys;                    // extents of the gradient; 1 where broadcast
  int query_chunk, key_chunk;  // of a region
  int64_t query_chunks, key_chunks,
      groups;  // regions along queries, keys, heads (one a KV head, or one for all)

  explicit BiasRegions(const AttentionProblem& p) {
    batches = p.bias.stride[0] ? p.B : 1;
    heads = p.bias.stride[1] ? p.Hq : 1;
    queries = p.bias.stride[2] ? p.Nq : 1;
    keys = p.bias.stride[3] ? p.Nk : 1;
    query_chunk = Max(1, kBackwardRowTile / (p.Hq / p.Hkv));
    key_chunk = kBackwardKeys;
    query_chunks = queries > 1 ? (queries + query_chunk - 1) / query_chunk : 1;
    key_chunks = keys > 1 ? (keys + key_chunk - 1) / key_chunk : 1;
    groups = heads > 1 ? p.Hkv : 1;
  }
  int64_t tasks() const { return batches * groups * query_chunks * key_chunks; }
};

template <class A>
void BiasGradientTask(const BackwardJob& job, int64_t task, Backward<A>& backward) {
  const AttentionProblem& p = *job.problem;
  const BiasRegions region(p);
  const int G = p.Hq / p.Hkv;
  const int64_t key_part = task % region.key_chunks;
  const int64_t query_part = task / region.key_chunks % region.query_chunks;
  const int64_t group = task / region.key_chunks / region.query_chunks % region.groups;
  const int64_t batch = task / region.key_chunks / region.query_chunks / region.groups;

  const bool all_batches = region.batches == 1, all_heads = region.heads == 1;
  const int64_t q_first = region.queries > 1 ? query_part * region.query_chunk : 0;
  const int64_t q_last = region.queries > 1 ? Min<int64_t>(p.Nq, q_first + region.query_chunk) : p.Nq;
  const int64_t k_first = region.keys > 1 ? key_part * region.key_chunk : 0;
  const int64_t k_last = region.keys > 1 ? Min<int64_t>(p.Nk, k_first + region.key_chunk) : p.Nk;
  const auto at = [&](int64_t b, int64_t h, int64_t q, int64_t k) {
    b = all_batches ? 0 : b;
    h = all_heads ? 0 : h;
    q = region.queries == 1 ? 0 : q;
    k = region.keys == 1 ? 0 : k;
    return job.out->dbias + ((b * region.heads + h) * region.queries + q) * region.keys + k;
  };
  const int64_t first_head = all_heads ? 0 : group * G, last_head = all_heads ? 1 : first_head + G;
  for (int64_t h = first_head; h < last_head; ++h)
    for (int64_t q = q_first; q < (region.queries == 1 ? q_first + 1 : q_last); ++q)
      for (int64_t k = k_first; k < (region.keys == 1 ? k_first + 1 : k_last); ++k) *at(batch, h, q, k) = 0.f;

  const auto rows_of = [&](int b) { return Min<int64_t>(q_last, query_count(p, b)) * G; };
  for (int b = all_batches ? 0 : static_cast<int>(batch); b < (all_batches ? p.B : batch + 1); ++b)
    for (int head = all_heads ? 0 : static_cast<int>(group); head < (all_heads ? p.Hkv : group + 1); ++head)
      for (int64_t row = q_first * G; row < rows_of(b); row += kBackwardRowTile)
        for (int64_t k0 = k_first; k0 < Min<int64_t>(k_last, key_count(p, b)); k0 += kBackwardKeys) {
          const int count = static_cast<int>(Min<int64_t>(kBackwardRowTile, rows_of(b) - row));
          const int keys = static_cast<int>(Min<int64_t>(kBackwardKeys, Min<int64_t>(k_last, key_count(p, b)) - k0));
          backward.VisitScores(b, head, row, count, k0, keys,
                               [&](const RowTile& t, const TileBlock& block, int first, int rows, const BlockKeys& seen,
                                   const float* dS) {
                                 constexpr ptrdiff_t ld = Backward<A>::kScoreStride;
                                 for (int r = 0; r < rows; ++r) {
                                   float* to = at(b, t.head[first + r], t.query[first + r], 0);
                                   if (region.keys == 1) {
                                     for (int k = seen.lo; k < seen.hi; ++k) *to += dS[k * ld + r];
                                   } else {
                                     for (int k = seen.lo; k < seen.hi; ++k) to[block.list.key[k]] += dS[k * ld + r];
                                   }
                                 }
                               });
        }
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
