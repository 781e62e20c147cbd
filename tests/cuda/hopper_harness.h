// hopper_harness.h: what the standalone Hopper programs share: loading cubins, tensor maps, a plain reference, errors.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "backend/cuda/device/hopper_tiles.cuh"

namespace harness {

inline void check(CUresult r, const char* what) {
  if (r == CUDA_SUCCESS) return;
  const char* text = nullptr;
  cuGetErrorString(r, &text);
  std::fprintf(stderr, "%s: %s\n", what, text ? text : "?");
  std::exit(1);
}
inline void check(cudaError_t r, const char* what) {
  if (r == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(r));
  std::exit(1);
}

struct Kernels {
  CUmodule module;
  explicit Kernels(const std::string& path) { check(cuModuleLoad(&module, path.c_str()), path.c_str()); }
  CUfunction get(const std::string& name, int shared_bytes) const {
    CUfunction f;
    check(cuModuleGetFunction(&f, module, name.c_str()), name.c_str());
    if (shared_bytes > 48 * 1024)
      check(cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes), name.c_str());
    return f;
  }
};

// A map over [B, H, N, D] with boxes of 64 columns and `rows` rows.
inline CUtensorMap tensor_map(const void* data, bool half, int B, int H, int N, int D, const int64_t stride[3],
                              int rows) {
  CUtensorMap map;
  const cuuint64_t dims[4] = {cuuint64_t(D), cuuint64_t(N), cuuint64_t(H), cuuint64_t(B)};
  const cuuint64_t strides[3] = {cuuint64_t(stride[2] * 2), cuuint64_t(stride[1] * 2), cuuint64_t(stride[0] * 2)};
  const cuuint32_t box[4] = {64, cuuint32_t(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  check(cuTensorMapEncodeTiled(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                               const_cast<void*>(data), dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "tensor map");
  return map;
}

template <class T>
T* device(size_t n) {
  void* p;
  check(cudaMalloc(&p, std::max<size_t>(n * sizeof(T), 256)), "cudaMalloc");
  return static_cast<T*>(p);
}

// --- Random inputs

__device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(x >> 32);
}
__device__ inline float normal(uint64_t i) {
  const float u = (hash(2 * i) + 1.0f) * 2.3283064e-10f, v = hash(2 * i + 1) * 2.3283064e-10f;
  return sqrtf(-2.f * logf(fminf(u, 1.f))) * cospif(2.f * v);
}
template <class T>
__global__ void fill_normal(T* p, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    p[i] = T(normal(seed * 0x9E3779B97F4A7C15ull + i));
}
template <class T>
__global__ void fill_value(T* p, size_t n, float value) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    p[i] = T(value);
}
template <class T>
void randomise(T* p, size_t n, uint64_t seed) {
  fill_normal<<<1024, 256>>>(p, n, seed);
}

// --- Scores by plain loops in float64

template <class T>
__device__ double load(const mfa::cuda::Tensor& t, int b, int h, int64_t n, int d) {
  return static_cast<double>(
      static_cast<float>(static_cast<const T*>(t.data)[b * t.stride[0] + h * t.stride[1] + n * t.stride[2] + d]));
}

// Philox4x32-10 word for key `key`; common/philox.h.
__device__ inline uint32_t dropout_word(const mfa::cuda::Problem& p, uint32_t row_head, uint32_t query, uint32_t key) {
  uint32_t c[4] = {key >> 2, query, row_head, 0}, k0 = p.dropout_seed[0], k1 = p.dropout_seed[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t n[4] = {uint32_t(b >> 32) ^ c[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ k1, uint32_t(a)};
    for (int i = 0; i < 4; ++i) c[i] = n[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[key & 3];
}

struct Score {
  double s;     // natural units; -inf: not seen
  double ds;    // derivative by scale * q . k
  double drop;  // dropout factor
};
template <class T>
__device__ Score score(const mfa::cuda::Problem& p, int b, int h, int i, int j) {
  const auto see = mfa::cuda::hopper::visibility(p, b);
  Score r{-INFINITY, 1., 1.};
  if (j < see.begin(i) || j >= see.end(i)) return r;
  if (p.mask.data &&
      !p.mask.data[b * p.mask.stride[0] + h * p.mask.stride[1] + i * p.mask.stride[2] + j * p.mask.stride[3]])
    return r;
  double s = 0;
  for (int d = 0; d < p.D; ++d) s += load<T>(p.q, b, h, i, d) * load<T>(p.k, b, h / p.G, j, d);
  s *= p.scale;
  if (p.softcap > 0) {
    const double t = tanh(s / p.softcap);
    s = p.softcap * t;
    r.ds = 1 - t * t;
  }
  if (p.alibi_slopes) s += double(p.alibi_slopes[h]) * (j - i - see.offset);
  if (p.bias.data)
    s += static_cast<const float*>(
        p.bias.data)[b * p.bias.stride[0] + h * p.bias.stride[1] + i * p.bias.stride[2] + j * p.bias.stride[3]];
  if (p.dropout_seed)
    r.drop = dropout_word(p, b * p.Hq + h, i, j) >= p.dropout_threshold ? double(p.dropout_scale) : 0.;
  r.s = s;
  return r;
}

// Grid: (Nq, Hq, B), 128 threads; s, z: scratch [B, Hq, Nq, Nk] of float64.
template <class T>
__global__ void reference_forward(mfa::cuda::Problem p, double* prob, double* o, double* lse) {
  const int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t row = (int64_t{b} * p.Hq + h) * p.Nq + i;
  double* s = prob + row * p.Nk;
  __shared__ double m, l;
  for (int j = threadIdx.x; j < p.Nk; j += blockDim.x) s[j] = score<T>(p, b, h, i, j).s;
  __syncthreads();
  if (threadIdx.x == 0) {
    m = p.sinks ? double(p.sinks[h]) : -INFINITY;
    bool nan = false;
    for (int j = 0; j < p.Nk; ++j) {
      nan |= isnan(s[j]);
      m = fmax(m, s[j]);
    }
    l = p.sinks ? exp(p.sinks[h] - m) : 0;
    if (m > -INFINITY)
      for (int j = 0; j < p.Nk; ++j) l += exp(s[j] - m);
    if (nan) l = NAN;
    lse[row] = l == 0 ? -INFINITY : m + log(l);
  }
  __syncthreads();
  for (int j = threadIdx.x; j < p.Nk; j += blockDim.x) s[j] = s[j] == -INFINITY ? 0 : exp(s[j] - lse[row]);
  __syncthreads();
  const auto see = mfa::cuda::hopper::visibility(p, b);
  for (int d = threadIdx.x; d < p.Dv; d += blockDim.x) {
    double sum = 0;
    for (int j = see.begin(i); j < see.end(i); ++j) {
      const Score z = p.mask.data || p.dropout_seed ? score<T>(p, b, h, i, j) : Score{0, 1, 1};
      if (z.s > -INFINITY || isnan(z.s)) sum += s[j] * z.drop * load<T>(p.v, b, h / p.G, j, d);
    }
    o[row * p.Dv + d] = sum;
  }
}

// --- One problem with its inputs

struct Case {
  int B, Hq, Hkv, Nq, Nk, D;
  bool causal;
  int left = -1, right = -1;
  bool lengths = false, sinks = false, poison = false;
  float softcap = 0;
  bool alibi = false, bias = false, mask = false;
  float dropout = 0;
  int Dv = 0;              // 0: D
  bool broadcast = false;  // k and v the same for every head
  bool far = false;        // heads of k and v more than 2^31 elements apart
  int value_columns() const { return Dv ? Dv : D; }
  bool modified() const { return softcap > 0 || alibi || bias || mask || dropout > 0; }
};

template <class T>
struct Inputs {
  Case c;
  mfa::cuda::Problem p{};
  T *q, *k, *v;
  std::vector<void*> owned;

  template <class U>
  U* take(size_t n) {
    U* x = device<U>(n);
    owned.push_back(x);
    return x;
  }
  ~Inputs() {
    for (void* x : owned) cudaFree(x);
  }

  // [B, N, H, D] in memory, viewed as [B, H, N, D]; `extra` rows of NaN between batch entries.
  T* tensor(int H, int N, int D, int extra, bool of_keys, mfa::cuda::Tensor& t, uint64_t seed) {
    const int64_t distance = (int64_t{1} << 31) + 64;
    const bool apart = of_keys && c.far, shared = of_keys && c.broadcast;
    const int heads = shared ? 1 : H;
    const size_t n = apart ? size_t(distance) * (H - 1) + size_t(N) * D : size_t(c.B) * (N + extra) * heads * D;
    T* x = take<T>(n);
    t.data = x;
    t.stride[0] = int64_t(N + extra) * heads * D;
    t.stride[1] = shared ? 0 : apart ? distance : D;
    t.stride[2] = apart ? D : int64_t(heads) * D;
    if (apart) {
      for (int i = 0; i < H; ++i) randomise(x + i * distance, size_t(N) * D, seed + 100 * i);
      t.stride[0] = distance * H;
      return x;
    }
    randomise(x, n, seed);
    if (extra)
      for (int b = 0; b < c.B; ++b)
        fill_value<<<64, 256>>>(x + b * t.stride[0] + int64_t(N) * heads * D, size_t(extra) * heads * D, NAN);
    return x;
  }

  explicit Inputs(const Case& c_) : c(c_) {
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Nq = c.Nq, p.Nk = c.Nk, p.D = c.D, p.Dv = c.value_columns(),
    p.G = c.Hq / c.Hkv;
    q = tensor(c.Hq, c.Nq, c.D, c.poison ? 3 : 0, false, p.q, 1);
    k = tensor(c.Hkv, c.Nk, c.D, c.poison ? 5 : 0, true, p.k, 2);
    v = tensor(c.Hkv, c.Nk, c.value_columns(), c.poison ? 5 : 0, true, p.v, 3);
    p.scale = 1.f / std::sqrt(float(c.D));
    p.scale_log2 = p.scale * 1.44269504f;
    set_windows(p, c.causal, c.left, c.right);
    if (c.lengths) {
      std::vector<int> lengths(c.B);
      for (int b = 0; b < c.B; ++b) lengths[b] = b == 1 ? 0 : c.Nk - 37 * b - 5;
      int* d = take<int>(c.B);
      cudaMemcpy(d, lengths.data(), c.B * 4, cudaMemcpyHostToDevice);
      p.kv_lengths = d;
      if (c.poison)
        for (int b = 0; b < c.B; ++b) {
          const size_t n = size_t(c.Nk - std::max(0, lengths[b])) * c.Hkv;
          if (!n) continue;
          fill_value<<<64, 256>>>(k + b * p.k.stride[0] + lengths[b] * p.k.stride[2], n * c.D, NAN);
          fill_value<<<64, 256>>>(v + b * p.v.stride[0] + lengths[b] * p.v.stride[2], n * c.value_columns(), NAN);
        }
    }
    if (c.poison && c.Nk > 40) {  // one value each, seen by some rows only
      fill_value<<<1, 1>>>(v + (c.Nk - 20) * p.v.stride[2] + 3, 1, NAN);
      fill_value<<<1, 1>>>(v + (c.Nk - 31) * p.v.stride[2] + 17, 1, INFINITY);
      fill_value<<<1, 1>>>(k + (c.Nk - 9) * p.k.stride[2] + 5, 1, NAN);
    }
    if (c.sinks || c.alibi) {
      float* x = take<float>(c.Hq);
      randomise(x, c.Hq, 7);
      if (c.sinks) p.sinks = x;
      if (c.alibi) p.alibi_slopes = x;
    }
    if (c.softcap > 0) {
      p.softcap = c.softcap;
      p.softcap_log2 = c.softcap * 1.44269504f;
      p.scale_over_softcap = p.scale / c.softcap;
    }
    if (c.bias) {
      float* x = take<float>(size_t(c.Hq) * c.Nq * c.Nk);
      randomise(x, size_t(c.Hq) * c.Nq * c.Nk, 8);
      p.bias.data = x;
      p.bias.stride[1] = int64_t(c.Nq) * c.Nk;
      p.bias.stride[2] = c.Nk;
      p.bias.stride[3] = 1;
    }
    if (c.mask) {
      std::vector<uint8_t> x(size_t(c.Nq) * c.Nk);
      for (size_t i = 0; i < x.size(); ++i) x[i] = (i * 2654435761u >> 13 & 3) != 0 && (i / c.Nk) % 19 != 5;
      uint8_t* d = take<uint8_t>(x.size());
      cudaMemcpy(d, x.data(), x.size(), cudaMemcpyHostToDevice);
      p.mask.data = d;
      p.mask.stride[2] = c.Nk;
      p.mask.stride[3] = 1;
    }
    if (c.dropout > 0) {
      const uint32_t seed[2] = {123, 456};
      uint32_t* d = take<uint32_t>(2);
      cudaMemcpy(d, seed, 8, cudaMemcpyHostToDevice);
      p.dropout_seed = d;
      p.dropout_threshold = uint64_t(std::floor(double(c.dropout) * 4294967296.0));
      p.dropout_scale = 1.f / (1.f - c.dropout);
    }
  }
};

// Grid: (Nq, Hq, B), 128 threads. Turns probabilities into ds (of scale * q . k) and pz (dropped probabilities); writes
// dq.
template <class T>
__global__ void reference_backward_rows(mfa::cuda::Problem p, mfa::cuda::Tensor d_o, const double* o, const float* dlse,
                                        double* prob, double* ds, double* dq) {
  const int i = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t row = (int64_t{b} * p.Hq + h) * p.Nq + i;
  double delta = dlse ? -double(dlse[row]) : 0;
  for (int d = 0; d < p.Dv; ++d) delta += o[row * p.Dv + d] * load<T>(d_o, b, h, i, d);
  for (int j = threadIdx.x; j < p.Nk; j += blockDim.x) {
    const Score z = score<T>(p, b, h, i, j);
    double g = 0;
    if (z.s > -INFINITY || isnan(z.s)) {
      double dp = 0;
      for (int d = 0; d < p.Dv; ++d) dp += load<T>(d_o, b, h, i, d) * load<T>(p.v, b, h / p.G, j, d);
      g = prob[row * p.Nk + j] * (dp * z.drop - delta) * z.ds;
      prob[row * p.Nk + j] *= z.drop;
    } else {
      prob[row * p.Nk + j] = -1;  // not seen
    }
    ds[row * p.Nk + j] = g;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < p.D; d += blockDim.x) {
    double sum = 0;
    for (int j = 0; j < p.Nk; ++j)
      if (prob[row * p.Nk + j] != -1) sum += ds[row * p.Nk + j] * load<T>(p.k, b, h / p.G, j, d);
    dq[row * p.D + d] = sum * p.scale;
  }
}
// Grid: (Nk, Hkv, B), 128 threads.
template <class T>
__global__ void reference_backward_keys(mfa::cuda::Problem p, mfa::cuda::Tensor d_o, const double* prob,
                                        const double* ds, double* dk, double* dv) {
  const int j = blockIdx.x, h = blockIdx.y, b = blockIdx.z;
  const int64_t key = (int64_t{b} * p.Hkv + h) * p.Nk + j;
  for (int d = threadIdx.x; d < max(p.D, p.Dv); d += blockDim.x) {
    double k = 0, v = 0;
    for (int g = 0; g < p.G; ++g)
      for (int i = 0; i < p.Nq; ++i) {
        const int64_t at = ((int64_t{b} * p.Hq + h * p.G + g) * p.Nq + i) * p.Nk + j;
        if (prob[at] == -1) continue;
        if (d < p.D) k += ds[at] * load<T>(p.q, b, h * p.G + g, i, d);
        if (d < p.Dv) v += prob[at] * load<T>(d_o, b, h * p.G + g, i, d);
      }
    if (d < p.D) dk[key * p.D + d] = k * p.scale;
    if (d < p.Dv) dv[key * p.Dv + d] = v;
  }
}
template <class T>
__global__ void convert(const double* from, T* to, size_t n) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x)
    to[i] = T(static_cast<float>(from[i]));
}

// --- Comparison

struct Error {
  double relative = 0, largest = 0;  // ||x - r|| / ||r||, max |x - r|
  bool ok = true;                    // NaN and infinities in the same places
};
inline Error compare(const std::vector<double>& x, const std::vector<double>& r) {
  Error e;
  double num = 0, den = 0;
  for (size_t i = 0; i < r.size(); ++i) {
    if (!std::isfinite(r[i]) || !std::isfinite(x[i])) {
      e.ok &= std::isfinite(r[i]) == std::isfinite(x[i]) && (std::isnan(r[i]) || x[i] == r[i] || std::isnan(x[i]));
      continue;
    }
    num += (x[i] - r[i]) * (x[i] - r[i]);
    den += r[i] * r[i];
    e.largest = std::max(e.largest, std::abs(x[i] - r[i]));
  }
  e.relative = std::sqrt(num / std::max(den, 1e-300));
  if (den < 1e-20) e.relative = e.largest;
  return e;
}

// --- Timing

template <class F>
double median_ms(F&& launch, int repeats) {
  std::vector<float> times;
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  for (int i = 0; i < 2; ++i) launch();
  for (int i = 0; i < repeats; ++i) {
    cudaEventRecord(start);
    launch();
    cudaEventRecord(stop);
    cudaEventSynchronize(stop);
    float ms;
    cudaEventElapsedTime(&ms, start, stop);
    times.push_back(ms);
  }
  check(cudaGetLastError(), "timed launches");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace harness
