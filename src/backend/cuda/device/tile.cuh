// tile.cuh: tiles in shared memory: filling them from strided tensors, and products of two of them in registers.
//
// A warp holds a product of MI * 16 rows and NI * 8 columns as mma.sync m16n8 accumulators do, whatever computes it:
// lane 4 g + t has, of block (mi, ni), rows 16 mi + g and + 8 and columns 8 ni + 2 t and + 1. Sixteen-bit operands are
// multiplied by mma.sync; float32 by fused multiply-adds, because the tensor cores' tf32 does not keep float32's
// accuracy.
#pragma once

#include <type_traits>

#include "backend/cuda/device/element.cuh"

namespace mfa::cuda {

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte copy

// Rows are one such copy longer than their elements, so that the rows of a column lie in different banks.
template <typename T, int D>
inline constexpr int kPitch = D + kVector<T>;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Sixteen bytes, or zeros if !valid, without passing through registers.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last `Pending` groups of this thread's copies have arrived.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
// Until all copies of this thread have arrived, committed or not.
__device__ __forceinline__ void drain_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rows of one batch entry. With G > 1 the heads of a group are packed: row r is query r / G of head r % G.
template <typename T>
struct Rows {
  const T* data;
  int64_t row_stride, head_stride;
  int32_t G;

  __device__ __forceinline__ const T* at(int r) const {
    if (G == 1) return data + int64_t(r) * row_stride;
    const int i = r / G;
    return data + int64_t(i) * row_stride + int64_t(r - i * G) * head_stride;
  }
  __device__ __forceinline__ bool is_vector(int D) const {
    constexpr int V = kVector<T>;
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && D % V == 0 && row_stride % V == 0 &&
           (G == 1 || head_stride % V == 0);
  }
};

template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const Tensor& x, int b, int h, int G) {
  return {static_cast<const T*>(x.data) + b * x.stride[0] + int64_t(h) * G * x.stride[1], x.stride[2], x.stride[1], G};
}

__device__ __forceinline__ int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Fills `ROWS` rows from row r0 on with their D channels, and zeros up to a multiple of 16 and for rows at and behind
// `end`. Waits for nothing: the copies belong to the group that is committed next.
// `thread` numbers the THREADS that take part.
template <int ROWS, int DP, int THREADS, typename T>
__device__ __forceinline__ void load_rows(T* tile, const Rows<T>& rows, int r0, int end, int D, bool vector,
                                          int thread = threadIdx.x) {
  constexpr int V = kVector<T>, pitch = kPitch<T, DP>;
  constexpr int chunks = DP / V;
  constexpr int lanes = chunks >= 32 ? 32 : chunks >= 16 ? 16 : chunks >= 8 ? 8 : 4;  // of a row
  const int lane = thread % lanes, extent = round_up(D, 16);
#pragma unroll 2
  for (int r = thread / lanes; r < ROWS; r += THREADS / lanes) {
    const bool inside = r0 + r < end;
    const T* from = inside ? rows.at(r0 + r) : rows.data;
    T* to = tile + r * pitch;
    if (vector) {
      for (int d = lane * V; d < extent; d += lanes * V) {
        const bool valid = inside && d < D;
        copy_async(to + d, valid ? from + d : rows.data, valid);
      }
    } else {
      for (int d = lane; d < extent; d += lanes) to[d] = inside && d < D ? from[d] : from_float<T>(0.f);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(p)));
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(p)));
}
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <int MI, int NI>
__device__ __forceinline__ void clear(float (&c)[MI][NI][4]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi)
#pragma unroll
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) c[mi][ni][e] = 0.f;
}

enum class A { rows, columns };  // A is stored [m][k] or [k][m]
enum class B { rows, columns };  // B is stored [k][n] or [n][k]

// c += A B over k < `depth`, a multiple of 16; without `All`, for the blocks of columns before `columns` only. Checks
// between the products of blocks keep their loads from running ahead, hence the two versions.
template <typename T, A Ta, B Tb, bool All, int MI, int NI>
__device__ __forceinline__ void multiply_blocks(float (&c)[MI][NI][4], const T* a, int a_pitch, const T* b, int b_pitch,
                                                int depth, int columns) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int low = lane % 8, half = lane / 8 % 2, upper = lane / 16;
