// hopper_forward.cu: checks the Hopper forward kernels against float64 and times them.
// Usage: hopper_forward CUBIN WIDE_CUBIN OPTIONS; those are in hopper_cases.h.
#include "backend/cuda/plan_hopper.h"
#include "hopper_cases.h"

using namespace harness;
using mfa::cuda::ForwardParams;
using mfa::cuda::HopperSchedule;
namespace hopper = mfa::cuda::hopper;

static int slot = 0;

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

  Run(const Kernels& kernels, const Kernels& wide, const Case& c_) : Inputs<T>(c_) {
    const bool half = std::is_same_v<T, __half>;
    f.p = p;
    const int Dv = c.value_columns();
    o = this->template take<T>(size_t(c.B) * c.Nq * c.Hq * Dv);
    f.o = {o, {int64_t(c.Nq) * c.Hq * Dv, Dv, int64_t(c.Hq) * Dv}};
    f.lse = this->template take<float>(size_t(c.B) * c.Hq * c.Nq);
    f.splits = 1;

    const int columns = hopper::columns_of(std::max(c.D, Dv));
    int choice = 0;
    while (hopper::forward_tiles[choice].columns != columns) ++choice;
    if (columns == 192 && Dv <= 128 && !c.modified()) choice = mfa::cuda::kNarrowValues;
    const bool mask_only =
        c.mask && !c.bias && !c.alibi && c.softcap == 0 && c.dropout == 0 && c.Nk % 16 == 0 && columns <= 256;
    const auto tile = mask_only      ? hopper::forward_mask_tiles[choice]
                      : c.modified() ? hopper::forward_modified_tiles[choice]
                                     : hopper::forward_tiles[choice];
    layout = hopper::forward_layout(tile);
    kernel = (columns <= 256 ? kernels : wide)
                 .get(std::string("hopper_forward_") +
                          (mask_only      ? "mask_"
                           : c.modified() ? "modified_"
                                          : "") +
                          mfa::cuda::kHopperColumns[choice] + (half ? "_f16" : "_bf16"),
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

  bool verify(int repeats) {
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
    for (int i = 0; i < repeats; ++i) {
      launch();
      std::vector<T> again(n);
      cudaMemcpy(again.data(), o, n * sizeof(T), cudaMemcpyDeviceToHost);
      ok &= same_bits(raw, again);
    }
    std::printf("%s %s %s: o %.2e max %.1e nan-ok%d lse %.1e ok%d\n", ok ? "ok  " : "FAIL", half ? "f16" : "bf16",
                text_of(c).c_str(), eo.relative, eo.largest, eo.ok, el.largest, el.ok);
    std::fflush(stdout);
    return ok;
  }
};

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  check(cudaFree(nullptr), "start");
  const Kernels kernels(argv[1]), wide(argv[2]);
  const Options options(argc, argv, 3);
  const int failures =
      options.check
          ? check_all(options,
                      [&]<class T>(T, const Case& c) { return Run<T>(kernels, wide, c).verify(options.repeats); })
          : 0;
  if (options.time)
    for (int D : options.columns) {
      std::vector<Case> cases = timed_cases(D, options.modified);
      if (D == 192 && !options.modified)
        for (int i = 0; i < 4; ++i) cases.push_back(cases[i]), cases.back().Dv = 128;
      for (const Case& c : cases) {
        Run<__nv_bfloat16> run(kernels, wide, c);
        const double ms = median_ms([&] { run.launch(); }, c.Nk == 4096 ? 15 : 9);
        const double flop = 2.0 * c.B * c.Hq * double(c.Nq) * c.Nk * (D + c.value_columns()) * (c.causal ? .5 : 1.);
        std::printf("TIME %s: %.3f ms %.1f TFLOP/s\n", text_of(c).c_str(), ms, flop / ms * 1e-9);
        std::fflush(stdout);
      }
    }
  return failures != 0;
}
