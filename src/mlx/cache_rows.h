// cache_rows.h: writing the rows of new tokens into a cache of keys or values, and reading them, as MLX primitives.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "mlx/sources.h"

namespace mfa {

// Everything about such a node that is not an array.
struct CacheRowsParams {
  const char* function = "";
  bool pool = false;       // the cache is [pages, page_size, H, D], else [B or rows, H, S, D]
  bool has_table = false;  // without a pool: a table of one row of the cache for each batch entry
  bool rotary = false;     // there are rotary tables and positions
  bool turns = false;      // by which the rows are turned
  bool interleaved = true;
  // Of the attention that follows, if one does, so that all of a step is checked before any of it is written.
  bool attended = false;
  bool rotates_k = false;
  int queries = 0;
  bool operator==(const CacheRowsParams&) const = default;
};

// Inputs: cache; rows [B, H, N, D] of its dtype; starts int32 [B]; if there are such, table int32 [B, pages of a
// sequence], and cos, sin float32 [positions, rotary_dim / 2] and positions int32 [B] of the first rows, and, if the
// cache is attended to, of the first queries. Output: the cache with the rows at starts[b] + t. It takes the memory of
// the input when nothing else holds that, and a copy of it otherwise. Linear in cache and rows.
class CacheAppend : public mx::UnaryPrimitive {
 public:
  CacheAppend(mx::Stream stream, const CacheRowsParams& params) : UnaryPrimitive(stream), params_(params) {}
  static mx::array make(mx::Stream stream, const CacheRowsParams& params, std::vector<mx::array> inputs);

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaCacheAppend"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override { return {inputs[0].shape()}; }

 private:
  CacheRowsParams params_;
};

// The transposed of CacheAppend in rows. Inputs: its, without the rows. Output: the rows [B, H, N, D], turned back.
class CacheRead : public mx::UnaryPrimitive {
 public:
  CacheRead(mx::Stream stream, const CacheRowsParams& params, int rows)
      : UnaryPrimitive(stream), params_(params), rows_(rows) {}
  static mx::array make(mx::Stream stream, const CacheRowsParams& params, int rows, std::vector<mx::array> inputs);

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  void eval_gpu(const std::vector<mx::array>& inputs, mx::array& out) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums, const std::vector<mx::array>& outputs) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  const char* name() const override { return "MfaCacheRead"; }
  bool is_equivalent(const Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  CacheRowsParams params_;
  int rows_;
};

// Rows `indices` (int32 [B]) of `x` (int32 [R, ...]), both as to_int32() gives them: mx::take with indices that are
// checked. Known ones are checked at once, others where the work runs; `name` is theirs in the message. Throws
// std::invalid_argument.
mx::array checked_rows(const mx::array& x, const mx::array& indices, const char* name, const char* function,
                       mx::Stream s);

}  // namespace mfa
