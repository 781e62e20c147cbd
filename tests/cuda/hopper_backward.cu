// hopper_backward.cu: checks the Hopper backward kernels against float64 and times them.
// Usage: hopper_backward CUBIN MODIFIED_CUBIN FUSED_CUBIN OPTIONS; those are in hopper_cases.h.
#include "hopper_cases.h"

using namespace harness;
using mfa::cuda::BackwardParams;
using mfa::cuda::HopperSchedule;
namespace hopper = mfa::cuda::hopper;

static int slot = 0;

template <class T>
struct Run : Inputs<T> {
  using Inputs<T>::c;
  using Inputs<T>::p;
  BackwardParams g{};
  struct Launch {
    CUfunction f;
    hopper::BackwardLayout layout;
    HopperSchedule s;
    CUtensorMap q, k, v, d_o;
  };
  CUfunction prepare;
  std::vector<Launch> launches;
  static constexpr bool half = std::is_same_v<T, __half>;

  template <int n>
  static mfa::cuda::hopper::TileChoice choose(const hopper::TileChoice (&table)[n], int columns) {
    for (const auto& t : table)
      if (t.columns == columns) return t;
    std::exit(3);
  }

  Run(const Kernels& kernels, const Kernels& modified, const Kernels& fused, const Case& c_, bool dlse)
      : Inputs<T>(c_) {
    const size_t rows = size_t(c.B) * c.Hq * c.Nq;
    g.p = p;
    // o and d_o [B, Hq, Nq, Dv] dense; d_o random, o and lse set by verify() or random.
    const int Dv = c.value_columns();
    T *o = this->template take<T>(rows * Dv), *d_o = this->template take<T>(rows * Dv);
    randomise(o, rows * Dv, 21);
    randomise(d_o, rows * Dv, 22);
    const int64_t stride[3] = {int64_t(c.Hq) * c.Nq * Dv, int64_t(c.Nq) * Dv, Dv};
    g.o.data = o, g.d_o.data = d_o;
    for (int i = 0; i < 3; ++i) g.o.stride[i] = g.d_o.stride[i] = stride[i];
    float* lse = this->template take<float>(rows);
    fill_value<<<256, 256>>>(lse, rows, std::log(float(c.Nk)) + .5f);
    g.lse = lse;
    if (dlse) {
      float* x = this->template take<float>(rows);
      randomise(x, rows, 23);
      g.dlse = x;
    }
    g.Nq_padded = ((c.Nq + 127) / 128 + 1) * 128;
    g.delta = this->template take<float>(size_t(c.B) * c.Hq * g.Nq_padded);
    g.lse2 = this->template take<float>(size_t(c.B) * c.Hq * g.Nq_padded);
    const auto gradient = [&](int H, int N, int D) {
      mfa::cuda::MutableTensor t;
      t.data = this->template take<T>(size_t(c.B) * H * N * D);
      t.stride[0] = int64_t(N) * H * D, t.stride[1] = D, t.stride[2] = int64_t(H) * D;
      return t;
    };
    g.dq = gradient(c.Hq, c.Nq, c.D), g.dk = gradient(c.Hkv, c.Nk, c.D), g.dv = gradient(c.Hkv, c.Nk, Dv);

    const int columns = hopper::columns_of(std::max(c.D, Dv));
    const char* type = half ? "_f16" : "_bf16";
    prepare = kernels.get(std::string("hopper_backward_prepare") + type, 0);
    const auto add = [&](const char* name, bool keeps_queries) {
      const bool shared_keys = columns > 128 && !keeps_queries;
      const auto tile = c.modified()    ? keeps_queries ? choose(hopper::dq_modified_tiles, columns)
                                          : shared_keys ? choose(hopper::dkv_shared_modified_tiles, columns)
                                                        : choose(hopper::dkv_modified_tiles, columns)
                        : keeps_queries ? choose(hopper::dq_tiles, columns)
                        : shared_keys   ? choose(hopper::dkv_shared_tiles, columns)
                                        : choose(hopper::dkv_tiles, columns);
      Launch l;
      l.layout = hopper::backward_layout(tile, shared_keys);
      const std::string stem = std::string("hopper_") + name + (c.modified() ? "_modified_" : "_");
      l.f = (c.modified() ? modified : kernels).get(stem + std::to_string(columns) + type, l.layout.bytes);
      const int q_rows = keeps_queries ? 64 : tile.tile, k_rows = keeps_queries ? tile.tile : 64;
      l.q = tensor_map(p.q.data, half, c.B, c.Hq, c.Nq, c.D, p.q.stride, q_rows);
      l.d_o = tensor_map(g.d_o.data, half, c.B, c.Hq, c.Nq, Dv, g.d_o.stride, q_rows);
      l.k = tensor_map(p.k.data, half, c.B, c.Hkv, c.Nk, c.D, p.k.stride, k_rows);
      l.v = tensor_map(p.v.data, half, c.B, c.Hkv, c.Nk, Dv, p.v.stride, k_rows);
      const int rows_a_tile = 64 * tile.consumers;
      const bool unequal = c.causal;
      if (keeps_queries)
        l.s = hopper::schedule(c.B * c.Hq, (c.Nq + rows_a_tile - 1) / rows_a_tile, int64_t(c.Nk) * c.D * 4, unequal,
                               true, ++slot);
      else
        l.s = hopper::schedule(c.B * c.Hkv, (c.Nk + rows_a_tile - 1) / rows_a_tile, int64_t(c.Nq) * c.D * 4, unequal,
                               false, ++slot);
      launches.push_back(l);
    };
    if (!c.modified() && (columns == 64 || columns == 128) && !std::getenv("SEPARATE")) {
      add_fused(fused, columns, type);
      return;
    }
    add("dq", true);
    add(columns <= 128 ? "dkv" : "dkv_shared", false);
  }