#pragma unroll 2
    for (int k = 0; k < depth; k += 16) {
      uint32_t af[MI][4];
#pragma unroll
      for (int mi = 0; mi < MI; ++mi) {
        if constexpr (Ta == A::rows)
          load_matrices(af[mi], a + (16 * mi + 8 * half + low) * a_pitch + k + 8 * upper);
        else
          load_matrices_transposed(af[mi], a + (k + 8 * upper + low) * a_pitch + 16 * mi + 8 * half);
      }
#pragma unroll
      for (int ni = 0; ni < NI; ni += 2) {
        if (!All && 8 * ni >= columns) break;
        uint32_t bf[4];
        const int n = NI == 1 ? 0 : 8 * upper;  // a single block is loaded twice
        if constexpr (Tb == B::columns)
          load_matrices(bf, b + (8 * ni + n + low) * b_pitch + k + 8 * half);
        else
          load_matrices_transposed(bf, b + (k + 8 * half + low) * b_pitch + 8 * ni + n);
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          multiply_add<T>(c[mi][ni], af[mi], bf[0], bf[1]);
          if constexpr (NI > 1) multiply_add<T>(c[mi][ni + 1], af[mi], bf[2], bf[3]);
        }
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float af[MI][2][4];
#pragma unroll
      for (int mi = 0; mi < MI; ++mi)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int m = 16 * mi + 8 * e + g;
          if constexpr (Ta == A::rows) {
            const float4 x = *reinterpret_cast<const float4*>(a + m * a_pitch + k);
            af[mi][e][0] = x.x, af[mi][e][1] = x.y, af[mi][e][2] = x.z, af[mi][e][3] = x.w;
          } else {
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) af[mi][e][kk] = a[(k + kk) * a_pitch + m];
          }
        }
#pragma unroll
      for (int ni = 0; ni < NI; ++ni) {
        if (!All && 8 * ni >= columns) break;
        float bf[4][2];  // [kk][column]
        const int n = 8 * ni + 2 * t;
        if constexpr (Tb == B::columns) {
          const float4 x = *reinterpret_cast<const float4*>(b + n * b_pitch + k);
          const float4 y = *reinterpret_cast<const float4*>(b + (n + 1) * b_pitch + k);
          bf[0][0] = x.x, bf[1][0] = x.y, bf[2][0] = x.z, bf[3][0] = x.w;
          bf[0][1] = y.x, bf[1][1] = y.y, bf[2][1] = y.z, bf[3][1] = y.w;
        } else {
#pragma unroll
          for (int kk = 0; kk < 4; ++kk) {
            const float2 x = *reinterpret_cast<const float2*>(b + (k + kk) * b_pitch + n);
            bf[kk][0] = x.x, bf[kk][1] = x.y;
          }
        }
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
          for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int kk = 0; kk < 4; ++kk) c[mi][ni][e] = fmaf(af[mi][e / 2][kk], bf[kk][e % 2], c[mi][ni][e]);
      }
    }
  }
}

template <typename T, A Ta, B Tb, int MI, int NI>
__device__ __forceinline__ void multiply(float (&c)[MI][NI][4], const T* a, int a_pitch, const T* b, int b_pitch,
                                         int depth, int columns) {
  if (columns >= 8 * NI)
    multiply_blocks<T, Ta, Tb, true>(c, a, a_pitch, b, b_pitch, depth, columns);
  else
    multiply_blocks<T, Ta, Tb, false>(c, a, a_pitch, b, b_pitch, depth, columns);
}

// c = A B^T over the channels, A and B stored [row][channel]. Scores feed an exponential, and the kernels that
// recompute them may sum in another order, so float32 sums are made of short ones of 16 channels, which err half as
// much.
template <typename T, int MI, int NI>
__device__ __forceinline__ void multiply_scores(float (&c)[MI][NI][4], const T* a, int a_pitch, const T* b, int b_pitch,
                                                int depth, int columns) {
  clear(c);
  if constexpr (sizeof(T) == 2) {
    multiply<T, A::rows, B::columns>(c, a, a_pitch, b, b_pitch, depth, columns);
  } else {
#pragma unroll 1
    for (int k = 0; k < depth; k += 16) {
      float piece[MI][NI][4];
      clear(piece);
      multiply<T, A::rows, B::columns>(piece, a + k, a_pitch, b + k, b_pitch, 16, columns);
#pragma unroll
      for (int mi = 0; mi < MI; ++mi)
#pragma unroll
        for (int ni = 0; ni < NI; ++ni)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[mi][ni][e] += piece[mi][ni][e];
    }
  }
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }

