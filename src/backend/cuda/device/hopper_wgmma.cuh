// hopper_wgmma.cuh: warpgroup matrix products, 64 x N x 16, 16-bit operands, float32 sums: descriptors, the instruction
// for each N in use, and loops over the inner dimension. Source: PTX ISA 9.0, "Asynchronous warpgroup level matrix".
//
// Tiles in shared memory are as tensor copies with 128-byte swizzle leave them: column chunks of 64 elements, each
// chunk [rows][128 bytes], starting at a multiple of 1024 bytes.
#pragma once

#include <type_traits>

#include "hopper_atoms.cuh"

namespace mfa::cuda::hopper {

// Descriptor of a swizzled tile at shared address `at`. `chunk_bytes` is the distance between column chunks, read only
// when the columns are the outer (M or N) dimension of the product; 8 rows of a chunk are always 1024 bytes apart.
// `offset` bytes further: added to the low word alone, since each 64-bit sum would cost five instructions.
struct TileDescriptor {
  uint32_t low;
  __device__ __forceinline__ explicit TileDescriptor(uint32_t at, uint32_t chunk_bytes = 16)
      : low((chunk_bytes >> 4) << 16 | ((at & 0x3ffff) >> 4)) {}
  __device__ __forceinline__ uint64_t at(uint32_t offset) const {
    constexpr uint32_t swizzle_128 = 1u << 30, group_bytes = 1024;
    return uint64_t{swizzle_128 | group_bytes >> 4} << 32 | (low + (offset >> 4));
  }
};

// Orders register writes before the next products, and opens and closes a group of products.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups are unfinished. Follow with `settle` on what they wrote.
template <int pending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Pins registers at this point of the program: their values are ready before it, and none is read early after it.
// Needed between a wait and the use of sums, and between computing an operand and the fence before its products.
template <int n>
__device__ __forceinline__ void settle(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int n>
__device__ __forceinline__ void settle(uint32_t (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// d [64, N] (+)= A B. shared_a: A from a descriptor; register_a: A as four packed registers. A transposed operand has
// its inner dimension along the rows of its tile.
template <int N>
struct Product;

// clang-format off
#define MFA_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MFA_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define MFA_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define MFA_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define MFA_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define MFA_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define MFA_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define MFA_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define MFA_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define MFA_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define MFA_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define MFA_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define MFA_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define MFA_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define MFA_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define MFA_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define MFA_D(b) "+f"(d[8 * b]), "+f"(d[8 * b + 1]), "+f"(d[8 * b + 2]), "+f"(d[8 * b + 3]), \
                "+f"(d[8 * b + 4]), "+f"(d[8 * b + 5]), "+f"(d[8 * b + 6]), "+f"(d[8 * b + 7])
// i0.. are the numbers of the operands that follow the N / 2 sums.
#define MFA_PRODUCT_ASM(N, TYPE, REGS, A, PRED, REST)                                                              \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" PRED ", 0;\n"                                               \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS "}, " A ", accumulate, 1, 1, " REST ";\n}\n"
#define MFA_PRODUCT(N, REGS, SUMS, i0, i1, i2, i3, i4, i5, i6)                                                         \
  template <>                                                                                                          \
  struct Product<N> {                                                                                                  \
    template <class T, int transpose_a, int transpose_b>                                                               \
    static __device__ __forceinline__ void shared_a(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {       \
      if constexpr (std::is_same_v<T, __half>)                                                                         \
        asm volatile(MFA_PRODUCT_ASM(N, "f16", REGS, "%" #i0 ", %" #i1, #i2, "%" #i3 ", %" #i4)                        \
                     : SUMS                                                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(transpose_a), "n"(transpose_b));                           \
      else                                                                                                             \
        asm volatile(MFA_PRODUCT_ASM(N, "bf16", REGS, "%" #i0 ", %" #i1, #i2, "%" #i3 ", %" #i4)                       \
                     : SUMS                                                                                            \
                     : "l"(a), "l"(b), "r"(accumulate), "n"(transpose_a), "n"(transpose_b));                           \
    }                                                                                                                  \
    template <class T, int transpose_b>                                                                                \
    static __device__ __forceinline__ void register_a(float (&d)[N / 2], const uint32_t* a, uint64_t b,                \
                                                      int accumulate) {                                                \
      if constexpr (std::is_same_v<T, __half>)                                                                         \
        asm volatile(MFA_PRODUCT_ASM(N, "f16", REGS, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4, #i5, "%" #i6)  \
                     : SUMS                                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transpose_b));         \
      else                                                                                                             \
        asm volatile(MFA_PRODUCT_ASM(N, "bf16", REGS, "{%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4, #i5, "%" #i6) \
                     : SUMS                                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(transpose_b));         \
    }                                                                                                                  \
  };
#define MFA_REGS_32 MFA_R0 ", " MFA_R1
#define MFA_SUMS_32 MFA_D(0), MFA_D(1)
MFA_PRODUCT(32, MFA_REGS_32, MFA_SUMS_32, 16, 17, 18, 19, 20, 21, 22)
#define MFA_REGS_48 MFA_R0 ", " MFA_R1 ", " MFA_R2
#define MFA_SUMS_48 MFA_D(0), MFA_D(1), MFA_D(2)
MFA_PRODUCT(48, MFA_REGS_48, MFA_SUMS_48, 24, 25, 26, 27, 28, 29, 30)
#define MFA_REGS_64 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3
#define MFA_SUMS_64 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3)
MFA_PRODUCT(64, MFA_REGS_64, MFA_SUMS_64, 32, 33, 34, 35, 36, 37, 38)
#define MFA_REGS_80 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4
#define MFA_SUMS_80 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4)
MFA_PRODUCT(80, MFA_REGS_80, MFA_SUMS_80, 40, 41, 42, 43, 44, 45, 46)
#define MFA_REGS_96 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5
#define MFA_SUMS_96 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5)
MFA_PRODUCT(96, MFA_REGS_96, MFA_SUMS_96, 48, 49, 50, 51, 52, 53, 54)
#define MFA_REGS_112 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6
#define MFA_SUMS_112 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6)
MFA_PRODUCT(112, MFA_REGS_112, MFA_SUMS_112, 56, 57, 58, 59, 60, 61, 62)
#define MFA_REGS_128 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6 ", " MFA_R7
#define MFA_SUMS_128 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6), MFA_D(7)
MFA_PRODUCT(128, MFA_REGS_128, MFA_SUMS_128, 64, 65, 66, 67, 68, 69, 70)
#define MFA_REGS_160 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6 ", " MFA_R7 ", " MFA_R8 ", " MFA_R9
#define MFA_SUMS_160 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6), MFA_D(7), MFA_D(8), MFA_D(9)
MFA_PRODUCT(160, MFA_REGS_160, MFA_SUMS_160, 80, 81, 82, 83, 84, 85, 86)
#define MFA_REGS_176 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6 ", " MFA_R7 ", " MFA_R8 ", " MFA_R9 ", " MFA_R10
#define MFA_SUMS_176 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6), MFA_D(7), MFA_D(8), MFA_D(9), MFA_D(10)
MFA_PRODUCT(176, MFA_REGS_176, MFA_SUMS_176, 88, 89, 90, 91, 92, 93, 94)
#define MFA_REGS_192 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6 ", " MFA_R7 ", " MFA_R8 ", " MFA_R9 ", " MFA_R10 ", " MFA_R11
#define MFA_SUMS_192 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6), MFA_D(7), MFA_D(8), MFA_D(9), MFA_D(10), MFA_D(11)
MFA_PRODUCT(192, MFA_REGS_192, MFA_SUMS_192, 96, 97, 98, 99, 100, 101, 102)
#define MFA_REGS_256 MFA_R0 ", " MFA_R1 ", " MFA_R2 ", " MFA_R3 ", " MFA_R4 ", " MFA_R5 ", " MFA_R6 ", " MFA_R7 ", " MFA_R8 ", " MFA_R9 ", " MFA_R10 ", " MFA_R11 ", " MFA_R12 ", " MFA_R13 ", " MFA_R14 ", " MFA_R15
#define MFA_SUMS_256 MFA_D(0), MFA_D(1), MFA_D(2), MFA_D(3), MFA_D(4), MFA_D(5), MFA_D(6), MFA_D(7), MFA_D(8), MFA_D(9), MFA_D(10), MFA_D(11), MFA_D(12), MFA_D(13), MFA_D(14), MFA_D(15)
MFA_PRODUCT(256, MFA_REGS_256, MFA_SUMS_256, 128, 129, 130, 131, 132, 133, 134)
#undef MFA_R0
#undef MFA_R1
#undef MFA_R2
#undef MFA_R3
#undef MFA_R4
#undef MFA_R5
#undef MFA_R6
#undef MFA_R7
#undef MFA_R8
#undef MFA_R9
#undef MFA_R10
#undef MFA_R11
#undef MFA_R12
#undef MFA_R13
#undef MFA_R14
#undef MFA_R15
#undef MFA_D
#undef MFA_PRODUCT
#undef MFA_PRODUCT_ASM
#undef MFA_REGS_32
#undef MFA_SUMS_32
#undef MFA_REGS_48
#undef MFA_SUMS_48
#undef MFA_REGS_64
#undef MFA_SUMS_64
#undef MFA_REGS_80
#undef MFA_SUMS_80
#undef MFA_REGS_96
#undef MFA_SUMS_96
#undef MFA_REGS_112
#undef MFA_SUMS_112
#undef MFA_REGS_128
#undef MFA_SUMS_128
#undef MFA_REGS_160
#undef MFA_SUMS_160
#undef MFA_REGS_176
#undef MFA_SUMS_176
#undef MFA_REGS_192
#undef MFA_SUMS_192
#undef MFA_REGS_256
#undef MFA_SUMS_256
// clang-format on

// Sums from which products start. Costs nothing: says that old values are dead.
template <int n>
__device__ __forceinline__ void zero(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) d[i] = 0.f;
}

// d [64, N] = A B^T over `depth` columns, or what that adds to it: both tiles keep the inner dimension along their
// columns. `a` and `b` are the tiles' addresses, their chunks `a_rows` and `b_rows` rows long; A starts at a multiple
// of 8 rows.
template <class T, int N, int depth, int a_rows, int b_rows, bool begin = true>
__device__ __forceinline__ void multiply_columns(float (&d)[N / 2], uint32_t a, uint32_t b) {
  if (begin) zero(d);
  asm volatile("" : "+r"(a), "+r"(b));  // descriptors are cheaper made anew than kept: they would fill the registers
  const TileDescriptor da(a), db(b);
#pragma unroll
  for (int c = 0; c < depth; c += 16) {
    const int chunk = c / 64, within = c % 64 * 2;
    Product<N>::template shared_a<T, 0, 0>(d, da.at(chunk * a_rows * 128 + within),
                                           db.at(chunk * b_rows * 128 + within), begin ? c > 0 : 1);
  }
}

// d [64, N] += A B over `depth` rows of B: A [64, depth] packed in registers, B a tile of N columns, `rows` rows a
// chunk.
template <class T, int N, int depth, int rows>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 2], const uint32_t (&a)[depth / 4], uint32_t b,
                                              int accumulate) {
  asm volatile("" : "+r"(b));
  const TileDescriptor db(b, rows * 128);
#pragma unroll
  for (int r = 0; r < depth; r += 16)
    Product<N>::template register_a<T, 1>(d, a + r / 4, db.at(r * 128), r > 0 ? 1 : accumulate);
}

// The same with A a tile of `a_rows` rows a chunk, its columns the inner dimension.
template <class T, int N, int depth, int a_rows, int rows>
__device__ __forceinline__ void multiply_tiles(float (&d)[N / 2], uint32_t a, uint32_t b) {
  asm volatile("" : "+r"(a), "+r"(b));
  const TileDescriptor da(a), db(b, rows * 128);
#pragma unroll
  for (int r = 0; r < depth; r += 16)
    Product<N>::template shared_a<T, 0, 1>(d, da.at(r / 64 * a_rows * 128 + r % 64 * 2), db.at(r * 128), 1);
}

}  // namespace mfa::cuda::hopper
