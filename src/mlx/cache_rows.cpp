#include "mlx/cache_rows.h"

#include <algorithm>
#include <cstring>

#include "attention/append.h"
#include "attention/validate.h"
#include "common/check.h"
#include "common/thread_pool.h"
#include "mlx/evaluate.h"
#include "mlx/integers.h"
#include "mlx/one_by_one.h"
#include "mlx/ops.h"

namespace mfa {
namespace {

[[noreturn]] void refuse_gpu(const char* function) {
  throw std::runtime_error(concat("[", function, "] caches are appended to on CPU streams only"));
}

// The inputs that follow the cache and, in CacheAppend, the rows: starts, table, cos, sin, positions.
std::vector<mx::array> places(const std::vector<mx::array>& inputs, size_t first) {
  return {inputs.begin() + static_cast<std::ptrdiff_t>(first), inputs.end()};
}

std::vector<mx::array> joined(std::vector<mx::array> first, const std::vector<mx::array>& rest) {
  first.insert(first.end(), rest.begin(), rest.end());
  return first;
}

// Sizes, and the pointers of the places that set(array, pointer) sets.
template <typename Set>
CacheRows describe_rows(const CacheRowsParams& params, const mx::array& cache, int rows,
                        const std::vector<mx::array>& places, const Set& set) {
  CacheRows p;
  size_t next = 0;
  const mx::array& starts = places[next++];
  p.B = starts.shape(0);
  p.H = cache.shape(params.pool ? 2 : 1);
  p.N = rows;
  p.D = cache.shape(3);
  p.dtype = to_dtype(cache.dtype());
  set(starts, p.starts);
  p.attended = params.attended;
  p.queries = params.queries;
  const int page_size = cache.shape(params.pool ? 1 : 2);
  p.capacity = page_size;
  if (params.has_table) {
    const mx::array& table = places[next++];
    p.pages = {nullptr, table.shape(1), page_size, cache.shape(0)};
    set(table, p.pages.table);
    p.capacity = static_cast<int32_t>(std::min<int64_t>(int64_t{table.shape(1)} * page_size, INT32_MAX));
  }
  if (params.rotary) {
    const mx::array &cos = places[next], &sin = places[next + 1], &positions = places[next + 2];
    p.rope.positions = cos.shape(0);
    p.rope.rotary_dim = 2 * cos.shape(1);
    p.rope.interleaved = params.interleaved;
    p.rope.rotates_k = params.rotates_k;
    if (params.turns) {
      set(cos, p.rope.cos);
      set(sin, p.rope.sin);
    }
    set(positions, p.rope.q_positions);
    if (params.attended) set(places[next + 3], p.query_positions);
  }
  return p;
}

CacheRows evaluated_rows(const CacheRowsParams& params, mx::array cache, mx::array rows,
                         const std::vector<mx::array>& places, mx::Stream stream) {
  CacheRows p = describe_rows(
      params, cache, rows.shape(2), places,
      [&]<typename T>(const mx::array& x, const T*& pointer) { pointer = with_dense_rows(x, stream).data<T>(); });
  p.cache = mutable_key_ref(cache, params.pool);
  p.rows = mutable_tensor_ref(rows);
  return p;
}

// Refuses places that are known and wrong before a node is made.
void validate_known(mx::Stream stream, const CacheRowsParams& params, const mx::array& cache, int rows,
                    const std::vector<mx::array>& places) {
  const auto address = [&]<typename T>(const mx::array& x, const T*& pointer) {
    if (is_known(x, stream) && x.flags().row_contiguous) pointer = x.data<T>();
  };
  CacheRows p = describe_rows(params, cache, rows, places, address);
  if (!p.starts) return;
  if (params.rotary && !p.rope.q_positions) p.rope.rotary_dim = 0;  // the places can be checked all the same
  validate(p, params.function);
}

bool is_writable(const mx::array& x) {
  return x.is_donatable() && x.data_size() == x.size() && (x.shape(-1) <= 1 || x.strides(-1) == 1);
}

void copy_bytes(const char* from, char* to, int64_t count) {
  constexpr int64_t kChunk = 1 << 20;
  parallel_for((count + kChunk - 1) / kChunk, [&](int64_t i, int) {
    std::memcpy(to + i * kChunk, from + i * kChunk, static_cast<size_t>(std::min(kChunk, count - i * kChunk)));
  });
}

// int32 [R, n] and indices [B] to [B, n].
class CheckedRows : public mx::UnaryPrimitive {
 public:
  CheckedRows(mx::Stream stream, const char* name, const char* function)
      : UnaryPrimitive(stream), name_(name), function_(function) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    allocate(out);
    const mx::array x = with_dense_rows(inputs[0], stream()), indices = with_dense_rows(inputs[1], stream());
    const int rows = x.shape(0), count = indices.shape(0);
    const auto width = static_cast<int64_t>(out.size()) / std::max(1, count);
    const int32_t *from = x.data<int32_t>(), *index = indices.data<int32_t>();
    auto* to = out.data<int32_t>();
    dispatch_or_poison(stream(), {}, [=, name = name_, function = function_] {
      validate_indices(index, 1, count, rows, name, function);
      for (int i = 0; i < count; ++i) std::copy_n(from + index[i] * width, width, to + i * width);
    });
  }
  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error(concat("[", function_, "] ", name_, " is followed on CPU streams only"));
  }
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override {
    return one_by_one(inputs, axes, stream(), [&](const std::vector<mx::array>& x) -> std::vector<mx::array> {
      return {checked_rows(x[0], x[1], name_, function_, stream())};
    });
  }
  const char* name() const override { return "MfaCheckedRows"; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& rows = static_cast<const CheckedRows&>(other);
    return name_ == rows.name_ && function_ == rows.function_;
  }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    mx::Shape shape = inputs[0].shape();
    shape[0] = inputs[1].shape(0);
    return {shape};
  }

 private:
  const char *name_, *function_;
};

}  // namespace

