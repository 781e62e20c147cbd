#include "mlx/evaluate.h"

#include <atomic>
#include <new>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/scheduler.h"

namespace mfa {
namespace {

// Runs MLX's own copy as a part of this node: there is no other exported way to copy an evaluated array.
mx::array dense_copy(const mx::array& x, mx::Stream stream) {
  std::vector<mx::array> out = {mx::contiguous(x, false, stream)};
  out[0].primitive().eval_cpu({x}, out);
  out[0].detach();
  mx::cpu::get_command_encoder(stream).add_temporary(out[0]);
  return out[0];
}

// MLX counts every tenth task that is handed to a stream, so as to wait when more than ten of these are under way. If
// the stream fails while the evaluating thread hands one over, that thread throws before it has enqueued what takes the
// task off the count again; eleven such losses, and an evaluation waits for ever. So the next of our tasks is preceded
// by one that takes off as many as may have been lost: what it takes off too much is under way, at most those ten.
std::atomic<int> failures{0};

}  // namespace

void note_failure() { failures.fetch_add(1); }

void restore_task_count(mx::Stream stream) {
  if (failures.load(std::memory_order_relaxed) == 0) return;
  mx::scheduler::enqueue(stream, [stream] {
    for (int lost = failures.exchange(0); lost > 0 && mx::scheduler::n_active_tasks() > 0; --lost)
      mx::scheduler::notify_task_completion(stream);
  });
}

void allocate(mx::array& out) {
  auto data = mx::allocator::malloc(out.nbytes());
  if (out.nbytes() > 0 && data.buffer().ptr() == nullptr) throw std::bad_alloc();
  out.set_data(std::move(data));
}

mx::array with_dense_last_axis(const mx::array& x, mx::Stream stream) {
  return x.shape(-1) <= 1 || x.strides(-1) == 1 || x.size() == 0 ? x : dense_copy(x, stream);
}

mx::array with_dense_rows(const mx::array& x, mx::Stream stream) {
  return x.flags().row_contiguous || x.size() == 0 ? x : dense_copy(x, stream);
}

TensorRef tensor_ref(const mx::array& x) { return {x.data<void>(), {x.strides(0), x.strides(1), x.strides(2)}}; }

TensorRef key_ref(const mx::array& x, bool paged) {
  return paged ? TensorRef{x.data<void>(), {x.strides(0), x.strides(2), x.strides(1)}} : tensor_ref(x);
}

MutableTensorRef mutable_key_ref(mx::array& x, bool paged) {
  return paged ? MutableTensorRef{x.data<void>(), {x.strides(0), x.strides(2), x.strides(1)}} : mutable_tensor_ref(x);
}

MutableTensorRef mutable_tensor_ref(mx::array& x) {
  return {x.data<void>(), {x.strides(0), x.strides(1), x.strides(2)}};
}

}  // namespace mfa
