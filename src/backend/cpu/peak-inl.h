// peak-inl.h: what the machine can do: multiply-adds from registers and a sequential read. Denominators of benchmarks.

namespace mfa::cpu::MFA_ISA {
namespace {

double PeakFlops(bool native_bf16, int64_t iterations) {
  constexpr int kChains = kTileRows * kTileVectors;
  VF acc[kChains];
  MFA_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = hn::Set(df, static_cast<float>(i));
  VF x = hn::Set(df, 0.999f), y = hn::Set(df, 1e-3f);
  double per_step = 2.0 * kChains * kLanes;
  if (native_bf16) {
#if MFA_NATIVE_BF16
    MFA_NO_UNROLL
    for (int64_t n = 0; n < iterations; ++n) {
      __asm__ volatile("" : "+v"(x.raw), "+v"(y.raw));
      MFA_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = DotPairs(acc[i], hn::BitCast(du, x), hn::BitCast(du, y));
    }
    per_step *= 2;
#else
    return 0;
#endif
  } else {
    MFA_NO_UNROLL
    for (int64_t n = 0; n < iterations; ++n) {
#if HWY_ARCH_X86
      __asm__ volatile("" : "+v"(x.raw),
                            "+v"(y.raw));  // the operands may have changed: no hoisting, no folding
#else
      __asm__ volatile("" : "+w"(x.raw), "+w"(y.raw));
#endif
      MFA_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = hn::MulAdd(acc[i], x, y);
    }
  }
  VF sum = acc[0];
  MFA_UNROLL
  for (int i = 1; i < kChains; ++i) sum = hn::Add(sum, acc[i]);
  volatile float sink = hn::GetLane(sum);
  static_cast<void>(sink);
  return per_step * static_cast<double>(iterations);
}

double ReadSum(const float* data, size_t count) {
  VF a = hn::Zero(df), b = a, c = a, d = a;
  size_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    __builtin_prefetch(data + i + 1024);
    a = hn::Add(a, hn::LoadU(df, data + i));
    b = hn::Add(b, hn::LoadU(df, data + i + kLanes));
    c = hn::Add(c, hn::LoadU(df, data + i + 2 * kLanes));
    d = hn::Add(d, hn::LoadU(df, data + i + 3 * kLanes));
  }
  double sum = hn::GetLane(hn::SumOfLanes(df, hn::Add(hn::Add(a, b), hn::Add(c, d))));
  for (; i < count; ++i) sum += data[i];
  return sum;
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
