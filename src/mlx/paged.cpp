#include "mfa/paged.h"

#include "common/check.h"
#include "mlx/cache_rows.h"
#include "mlx/dtypes.h"
#include "mlx/integers.h"
#include "mlx/ops.h"
#include "mlx/page_table.h"
#include "mlx/route.h"

namespace mfa {
namespace {

AttentionResult run(const mx::array& q, const mx::array& k, const mx::array& v, const PageTable& given,
                    const PackedQueries* queries, const AttentionOptions& options, mx::StreamOrDevice stream_or_device,
                    const char* own_name) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  const char* function = name_of(options, own_name);
  check_pools(q, k, v, function);
  check_page_size(k, function);
  check_no_lengths(options, function);
  const CheckedTable table = make_table(given, function, s);
  const int B = table.lengths.shape(0);

  AttentionSources sources;
  sources.function = function;
  sources.lengths_name = "seq_lens";
  sources.paged = PagedKeys{table.table};
  if (queries) {
    auto starts = to_int32(queries->cu_seqlens_q, 1, "cu_seqlens_q", function, s);
    check(starts.shape(0) == B + 1, function, "cu_seqlens_q must have one element more than the ", B,
          " sequences of the block table; got shape ", starts.shape());
    const std::optional<int> longest = queries->max_seqlen_q;
    check(!longest || *longest >= 0, function, "max_seqlen_q must not be negative; got ", longest.value_or(0));
    sources.packed = PackedRows{starts, std::nullopt, longest.value_or(q.shape(2)), 0};
  } else {
    check(q.shape(0) == B, function, "q must have one batch entry for each of the ", B,
          " sequences of the block table; got ", q.shape(0));
  }
  AttentionOptions with_lengths = options;
  with_lengths.kv_lengths = table.lengths;
  auto outputs = launch(make_request(cast_to(q, k.dtype(), s), k, v, with_lengths, options.return_probs, s, sources),
                        options.backend, WantedOutputs{.lse = true});
  return {cast_to(outputs[0], q.dtype(), s), outputs[1], std::nullopt};
}

constexpr const char *kPaged = "flash_attention_paged", *kVarlen = "flash_attention_paged_varlen";

}  // namespace

CheckedTable make_table(const PageTable& given, const char* function, mx::Stream s) {
  auto table = to_int32(given.block_table, 2, "block_table", function, s);
  auto lengths = to_int32(given.seq_lens, 1, "seq_lens", function, s);
  check(table.shape(0) == lengths.shape(0), function, "block_table and seq_lens must have one count of sequences; got ",
        table.shape(0), " and ", lengths.shape(0));
  if (!given.cache_batch_idx) return {table, lengths};
  constexpr const char* kIndices = "cache_batch_idx";
  const auto rows = to_int32(*given.cache_batch_idx, 1, kIndices, function, s);
  return {checked_rows(table, rows, kIndices, function, s), checked_rows(lengths, rows, kIndices, function, s)};
}

void check_pools(const mx::array& q, const mx::array& k, const mx::array& v, const char* function) {
  check(q.ndim() == 4, function, "q must have 4 dimensions [B, Hq, Nq, D]; got shape ", q.shape());
  check(mx::issubdtype(q.dtype(), mx::floating), function, "q must have a floating dtype; got ", q.dtype());
  check(is_kernel_dtype(k.dtype()), function, "the keys must be float32, float16 or bfloat16; got ", k.dtype());
  check(k.dtype() == v.dtype(), function, "keys and values must have one dtype; got ", k.dtype(), " and ", v.dtype());
}

void check_page_size(const mx::array& pool, const char* function) {
  check(pool.ndim() != 4 || pool.shape(1) > 0, function, "the page size of a pool must be positive; got 0");
}

void check_no_lengths(const AttentionOptions& options, const char* function) {
  check(!options.kv_lengths, function, "kv_lengths must not be given: seq_lens are the lengths");
}

mx::array attention_paged(const mx::array& q, const mx::array& k, const mx::array& v, const PageTable& table,
                          const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, table, nullptr, options, s, kPaged).out;
}

AttentionResult attention_paged_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                         const PageTable& table, const AttentionOptions& options,
                                         mx::StreamOrDevice s) {
  return run(q, k, v, table, nullptr, options, s, kPaged);
}

mx::array attention_paged_varlen(const mx::array& q, const mx::array& k, const mx::array& v, const PageTable& table,
                                 const PackedQueries& queries, const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, table, &queries, options, s, kVarlen).out;
}

AttentionResult attention_paged_varlen_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                                const PageTable& table, const PackedQueries& queries,
                                                const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, table, &queries, options, s, kVarlen);
}

}  // namespace mfa
