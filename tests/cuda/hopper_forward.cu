// hopper_forward.cu: checks the Hopper forward kernels against float64 and times them.
// Usage: hopper_forward CUBIN [check | quick | soak] [modified] [time] [columns...]
#include "hopper_harness.h"

using namespace harness;
using mfa::cuda::ForwardParams;
using mfa::cuda::HopperSchedule;
namespace hopper = mfa::cuda::hopper;

static int slot = 0, repeats = 3;

template <class T>
struct Run : Inputs<T> {
  using Inputs<T>::c;
  using Inputs<T>::p;
  ForwardParams f{};
  T* o;
  CUtensorMap qm, km, vm;
  CUfunction kernel;
  hopper::ForwardLayout layout;
  HopperSchedule s{};

  Run(const Kernels& kernels, const Case& c_) : Inputs<T>(c_) {
    const bool half = std::is_same_v<T, __half>;
    f.p = p;
    const int Dv = c.value_columns();
    o = this->template take<T>(size_t(c.B) * c.Nq * c.Hq * Dv);
    f.o = {o, {int64_t(c.Nq) * c.Hq * Dv, Dv, int64_t(c.Hq) * Dv}};
    f.lse = this->template take<float>(size_t(c.B) * c.Hq * c.Nq);
    f.splits = 1;

    const int columns = hopper::columns_of(std::max(c.D, Dv));
    const bool narrow_values = columns == 192 && Dv <= 128 && !c.modified();
    int choice = narrow_values ? 5 : 0;
    while (hopper::forward_tiles[choice].columns != columns) ++choice;
    const bool mask_only = c.mask && !c.bias && !c.alibi && c.softcap == 0 && c.dropout == 0 && c.Nk % 16 == 0;
    const auto tile = mask_only      ? hopper::forward_mask_tiles[choice]
                      : c.modified() ? hopper::forward_modified_tiles[choice]
                                     : hopper::forward_tiles[choice];
    layout = hopper::forward_layout(tile);
    kernel = kernels.get(std::string("hopper_forward_") +
                             (mask_only      ? "mask_"
                              : c.modified() ? "modified_"
                                             : "") +
                             std::to_string(columns) + (narrow_values ? "x128" : "") + (half ? "_f16" : "_bf16"),
                         layout.bytes);
    qm = tensor_map(p.q.data, half, c.B, c.Hq, c.Nq, c.D, p.q.stride, 64);
    km = tensor_map(p.k.data, half, c.B, c.Hkv, c.Nk, c.D, p.k.stride, tile.tile);
    vm = tensor_map(p.v.data, half, c.B, c.Hkv, c.Nk, Dv, p.v.stride, tile.tile);
    s = hopper::schedule(c.B * c.Hq, (c.Nq + 64 * tile.consumers - 1) / (64 * tile.consumers),
                         int64_t(c.Nk) * (c.D + Dv) * 2, c.causal, true, ++slot);
  }
  void launch() {
    void* args[] = {&f, &s, &qm, &km, &vm};
    check(cuLaunchKernel(kernel, std::min(132, s.tiles), 1, 1, layout.threads, 1, 1, layout.bytes, nullptr, args,
                         nullptr),
          "launch");
  }

