// Softmax attention within the sequences of a pack, forward and backward, for processors.
//
// Why it exists: at 16 or 24 channels a head (ESM-2 8M and 35M) general kernels reach a third of the rate of a
// matrix product. Here 32 queries lie side by side in vector registers ("lanes"), so that no head dimension
// wastes a lane and the softmax needs no sum across lanes.
//
// Every sequence and head is computed by itself, in an order that depends on nothing else: its bits are the
// same alone, in any pack and on any number of threads. Everything is computed in fp32; bf16 is read and
// written only. Nothing of Python or PyTorch is included; native_attention.py calls the functions at the end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "native_numbers.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector register
#else
constexpr int W = 8;
#endif
constexpr int LANES = 2 * W;  // queries of a block
constexpr int KEYS = 8;       // keys, or channels, whose sums stay in registers
constexpr int TILE = 64;      // keys whose probabilities the backward pass holds in the first cache
constexpr int CHUNK = 8 * LANES;  // queries of a task of the forward pass

typedef float vec __attribute__((vector_size(W * sizeof(float)), aligned(W * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(W * sizeof(float)), aligned(W * sizeof(float))));

inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<vec*>(p) = x; }
inline vec splat(float x) { return vec{} + x; }
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// e^x for x <= 0 (above, up to 88, too), to 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2 and the
// polynomial of Cephes' expf. Below -87.3 the result is 0 or nearly so; NaN stays NaN.
inline vec exponential(vec x) {
  const vec lowest = splat(-87.3f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x < lowest ? lowest : x;
  vec n = x * 1.44269504088896341f + magic;
  ivec exponent = (ivec)n << 23;  // the low bits of n hold the integer
  n = n - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return (vec)((ivec)y + exponent);
}

// Memory of a thread. It is kept from call to call, for new pages cost as much as short proteins do.
struct Aligned {
  static constexpr size_t KEPT = size_t(1) << 22;  // floats
  std::unique_ptr<float[]> owned;
  size_t size = 0;
  void trim() {
    if (size > KEPT) owned.reset(), size = 0;
  }
  float* take(size_t count) {
    if (count + W > size) {
      size = count + W;
      owned.reset(new float[size]);
    }
    auto address = reinterpret_cast<uintptr_t>(owned.get());
    return reinterpret_cast<float*>((address + W * 4 - 1) / (W * 4) * (W * 4));
  }
};

template <class T>
struct Rows {  // tokens x heads x channels, the channels contiguous
  T* data;
  int64_t token, head;  // strides in elements
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

// rows [count, d] of one head -> out [count, width] in fp32, zeros behind d
template <class T>
void read_rows(Rows<const T> x, int64_t first, int64_t count, int64_t head, int d, int width, float factor, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T* row = x.at(first + i, head);
    for (int c = 0; c < d; ++c) out[i * width + c] = wide(row[c]) * factor;
    for (int c = d; c < width; ++c) out[i * width + c] = 0;
  }
}

// rows [count, d] of one head, at most LANES -> out [d, LANES], zeros in lanes without a query
template <class T>
void read_lanes(Rows<const T> x, int64_t first, int count, int64_t head, int d, float factor, float* out) {
  if (count < LANES) std::fill(out, out + d * LANES, 0.0f);
  for (int i = 0; i < count; ++i) {
    const T* row = x.at(first + i, head);
    for (int c = 0; c < d; ++c) out[c * LANES + i] = wide(row[c]) * factor;
  }
}

// Products of rows (of keys or values) with lanes (of queries or of gradients) over the channels. `Scores<T>`
// holds how both are laid out for them, in units of a float, and multiplies KEYS rows with all lanes.
template <class T>
struct Scores {
  static constexpr bool SCALES_LANES = true;  // the factor goes into the lanes; else the caller multiplies
  static void rows(Rows<const T> x, int64_t first, int64_t count, int64_t padded, int64_t head, int d, float* out) {
    read_rows(x, first, count, head, d, d, 1.0f, out);
    std::fill(out + count * d, out + padded * d, 0.0f);
  }
  static void lanes(Rows<const T> x, int64_t first, int count, int64_t head, int d, float factor, float* out) {
    read_lanes(x, first, count, head, d, factor, out);
  }
  static const float* row(const float* rows, int64_t j, int d) { return rows + j * d; }
  static void multiply(const float* a, const float* b, int d, vec (&out)[KEYS][2]) {
    for (int k = 0; k < KEYS; ++k) out[k][0] = out[k][1] = vec{};
    for (int c = 0; c < d; ++c) {
      const vec b0 = load(b + c * LANES), b1 = load(b + c * LANES + W);
      for (int k = 0; k < KEYS; ++k) {
        out[k][0] += a[k * d + c] * b0;
        out[k][1] += a[k * d + c] * b1;
      }
    }
  }
};

#if defined(__AVX512BF16__)
// One instruction multiplies pairs of bf16 exactly and adds both products in fp32: half the work.
template <>
struct Scores<bf16> {
  static constexpr bool SCALES_LANES = false;  // which would round them to bf16 once more
  static void rows(Rows<const bf16> x, int64_t first, int64_t count, int64_t padded, int64_t head, int d, float* out) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * d / 2, x.at(first + i, head), d * sizeof(bf16));
    std::fill(out + count * d / 2, out + padded * d / 2, 0.0f);
  }
  static void lanes(Rows<const bf16> x, int64_t first, int count, int64_t head, int d, float, float* out) {
    if (count < LANES) std::fill(out, out + d / 2 * LANES, 0.0f);
    for (int i = 0; i < count; ++i) {
      const bf16* row = x.at(first + i, head);
      for (int c = 0; c < d / 2; ++c) std::memcpy(out + c * LANES + i, row + 2 * c, 2 * sizeof(bf16));
    }
  }
  static const float* row(const float* rows, int64_t j, int d) { return rows + j * d / 2; }
  static void multiply(const float* a, const float* b, int d, vec (&out)[KEYS][2]) {
    __m512 sums[KEYS][2] = {};
    for (int c = 0; c < d / 2; ++c) {
      const __m512bh b0 = (__m512bh)_mm512_load_ps(b + c * LANES), b1 = (__m512bh)_mm512_load_ps(b + c * LANES + W);
      for (int k = 0; k < KEYS; ++k) {
        const __m512bh pair = (__m512bh)_mm512_set1_ps(a[k * (d / 2) + c]);
        sums[k][0] = _mm512_dpbf16_ps(sums[k][0], pair, b0);
        sums[k][1] = _mm512_dpbf16_ps(sums[k][1], pair, b1);
      }
    }
    for (int k = 0; k < KEYS; ++k) out[k][0] = (vec)sums[k][0], out[k][1] = (vec)sums[k][1];
  }
};
#endif

