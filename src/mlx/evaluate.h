// evaluate.h: from evaluated MLX arrays to the pointers and strides that the kernels take.
#pragma once

#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "attention/problem.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/request.h"

namespace mfa {

// Gives `out` dense memory. Throws std::bad_alloc if there is none, naming nothing else.
void allocate(mx::array& out);

// MLX loses count of its tasks when one throws (evaluate.cpp): a task that throws says so, and what is dispatched after
// it puts the count right.
void note_failure();
void restore_task_count(mx::Stream stream);

// Dispatches `work` to the stream of the primitive whose outputs these are. Should it throw, they are filled with NaN:
// after mx::async_eval() the error is thrown elsewhere, and what could not be computed may still be read.
template <typename Work>
void dispatch_or_poison(mx::Stream stream, const std::vector<mx::array>& outputs, Work work) {
  std::vector<std::span<char>> memory;
  for (mx::array out : outputs) memory.emplace_back(out.data<char>(), out.nbytes());
  restore_task_count(stream);
  mx::cpu::get_command_encoder(stream).dispatch([memory = std::move(memory), work = std::move(work)] {
    try {
      work();
    } catch (...) {
      note_failure();
      for (const auto bytes : memory) std::memset(bytes.data(), 0xff, bytes.size());  // NaN in each kernel dtype
      throw;
    }
  });
}

// `x` itself if its last axis is dense, else a dense copy of it that is made on `stream` and lives until the work
// dispatched there after it has run.
mx::array with_dense_last_axis(const mx::array& x, mx::Stream stream);

// `x` itself if all of it is dense in row-major order, else such a copy.
mx::array with_dense_rows(const mx::array& x, mx::Stream stream);

TensorRef tensor_ref(const mx::array& x);
MutableTensorRef mutable_tensor_ref(mx::array& x);
// The same of k, v and their gradients: of pools [pages, page_size, Hkv, *] with strides of page, head and token.
TensorRef key_ref(const mx::array& x, bool paged);
MutableTensorRef mutable_key_ref(mx::array& x, bool paged);

// A problem with its pointers. What they point to is not known until the arrays before it in the stream are computed.
struct EvaluatedProblem {
  AttentionProblem problem;
  const char* function = "";
  const uint32_t* seed = nullptr;

  // The problem with the seed read, and the values that are addresses validated; call it where the work runs. Throws
  // std::invalid_argument.
  AttentionProblem checked() const;
};

// Validates the values that are addresses if they are known already. Throws std::invalid_argument.
void validate_known(const Request& request);

// `inputs` are those of the primitive, evaluated. With `dense_bias` a bias that repeats along an axis of an extent
// above 1 is copied, so that each of its elements has its own gradient.
EvaluatedProblem evaluate(const AttentionParams& params, const std::vector<mx::array>& inputs, mx::Stream stream,
                          bool dense_bias = false);

}  // namespace mfa