  bool verify(const char* dtype) {
    const size_t rows = size_t(c.B) * c.Hq * c.Nq, n = rows * c.value_columns();
    fill_value<<<256, 256>>>(o, n, 777.f);
    fill_value<<<256, 256>>>(f.lse, rows, 777.f);
    launch();
    check(cudaDeviceSynchronize(), "forward");
    double *ro = this->template take<double>(n), *rl = this->template take<double>(rows),
           *prob = this->template take<double>(rows * c.Nk);
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
          for (int d = 0; d < c.value_columns(); ++d)
            x[((size_t(b) * c.Hq + h) * c.Nq + i) * c.value_columns() + d] =
                float(raw[b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2] + d]);
    for (size_t i = 0; i < rows; ++i) xlse[i] = lse[i];
    const Error eo = compare(x, r), el = compare(xlse, rlse);
    const bool half = std::is_same_v<T, __half>;
    bool ok = eo.ok && el.ok && eo.relative < (half ? 6e-4 : 4.6e-3) && el.largest < 1e-4 && el.relative < 2e-5;
    // Same bits again.
    for (int i = 0; i < repeats; ++i) {
      launch();
      std::vector<T> again(n);
      cudaMemcpy(again.data(), o, n * sizeof(T), cudaMemcpyDeviceToHost);
      ok &= std::equal(raw.begin(), raw.end(), again.begin(),
                       [](T a, T b) { return *reinterpret_cast<uint16_t*>(&a) == *reinterpret_cast<uint16_t*>(&b); });
    }
    std::printf(
        "%s %s B%d Hq%d Hkv%d Nq%d Nk%d D%d,%d causal%d window(%d,%d) len%d sink%d poison%d cap%g alibi%d bias%d "
        "mask%d "
        "drop%g: o %.2e max %.1e nan-ok%d lse %.1e ok%d\n",
        ok ? "ok  " : "FAIL", dtype, c.B, c.Hq, c.Hkv, c.Nq, c.Nk, c.D, c.value_columns(), c.causal, c.left, c.right,
        c.lengths, c.sinks, c.poison, c.softcap, c.alibi, c.bias, c.mask, c.dropout, eo.relative, eo.largest, eo.ok,
        el.largest, el.ok);
    std::fflush(stdout);
    return ok;
  }
};

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  check(cudaFree(nullptr), "start");
  const Kernels kernels(argv[1]);
  bool checks = false, quick = false, times = false, modified = false;
  std::vector<int> dims;
  for (int i = 2; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "check")
      checks = true;
    else if (a == "quick")
      checks = quick = true;
    else if (a == "soak")
      checks = quick = true, repeats = 200;
    else if (a == "time")
      times = true;
    else if (a == "modified")
      modified = true;
    else
      dims.push_back(std::atoi(argv[i]));
  }
  if (dims.empty()) dims = {64, 96, 128, 192, 256};
  int failures = 0;
  if (checks)
    for (int D : dims) {
      std::vector<Case> cases = {
          {1, 1, 1, 128, 128, D, false},
          {1, 2, 1, 256, 384, D, true},
          {2, 4, 2, 333, 517, D, false},
          {2, 4, 2, 517, 333, D, true},
          {2, 4, 1, 200, 1000, D, true},
          {1, 2, 2, 1, 1, D, true},
          {1, 2, 2, 700, 700, D, false, 100, 50},
          {1, 2, 2, 700, 900, D, true, 130},
          {3, 2, 1, 300, 411, D, true, -1, -1, true},
          {3, 2, 1, 300, 411, D, false, 64, 10, true, true},
          {3, 4, 2, 300, 411, D, true, -1, -1, true, true, true},
          {2, 2, 2, 300, 400, D, false, -1, -1, true, false, true},
          {2, 2, 1, 500, 500, D, true, -1, -1, false, false, true},
          {2, 3, 3, 1024, 64, D, false, 5, 5},
          {1, 40, 8, 640, 640, D, true},
          {1, 2, 2, 260, 400, D - 8, true},
      };
      Case c{2, 4, 2, 300, 300, D, true};
      c.Dv = 64;
      cases.push_back(c);
      c = {2, 4, 4, 300, 300, D > 64 ? 64 : 32, true};
      c.Dv = D;
      cases.push_back(c);
      c = {2, 4, 2, 200, 300, D, false};
      c.broadcast = true;
      cases.push_back(c);
      c = {1, 2, 2, 200, 300, D, true};
      c.far = true;
      cases.push_back(c);
      if (quick) cases = {cases[2], cases[3], cases[10]};
      for (const Case& c : cases) failures += !Run<__nv_bfloat16>(kernels, c).verify("bf16");
      if (quick) continue;
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
        m.Nk = 416;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        failures += !Run<__nv_bfloat16>(kernels,
                                        {3, 4, 2, 300, 1040, D, true, 300, -1, true, true, true, 0, false, false, true})
                         .verify("bf16");
        m.poison = true;
        failures += !Run<__half>(kernels, m).verify("f16");
        m.Nk = 417;
        failures += !Run<__half>(kernels, m).verify("f16");
        m.poison = false, m.mask = false, m.dropout = .3f;
        failures += !Run<__nv_bfloat16>(kernels, m).verify("bf16");
        m = {3, 4, 2, 333, 417, D, true, 200, -1, true, true, true, 8, true, true, true, .2f};
        m.alibi = false;
        failures += !Run<__half>(kernels, m).verify("f16");
      }
    }
  if (checks) std::printf("%d failures\n", failures);
  if (times && modified)
    for (int D : dims)
      for (int which = 0; which < 5; ++which) {
        Case c{4, 16, 16, 4096, 4096, D, which == 2};
        c.mask = which == 0, c.bias = which == 1, c.alibi = which == 2, c.softcap = which == 3 ? 20 : 0;
        c.dropout = which == 4 ? .1f : 0;
        Run<__nv_bfloat16> run(kernels, c);
        const double ms = median_ms([&] { run.launch(); }, 9);
        const char* names[] = {"mask", "bias", "alibi causal", "softcap", "dropout"};
        std::printf("TIME ours D%d N4096 %s: %.3f ms %.1f TFLOP/s\n", D, names[which], ms,
                    4.0 * 64 * 4096.0 * 4096 * D * (c.causal ? .5 : 1.) / ms * 1e-9);
      }
  else if (times)
    for (int D : dims)
      for (auto [B, N] : {std::pair{4, 4096}, std::pair{1, 16384}})
        for (bool causal : {false, true}) {
          Run<__nv_bfloat16> run(kernels, {B, 16, 16, N, N, D, causal});
          const double ms = median_ms([&] { run.launch(); }, N == 4096 ? 15 : 9);
          const double flop = 4.0 * B * 16 * double(N) * N * D * (causal ? .5 : 1.);
          std::printf("TIME ours D%d N%d causal%d: %.3f ms %.1f TFLOP/s\n", D, N, causal, ms, flop / ms * 1e-9);
          if (D == 192) {
            Case c{B, 16, 16, N, N, D, causal};
            c.Dv = 128;
            Run<__nv_bfloat16> narrow(kernels, c);
            const double narrow_ms = median_ms([&] { narrow.launch(); }, 9);
            std::printf("TIME ours D192,128 N%d causal%d: %.3f ms %.1f TFLOP/s\n", N, causal, narrow_ms,
                        flop * 5 / 6 / narrow_ms * 1e-9);
          }
          std::fflush(stdout);
        }
  return failures != 0;
}
