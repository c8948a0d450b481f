// Splits the fused projection of attention and turns its queries and keys, or puts their gradients together and
// turns these back, reading and writing every number once. It is compiled without contraction of products and
// sums, so that it has the bits of PyTorch's operations; see native_rotary.py.

#include <cstdint>
#include <cstring>

#include "native_numbers.h"

namespace {

// a + b * c, rounded once, as in PyTorch's addcmul
inline float plus(float a, float b, float c) { return __builtin_fmaf(b, c, a); }
inline double plus(double a, double b, double c) { return __builtin_fma(b, c, a); }

template <class T, class A>
inline void turn(const T* __restrict x, const A* __restrict cos, const A* __restrict sin, A sign, int64_t half,
                 T* __restrict out) {
  for (int64_t c = 0; c < half; ++c) {
    const A first = wide(x[c]), second = wide(x[c + half]), s = sign * sin[c];
    rounded(plus(first * cos[c], -second, s), out[c]);
    rounded(plus(second * cos[c], first, s), out[c + half]);
  }
}

// Each tensor is tokens x heads x channels with channels contiguous; `strides` holds token and head strides of
// q, k, v and of what is written for them.
template <class T, class A>
void turn_all(const T* const (&in)[3], T* const (&out)[3], const A* cos, const A* sin, const int64_t* strides,
              int64_t tokens, int64_t heads, int64_t half, A sign, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int part = 0; part < 3; ++part) {
      const int64_t *from = strides + 2 * part, *to = from + 6;
      for (int64_t h = 0; h < heads; ++h) {
        const T* x = in[part] + t * from[0] + h * from[1];
        T* y = out[part] + t * to[0] + h * to[1];
        if (part == 2)
          std::memcpy(y, x, 2 * half * sizeof(T));
        else
          turn(x, cos + t * half, sin + t * half, sign, half, y);
      }
    }
}

}  // namespace

#define DEFINE(NAME, T, A)                                                                                          \
  extern "C" void NAME##_turn(const T* q, const T* k, const T* v, T* to_q, T* to_k, T* to_v, const A* cos,          \
                              const A* sin, const int64_t* strides, int64_t tokens, int64_t heads, int64_t half,    \
                              int backward, int threads) {                                                          \
    turn_all<T, A>({q, k, v}, {to_q, to_k, to_v}, cos, sin, strides, tokens, heads, half, backward ? A(-1) : A(1),  \
                   threads);                                                                                        \
  }

DEFINE(fp32, float, float)
DEFINE(fp64, double, double)
DEFINE(bf16, bf16, float)
