// describe.cpp: from the parameters and arrays of a primitive to the problem: sizes, then pointers and strides.
#include <algorithm>
#include <limits>

#include "attention/validate.h"
#include "common/ceil_div.h"
#include "common/check.h"
#include "mlx/evaluate.h"
#include "mlx/integers.h"

namespace mfa {
namespace {

// The stride of an axis as a broadcast term of the scores sees it: an axis of extent 1 is not stepped along.
void set_strides(int64_t (&stride)[4], const mx::array& x) {
  for (int i = 0; i < 4; ++i) stride[i] = x.shape(i) == 1 ? 0 : x.strides(i);
}

bool repeats(const mx::array& x) {
  for (int i = 0; i < static_cast<int>(x.ndim()); ++i) {
    if (x.shape(i) > 1 && x.strides(i) == 0) return true;
  }
  return false;
}

// Points `p` to the arrays that say where rows are and what they see; `set(pointer, input)` sets one.
template <typename Set>
void set_addresses(AttentionProblem& p, const AttentionParams& params, const Set& set) {
  const InputLayout at(params);
  if (params.packs_queries) set(p.query_starts, at.query_starts);
  if (params.packs_keys) set(p.key_starts, at.key_starts);
  if (params.paged) set(p.pages.table, at.table);
  if (params.has_q_positions) set(p.rope.q_positions, at.q_positions);
  if (params.has_k_positions) set(p.rope.k_positions, at.k_positions);
  if (params.has_blocks) {
    set(p.blocks.offsets, at.offsets);
    set(p.blocks.key_ids, at.key_ids);
    set(p.blocks.transposed_offsets, at.transposed_offsets);
    set(p.blocks.query_ids, at.query_ids);
  }
  if (params.has_lengths) set(p.kv_lengths, at.kv_lengths);
}

}  // namespace

AttentionProblem describe(const AttentionParams& params, const std::vector<mx::array>& inputs) {
  const InputLayout at(params);
  const mx::Shape &q = inputs[0].shape(), &k = inputs[1].shape(), &v = inputs[2].shape();
  AttentionProblem p;
  p.B = q[0];
  p.Hq = q[1];
  p.Hkv = k[params.paged ? 2 : 1];
  p.Nq = q[2];
  p.Nk = k[2];
  p.D = q[3];
  p.Dv = v[3];
  if (params.packs_queries) {
    p.B = inputs[at.query_starts].shape(0) - 1;
    p.packed_queries = q[2];
    p.Nq = std::min(q[2], params.longest_query);
  }
  if (params.packs_keys) {
    p.packed_keys = k[2];
    p.Nk = std::min(k[2], params.longest_key);
  }
  if (params.paged) {
    const mx::array& table = inputs[at.table];
    p.pages = {nullptr, table.shape(1), k[1], k[0]};
    const int64_t most = int64_t{table.shape(1)} * k[1];
    check(most <= std::numeric_limits<int32_t>::max(), params.function,
          "a block table may have room for at most 2^31 - 1 keys of a sequence; got ", table.shape(1), " pages of ",
          k[1]);
    p.Nk = static_cast<int32_t>(most);
  }
  if (params.rotary) {
    p.rope.positions = inputs[at.cos].shape(0);
    p.rope.rotary_dim = 2 * inputs[at.cos].shape(1);
    p.rope.interleaved = params.interleaved;
    p.rope.rotates_k = params.rotates_k;
  }
  if (params.has_blocks) {
    BlockListRef& l = p.blocks;
    l.block_q = params.block_q;
    l.block_k = params.block_k;
    l.query_blocks = static_cast<int32_t>(ceil_div(p.Nq, l.block_q));
    l.key_blocks = static_cast<int32_t>(ceil_div(p.Nk, l.block_k));
    l.stride_h = params.lists_h ? 1 : 0;
    l.stride_b = params.lists_b ? (params.lists_h ? p.Hq : 1) : 0;
    l.entries = inputs[at.key_ids].size();
  }
  p.neighbourhood = params.neighbourhood;
  p.dtype = to_dtype(inputs[0].dtype());
  p.scale = params.scale;
  p.softcap = params.softcap;
  p.causal = params.causal;
  // A window that reaches past both ends is none.
  const int longest = std::max(p.Nq, p.Nk);
  p.window_left = params.window_left < longest ? params.window_left : -1;
  p.window_right = params.window_right < longest ? params.window_right : -1;
  p.dropout_p = params.dropout_p;
  return p;
}

void validate_known(const Request& request) {
  const AttentionParams& params = request.params;
  if (request.stream.device != mx::Device::cpu) return;
  AttentionProblem p = describe(params, request.inputs);
  set_addresses(p, params, [&]<typename T>(const T*& pointer, int input) {
    const mx::array& x = request.inputs[input];
    if (is_known(x, request.stream) && x.flags().row_contiguous) pointer = x.data<T>();
  });
  BlockListRef& l = p.blocks;
  if (!l.key_ids || !l.transposed_offsets || !l.query_ids) l.offsets = nullptr;
  validate(p, params.function,
           {.query_starts = params.packs_queries && !p.query_starts,
            .key_starts = params.packs_keys && !p.key_starts,
            .kv_lengths = params.has_lengths && !p.kv_lengths,
            .q_positions = params.has_q_positions && !p.rope.q_positions,
            .k_positions = params.has_k_positions && !p.rope.k_positions});
}

AttentionProblem EvaluatedProblem::checked() const {
  AttentionProblem p = problem;
  if (seed) p.dropout_seed = uint64_t{seed[1]} << 32 | seed[0];
  validate(p, function);
  return p;
}

EvaluatedProblem evaluate(const AttentionParams& params, const std::vector<mx::array>& inputs, mx::Stream stream,
                          bool dense_bias) {
  const InputLayout at(params);
  EvaluatedProblem result{describe(params, inputs), params.function};
  AttentionProblem& p = result.problem;
  const auto dense = [&](const mx::array& x) { return with_dense_rows(x, stream); };
  p.q = tensor_ref(with_dense_last_axis(inputs[0], stream));
  p.k = key_ref(with_dense_last_axis(inputs[1], stream), params.paged);
  p.v = key_ref(with_dense_last_axis(inputs[2], stream), params.paged);
  set_addresses(p, params, [&]<typename T>(const T*& pointer, int input) { pointer = dense(inputs[input]).data<T>(); });
  if (params.rotary) {
    p.rope.cos = dense(inputs[at.cos]).data<float>();
    p.rope.sin = dense(inputs[at.sin]).data<float>();
  }
  if (params.has_dropout_keys) p.dropout_first_keys = dense(inputs[at.dropout_keys]).data<int32_t>();
  if (params.has_floor) p.score_floor = dense(inputs[at.floor]).data<float>();
  if (params.has_alibi) p.alibi_slopes = dense(inputs[at.alibi]).data<float>();
  if (params.has_sinks) p.sinks = dense(inputs[at.sinks]).data<float>();
  if (params.has_bias) {
    const mx::array& given = inputs[at.bias];
    const mx::array bias = dense_bias && repeats(given) ? dense(given) : given;
    p.bias.data = bias.data<void>();
    p.bias.dtype = to_dtype(bias.dtype());
    set_strides(p.bias.stride, bias);
  }
  if (params.has_mask) {
    p.mask.data = inputs[at.mask].data<uint8_t>();
    set_strides(p.mask.stride, inputs[at.mask]);
  }
  if (params.has_seed) result.seed = dense(inputs[at.seed]).data<uint32_t>();
  return result;
}

}  // namespace mfa