// ---- appending ------------------------------------------------------------------------------------------------------
mx::array CacheAppend::make(mx::Stream stream, const CacheRowsParams& params, std::vector<mx::array> inputs) {
  if (stream.device != mx::Device::cpu) refuse_gpu(params.function);
  validate_known(stream, params, inputs[0], inputs[1].shape(2), places(inputs, 2));
  const mx::Shape shape = inputs[0].shape();
  const mx::Dtype dtype = inputs[0].dtype();
  return mx::array(shape, dtype, std::make_shared<CacheAppend>(stream, params), std::move(inputs));
}

void CacheAppend::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  const char *copy_from = nullptr, *function = params_.function;
  if (is_writable(inputs[0])) {
    out.copy_shared_buffer(inputs[0]);
  } else if (inputs[0].flags().row_contiguous) {
    allocate(out);
    copy_from = inputs[0].data<char>();
  } else {
    out.copy_shared_buffer(with_dense_rows(inputs[0], stream()));  // a copy that nothing else holds
  }
  const mx::array rows = with_dense_last_axis(inputs[1], stream());
  const CacheRows p = evaluated_rows(params_, out, rows, places(inputs, 2), stream());
  const auto bytes = static_cast<int64_t>(out.nbytes());
  dispatch_or_poison(stream(), {}, [p, copy_from, bytes, function] {
    validate(p, function);
    if (copy_from) copy_bytes(copy_from, static_cast<char*>(p.cache.data), bytes);
    append_rows(p);
  });
}

void CacheAppend::eval_gpu(const std::vector<mx::array>&, mx::array&) { refuse_gpu(params_.function); }

std::vector<mx::array> CacheAppend::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                                        const std::vector<int>& argnums) {
  std::vector<mx::array> inputs = primals;
  for (const int i : {0, 1}) inputs[i] = mx::zeros(primals[i].shape(), primals[i].dtype(), stream());
  for (size_t n = 0; n < argnums.size(); ++n) {
    if (argnums[n] < 2) inputs[argnums[n]] = tangents[n];
  }
  return {make(stream(), params_, std::move(inputs))};
}

std::vector<mx::array> CacheAppend::vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                                        const std::vector<int>& argnums, const std::vector<mx::array>&) {
  std::vector<mx::array> result;
  for (const int i : argnums) {
    if (i == 0) {  // where rows were written, the cache had no part in the result
      CacheRowsParams plain = params_;
      plain.rotary = plain.turns = plain.attended = false;
      auto inputs =
          joined({cotangents[0], mx::zeros(primals[1].shape(), primals[1].dtype(), stream()), primals[2]}, {});
      if (params_.has_table) inputs.push_back(primals[3]);
      result.push_back(make(stream(), plain, std::move(inputs)));
    } else if (i == 1) {
      result.push_back(
          CacheRead::make(stream(), params_, primals[1].shape(2), joined({cotangents[0]}, places(primals, 2))));
    } else {
      result.push_back(mx::zeros_like(primals[i], stream()));
    }
  }
  return result;
}

