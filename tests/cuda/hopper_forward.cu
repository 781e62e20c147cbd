// hopper_forward.cu: checks the Hopper forward kernels against float64 and times them.
// Usage: hopper_forward CUBIN [check] [time]
#include "hopper_harness.h"

using namespace harness;
using mfa::cuda::ForwardParams;
using mfa::cuda::HopperSchedule;
using mfa::cuda::Problem;
namespace hopper = mfa::cuda::hopper;

struct Case {
  int B, Hq, Hkv, Nq, Nk, D;
  bool causal;
  int left = -1, right = -1;
  bool lengths = false, sinks = false, poison = false;
  float softcap = 0;
  bool alibi = false, bias = false, mask = false;
  float dropout = 0;
  bool modified() const { return softcap > 0 || alibi || bias || mask || dropout > 0; }
};

static int slot = 0;

template <class T>
struct Run {
  Case c;
  Problem p{};
  ForwardParams f{};
  T *q, *k, *v, *o;
  int64_t q_rows, k_rows;
  CUtensorMap qm, km, vm;
  CUfunction kernel;
  hopper::ForwardLayout layout;
  HopperSchedule s{};
  std::vector<void*> owned;

  template <class U>
  U* take(size_t n) {
    U* x = device<U>(n);
    owned.push_back(x);
    return x;
  }
  ~Run() {
    for (void* x : owned) cudaFree(x);
  }

  // [B, N, H, D] in memory, viewed as [B, H, N, D]; `extra` rows of NaN between batch entries.
  T* tensor(int H, int N, int extra, mfa::cuda::Tensor& t, uint64_t seed) {
    const size_t n = size_t(c.B) * (N + extra) * H * c.D;
    T* x = take<T>(n);
    randomise(x, n, seed);
    t.data = x;
    t.stride[0] = int64_t(N + extra) * H * c.D;
    t.stride[1] = c.D;
    t.stride[2] = int64_t(H) * c.D;
    if (extra)
      for (int b = 0; b < c.B; ++b)
        fill_value<<<64, 256>>>(x + b * t.stride[0] + int64_t(N) * H * c.D, size_t(extra) * H * c.D, NAN);
    return x;
  }

