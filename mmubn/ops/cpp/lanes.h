// The passes over X with channels in the lanes: a block of N channels of one image, whose pixels
// lie `step` numbers apart. So channels_last is read as it is (step = C), and small planes of
// NCHW, in which vectors of pixels would be mostly tail, from a packed copy (step = N).
//
// Coefficients are those of the block, N each; taps are (k * k, pitch), tap after tap.
#pragma once
#include "vec.h"

namespace ubn {

// A bound of a loop that is known when this is compiled, so that the loop is unrolled.
template <int value>
using Fixed = std::integral_constant<int, value>;

template <class T, class A, int K>
struct Lanes {
  static constexpr int P = K / 2, N = Vec<A>::n;
  typedef typename Vec<A>::type V;

  // Sums of a few pixels and then of those sums: near the first level cache, and more exact.
  static constexpr int64_t CHUNK = 16;

  static V mean(const T* x, int64_t hw, int64_t step) {
    V total{};
    for (int64_t q = 0; q < hw; q += CHUNK) {
      V part{};
      for (int64_t i = q; i < std::min(hw, q + CHUNK); i++) part += load_as<A>(x + i * step);
      total += part;
    }
    return total / A(hw);
  }

  // Chan's update over chunks, which are read twice while they are in the cache.
  static void moments(const T* x, int64_t hw, int64_t step, A* mean_out, A* var_out) {
    V mean{}, square{};
    for (int64_t q = 0; q < hw; q += CHUNK) {
      const int64_t count = std::min(CHUNK, hw - q);
      V part{}, about{};
      for (int64_t i = q; i < q + count; i++) part += load_as<A>(x + i * step);
      const V here = part / A(count);
      for (int64_t i = q; i < q + count; i++) {
        const V d = load_as<A>(x + i * step) - here;
        about += d * d;
      }
      const V move = here - mean;
      mean += move * (A(count) / A(q + count));
      square += about + move * move * (A(q) * A(count) / A(q + count));
    }
    store<A>(mean_out, mean);
    store<A>(var_out, square / A(hw));
  }

  // f(j, sum over the taps u in [u0, u1) of K z) for the outputs j of a row, z = in + shift;
  // `in` is the row that tap p sees. A column goes to the k outputs that it touches.
  template <class U0, class U1, class F>
  static inline void row(U0 u0, U1 u1, const T* in, V shift, const V (&taps)[K * K], int64_t W,
                         int64_t step, F f) {
    V open[K] = {};  // outputs j - p ... j + p
    const int64_t R = W * step;
    for (int64_t j = 0; j < W; j++) {
      for (int u = u0; u < u1; u++) {
        const V z = load_as<A>(in + (u - P) * R + j * step) + shift;
        for (int t = 0; t < K; t++) open[t] += z * taps[u * K + K - 1 - t];
      }
      if (j >= P) f(j - P, open[0]);
      for (int t = 0; t + 1 < K; t++) open[t] = open[t + 1];
      open[K - 1] = V{};
    }
    for (int t = 0; t < P; t++) {
      const int64_t j = W - P + t;
      if (j >= 0) f(j, open[t]);
    }
  }

  // g(u0, u1) with the taps that row i has inside of H rows, as constants where that pays.
  template <class G>
  static inline void with_taps(int64_t i, int64_t H, G g) {
    const int u0 = int(std::max<int64_t>(0, P - i)), u1 = int(std::min<int64_t>(K, H - i + P));
    if (u0 == 0 && u1 == K) return g(Fixed<0>{}, Fixed<K>{});
    if constexpr (K == 3) {
      if (u0 == 1 && u1 == 3) return g(Fixed<1>{}, Fixed<3>{});
      if (u0 == 0 && u1 == 2) return g(Fixed<0>{}, Fixed<2>{});
      return g(Fixed<1>{}, Fixed<2>{});
    } else {
      return g(u0, u1);
    }
  }

  static void forward(const T* x, T* y, const A* shift, const A* scale, const A* taps,
                      int64_t pitch, V bias, int64_t i, int64_t H, int64_t W, int64_t step) {
    V k[K * K];
    const V a = load<A>(scale), h = load<A>(shift);
    for (int t = 0; t < K * K; t++) k[t] = load<A>(taps + t * pitch) * a;
    T* out = y + i * W * step;
    with_taps(i, H, [&](auto u0, auto u1) {
      row(u0, u1, x + i * W * step, h, k, W, step,
          [&](int64_t j, V value) { store_as<A>(out + j * step, value + bias); });
    });
  }