// sums[c][lanes] += over `count` keys a[j][c] * p[j][lanes], for KEYS channels from a
inline void add_keys(const float* a, int width, const float* p, int64_t count, vec (&sums)[KEYS][2]) {
  for (int64_t j = 0; j < count; ++j) {
    const vec p0 = load(p + j * LANES), p1 = load(p + j * LANES + W);
    for (int c = 0; c < KEYS; ++c) {
      sums[c][0] += a[j * width + c] * p0;
      sums[c][1] += a[j * width + c] * p1;
    }
  }
}

// out[k][channels] += over lanes p[k][i] * x[i][channels], for KEYS keys
inline void add_lanes(const float* p, const float* x, int width, float* out) {
  for (int c = 0; c < width; c += W) {
    vec sums[KEYS];
    for (int k = 0; k < KEYS; ++k) sums[k] = load(out + k * width + c);
    for (int i = 0; i < LANES; ++i) {
      const vec row = load(x + i * width + c);
      for (int k = 0; k < KEYS; ++k) sums[k] += p[k * LANES + i] * row;
    }
    for (int k = 0; k < KEYS; ++k) store(out + k * width + c, sums[k]);
  }
}

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Task {
  int64_t q, queries, k, keys, head;
};

// Tasks in the order of their cost, dear ones first, so that threads end together.
std::vector<Task> tasks(const int32_t* cu_q, const int32_t* cu_k, int64_t sequences, int64_t heads, int64_t chunk) {
  std::vector<Task> all;
  for (int64_t s = 0; s < sequences; ++s) {
    int64_t first = cu_q[s];
    do {  // once at least: a sequence without queries has gradients of k and v, which are 0
      for (int64_t head = 0; head < heads; ++head)
        all.push_back({first, std::min<int64_t>(chunk, cu_q[s + 1] - first), cu_k[s], cu_k[s + 1] - cu_k[s], head});
      first += chunk;
    } while (first < cu_q[s + 1]);
  }
  std::stable_sort(all.begin(), all.end(), [](const Task& a, const Task& b) { return a.queries * a.keys > b.queries * b.keys; });
  return all;
}

