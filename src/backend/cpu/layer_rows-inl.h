// layer_rows-inl.h: the body of every layers_<isa>.cc: small layers on dense rows, in float32 and rounded once.
// Multiplications and additions stay apart and sums have eight parts, so that vectors of every width give the same
// bits. The including file defines MFA_ISA, MFA_ISA_LAYERS and MFA_ISA_TARGET.
#include "backend/cpu/kernels.h"
#include "backend/cpu/simd-inl.h"
#include "layers/elementary.h"

static_assert(HWY_STATIC_TARGET == MFA_ISA_TARGET, "the flags of this unit do not select its instruction set");

namespace mfa::cpu::MFA_ISA {
namespace {

// out[i] = f(vectors of in[i] ...), the last elements through a buffer.
template <class F, class T, class... In>
HWY_INLINE void MapRows(int64_t size, T* out, const F& f, const In*... in) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) StoreFloat(f(LoadFloat(in + i)...), out + i);
  if (i == size) return;
  const auto last = static_cast<size_t>(size - i) * sizeof(T);
  const auto load_last = [&](const T* from) {
    T buffer[kLanes] = {};
    std::memcpy(buffer, from, last);
    return LoadFloat(buffer);
  };
  T buffer[kLanes];
  StoreFloat(f(load_last(in + i)...), buffer);
  std::memcpy(out + i, buffer, last);
}

// The sum of squares, of eight interleaved parts which are added one after the other.
template <class T>
HWY_INLINE float SumOfSquares(const T* x, int D) {
  using D8 = hn::CappedTag<float, 8>;
  constexpr D8 d8;
  constexpr int kStep = 8, kWidth = static_cast<int>(hn::MaxLanes(D8())), kVectors = kStep / kWidth;
  HWY_ALIGN float parts[kStep] = {};
  hn::Vec<D8> sums[kVectors];
  MFA_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[v] = hn::Zero(d8);
  int i = 0;
  for (; i + kStep <= D; i += kStep) {
    MFA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto value = LoadFloat(d8, x + i + v * kWidth);
      sums[v] = hn::Add(sums[v], hn::Mul(value, value));
    }
  }
  MFA_UNROLL
  for (int v = 0; v < kVectors; ++v) hn::Store(sums[v], d8, parts + v * kWidth);
  for (; i < D; ++i) parts[i % kStep] += to_float(x[i]) * to_float(x[i]);
  float sum = 0.f;
  for (const float part : parts) sum += part;
  return sum;
}

void NormRow(DType dtype, const void* row, const void* weights, int D, float eps, void* result) {
  WithType(dtype, [&]<class T>(T*) {
    const T *x = static_cast<const T*>(row), *weight = static_cast<const T*>(weights);
    T* out = static_cast<T*>(result);
    const VF factor = hn::Set(df, 1.f / std::sqrt(SumOfSquares(x, D) / static_cast<float>(D) + eps));
    if (weight) {
      MapRows(D, out, [&](VF v, VF w) MFA_INLINE_LAMBDA { return hn::Mul(hn::Mul(v, factor), w); }, x, weight);
    } else {
      MapRows(D, out, [&](VF v) MFA_INLINE_LAMBDA { return hn::Mul(v, factor); }, x);
    }
  });
}

// e^x as fast_exp() computes it.
HWY_INLINE VF FastExp(VF x) {
  const VF low = hn::IfThenElse(hn::Lt(x, hn::Set(df, -104.f)), hn::Set(df, -104.f), x);
  const VF clamped = hn::IfThenElse(hn::Gt(low, hn::Set(df, 89.f)), hn::Set(df, 89.f), low);
  const VF to_integer = hn::Set(df, kExpToInteger);
  const VF shifted = hn::Add(hn::Mul(clamped, hn::Set(df, kExpLog2e)), to_integer);
  const VF n = hn::Sub(shifted, to_integer);
  const VF r = hn::Sub(hn::Sub(clamped, hn::Mul(n, hn::Set(df, kExpLn2High))), hn::Mul(n, hn::Set(df, kExpLn2Low)));
  VF series = hn::Set(df, kExpSeries[0]);
  MFA_UNROLL
  for (int i = 1; i < 8; ++i) series = hn::Add(hn::Mul(series, r), hn::Set(df, kExpSeries[i]));
  const VI exponent = hn::Sub(hn::BitCast(di, shifted), hn::BitCast(di, to_integer)),
           half = hn::ShiftRight<1>(exponent);
  const auto power = [](VI e)
                         MFA_INLINE_LAMBDA { return hn::BitCast(df, hn::ShiftLeft<23>(hn::Add(e, hn::Set(di, 127)))); };
  return hn::Mul(hn::Mul(series, power(half)), power(hn::Sub(exponent, half)));
}

void SwigluRow(DType dtype, const void* gate, const void* x, int64_t size, void* out) {
  WithType(dtype, [&]<class T>(T*) {
    const auto activate = [](VF g, VF v) MFA_INLINE_LAMBDA {
      const VF one = hn::Set(df, 1.f);
      return hn::Mul(hn::Div(g, hn::Add(one, FastExp(hn::Neg(g)))), v);
    };
    MapRows(size, static_cast<T*>(out), activate, static_cast<const T*>(gate), static_cast<const T*>(x));
  });
}

void AddRow(DType dtype, const void* a, const void* b, int64_t size, void* out) {
  WithType(dtype, [&]<class T>(T*) {
    MapRows(
        size, static_cast<T*>(out), [](VF x, VF y) { return hn::Add(x, y); }, static_cast<const T*>(a),
        static_cast<const T*>(b));
  });
}

// Pairs (i, i + half): (a, b) becomes (a cos - b sin, a sin + b cos).
void TurnRow(DType dtype, const void* row, const float* cosine, const float* sine, int half, void* result) {
  WithType(dtype, [&]<class T>(T*) {
    const T* x = static_cast<const T*>(row);
    T* out = static_cast<T*>(result);
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const VF a = LoadFloat(x + i), b = LoadFloat(x + half + i);
      const VF c = hn::LoadU(df, cosine + i), s = hn::LoadU(df, sine + i);
      StoreFloat(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), out + i);
      StoreFloat(hn::Add(hn::Mul(a, s), hn::Mul(b, c)), out + half + i);
    }
    for (; i < half; ++i) {
      const float a = to_float(x[i]), b = to_float(x[half + i]);
      StoreScalar(a * cosine[i] - b * sine[i], out + i);
      StoreScalar(a * sine[i] + b * cosine[i], out + half + i);
    }
  });
}

constexpr LayerTable kLayerTable = {.norm_row = NormRow, .swiglu = SwigluRow, .add = AddRow, .turn_row = TurnRow};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA

namespace mfa::cpu {

const LayerTable& MFA_ISA_LAYERS() { return MFA_ISA::kLayerTable; }

}  // namespace mfa::cpu
