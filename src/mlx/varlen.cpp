#include "mfa/varlen.h"

#include <algorithm>

#include "common/check.h"
#include "mlx/integers.h"
#include "mlx/route.h"
#include "mlx/sparse.h"

namespace mfa {
namespace {

constexpr const char* kFunction = "flash_attention_varlen";

int longest(std::optional<int> given, int rows, const char* name, const char* function) {
  check(!given || *given >= 0, function, name, " must not be negative; got ", given.value_or(0));
  return given.value_or(rows);
}

std::vector<mx::array> run(const mx::array& q, const mx::array& k, const mx::array& v, const PackedSequences& sequences,
                           const AttentionOptions& options, mx::StreamOrDevice stream_or_device, bool wants_lse) {
  const mx::Stream s = mx::to_stream(stream_or_device);
  const char* function = name_of(options, kFunction);
  check(q.ndim() == 4 && k.ndim() == 4, function, "q and k must have 4 dimensions [1, H, packed rows, D]; got shapes ",
        q.shape(), " and ", k.shape());
  auto starts_q = to_int32(sequences.cu_seqlens_q, 1, "cu_seqlens_q", function, s);
  auto starts_k = to_int32(sequences.cu_seqlens_k, 1, "cu_seqlens_k", function, s);
  check(starts_q.size() >= 1, function, "cu_seqlens_q must have at least one element; got shape ", starts_q.shape());
  check(starts_q.size() == starts_k.size(), function, "cu_seqlens_q and cu_seqlens_k must have one shape; got ",
        starts_q.shape(), " and ", starts_k.shape());

  AttentionSources sources;
  sources.function = function;
  sources.packed = PackedRows{starts_q, starts_k, longest(sequences.max_seqlen_q, q.shape(2), "max_seqlen_q", function),
                              longest(sequences.max_seqlen_k, k.shape(2), "max_seqlen_k", function)};
  if (sequences.block_mask) {
    const auto& packed = *sources.packed;
    check(sequences.block_mask->batch() == 1, function, "the block mask must be of 1 batch entry; got ",
          sequences.block_mask->batch());
    sources.blocks = block_lists(
        *sequences.block_mask,
        {1, q.shape(1), std::min(packed.longest_query, q.shape(2)), std::min(packed.longest_key, k.shape(2))},
        function);
  }
  return launch(make_request(q, k, v, options, options.return_probs, s, sources), options.backend, {.lse = wants_lse});
}

}  // namespace

mx::array attention_varlen(const mx::array& q, const mx::array& k, const mx::array& v, const PackedSequences& sequences,
                           const AttentionOptions& options, mx::StreamOrDevice s) {
  return run(q, k, v, sequences, options, s, false)[0];
}

AttentionResult attention_varlen_with_lse(const mx::array& q, const mx::array& k, const mx::array& v,
                                          const PackedSequences& sequences, const AttentionOptions& options,
                                          mx::StreamOrDevice s) {
  const auto outputs = run(q, k, v, sequences, options, s, true);
  return {outputs[0], outputs[1], std::nullopt};
}

}  // namespace mfa