template <class T>
void forward_task(const Task& t, Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, float* lse, int d,
                  float scale, Aligned& memory) {
  const int64_t padded = up(t.keys, KEYS);
  float* keys = memory.take(2 * padded * up(d, W) + padded * LANES + 2 * d * LANES);
  float* values = keys + padded * up(d, W);
  float* p = values + padded * up(d, W);
  float* lanes = p + padded * LANES;
  float* sums = lanes + d * LANES;
  Scores<T>::rows(k, t.k, t.keys, padded, t.head, d, keys);
  read_rows(v, t.k, t.keys, t.head, d, d, 1.0f, values);
  const float after = Scores<T>::SCALES_LANES ? 1.0f : scale;
  for (int64_t first = 0; first < t.queries; first += LANES) {
    const int count = int(std::min<int64_t>(LANES, t.queries - first));
    Scores<T>::lanes(q, t.q + first, count, t.head, d, scale, lanes);
    vec top[2] = {splat(-INFINITY), splat(-INFINITY)};
    for (int64_t j = 0; j < padded; j += KEYS) {
      vec s[KEYS][2];
      Scores<T>::multiply(Scores<T>::row(keys, j, d), lanes, d, s);
      const int real = int(std::min<int64_t>(KEYS, t.keys - j));
      for (int i = 0; i < KEYS; ++i)
        for (int half = 0; half < 2; ++half) {
          if (!Scores<T>::SCALES_LANES) s[i][half] *= after;
          store(p + (j + i) * LANES + half * W, s[i][half]);
          if (i < real) top[half] = larger(s[i][half], top[half]);
        }
    }
    vec total[2] = {};
    for (int64_t j = 0; j < t.keys; ++j)
      for (int half = 0; half < 2; ++half) {
        float* place = p + j * LANES + half * W;
        const vec e = exponential(load(place) - top[half]);
        store(place, e);
        total[half] += e;
      }
    const vec inverse[2] = {1.0f / total[0], 1.0f / total[1]};
    for (int c = 0; c < d; c += KEYS) {
      vec o[KEYS][2] = {};
      add_keys(values + c, d, p, t.keys, o);
      for (int i = 0; i < KEYS; ++i)
        for (int half = 0; half < 2; ++half) store(sums + (c + i) * LANES + half * W, o[i][half] * inverse[half]);
    }
    for (int i = 0; i < count; ++i) {
      T* row = out.at(t.q + first + i, t.head);
      for (int c = 0; c < d; ++c) rounded(sums[c * LANES + i], row[c]);
      lse[t.q + first + i] = top[i / W][i % W] + std::log(total[i / W][i % W]);
    }
  }
}

template <class T>
void backward_task(const Task& t, Rows<const T> grad, Rows<const T> q, Rows<const T> k, Rows<const T> v,
                   Rows<const T> out, const float* lse, Rows<T> grad_q, Rows<T> grad_k, Rows<T> grad_v, int d, float scale,
                   Aligned& memory) {
  const int64_t padded = up(t.keys, KEYS);
  const int width = int(up(d, W));
  // What is loaded as vectors comes first, where it is aligned.
  float* sum_k = memory.take(3 * padded * d + 2 * padded * width + 2 * TILE * LANES + 2 * LANES * width + 3 * d * LANES + 4 * W);
  float* sum_v = sum_k + padded * width;
  float* p = sum_v + padded * width;
  float* ds = p + TILE * LANES;
  float* query_rows = ds + TILE * LANES;
  float* grad_rows = query_rows + LANES * width;
  float* query_lanes = grad_rows + LANES * width;
  float* grad_lanes = query_lanes + d * LANES;
  float* sum_q = grad_lanes + d * LANES;
  float* borders = sum_q + d * LANES;  // log-sum-exp and delta of the lanes
  float* keys = borders + 4 * W;
  float* score_keys = keys + padded * d;
  float* score_values = score_keys + padded * d;
  read_rows(k, t.k, t.keys, t.head, d, d, 1.0f, keys);
  Scores<T>::rows(k, t.k, t.keys, padded, t.head, d, score_keys);
  Scores<T>::rows(v, t.k, t.keys, padded, t.head, d, score_values);
  std::fill(sum_k, p, 0.0f);
  const float after = Scores<T>::SCALES_LANES ? 1.0f : scale;
  for (int64_t first = 0; first < t.queries; first += LANES) {
    const int count = int(std::min<int64_t>(LANES, t.queries - first));
    const int64_t query = t.q + first;
    std::fill(query_rows, query_lanes, 0.0f);
    read_rows(q, query, count, t.head, d, width, scale, query_rows);
    read_rows(grad, query, count, t.head, d, width, 1.0f, grad_rows);
    Scores<T>::lanes(q, query, count, t.head, d, scale, query_lanes);
    Scores<T>::lanes(grad, query, count, t.head, d, 1.0f, grad_lanes);
    std::fill(borders, borders + 4 * W, 0.0f);
    for (int i = 0; i < count; ++i) {
      borders[i] = lse[query + i];
      const T* row = out.at(query + i, t.head);
      float delta = 0;
      for (int c = 0; c < d; ++c) delta += wide(row[c]) * grad_rows[i * width + c];
      borders[LANES + i] = delta;
    }
    const vec top[2] = {load(borders), load(borders + W)}, delta[2] = {load(borders + LANES), load(borders + LANES + W)};
    std::fill(sum_q, sum_q + d * LANES, 0.0f);
    for (int64_t tile = 0; tile < padded; tile += TILE) {
      const int64_t size = std::min<int64_t>(TILE, padded - tile);
      for (int64_t j = 0; j < size; j += KEYS) {
        vec s[KEYS][2], dp[KEYS][2];
        Scores<T>::multiply(Scores<T>::row(score_keys, tile + j, d), query_lanes, d, s);
        for (int i = 0; i < KEYS; ++i)
          for (int half = 0; half < 2; ++half) {
            if (!Scores<T>::SCALES_LANES) s[i][half] *= after;
            store(p + (j + i) * LANES + half * W, exponential(s[i][half] - top[half]));
          }
        Scores<T>::multiply(Scores<T>::row(score_values, tile + j, d), grad_lanes, d, dp);
        for (int i = 0; i < KEYS; ++i)
          for (int half = 0; half < 2; ++half)
            store(ds + (j + i) * LANES + half * W, load(p + (j + i) * LANES + half * W) * (dp[i][half] - delta[half]));
        // Lanes without a query have zero rows, and keys behind the last are not written back.
        add_lanes(p + j * LANES, grad_rows, width, sum_v + (tile + j) * width);
        add_lanes(ds + j * LANES, query_rows, width, sum_k + (tile + j) * width);
      }
      const int64_t real = std::min<int64_t>(size, t.keys - tile);
      for (int c = 0; c < d; c += KEYS) {
        vec o[KEYS][2];
        for (int i = 0; i < KEYS; ++i)
          for (int half = 0; half < 2; ++half) o[i][half] = load(sum_q + (c + i) * LANES + half * W);
        add_keys(keys + tile * d + c, d, ds, real, o);
        for (int i = 0; i < KEYS; ++i)
          for (int half = 0; half < 2; ++half) store(sum_q + (c + i) * LANES + half * W, o[i][half]);
      }
    }
    for (int i = 0; i < count; ++i) {
      T* row = grad_q.at(query + i, t.head);
      for (int c = 0; c < d; ++c) rounded(sum_q[c * LANES + i] * scale, row[c]);
    }
  }
  for (int64_t j = 0; j < t.keys; ++j) {
    T *row_k = grad_k.at(t.k + j, t.head), *row_v = grad_v.at(t.k + j, t.head);
    for (int c = 0; c < d; ++c) {
      rounded(sum_k[j * width + c], row_k[c]);
      rounded(sum_v[j * width + c], row_v[c]);
    }
  }
}