// Adds the terms of A B, B stored [k][n], in which B is not finite and A not 0: a factor of 0 hides what it meets.
template <typename T, A Ta, int MI, int NI>
__device__ __forceinline__ void add_nonfinite(float (&c)[MI][NI][4], const T* a, int a_pitch, const T* b, int b_pitch,
                                              int depth, int columns) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
  for (int k = 0; k < depth; ++k) {
    float x[2 * MI];
#pragma unroll
    for (int n = 0; n < 2 * MI; ++n)
      x[n] = to_float(Ta == A::rows ? a[(8 * n + g) * a_pitch + k] : a[k * a_pitch + 8 * n + g]);
#pragma unroll
    for (int ni = 0; ni < NI; ++ni) {
      if (8 * ni >= columns) break;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float y = to_float(b[k * b_pitch + 8 * ni + 2 * t + e]);
        if (is_finite(y)) continue;
#pragma unroll
        for (int n = 0; n < 2 * MI; ++n)
          if (x[n] != 0.f) c[n / 2][ni][2 * (n % 2) + e] += x[n] * y;
      }
    }
  }
}

// Zeros in place of what is not finite in the first `D` channels of a tile.
template <int ROWS, int DP, int THREADS, typename T>
__device__ __forceinline__ void clear_nonfinite(T* tile, int D, int thread = threadIdx.x) {
#pragma unroll 1
  for (int n = thread; n < ROWS * DP; n += THREADS) {
    T& x = tile[n / DP * kPitch<T, DP> + n % DP];
    if (n % DP < D && !is_finite(to_float(x))) x = from_float<T>(0.f);
  }
}

// c += A B with a tile B of `DEPTH` rows of which the warp multiplies the columns from `first` on. A factor of 0 hides
// even a NaN or an infinity; the bits are those of multiply() on a tile without them. Slow, and for all threads of the
// block: for tiles in which the fast product has met one.
template <typename T, A Ta, int DEPTH, int DP, int THREADS, int MI, int NI>
__device__ __forceinline__ void multiply_hiding(float (&c)[MI][NI][4], const T* a, int a_pitch, T* tile, int first,
                                                int D) {
  const int columns = round_up(D, 16) - first;
  add_nonfinite<T, Ta>(c, a, a_pitch, tile + first, kPitch<T, DP>, DEPTH, columns);
  __syncthreads();
  clear_nonfinite<DEPTH, DP, THREADS>(tile, D);
  __syncthreads();
  multiply<T, Ta, B::rows>(c, a, a_pitch, tile + first, kPitch<T, DP>, DEPTH, columns);
}

// Whether an accumulator of the thread is infinite or NaN.
template <int MI, int NI>
__device__ __forceinline__ bool any_nonfinite(const float (&c)[MI][NI][4]) {
  float sum = 0.f;  // 0 * finite = 0, else NaN
#pragma unroll
  for (int mi = 0; mi < MI; ++mi)
#pragma unroll
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(c[mi][ni][e], 0.f, sum);
  return sum != 0.f;
}

// Writes a warp's block as elements of T to shared memory.
template <typename T, int MI, int NI>
__device__ __forceinline__ void store_block(T* tile, int pitch, const float (&c)[MI][NI][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int mi = 0; mi < MI; ++mi)
#pragma unroll
    for (int ni = 0; ni < NI; ++ni)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        store_pair(tile + (16 * mi + 8 * e + g) * pitch + 8 * ni + 2 * t, c[mi][ni][2 * e], c[mi][ni][2 * e + 1]);
}

// Writes row `m` (16 mi + 8 e + g) of a warp's block to `to`, the row's channel of the block's first column, times `x`.
template <typename T, int NI>
__device__ __forceinline__ void store_row(T* to, const float (&c)[NI][4], int e, float x, int columns, bool pairs) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int ni = 0; ni < NI; ++ni) {
    const int n = 8 * ni + 2 * t;
    if (pairs) {
      if (n < columns) store_pair(to + n, c[ni][2 * e] * x, c[ni][2 * e + 1] * x);
    } else {
      if (n < columns) to[n] = from_float<T>(c[ni][2 * e] * x);
      if (n + 1 < columns) to[n + 1] = from_float<T>(c[ni][2 * e + 1] * x);
    }
  }
}

}  // namespace mfa::cuda
