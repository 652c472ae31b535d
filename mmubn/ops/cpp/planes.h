// The passes over X with pixels in the lanes: planes of H*W numbers, one after the other (NCHW).
//
// A convolution marches down the rows of a few vectors of columns: a row is read k times, once a
// column shift, and added to the k output rows that it touches, which stay in registers. It does
// so strip by strip of rows, so that what it reads again is in the first level cache. p is k / 2.
#pragma once
#include "vec.h"

namespace ubn {

// Mean of a plane and sum of squared distances from it.
template <class T, class A>
void plane_moments(const T* x, int64_t hw, A& mean, A& squares) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const int64_t blocks = hw / N * N;
  V s[4] = {};
  int64_t q = 0;
  for (; q + 4 * N <= hw; q += 4 * N)
    for (int i = 0; i < 4; i++) s[i] += load_as<A>(x + q + i * N);
  for (; q < blocks; q += N) s[0] += load_as<A>(x + q);
  const V tail = load_some<A>(x + blocks, hw - blocks);
  const A m = sum<A>((s[0] + s[1]) + (s[2] + s[3]) + tail) / A(hw);
  for (V& value : s) value = V{};
  for (q = 0; q + 4 * N <= hw; q += 4 * N)
    for (int i = 0; i < 4; i++) {
      const V d = load_as<A>(x + q + i * N) - m;
      s[i] += d * d;
    }
  for (; q < blocks; q += N) {
    const V d = load_as<A>(x + q) - m;
    s[0] += d * d;
  }
  A rest = 0;
  for (; q < hw; q++) rest += (widen(x[q]) - m) * (widen(x[q]) - m);
  mean = m;
  squares = sum<A>((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

template <class T, class A>
A plane_mean(const T* x, int64_t hw) {
  constexpr int N = Vec<A>::n;
  typename Vec<A>::type s[4] = {};
  int64_t q = 0;
  for (; q + 4 * N <= hw; q += 4 * N)
    for (int i = 0; i < 4; i++) s[i] += load_as<A>(x + q + i * N);
  for (; q + N <= hw; q += N) s[0] += load_as<A>(x + q);
  return sum<A>((s[0] + s[1]) + (s[2] + s[3]) + load_some<A>(x + q, hw - q)) / A(hw);
}

// H rows of W numbers, before and behind which others can be read.
template <class T>
struct Plane {
  const T* pixels;
  int64_t H, W;

  // How many: a chunk, which may be two vectors, a column shift away from the last column.
  template <class A, int K>
  static constexpr int64_t margin = 2 * Vec<A>::n + K / 2;

  // f(first row, how many) for strips of about 16 KB: they stay in the first level cache.
  template <class F>
  void each_strip(F f) const {
    const int64_t rows = std::max<int64_t>(1, 16384 / int64_t(sizeof(T)) / W);
    for (int64_t i = 0; i < H; i += rows) f(i, std::min(rows, H - i));
  }
  // What the strip after this one adds begins here, to be prefetched while this is worked on.
  const T* after(int64_t first, int64_t count, int64_t p) const {
    return pixels + std::min(H, first + count + p) * W;
  }
};

// Calls f(vectors of a chunk), which is what pays for rows of W numbers.
template <class T, class A, class F>
inline void with_chunk(int64_t W, F f) {
#ifdef UBN_PAIRS
  if constexpr (std::is_same<T, bf16>::value)
    if (W > Vec<A>::n) return f(Fixed<2>{});
#endif
  f(Fixed<1>{});
}

// What the taps of B chunks of outputs see of a row, from column q on, zeros outside of it. Tap v
// of vector m of a chunk sees vector m + v of these. `inside`: nothing is outside.
template <class T, class A, int K, int M, int B, bool inside>
class Window {
 public:
  static constexpr int P = K / 2, N = Vec<A>::n, SEEN = K + M - 1;
  typedef typename Vec<A>::type V;

  Window(const Plane<T>& plane, int64_t q) : first_(plane.pixels + q - P), W_(plane.W) {
    for (int i = 0; !inside && i < B * SEEN; i++) {
      const auto column = lane_numbers<A>() * M + int(q + i / SEEN * M * N + i % SEEN - P);
      lanes_[i] = (column >= 0) & (column < int(W_));
    }
  }

  // Row i; f is applied to what is not outside.
  template <class F>
  void read(int64_t i, F f, V (&seen)[B][SEEN]) const {
    for (int b = 0; b < B; b++)
      for (int t = 0; t < SEEN; t += M) {
        const auto chunk = load_chunk<A, M>(first_ + i * W_ + b * M * N + t);
        for (int m = 0; m < M; m++)
          seen[b][t + m] = only_inside(b * SEEN + t + m, f(chunk.v[m]));
      }
  }
  // v where vector t of `seen` is not outside.
  V only_inside(int t, V v) const {
    if constexpr (inside)
      return v;
    else
      return only<A>(lanes_[t], v);
  }

 private:
  const T* first_;
  const int64_t W_;
  typename Mask<A>::type lanes_[inside ? 1 : B * SEEN];
};

// Calls f(first column, how many chunks, whether no tap leaves the row, numbers of a chunk) for all
// columns.
template <class A, int K, int M, class F>
inline void each_columns(int64_t W, F f) {
  constexpr int64_t P = K / 2, size = M * Vec<A>::n;
  constexpr std::false_type edge{};
  constexpr std::true_type inside{};
  const auto numbers = [=](int64_t q) { return int(std::min(size, W - q)); };
  int64_t q = 0;
  f(q, Fixed<1>{}, edge, numbers(q));
  q += size;
  if constexpr (M == 1)
    for (; q + 4 * size + P <= W; q += 4 * size) f(q, Fixed<4>{}, inside, Fixed<size>{});
  for (; q + 2 * size + P <= W; q += 2 * size) f(q, Fixed<2>{}, inside, Fixed<size>{});
  for (; q + size + P <= W; q += size) f(q, Fixed<1>{}, inside, Fixed<size>{});
  for (; q < W; q += size) f(q, Fixed<1>{}, edge, numbers(q));
}

// Whether chunk b of a group begins another line of the cache than the one before.
template <class T, int size>
constexpr bool starts_line(int b) {
  return b * size * sizeof(T) % 64 == 0;
}

// store(row, column, which chunk of a group, sum of K f(z), how many) for the outputs of a strip.
template <int K, int M, class A, class T, class F, class Store>
inline void march(const Plane<T>& plane, const A (&taps)[K * K], int64_t first, int64_t count, F f,
                  Store store) {
  constexpr int P = K / 2, size = Chunk<A, M>::size;
  const int64_t begin = std::max<int64_t>(0, first - P), end = first + count + P;
  each_columns<A, K, M>(plane.W, [&](int64_t q, auto chunks, auto inside, auto n) {
    constexpr int B = chunks;
    typedef Window<T, A, K, M, B, inside> Seen;
    const Seen window(plane, q);
    Chunk<A, M> open[B][K] = {};  // outputs of rows i - p ... i + p
    for (int64_t i = begin; i < end; i++) {
      if (i < plane.H) {
        typename Vec<A>::type seen[B][Seen::SEEN];
        window.read(i, f, seen);
        for (int b = 0; b < B; b++)
          for (int t = 0; t < K; t++)
            for (int v = 0; v < K; v++)
              for (int m = 0; m < M; m++)
                open[b][t].v[m] += seen[b][m + v] * taps[(K - 1 - t) * K + v];
      }
      for (int b = 0; b < B; b++) {
        if (i - P >= first) store(i - P, q + b * size, b, open[b][0], n);
        for (int t = 0; t + 1 < K; t++) open[b][t] = open[b][t + 1];
        open[b][K - 1] = {};
      }
    }
  });
}

// Calls store(pixel, chunk of sums of K f(z) from there on, how many, how far ahead the next strip
// lies) for all outputs of a plane. The last is 0 where that line of the cache was named before.
template <int K, class A, class T, class F, class Store>
inline void convolve(const Plane<T>& plane, const A (&taps)[K * K], F f, Store store) {
  const int64_t W = plane.W;
  with_chunk<T, A>(W, [&](auto vectors) {
    constexpr int M = vectors;
    plane.each_strip([&](int64_t first, int64_t count) {
      const T* after = plane.after(first, count, K / 2) - first * W;
      march<K, M>(plane, taps, first, count, f,
                  [=](int64_t i, int64_t j, int b, const Chunk<A, M>& value, auto n) {
                    const bool line = starts_line<T, Chunk<A, M>::size>(b);
                    if (line) UBN_PREFETCH(after + i * W + j);
                    store(i * W + j, value, n, line ? count * W : 0);
                  });
    });
  });
}

// Y = dwconv(a (X + h); K) + beta of one plane; taps hold a already.
template <class A, int K, class T>
void plane_forward(const Plane<T>& plane, T* y, A shift, const A (&taps)[K * K], A bias) {
  const auto shifted = [=](auto v) { return v + shift; };
  const auto beta = spread(bias);
  convolve<K>(plane, taps, shifted, [=](int64_t at, auto value, auto n, int64_t) {
    for (auto& v : value.v) v += beta;
    store_chunk(y + at, value, n);
  });
}

// dX = a dX_r + slope (X - m) + level of one plane; taps are reversed and hold a already. Where
// there is no slope X is not read: what is not finite in it does not reach the gradient.
template <class A, int K, class T>
void plane_input(const Plane<T>& dy, const T* x, T* dx, const A (&taps)[K * K], A mean, A slope,
                 A level) {
  const auto same = [](auto v) { return v; };
  const auto base = spread(level);
  if (slope != 0)
    convolve<K>(dy, taps, same, [=](int64_t at, auto value, auto n, int64_t ahead) {
      constexpr int M = decltype(value)::count;
      if (ahead) UBN_PREFETCH(x + at + ahead);
      const auto apart = load_chunk<A, M>(x + at, n);
      for (int m = 0; m < M; m++) value.v[m] += (apart.v[m] - mean) * slope + base;
      store_chunk(dx + at, value, n);
    });
  else
    convolve<K>(dy, taps, same, [=](int64_t at, auto value, auto n, int64_t) {
      for (auto& v : value.v) v += base;
      store_chunk(dx + at, value, n);
    });
}

// Sums of rows first ... end of one plane, as plane_sums returns them, without a product or a
// difference that the equations do not have, so that what is not finite reaches what it should and
// no more. `step` is the stride of a pixel.
template <class T, class A, int K>
void exact_sums(const T* x, const T* dy, A shift, const A (&taps)[K * K], int64_t first,
                int64_t end, int64_t H, int64_t W, int64_t step, A (&P)[K * K], A& d) {
  constexpr int p = K / 2;
  d = 0;
  for (int u = 0; u < K; u++)
    for (int v = 0; v < K; v++) {
      A product = 0, plain = 0;
      for (int64_t i = std::max<int64_t>(first, p - u); i < std::min(end, H + p - u); i++)
        for (int64_t j = std::max(0, p - v); j < std::min(W, W + p - v); j++) {
          const A g = widen(dy[(i * W + j) * step]);
          product += (widen(x[((i + u - p) * W + j + v - p) * step]) + shift) * g;
          plain += g;
        }
      P[u * K + v] = product;
      d += plain * taps[u * K + v];
    }
}

// Adds up a chunk of columns of a strip: products of each tap; K times dY where the tap is inside
// of the plane; dY. `ahead`: X of the strip after this one.
template <int K, int M, class A, class T, class Inside, class Count>
inline void march_sums(const Plane<T>& plane, const T* dy, const T* ahead, A shift,
                       const A (&taps)[K * K], int64_t q, int64_t first, int64_t count,
                       Inside inside, Count n, typename Vec<A>::type (&products)[K * K],
                       typename Vec<A>::type& d, typename Vec<A>::type& total) {
  constexpr int P = K / 2;
  typedef typename Vec<A>::type V;
  typedef Window<T, A, K, M, 1, inside> Seen;
  const int64_t W = plane.W, end = first + count;
  const Seen window(plane, q);
  const auto shifted = [=](V v) { return v + shift; };
  V s[K * K] = {}, seen[1][Seen::SEEN];
  Chunk<A, M> rows[K] = {};  // dY where row u of the taps is inside
  if constexpr (K == 3) {    // dY of the k outputs that a row touches stays in registers
    Chunk<A, M> g[K] = {};
    for (int64_t i = first - P; i < end + P; i++) {
      UBN_PREFETCH(ahead + (i - first) * W + q);
      UBN_PREFETCH(dy + (i + count) * W + q);
      for (int t = 0; t + 1 < K; t++) g[t] = g[t + 1];
      g[K - 1] = {};
      if (i + P < end) g[K - 1] = load_chunk<A, M>(dy + (i + P) * W + q, n);
      if (i < 0 || i >= plane.H) continue;
      window.read(i, shifted, seen);
      for (int u = 0; u < K; u++)
        for (int m = 0; m < M; m++) {
          const V here = g[K - 1 - u].v[m];
          rows[u].v[m] += here;
          for (int v = 0; v < K; v++) s[u * K + v] += seen[0][m + v] * here;
        }
    }
  } else {
    for (int u = 0; u < K; u++) {
      const int64_t to = std::min(end, plane.H + P - u);
      for (int64_t i = std::max<int64_t>(first, P - u); i < to; i++) {
        const auto g = load_chunk<A, M>(dy + i * W + q, n);
        window.read(i + u - P, shifted, seen);
        for (int m = 0; m < M; m++) {
          rows[u].v[m] += g.v[m];
          for (int v = 0; v < K; v++) s[u * K + v] += seen[0][m + v] * g.v[m];
        }
      }
    }
  }
  for (int t = 0; t < K * K; t++) products[t] += s[t];
  for (int m = 0; m < M; m++) {
    for (int t = 0; t < K * K; t++) d += window.only_inside(m + t % K, rows[t / K].v[m]) * taps[t];
    total += rows[P].v[m];
  }
}

// Of one plane: P_uv = sum of (X + h) seen by tap (u, v), times dY; d = the sum of K dY over the
// taps inside of the plane; the sum of dY. With D = dX_r, the sum of (X + h) D is that of K P and
// the sum of D is d, so D itself is not needed.
template <class A, int K, class T>
void plane_sums(const Plane<T>& plane, const T* dy, A shift, const A (&taps)[K * K], A (&P)[K * K],
                A& d, A& total) {
  typedef typename Vec<A>::type V;
  V products[K * K] = {}, sum_d{}, sum_dy{};
  with_chunk<T, A>(plane.W, [&](auto vectors) {
    constexpr int M = vectors, size = Chunk<A, M>::size;
    plane.each_strip([&](int64_t first, int64_t count) {
      const T* ahead = plane.after(first, count, K / 2);
      each_columns<A, K, M>(plane.W, [&](int64_t q, auto chunks, auto inside, auto n) {
        for (int b = 0; b < chunks; b++)
          march_sums<K, M>(plane, dy, ahead, shift, taps, q + b * size, first, count, inside, n,
                           products, sum_d, sum_dy);
      });
    });
  });
  d = sum<A>(sum_d);
  total = sum<A>(sum_dy);
  bool finite = std::isfinite(d) && std::isfinite(total);
  for (int t = 0; t < K * K; t++) finite &= bool(std::isfinite(P[t] = sum<A>(products[t])));
  if (!finite)
    exact_sums<T, A, K>(plane.pixels, dy, shift, taps, 0, plane.H, plane.H, plane.W, 1, P, d);
}

}  // namespace ubn