  static void input(const T* x, const T* dy, T* dx, const A* scale, const A* taps, int64_t pitch,
                    const A* mean, const A* slope, const A* level, bool has_slope, int64_t i,
                    int64_t H, int64_t W, int64_t step) {
    V k[K * K];
    const V a = load<A>(scale), m = load<A>(mean), s = load<A>(slope), l = load<A>(level);
    for (int t = 0; t < K * K; t++) k[t] = load<A>(taps + (K * K - 1 - t) * pitch) * a;
    const T* source = x + i * W * step;
    T* out = dx + i * W * step;
    with_taps(i, H, [&](auto u0, auto u1) {
      if (has_slope)
        row(u0, u1, dy + i * W * step, V{}, k, W, step, [&](int64_t j, V value) {
          store_as<A>(out + j * step, value + ((load_as<A>(source + j * step) - m) * s + l));
        });
      else
        row(u0, u1, dy + i * W * step, V{}, k, W, step,
            [&](int64_t j, V value) { store_as<A>(out + j * step, value + l); });
    });
  }

  // Row i of the sums of planes.h: adds to P (k * k, pitch) of which the last, sums[k * k], is that
  // of dY, and to d_sum the sum of K times what lies inside.
  static void sums(const T* x, const T* dy, const A* shift, const A* taps, int64_t taps_pitch,
                   A* products, A* d_sum, int64_t pitch, int64_t i, int64_t H, int64_t W,
                   int64_t step) {
    const int64_t R = W * step;
    const T *px = x + i * R, *pd = dy + i * R;
    const V h = load<A>(shift);
    V total{}, left[P + 1] = {}, right[P + 1] = {};
    with_taps(i, H, [&](auto u0, auto u1) {
      V s[K * K], seen[K * K];  // seen[u]: X + h in columns j - p ... j + p of row i + u - p
      for (int t = 0; t < K * K; t++) s[t] = V{}, seen[t] = V{};
      for (int u = u0; u < u1; u++)
        for (int v = P; v < K - 1; v++)
          if (v - P < W) seen[u * K + v + 1] = load_as<A>(px + (u - P) * R + (v - P) * step) + h;
      for (int64_t j = 0; j < W; j++) {
        const V g = load_as<A>(pd + j * step);
        total += g;
        for (int u = u0; u < u1; u++) {
          for (int v = 0; v + 1 < K; v++) seen[u * K + v] = seen[u * K + v + 1];
          seen[u * K + K - 1] =
              j + P < W ? load_as<A>(px + (u - P) * R + (j + P) * step) + h : V{};
          for (int v = 0; v < K; v++) s[u * K + v] += seen[u * K + v] * g;
        }
      }
      for (int e = 1; e <= P; e++) {  // sums of the e outer columns
        left[e] = left[e - 1] + (e <= W ? load_as<A>(pd + (e - 1) * step) : V{});
        right[e] = right[e - 1] + (e <= W ? load_as<A>(pd + (W - e) * step) : V{});
      }
      V d = load<A>(d_sum);
      for (int u = u0; u < u1; u++)
        for (int v = 0; v < K; v++) {
          const V inside = total - (v < P ? left[P - v] : right[v - P]);
          d += inside * load<A>(taps + (u * K + v) * taps_pitch);
          A* at = products + (u * K + v) * pitch;
          store<A>(at, load<A>(at) + s[u * K + v]);
        }
      store<A>(d_sum, d);
    });
    A* at = products + K * K * pitch;
    store<A>(at, load<A>(at) + total);
  }
};

// Planes of `count` channels, hw numbers each, to pixels of N channels; zeros behind `count`.
template <class T, int N>
void pack(const T* planes, T* tile, int64_t hw, int64_t count) {
  if (count < N) std::memset(static_cast<void*>(tile), 0, hw * N * sizeof(T));
  for (int64_t q = 0; q < hw; q += 16) {
    const int64_t m = std::min<int64_t>(16, hw - q);
    for (int64_t c = 0; c < count; c++)
      for (int64_t j = 0; j < m; j++) tile[(q + j) * N + c] = planes[c * hw + q + j];
  }
}
template <class T, int N>
void unpack(const T* tile, T* planes, int64_t hw, int64_t count) {
  for (int64_t q = 0; q < hw; q += 16) {
    const int64_t m = std::min<int64_t>(16, hw - q);
    for (int64_t c = 0; c < count; c++)
      for (int64_t j = 0; j < m; j++) planes[c * hw + q + j] = tile[(q + j) * N + c];
  }
}
// The last `count` channels of pixels that are C apart, to pixels of N channels and back.
template <class T, int N>
void pack_tail(const T* pixels, T* tile, int64_t hw, int64_t C, int64_t count) {
  std::memset(static_cast<void*>(tile), 0, hw * N * sizeof(T));
  for (int64_t q = 0; q < hw; q++) std::memcpy(tile + q * N, pixels + q * C, count * sizeof(T));
}
template <class T, int N>
void unpack_tail(const T* tile, T* pixels, int64_t hw, int64_t C, int64_t count) {
  for (int64_t q = 0; q < hw; q++) std::memcpy(pixels + q * C, tile + q * N, count * sizeof(T));
}

}  // namespace ubn
