#include "mfa/kv_cache.h"

#include <limits>

#include "common/check.h"
#include "mlx/cache_rows.h"
#include "mlx/dtypes.h"
#include "mlx/integers.h"
#include "mlx/ops.h"
#include "mlx/page_table.h"
#include "mlx/rotary.h"
#include "mlx/route.h"

namespace mfa {
namespace {

constexpr const char* kIndices = "cache_batch_idx";

// A call of attention_kvcache() in the making.
struct Call {
  const char* function;
  mx::Stream s;
  int B, N;                               // of q
  int added = 0;                          // new keys
  bool pool = false, grows = false;       // see KvCache; neither: preallocated
  mx::array k, v;                         // the cache; an empty one if it is absent
  std::optional<mx::array> table = {};    // int32 [B, n]: pages, or the row of a dense cache
  std::optional<mx::array> lengths = {};  // int32 [B], without the new keys
  std::optional<Rotary> rotary = {};      // of q and k at load
  std::optional<mx::array> new_positions = {};

  template <typename... Parts>
  void require(bool holds, const Parts&... parts) const {
    check(holds, function, parts...);
  }

  // Lengths with the new keys.
  mx::array all_lengths() const {
    if (!lengths) return repeated(k.shape(2) + added, B);
    return added > 0 ? plus(*lengths, added, std::numeric_limits<int>::min(), s) : *lengths;
  }
};

void check_new_keys(const Call& c, const NewKeys& added) {
  const int H = c.k.shape(c.pool ? 2 : 1);
  for (const auto& [name, rows, cache] : {std::tuple{"k_new", &added.k, &c.k}, std::tuple{"v_new", &added.v, &c.v}}) {
    c.require(rows->ndim() == 4, name, " must have 4 dimensions [B, Hkv, N, D]; got shape ", rows->shape());
    c.require(mx::issubdtype(rows->dtype(), mx::floating), name, " must have a floating dtype; got ", rows->dtype());
    c.require(rows->shape(0) == c.B && rows->shape(1) == H && rows->shape(3) == cache->shape(3), name,
              " must have the batch of q, and the heads and head dimension of the cache, [", c.B, ", ", H, ", N, ",
              cache->shape(3), "]; got shape ", rows->shape());
  }
  c.require(added.k.shape(2) == added.v.shape(2), "k_new and v_new must have the same length; got ", added.k.shape(2),
            " and ", added.v.shape(2));
}

// Sets what says where keys lie: kind, table, lengths.
void set_places(Call& c, const KvCache& cache) {
  c.pool = cache.block_table.has_value();
  c.grows = !cache.seq_lens && !c.pool;
  c.require(!c.pool || cache.seq_lens, "a block_table needs seq_lens, the keys of each sequence; got none");
  c.require(c.grows || (cache.k && cache.v), "a cache with seq_lens must be given; got none");
  if (c.pool) {
    const auto checked = make_table({*cache.block_table, *cache.seq_lens, cache.cache_batch_idx}, c.function, c.s);
    c.table = checked.table;
    c.lengths = checked.lengths;
    c.require(c.table->shape(0) == c.B, "q must have one batch entry for each of the ", c.table->shape(0),
              " sequences of the block table; got ", c.B);
    return;
  }
  if (cache.seq_lens) {
    c.lengths = to_int32(*cache.seq_lens, 1, "seq_lens", c.function, c.s);
    c.require(c.lengths->shape(0) == c.k.shape(0), "seq_lens must have one length for each of the ", c.k.shape(0),
              " rows of the cache; got shape ", c.lengths->shape());
  }
  if (cache.cache_batch_idx) {
    c.require(!(c.grows && c.added > 0), kIndices,
              " selects rows of a preallocated cache with seq_lens; got a cache that grows");
    const auto rows = to_int32(*cache.cache_batch_idx, 1, kIndices, c.function, c.s);
    c.require(rows.shape(0) == c.B, kIndices, " must have one row for each of the ", c.B, " batch entries; got shape ",
              rows.shape());
    const auto lengths = c.lengths ? *c.lengths : repeated(c.k.shape(2), c.k.shape(0));
    c.lengths = checked_rows(lengths, rows, kIndices, c.function, c.s);
    // Each row of the cache is a page.
    c.table =
        is_known(rows, c.s) ? mx::array(rows.data<int32_t>(), {c.B, 1}, mx::int32) : mx::expand_dims(rows, 1, c.s);
  } else {
    c.require(c.k.shape(0) == c.B, "q must have one batch entry for each of the ", c.k.shape(0),
              " rows of the cache; got ", c.B);
  }
}

void set_rotation(Call& c, const CacheRotation& rotation, int D) {
  RotaryEmbedding rope{rotation.cos,
                       rotation.sin,
                       rotation.interleaved,
                       rotation.rotary_dim,
                       rotation.positions,
                       std::nullopt,
                       rotation.rotates_k.value_or(c.grows && c.added == 0)};
  c.rotary = make_rotary(rope, c.B, D, c.function, c.s);
  c.new_positions = c.rotary->q_positions;
  if (!c.new_positions) c.new_positions = c.lengths ? *c.lengths : repeated(c.k.shape(2), c.B);
  if (!c.rotary->q_positions) {
    c.rotary->q_positions = plus(c.all_lengths(), -c.N, 0, c.s);
  }
}

// `rows` turned by their positions.
mx::array turned(const Call& c, const mx::array& rows) {
  // Its own rows are the cache, which all are written to.
  const CacheRowsParams params{
      .function = c.function, .rotary = true, .turns = true, .interleaved = c.rotary->interleaved};
  return CacheAppend::make(c.s, params, {rows, rows, repeated(0, c.B), c.rotary->cos, c.rotary->sin, *c.new_positions});
}

mx::array appended(const Call& c, const mx::array& cache, mx::array rows, bool turns) {
  rows = cast_to(rows, cache.dtype(), c.s);
  if (c.grows) {
    if (turns) rows = turned(c, rows);
    return cache.shape(2) > 0 ? mx::concatenate({cache, rows}, 2, c.s) : rows;
  }
  const bool rotary = c.rotary.has_value();
  const CacheRowsParams params{.function = c.function,
                               .pool = c.pool,
                               .has_table = c.table.has_value(),
                               .rotary = rotary,
                               .turns = turns,
                               .interleaved = !turns || c.rotary->interleaved,
                               .attended = true,
                               .rotates_k = rotary && c.rotary->rotates_k,
                               .queries = c.N};
  std::vector<mx::array> inputs = {cache, rows, *c.lengths};
  if (c.table) inputs.push_back(*c.table);
  if (rotary) inputs.insert(inputs.end(), {c.rotary->cos, c.rotary->sin, *c.new_positions, *c.rotary->q_positions});
  return CacheAppend::make(c.s, params, std::move(inputs));
}

void check_cache(const Call& c, const mx::array& q) {
  const char* layout = c.pool ? "[pages, page_size, Hkv, D]" : "[B, Hkv, S, D]";
  c.require(c.k.ndim() == 4, "k_cache must have 4 dimensions ", layout, "; got shape ", c.k.shape());
  c.require(c.v.ndim() == 4, "v_cache must have 4 dimensions ", layout, "; got shape ", c.v.shape());
  check_pools(q, c.k, c.v, c.function);
  if (c.pool) check_page_size(c.k, c.function);
  const mx::Shape &k = c.k.shape(), &v = c.v.shape();
  c.require(k[0] == v[0] && k[1] == v[1] && k[2] == v[2],
            "k_cache and v_cache must differ in their last axis alone; got shapes ", k, " and ", v);
}

mx::array empty_cache(const mx::array& rows, mx::Stream s) {
  mx::Shape shape = rows.shape();
  shape[2] = 0;
  return mx::zeros(shape, rows.dtype(), s);
}

}  // namespace

KvCacheResult attention_kvcache(const mx::array& q, const KvCache& cache, const std::optional<NewKeys>& added,
                                const std::optional<CacheRotation>& rotation, const AttentionOptions& options,
                                bool wants_lse, mx::StreamOrDevice stream_or_device) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  const char* function = name_of(options, "flash_attention_kvcache");
  check(q.ndim() == 4, function, "q must have 4 dimensions [B, Hq, Nq, D]; got shape ", q.shape());
  check(cache.k.has_value() == cache.v.has_value(), function,
        "k_cache and v_cache must be given together; got one of them");
  check(cache.k || added, function, "a cache or new keys must be given; got neither");
  check_no_lengths(options, function);
  if (added) {
    check(added->k.ndim() == 4 && added->v.ndim() == 4, function,
          "k_new and v_new must have 4 dimensions [B, Hkv, N, D]; got shapes ", added->k.shape(), " and ",
          added->v.shape());
  }
  Call c{.function = function,
         .s = s,
         .B = q.shape(0),
         .N = q.shape(2),
         .added = added ? added->k.shape(2) : 0,
         .pool = cache.block_table.has_value(),
         .k = cache.k ? *cache.k : empty_cache(added->k, s),
         .v = cache.v ? *cache.v : empty_cache(added->v, s)};
  check_cache(c, q);
  set_places(c, cache);
  if (added) check_new_keys(c, *added);
  if (rotation) set_rotation(c, *rotation, q.shape(3));

