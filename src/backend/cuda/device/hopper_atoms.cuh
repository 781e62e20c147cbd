// hopper_atoms.cuh: the sm_90a instructions that the Hopper kernels are written in: mbarriers, tensor copies, warpgroup
// control and the few arithmetic instructions that C++ does not reach. Semantics: PTX ISA 9.0. hopper_wgmma.cuh holds
// the matrix products.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mfa::cuda {

// A CUtensorMap as the driver encodes it; kernels take it as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

namespace hopper {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Numbers in shared memory, read and written where it is said.
__device__ __forceinline__ int load_shared(uint32_t at) {
  int x;
  asm volatile("ld.volatile.shared.s32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t at, int x) {
  asm volatile("st.volatile.shared.s32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

// --- mbarriers: 64-bit words in shared memory. A waiter gives the parity of the phase it waits to see completed

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives where `condition` holds, without a branch: after one the compiler no longer knows that the warp's values
// agree, and moves what feeds the tensor cores out of uniform registers.
__device__ __forceinline__ void barrier_arrive_if(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.s32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}\n" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Makes barrier initialisation visible to the copy engine; then a block barrier.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Orders this thread's ordinary shared-memory stores before later reads by the tensor cores or the copy engine.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Named barriers: `threads` threads meet; arrive does not block. Barrier 0 is __syncthreads

__device__ __forceinline__ void named_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- Tensor copies

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}
// One box of a [B, H, N, D] map into shared memory; coordinates innermost first. Out of range elements become zero.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int d, int n, int h,
                                         int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(barrier), "r"(d), "r"(n), "r"(h), "r"(b)
      : "memory");
}
// `bytes` (a multiple of 16) contiguous bytes into shared memory.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(reinterpret_cast<uint64_t>(from)), "r"(bytes), "r"(barrier)
               : "memory");
}

// `bytes` contiguous bytes from shared memory to global memory, or added to the floats there. Both complete with the
// thread's current group.
__device__ __forceinline__ void store_bytes(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void add_floats(float* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read; until global memory has been written.
__device__ __forceinline__ void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void stores_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements from a warp's registers; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void store_matrices(uint32_t at, const uint32_t* x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// --- Flags in global memory, with what was written before them

__device__ __forceinline__ int load_acquire(const int* flag) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
}
template <class Int>
__device__ __forceinline__ Int load_relaxed(const Int* flag) {
  Int x;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
  return x;
}
__device__ __forceinline__ void store_relaxed(int* flag, int x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(x) : "memory");
}
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// Orders what this thread has seen before its later copies to and from global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- Warpgroups

template <int registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// --- Registers

// x, of which the compiler knows nothing: what is computed from it is computed here, each time, and not kept in
// registers from further up.
template <class Int>
__device__ __forceinline__ Int computed_here(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t blocks_in_all() {  // gridDim.x, likewise
  uint32_t n;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(n));
  return n;
}

__device__ __forceinline__ int thread_number() {  // threadIdx.x, likewise
  int n;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(n));
  return n;
}

// --- Arithmetic

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as a pair of T in one register, `low` in the low half: the order of the matrix fragments.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// Of pairs of T that are not negative, the larger elements; NaN if either is.
template <class T>
__device__ __forceinline__ uint32_t larger(uint32_t x, uint32_t y) {
  uint32_t z;
  if constexpr (std::is_same_v<T, __half>)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  else
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// In a pair of T, all ones over each element that is NaN or infinite: adding one exponent step carries into the sign.
template <class T>
__device__ __forceinline__ uint32_t nonfinite_mask(uint32_t pair) {
  constexpr uint32_t step = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;
  return ((((pair & 0x7fff7fffu) + step) & 0x80008000u) >> 15) * 0xffffu;
}

}  // namespace hopper
}  // namespace mfa::cuda