  Run(const Kernels& kernels, const Case& c_) : c(c_) {
    const bool half = std::is_same_v<T, __half>;
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.Nq = c.Nq, p.Nk = c.Nk, p.D = p.Dv = c.D, p.G = c.Hq / c.Hkv;
    q = tensor(c.Hq, c.Nq, c.poison ? 3 : 0, p.q, 1);
    k = tensor(c.Hkv, c.Nk, c.poison ? 5 : 0, p.k, 2);
    v = tensor(c.Hkv, c.Nk, c.poison ? 5 : 0, p.v, 3);
    p.scale = 1.f / std::sqrt(float(c.D));
    p.scale_log2 = p.scale * 1.44269504f;
    p.causal = c.causal, p.window_left = c.left, p.window_right = c.right;
    if (c.lengths) {
      std::vector<int> lengths(c.B);
      for (int b = 0; b < c.B; ++b) lengths[b] = b == 1 ? 0 : c.Nk - 37 * b - 5;
      int* d = take<int>(c.B);
      cudaMemcpy(d, lengths.data(), c.B * 4, cudaMemcpyHostToDevice);
      p.kv_lengths = d;
      if (c.poison)
        for (int b = 0; b < c.B; ++b) {
          const size_t n = size_t(c.Nk - std::max(0, lengths[b])) * c.Hkv * c.D;
          if (!n) continue;
          fill_value<<<64, 256>>>(k + b * p.k.stride[0] + lengths[b] * p.k.stride[2], n, NAN);
          fill_value<<<64, 256>>>(v + b * p.v.stride[0] + lengths[b] * p.v.stride[2], n, NAN);
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
    f.p = p;
    o = take<T>(size_t(c.B) * c.Nq * c.Hq * c.D);
    f.o = {o, {int64_t(c.Nq) * c.Hq * c.D, c.D, int64_t(c.Hq) * c.D}};
    f.lse = take<float>(size_t(c.B) * c.Hq * c.Nq);
    f.splits = 1;

    const int columns = hopper::columns_of(c.D);
    int choice = 0;
    while (hopper::forward_tiles[choice].columns != columns) ++choice;
    const auto tile = hopper::forward_tiles[choice];
    layout = hopper::forward_layout(tile);
    kernel = kernels.get(std::string("hopper_forward_") + (c.modified() ? "modified_" : "") +
                             std::to_string(columns) + (half ? "_f16" : "_bf16"),
                         layout.bytes);
    qm = tensor_map(q, half, c.B, c.Hq, c.Nq, c.D, p.q.stride, 64);
    km = tensor_map(k, half, c.B, c.Hkv, c.Nk, c.D, p.k.stride, tile.tile);
    vm = tensor_map(v, half, c.B, c.Hkv, c.Nk, c.D, p.v.stride, tile.tile);
    s = hopper::schedule(c.B * c.Hq, (c.Nq + 64 * tile.consumers - 1) / (64 * tile.consumers),
                         int64_t(c.Nk) * c.D * 4, c.causal, ++slot);
  }
  void launch() {
    void* args[] = {&f, &s, &qm, &km, &vm};
    check(cuLaunchKernel(kernel, std::min(132, s.tiles), 1, 1, layout.threads, 1, 1, layout.bytes, nullptr, args,
                         nullptr),
          "launch");
  }

  bool verify(const char* dtype) {
    const size_t rows = size_t(c.B) * c.Hq * c.Nq, n = rows * c.D;
    fill_value<<<256, 256>>>(o, n, 777.f);
    fill_value<<<256, 256>>>(f.lse, rows, 777.f);
    launch();
    check(cudaDeviceSynchronize(), "forward");
    double *ro = take<double>(n), *rl = take<double>(rows), *prob = take<double>(rows * c.Nk);
    reference_forward<T><<<dim3(c.Nq, c.Hq, c.B), 128>>>(p, prob, ro, rl);
    check(cudaDeviceSynchronize(), "reference");
    std::vector<double> r(n), x(n), rlse(rows), xlse(rows);
    std::vector<T> raw(n);
    std::vector<float> lse(rows);
    cudaMemcpy(r.data(), ro, n * 8, cudaMemcpyDeviceToHost);
    cudaMemcpy(rlse.data(), rl, rows * 8, cudaMemcpyDeviceToHost);
    cudaMemcpy(raw.data(), o, n * sizeof(T), cudaMemcpyDeviceToHost);
    cudaMemcpy(lse.data(), f.lse, rows * 4, cudaMemcpyDeviceToHost);
    for (int b = 0; b < c.B; ++b)
      for (int h = 0; h < c.Hq; ++h)
        for (int i = 0; i < c.Nq; ++i)
          for (int d = 0; d < c.D; ++d)
            x[((size_t(b) * c.Hq + h) * c.Nq + i) * c.D + d] =
                float(raw[b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2] + d]);
    for (size_t i = 0; i < rows; ++i) xlse[i] = lse[i];
    const Error eo = compare(x, r), el = compare(xlse, rlse);
    const bool half = std::is_same_v<T, __half>;
    bool ok = eo.ok && el.ok && eo.relative < (half ? 6e-4 : 4.6e-3) && el.largest < 1e-4 && el.relative < 2e-5;
    // Same bits again.
    for (int i = 0; i < 3; ++i) {
      launch();
      std::vector<T> again(n);
      cudaMemcpy(again.data(), o, n * sizeof(T), cudaMemcpyDeviceToHost);
      ok &= std::equal(raw.begin(), raw.end(), again.begin(),
                       [](T a, T b) { return *reinterpret_cast<uint16_t*>(&a) == *reinterpret_cast<uint16_t*>(&b); });
    }
    std::printf("%s %s B%d Hq%d Hkv%d Nq%d Nk%d D%d causal%d window(%d,%d) len%d sink%d poison%d cap%g alibi%d bias%d mask%d "
                "drop%g: o %.2e max %.1e nan-ok%d lse %.1e ok%d\n",
                ok ? "ok  " : "FAIL", dtype, c.B, c.Hq, c.Hkv, c.Nq, c.Nk, c.D, c.causal, c.left, c.right, c.lengths,
                c.sinks, c.poison, c.softcap, c.alibi, c.bias, c.mask, c.dropout, eo.relative, eo.largest, eo.ok,
                el.largest, el.ok);
    std::fflush(stdout);
    return ok;
  }
};

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  check(cudaFree(nullptr), "start");
  const Kernels kernels(argv[1]);
  bool checks = false, times = false, modified = false;
  std::vector<int> dims;
  for (int i = 2; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "check") checks = true;
    else if (a == "time") times = true;
    else if (a == "modified") modified = true;
    else dims.push_back(std::atoi(argv[i]));
  }
  if (dims.empty()) dims = {64, 96, 128, 192, 256};
  int failures = 0;
  if (checks)
    for (int D : dims) {
      std::vector<Case> cases = {
          {1, 1, 1, 128, 128, D, false},       {1, 2, 1, 256, 384, D, true},
          {2, 4, 2, 333, 517, D, false},       {2, 4, 2, 517, 333, D, true},
          {2, 4, 1, 200, 1000, D, true},       {1, 2, 2, 1, 1, D, true},
          {1, 2, 2, 700, 700, D, false, 100, 50}, {1, 2, 2, 700, 900, D, true, 130},
          {3, 2, 1, 300, 411, D, true, -1, -1, true}, {3, 2, 1, 300, 411, D, false, 64, 10, true, true},
          {3, 4, 2, 300, 411, D, true, -1, -1, true, true, true}, {2, 2, 2, 300, 400, D, false, -1, -1, true, false, true},
          {2, 2, 1, 500, 500, D, true, -1, -1, false, false, true}, {2, 3, 3, 1024, 64, D, false, 5, 5},
          {1, 40, 8, 640, 640, D, true}, {1, 2, 2, 260, 400, D - 8, true}, 
      };
      for (const Case& c : cases) failures += !Run<__nv_bfloat16>(kernels, c).verify("bf16");
      for (const Case& c : {cases[2], cases[4], cases[10]}) failures += !Run<__half>(kernels, c).verify("f16");
      if (modified) {
        Case m{2, 4, 2, 333, 417, D, true};
        m.softcap = 5;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m.softcap = 0, m.alibi = true;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m.alibi = false, m.bias = true;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m.bias = false, m.mask = true, m.causal = false;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m.poison = true;
        failures += !Run<__half>(kernels, m).verify("f16");
        m.poison = false, m.mask = false, m.dropout = .3f;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m = {3, 4, 2, 333, 417, D, true, 200, -1, true, true, true, 8, true, true, true, .2f};
        m.alibi = false;
        failures += !Run<__half>(kernels, m).verify("f16");
      }
    }
  if (checks) std::printf("%d failures\n", failures);
  if (times)
    for (int D : dims)
      for (auto [B, N] : {std::pair{4, 4096}, std::pair{1, 16384}})
        for (bool causal : {false, true}) {
          Run<__nv_bfloat16> run(kernels, {B, 16, 16, N, N, D, causal});
          const double ms = median_ms([&] { run.launch(); }, N == 4096 ? 15 : 9);
          const double flop = 4.0 * B * 16 * double(N) * N * D * (causal ? .5 : 1.);
          std::printf("TIME ours D%d N%d causal%d: %.3f ms %.1f TFLOP/s\n", D, N, causal, ms, flop / ms * 1e-9);
          std::fflush(stdout);
        }
  return failures != 0;
}
