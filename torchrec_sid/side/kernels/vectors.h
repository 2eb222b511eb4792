// Short float vectors through the vector extensions of GCC and Clang (any processor), and exp on them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

template <int L>
struct Lanes {
  typedef float F __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(L * 4), aligned(4), may_alias));
};

// Floats of the machine's own vectors. Longer ones work, but GCC keeps them in memory: a loop that matters takes
// them piece by piece.
#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif

constexpr float kInf = std::numeric_limits<float>::infinity();

template <int L>
static inline typename Lanes<L>::F load(const float* p) {
  return *reinterpret_cast<const typename Lanes<L>::F*>(p);
}

template <int L>
static inline void store(float* p, typename Lanes<L>::F v) {
  *reinterpret_cast<typename Lanes<L>::F*>(p) = v;
}

// What a vector of L lanes is worked on in, and how many of them it has.
template <int L>
constexpr int kPiece = L < kNative ? L : kNative;
template <int L>
using Piece = typename Lanes<kPiece<L>>::F;

// Call `work(first lane)` for every piece.
template <int L, typename Work>
static inline void pieces(Work work) {
  for (int k = 0; k < L; k += kPiece<L>) work(k);
}

template <int L>
static inline Piece<L> piece(const float* p) {
  return load<kPiece<L>>(p);
}

template <int L>
static inline void put_piece(float* p, Piece<L> v) {
  store<kPiece<L>>(p, v);
}

template <int L>
static inline typename Lanes<L>::F splat(float x) {
  return typename Lanes<L>::F{} + x;
}

// exp(x) within 2 ulp (Cephes expf): 2^k times a polynomial of the rest. Exactly 0 below -87.3, so that a
// masked event (-inf) has no weight; saturates above 88; NaN stays NaN.
template <int L>
static inline typename Lanes<L>::F vexp(typename Lanes<L>::F x) {
  typedef typename Lanes<L>::F F;
  typedef typename Lanes<L>::I I;
  const F low = splat<L>(-87.3f), high = splat<L>(88.0f);
  const I small = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F shifted = x * 1.44269504088896341f + 12582912.0f;
  const F k = shifted - 12582912.0f;
  F r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  F p = splat<L>(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  I bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof power);
  return small ? F{} : p * power;
}