  KvCacheResult result{q, std::nullopt, std::nullopt, std::nullopt};
  mx::array k = c.k, v = c.v;
  if (added) {
    result.k = k = appended(c, c.k, added->k, c.rotary && !c.rotary->rotates_k);
    result.v = v = appended(c, c.v, added->v, false);
  }
  AttentionSources sources;
  sources.function = function;
  sources.lengths_name = "seq_lens";
  sources.rotary = c.rotary;
  if (c.table) {
    sources.paged = PagedKeys{*c.table};
    if (!c.pool) {  // [rows, H, S, D] as pages of S tokens
      k = mx::swapaxes(k, 1, 2, s);
      v = mx::swapaxes(v, 1, 2, s);
    }
  }
  AttentionOptions with_lengths = options;
  if (c.lengths) with_lengths.kv_lengths = c.all_lengths();
  auto outputs = launch(make_request(cast_to(q, k.dtype(), s), k, v, with_lengths, false, s, sources), options.backend,
                        WantedOutputs{.lse = wants_lse});
  result.out = cast_to(outputs[0], q.dtype(), s);
  if (wants_lse) result.lse = outputs[1];
  return result;
}

mx::array append_to_cache(const mx::array& cache, const mx::array& rows, const mx::array& starts,
                          const std::optional<mx::array>& block_table, mx::StreamOrDevice stream_or_device) {
  constexpr const char* kFunction = "append_to_cache";
  const mx::Stream s = mx::to_stream(stream_or_device);
  check_pools(rows, cache, cache, kFunction);
  check(cache.ndim() == 4, kFunction, "cache must have 4 dimensions; got shape ", cache.shape());
  check(cache.shape(3) > 0, kFunction, "the head dimension of the cache must be positive; got 0");
  if (block_table) check_page_size(cache, kFunction);
  const auto lengths = to_int32(starts, 1, "starts", kFunction, s);
  const int B = lengths.shape(0), H = cache.shape(block_table ? 2 : 1), D = cache.shape(3);
  check(rows.shape(0) == B && rows.shape(1) == H && rows.shape(3) == D, kFunction,
        "rows must have the batch of starts, and the heads and head dimension of the cache, [", B, ", ", H, ", N, ", D,
        "]; got shape ", rows.shape());
  std::vector<mx::array> inputs = {cache, cast_to(rows, cache.dtype(), s), lengths};
  if (block_table) {
    inputs.push_back(to_int32(*block_table, 2, "block_table", kFunction, s));
    check(inputs[3].shape(0) == B, kFunction, "block_table must have one row for each of the ", B,
          " sequences; got shape ", inputs[3].shape());
  } else {
    check(cache.shape(0) == B, kFunction, "starts must have one position for each of the ", cache.shape(0),
          " rows of the cache; got ", B);
  }
  const bool paged = block_table.has_value();
  return CacheAppend::make(s, {.function = kFunction, .pool = paged, .has_table = paged}, std::move(inputs));
}

}  // namespace mfa
