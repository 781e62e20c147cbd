// hopper_forward_f32.cu: checks the Hopper forward kernels for float32 against float64 and times them.
// Usage: hopper_forward_f32 CUBIN OPTIONS; those are in hopper_cases.h.
#include "hopper_cases.h"

using namespace harness;
using mfa::cuda::ForwardParams;
using mfa::cuda::HopperSchedule;
using mfa::cuda::SplitOperands;
namespace hopper = mfa::cuda::hopper;

static int slot = 0;

struct Run : Inputs<float> {
  ForwardParams f{};
  SplitOperands parts{};
  float* o;
  CUtensorMap maps[3];
  CUfunction split, attention;
  hopper::SplitLayout layout;
  HopperSchedule s{};
  int split_blocks;

  Run(const Kernels& kernels, const Case& c_) : Inputs(c_) {
    const int Dv = c.value_columns();
    const bool wide = std::max(c.D, Dv) > 64;
    const auto tile = c.modified() ? hopper::split_modified_tiles[wide] : hopper::split_tiles[wide];
    f.p = p;
    o = take<float>(size_t(c.B) * c.Nq * c.Hq * Dv);
    f.o = {o, {int64_t(c.Nq) * c.Hq * Dv, Dv, int64_t(c.Hq) * Dv}};
    f.lse = take<float>(size_t(c.B) * c.Hq * c.Nq);
    f.splits = 1;
    layout = hopper::split_layout(tile);
    const int heads[] = {c.Hq, c.Hkv, c.Hkv}, rows[] = {c.Nq, c.Nk, c.Nk};
    const auto tiles = [&](int i) { return (rows[i] + hopper::split_rows - 1) / hopper::split_rows; };
    for (int i = 0; i < 3; ++i) {
      parts.parts[i] = take<__half>(size_t(hopper::split_parts) * c.B * heads[i] * rows[i] * tile.columns);
      parts.tiles[i] = take<mfa::cuda::SplitTileFacts>(size_t(c.B) * heads[i] * tiles(i));
      const int64_t row = tile.columns, stride[] = {row * rows[i] * heads[i], row * rows[i], row};
      maps[i] = tensor_map(parts.parts[i], true, hopper::split_parts * c.B, heads[i], rows[i], tile.columns, stride,
                           i ? tile.tile : 64);
    }
    split_blocks = c.B * (c.Hq * tiles(0) + 2 * c.Hkv * tiles(1));
    const std::string suffix = std::to_string(tile.columns) + "_f32";
    split = kernels.get("hopper_split_" + suffix, 0);
    attention = kernels.get((c.modified() ? "hopper_forward_modified_" : "hopper_forward_") + suffix, layout.bytes);
    s = hopper::schedule(c.B * c.Hq, (c.Nq + 64 * tile.consumers - 1) / (64 * tile.consumers),
                         int64_t(c.Nk) * tile.columns * 12, c.causal, true, ++slot);
  }
  void launch_split() {
    void* args[] = {&f, &parts};
    check(cuLaunchKernel(split, split_blocks, 1, 1, 256, 1, 1, 0, nullptr, args, nullptr), "split");
  }
  void launch_attention() {
    void* args[] = {&f, &parts, &s, &maps[0], &maps[1], &maps[2]};
    check(cuLaunchKernel(attention, std::min(132, s.tiles), 1, 1, layout.threads, 1, 1, layout.bytes, nullptr, args,
                         nullptr),
          "attention");
  }

  bool verify(int repeats) {
    const size_t rows = size_t(c.B) * c.Hq * c.Nq, n = rows * c.value_columns();
    fill_value<<<256, 256>>>(o, n, 777.f);
    fill_value<<<256, 256>>>(f.lse, rows, 777.f);
    launch_split(), launch_attention();
    check(cudaDeviceSynchronize(), "forward");
    double *ro = take<double>(n), *rl = take<double>(rows), *prob = take<double>(rows * c.Nk);
    reference_forward<float><<<dim3(c.Nq, c.Hq, c.B), 128>>>(p, prob, ro, rl);
    check(cudaDeviceSynchronize(), "reference");
    std::vector<double> r(n), x(n), rlse(rows), xlse(rows);
    std::vector<float> raw(n), lse(rows);
    cudaMemcpy(r.data(), ro, n * 8, cudaMemcpyDeviceToHost);
    cudaMemcpy(rlse.data(), rl, rows * 8, cudaMemcpyDeviceToHost);
    cudaMemcpy(raw.data(), o, n * sizeof(float), cudaMemcpyDeviceToHost);
    cudaMemcpy(lse.data(), f.lse, rows * 4, cudaMemcpyDeviceToHost);
    for (int b = 0; b < c.B; ++b)
      for (int h = 0; h < c.Hq; ++h)
        for (int i = 0; i < c.Nq; ++i)
          for (int d = 0; d < c.value_columns(); ++d)
            x[((size_t(b) * c.Hq + h) * c.Nq + i) * c.value_columns() + d] =
                raw[b * f.o.stride[0] + h * f.o.stride[1] + i * f.o.stride[2] + d];
    for (size_t i = 0; i < rows; ++i) xlse[i] = lse[i];
    const Error eo = compare(x, r), el = compare(xlse, rlse);
    // A slope of ALiBi times hundreds of keys has a large rounding.
    const double allowed = c.alibi ? 20. : 1.;
    bool ok = eo.ok && el.ok && eo.relative < 4e-7 * allowed && el.largest < 4e-6 * allowed && el.relative < 1e-6;
    for (int i = 0; i < repeats; ++i) {
      launch_split(), launch_attention();
      std::vector<float> again(n);
      cudaMemcpy(again.data(), o, n * sizeof(float), cudaMemcpyDeviceToHost);
      ok &= same_bits(raw, again);
    }
    std::printf("%s %s: o %.2e max %.1e nan-ok%d lse %.1e max %.1e ok%d\n", ok ? "ok  " : "FAIL", text_of(c).c_str(),
                eo.relative, eo.largest, eo.ok, el.relative, el.largest, el.ok);
    std::fflush(stdout);
    return ok;
  }
};

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  check(cudaFree(nullptr), "start");
  const Kernels kernels(argv[1]);
  Options options(argc, argv, 2);
  std::erase_if(options.columns, [](int D) { return D > 128; });
  int failures = 0;
  if (options.check)
    for (int D : options.columns) {
      std::vector<Case> cases = plain_cases(D, options.quick);
      if (options.modified)
        for (const Case& c : modified_cases(D)) cases.push_back(c);
      for (Case& c : cases) {
        c.softcap = 0;
        failures += !Run(kernels, c).verify(options.repeats);
      }
    }
  std::printf("%d failures\n", failures);
  if (options.time)
    for (int D : options.columns)
      for (const Case& c : timed_cases(D, options.modified)) {
        if (c.softcap > 0) continue;
        Run run(kernels, c);
        const int repeats = c.Nk == 4096 ? 9 : 5;
        const double split = median_ms([&] { run.launch_split(); }, repeats);
        const double ms = median_ms([&] { run.launch_attention(); }, repeats);
        const double flop = 2.0 * c.B * c.Hq * double(c.Nq) * c.Nk * (D + c.value_columns()) * (c.causal ? .5 : 1.);
        std::printf("TIME %s: %.3f + %.3f ms %.1f TFLOP/s, loop alone %.1f\n", text_of(c).c_str(), split, ms,
                    flop / (split + ms) * 1e-9, flop / ms * 1e-9);
        std::fflush(stdout);
      }
  return failures != 0;
}