  void add_fused(const Kernels& kernels, int columns, const char* type) {
    const auto tile = choose(hopper::fused_tiles, columns);
    const auto layout = hopper::fused_layout(tile);
    const std::string suffix = "_" + std::to_string(columns) + type;
    const size_t query_tiles = size_t(c.B) * c.Hq * hopper::fused_query_tiles(c.Nq);
    g.dq_sums = this->template take<float>(query_tiles * tile.tile * columns);
    g.dq_turns = this->template take<int>(query_tiles + 1);
    fill_value<<<256, 256>>>(g.dq_sums, query_tiles * tile.tile * columns, NAN);
    Launch l;
    l.layout.threads = 128 * (tile.consumers + 1), l.layout.bytes = layout.bytes;
    l.f = kernels.get("hopper_backward_fused" + suffix, layout.bytes);
    l.q = tensor_map(p.q.data, half, c.B, c.Hq, c.Nq, c.D, p.q.stride, tile.tile);
    l.d_o = tensor_map(g.d_o.data, half, c.B, c.Hq, c.Nq, p.Dv, g.d_o.stride, tile.tile);
    l.k = tensor_map(p.k.data, half, c.B, c.Hkv, c.Nk, c.D, p.k.stride, 64);
    l.v = tensor_map(p.v.data, half, c.B, c.Hkv, c.Nk, p.Dv, p.v.stride, 64);
    const int rows = 64 * tile.consumers, tiles = (c.Nk + rows - 1) / rows;
    l.s = HopperSchedule{c.B * c.Hkv * tiles, tiles, 0, 0, ++slot};
    launches.push_back(l);
  }

  void launch_prepare() {
    void* args[] = {&g};
    check(cuLaunchKernel(prepare, c.Hq * ((g.Nq_padded + hopper::prepare_rows(p.Dv) - 1) / hopper::prepare_rows(p.Dv)),
                         c.B, 1, 256, 1, 1, 0, nullptr, args, nullptr),
          "prepare");
  }
  void launch_one(Launch& l) {
    void* args[] = {&g, &l.s, &l.q, &l.k, &l.v, &l.d_o};
    check(cuLaunchKernel(l.f, std::min(132, l.s.tiles), 1, 1, l.layout.threads, 1, 1, l.layout.bytes, nullptr, args,
                         nullptr),
          "launch");
  }
  void launch() {
    launch_prepare();
    for (Launch& l : launches) launch_one(l);
  }

  std::vector<double> fetch(const mfa::cuda::MutableTensor& t, int H, int N, int D, std::vector<T>* raw_out = nullptr) {
    const size_t n = size_t(c.B) * H * N * D;
    std::vector<T> raw(n);
    cudaMemcpy(raw.data(), t.data, n * sizeof(T), cudaMemcpyDeviceToHost);
    if (raw_out) *raw_out = raw;
    std::vector<double> x(n);
    for (int b = 0; b < c.B; ++b)
      for (int h = 0; h < H; ++h)
        for (int i = 0; i < N; ++i)
          for (int d = 0; d < D; ++d)
            x[((size_t(b) * H + h) * N + i) * D + d] =
                float(raw[b * t.stride[0] + h * t.stride[1] + i * t.stride[2] + d]);
    return x;
  }