template <class Work>
void run(const std::vector<Task>& all, int threads, Work work) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Aligned memory;
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < all.size(); ++i) work(all[i], memory);
    memory.trim();
  }
}

}  // namespace

// Shapes: q, out, their gradients [m, heads, d]; k, v, theirs [T, heads, d]; lse fp32 [heads, m]. `strides` gives
// token and head strides of each tensor in elements, in the order of the arguments.
#define DEFINE(NAME, T)                                                                                                  \
  extern "C" void NAME##_forward(const T* q, const T* k, const T* v, T* out, float* lse, const int64_t* strides,         \
                                 const int32_t* cu_q, const int32_t* cu_k, int64_t sequences, int64_t heads, int64_t d,  \
                                 float scale, int threads) {                                                             \
    const int64_t m = cu_q[sequences], *s = strides;                                                                     \
    run(tasks(cu_q, cu_k, sequences, heads, CHUNK), threads, [=](const Task& t, Aligned& memory) {                       \
      forward_task<T>(t, {q, s[0], s[1]}, {k, s[2], s[3]}, {v, s[4], s[5]}, {out, s[6], s[7]}, lse + t.head * m, int(d), \
                      scale, memory);                                                                                    \
    });                                                                                                                  \
  }                                                                                                                      \
  extern "C" void NAME##_backward(const T* grad, const T* q, const T* k, const T* v, const T* out, const float* lse,     \
                                  T* grad_q, T* grad_k, T* grad_v, const int64_t* strides, const int32_t* cu_q,          \
                                  const int32_t* cu_k, int64_t sequences, int64_t heads, int64_t d, float scale,         \
                                  int threads) {                                                                         \
    const int64_t m = cu_q[sequences], *s = strides;                                                                     \
    run(tasks(cu_q, cu_k, sequences, heads, m + 1), threads, [=](const Task& t, Aligned& memory) {                       \
      backward_task<T>(t, {grad, s[0], s[1]}, {q, s[2], s[3]}, {k, s[4], s[5]}, {v, s[6], s[7]}, {out, s[8], s[9]},      \
                       lse + t.head * m, {grad_q, s[10], s[11]}, {grad_k, s[12], s[13]}, {grad_v, s[14], s[15]}, int(d), \
                       scale, memory);                                                                                   \
    });                                                                                                                  \
  }

DEFINE(fp32, float)
DEFINE(bf16, bf16)
