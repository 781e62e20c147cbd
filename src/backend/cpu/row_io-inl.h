// row_io-inl.h: what all products do with their rows: ask for x, write sums.

namespace mfa::cpu::MFA_ISA {
namespace {

// Asks for terms of a row of x: its pieces are too short for the processor's own prefetchers.
HWY_INLINE void FetchRow(const MatmulProblem& p, int64_t r, int k0, int n) {
  const auto size = static_cast<ptrdiff_t>(size_of(p.dtype));
  const char* from = static_cast<const char*>(p.x.data) + (p.x.at(r) + k0) * size;
  for (ptrdiff_t i = 0; i < n * size; i += kCacheLine) __builtin_prefetch(from + i, 0, 3);
}

// The added terms of a vector of columns, the first `count` of which exist.
template <class T>
HWY_INLINE VF LoadAddend(const T* c, ptrdiff_t stride, int count) {
  if (stride == 1 && count == kLanes) return LoadFloat(c);
  T lanes[kLanes] = {};
  for (int j = 0; j < count; ++j) lanes[j] = c[j * stride];
  return LoadFloat(lanes);
}

// Writes `count` columns from n on of row r: alpha * sum + beta * c, rounded once.
HWY_NOINLINE void WriteRow(const MatmulProblem& p, const float* sums, int64_t r, int n, int count) {
  WithType(p.dtype, [&]<class T>(T*) {
    T* out = static_cast<T*>(p.out) + p.out_at(r) + n;
    const T* c = static_cast<const T*>(p.c.data);
    if (c) c += r * p.c.row_stride + n * p.c.column_stride;
    const bool plain = !c && p.alpha == 1.f;
    for (int i = 0; i < count; i += kLanes) {
      const int left = Min(kLanes, count - i);
      VF v = hn::LoadU(df, sums + i);
      if (!plain) v = hn::Mul(v, hn::Set(df, p.alpha));
      if (c) v = hn::MulAdd(hn::Set(df, p.beta), LoadAddend(c + i * p.c.column_stride, p.c.column_stride, left), v);
      if (left == kLanes) {
        StoreFloat(v, out + i);
      } else {
        T last[kLanes];
        StoreFloat(v, last);
        for (int j = 0; j < left; ++j) out[i + j] = last[j];
      }
    }
  });
}

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