std::pair<std::vector<mx::array>, std::vector<int>> CacheAppend::vmap(const std::vector<mx::array>& inputs,
                                                                      const std::vector<int>& axes) {
  return one_by_one(inputs, axes, stream(), [&](std::vector<mx::array> x) -> std::vector<mx::array> {
    return {make(stream(), params_, std::move(x))};
  });
}

bool CacheAppend::is_equivalent(const Primitive& other) const {
  return params_ == static_cast<const CacheAppend&>(other).params_;
}

// ---- reading --------------------------------------------------------------------------------------------------------
mx::array CacheRead::make(mx::Stream stream, const CacheRowsParams& params, int rows, std::vector<mx::array> inputs) {
  if (stream.device != mx::Device::cpu) refuse_gpu(params.function);
  auto primitive = std::make_shared<CacheRead>(stream, params, rows);
  const mx::Shape shape = primitive->output_shapes(inputs)[0];
  const mx::Dtype dtype = inputs[0].dtype();
  return mx::array(shape, dtype, std::move(primitive), std::move(inputs));
}

void CacheRead::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  allocate(out);
  const mx::array cache = with_dense_last_axis(inputs[0], stream());
  const CacheRows p = evaluated_rows(params_, cache, out, places(inputs, 1), stream());
  dispatch_or_poison(stream(), {}, [p, function = params_.function] {
    validate(p, function);
    read_rows(p);
  });
}

void CacheRead::eval_gpu(const std::vector<mx::array>&, mx::array&) { refuse_gpu(params_.function); }

std::vector<mx::array> CacheRead::jvp(const std::vector<mx::array>& primals, const std::vector<mx::array>& tangents,
                                      const std::vector<int>& argnums) {
  for (size_t n = 0; n < argnums.size(); ++n) {
    if (argnums[n] == 0) return {make(stream(), params_, rows_, joined({tangents[n]}, places(primals, 1)))};
  }
  return {mx::zeros(output_shapes(primals)[0], primals[0].dtype(), stream())};
}

std::vector<mx::array> CacheRead::vjp(const std::vector<mx::array>& primals, const std::vector<mx::array>& cotangents,
                                      const std::vector<int>& argnums, const std::vector<mx::array>&) {
  std::vector<mx::array> result;
  for (const int i : argnums) {
    const mx::array empty = mx::zeros_like(primals[i], stream());
    result.push_back(i == 0 ? CacheAppend::make(stream(), params_, joined({empty, cotangents[0]}, places(primals, 1)))
                            : empty);
  }
  return result;
}

std::pair<std::vector<mx::array>, std::vector<int>> CacheRead::vmap(const std::vector<mx::array>& inputs,
                                                                    const std::vector<int>& axes) {
  return one_by_one(inputs, axes, stream(), [&](std::vector<mx::array> x) -> std::vector<mx::array> {
    return {make(stream(), params_, rows_, std::move(x))};
  });
}

bool CacheRead::is_equivalent(const Primitive& other) const {
  const auto& read = static_cast<const CacheRead&>(other);
  return params_ == read.params_ && rows_ == read.rows_;
}

std::vector<mx::Shape> CacheRead::output_shapes(const std::vector<mx::array>& inputs) {
  return {{inputs[1].shape(0), inputs[0].shape(params_.pool ? 2 : 1), rows_, inputs[0].shape(3)}};
}

// ---- remapping ------------------------------------------------------------------------------------------------------
mx::array checked_rows(const mx::array& x, const mx::array& indices, const char* name, const char* function,
                       mx::Stream s) {
  if (is_known(indices, s)) {
    const auto* index = indices.data<int32_t>();
    const int count = indices.shape(0);
    validate_indices(index, 1, count, x.shape(0), name, function);
    if (is_known(x, s)) {
      mx::Shape shape = x.shape();
      shape[0] = count;
      const auto width = x.shape(0) > 0 ? static_cast<std::ptrdiff_t>(x.size()) / x.shape(0) : 0;
      std::vector<int32_t> values;
      values.reserve(static_cast<size_t>(count * width));
      for (int i = 0; i < count; ++i) {
        const int32_t* row = x.data<int32_t>() + index[i] * width;
        values.insert(values.end(), row, row + width);
      }
      return mx::array(values.data(), shape, mx::int32);
    }
  }
  auto primitive = std::make_shared<CheckedRows>(s, name, function);
  const mx::Shape shape = primitive->output_shapes({x, indices})[0];
  return mx::array(shape, mx::int32, std::move(primitive), {x, indices});
}

}  // namespace mfa