  bool verify(int repeats) {
    const size_t rows = size_t(c.B) * c.Hq * c.Nq, n = rows * c.D, keys = size_t(c.B) * c.Hkv * c.Nk,
                 n_o = rows * c.value_columns(), n_v = keys * c.value_columns(), nk = keys * c.D;
    double *ro = this->template take<double>(n_o), *rl = this->template take<double>(rows),
           *prob = this->template take<double>(rows * c.Nk), *ds = this->template take<double>(rows * c.Nk),
           *dq = this->template take<double>(n), *dk = this->template take<double>(nk),
           *dv = this->template take<double>(n_v);
    reference_forward<T><<<dim3(c.Nq, c.Hq, c.B), 128>>>(p, prob, ro, rl);
    convert<<<256, 256>>>(ro, static_cast<T*>(const_cast<void*>(g.o.data)), n_o);
    convert<<<256, 256>>>(rl, const_cast<float*>(g.lse), rows);
    reference_backward_rows<T><<<dim3(c.Nq, c.Hq, c.B), 128>>>(p, g.d_o, ro, g.dlse, prob, ds, dq);
    reference_backward_keys<T><<<dim3(c.Nk, c.Hkv, c.B), 128>>>(p, g.d_o, prob, ds, dk, dv);
    check(cudaDeviceSynchronize(), "reference");
    for (const auto& [t, count] : {std::pair{g.dq, n}, {g.dk, nk}, {g.dv, n_v}})
      fill_value<<<256, 256>>>(static_cast<T*>(t.data), count, 777.f);
    launch();
    check(cudaDeviceSynchronize(), "backward");
    bool ok = true;
    Error errors[3];
    std::vector<T> raw[3];
    const mfa::cuda::MutableTensor* got[3] = {&g.dq, &g.dk, &g.dv};
    const double* want[3] = {dq, dk, dv};
    for (int i = 0; i < 3; ++i) {
      const std::vector<double> x =
          fetch(*got[i], i ? c.Hkv : c.Hq, i ? c.Nk : c.Nq, i == 2 ? c.value_columns() : c.D, &raw[i]);
      std::vector<double> r(x.size());
      cudaMemcpy(r.data(), want[i], r.size() * 8, cudaMemcpyDeviceToHost);
      errors[i] = compare(x, r);
      ok &= errors[i].ok && errors[i].relative < (half ? 8e-4 : 5.5e-3);
    }
    for (int again = 0; again < repeats; ++again) {
      launch();
      for (int i = 0; i < 3; ++i) {
        std::vector<T> bits;
        fetch(*got[i], i ? c.Hkv : c.Hq, i ? c.Nk : c.Nq, i == 2 ? c.value_columns() : c.D, &bits);
        ok &= same_bits(bits, raw[i]);
      }
    }
    std::printf("%s %s %s dlse%d: dq %.2e%s dk %.2e%s dv %.2e%s\n", ok ? "ok  " : "FAIL", half ? "f16" : "bf16",
                text_of(c).c_str(), g.dlse != nullptr, errors[0].relative, errors[0].ok ? "" : " NAN",
                errors[1].relative, errors[1].ok ? "" : " NAN", errors[2].relative, errors[2].ok ? "" : " NAN");
    std::fflush(stdout);
    return ok;
  }
};

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  check(cudaFree(nullptr), "start");
  const Kernels kernels(argv[1]), modified(argv[2]), fused(argv[3]);
  const Options options(argc, argv, 4);
  int number = 0;
  const int failures =
      options.check ? check_all(options,
                                [&]<class T>(T, const Case& c) {
                                  return Run<T>(kernels, modified, fused, c, number++ % 2 == 1).verify(options.repeats);
                                })
                    : 0;
  if (options.time)
    for (int D : options.columns)
      for (const Case& c : timed_cases(D, options.modified)) {
        Run<__nv_bfloat16> run(kernels, modified, fused, c, false);
        const double flop = 10.0 * c.B * c.Hq * double(c.Nq) * c.Nk * D * (c.causal ? .5 : 1.);
        const int repeats = c.Nk == 4096 ? 11 : 7;
        const double ms = median_ms([&] { run.launch(); }, repeats);
        std::printf("TIME %s: %.3f ms %.1f TFLOP/s; prepare %.3f", text_of(c).c_str(), ms, flop / ms * 1e-9,
                    median_ms([&] { run.launch_prepare(); }, repeats));
        for (auto& l : run.launches) {
          // The fused kernel needs its turns to be cleared.
          const double with = median_ms([&] { run.launch_prepare(), run.launch_one(l); }, repeats);
          std::printf(" %.3f", with - median_ms([&] { run.launch_prepare(); }, repeats));
        }
        std::printf("\n");
        std::fflush(stdout);
      }
  return failures != 0;
}
