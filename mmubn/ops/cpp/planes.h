// The passes over X with pixels in the lanes: planes of H*W numbers, one after the other (NCHW).
//
// A strip of rows is copied into a scratch in the first level cache, converted, with zeros where
// taps leave the plane. A convolution then marches down the rows of a vector or two of columns:
// a row is read k times, once a column shift, and added to the k output rows that it touches,
// which stay in registers. p is k / 2.
#pragma once
#include "vec.h"

namespace ubn {

template <class T, class A>
void plane_moments(const T* x, int64_t hw, A& mean, A& var) {
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
  var = (sum<A>((s[0] + s[1]) + (s[2] + s[3])) + rest) / A(hw);
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

// R rows of a plane and p more on each side.
template <class A, int K>
class Strip {
 public:
  static constexpr int P = K / 2, N = Vec<A>::n;
  static constexpr int64_t NUMBERS = 4096;  // 16 KB of float

  int64_t R;      // rows of a strip
  int64_t pitch;  // from row to row: at least p zeros behind each
  A* rows;        // row 0 is p above the first output row

  Strip(int64_t H, int64_t W, int which = 0) : H_(H), W_(W) {
    pitch = (W + P + N - 1) / N * N;
    R = std::max<int64_t>(1, std::min(H, NUMBERS / pitch - 2 * P));
    static thread_local Buffer memory[2];
    const int64_t numbers = (R + 2 * P) * pitch + 2 * N;
    A* base = memory[which].template get<A>(numbers);
    std::memset(base, 0, numbers * sizeof(A));
    rows = base + N;
  }

  // Takes rows r0 - p ... r0 + count + p of plane x, plus a shift.
  template <class T>
  void fill(const T* x, A shift, int64_t r0, int64_t count) {
    const int64_t full = W_ / N * N, tail = W_ - full;
    const auto lanes = first_lanes<A>(tail);
    for (int64_t i = 0; i < count + 2 * P; i++) {
      const int64_t r = r0 - P + i;
      A* target = rows + i * pitch;
      if (r < 0 || r >= H_) {
        std::memset(target, 0, W_ * sizeof(A));
        continue;
      }
      const T* source = x + r * W_;
      for (int64_t q = 0; q < full; q += N) store<A>(target + q, load_as<A>(source + q) + shift);
      if (tail)  // a whole vector, which can be read again at once
        store<A>(target + full, only<A>(lanes, load_some<A>(source + full, tail) + shift));
    }
  }

  // Where what the strip after this one adds begins, to be prefetched while this is worked on.
  template <class T>
  const T* next(const T* x, int64_t r0, int64_t count) const {
    return x + std::min(H_, r0 + count + P) * W_;
  }

 private:
  int64_t H_, W_;
};

// Whether vector b of a group begins another line of the cache than the one before.
template <class T, class A>
constexpr bool starts_line(int b) {
  return b * Vec<A>::n * sizeof(T) % 64 == 0;
}

// f(row, which of B vectors, sum of K z) for `count` rows of outputs, B vectors from column q on.
template <class A, int K, int B, class F>
inline void march(const Strip<A, K>& strip, const A (&taps)[K * K], int64_t q, int64_t count, F f) {
  constexpr int P = K / 2, N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  V open[B][K] = {};  // outputs of rows s - k + 1 ... s
  for (int64_t s = 0; s < count + 2 * P; s++) {
    const A* row = strip.rows + s * strip.pitch + q - P;
    for (int b = 0; b < B; b++) {
      V z[K];
      for (int v = 0; v < K; v++) z[v] = load<A>(row + b * N + v);
      for (int t = 0; t < K; t++) {
        const A* tap = taps + (K - 1 - t) * K;
        V sum = z[0] * tap[0];
        for (int v = 1; v < K; v++) sum += z[v] * tap[v];
        open[b][t] += sum;
      }
    }
    for (int b = 0; b < B; b++) {
      if (s >= K - 1) f(s - (K - 1), b, open[b][0]);
      for (int t = 0; t + 1 < K; t++) open[b][t] = open[b][t + 1];
      open[b][K - 1] = V{};
    }
  }
}

// Calls store(row, column, which vector of a group, value, how many) for all outputs of a strip.
template <class A, int K, class F>
inline void march_all(const Strip<A, K>& strip, const A (&taps)[K * K], int64_t count, int64_t W,
                      F store) {
  constexpr int N = Vec<A>::n;
  int64_t q = 0;
  for (; q + 4 * N <= W; q += 4 * N)
    march<A, K, 4>(strip, taps, q, count, [&](int64_t r, int b, typename Vec<A>::type value) {
      store(r, q + b * N, b, value, Fixed<N>{});
    });
  for (; q + 2 * N <= W; q += 2 * N)
    march<A, K, 2>(strip, taps, q, count, [&](int64_t r, int b, typename Vec<A>::type value) {
      store(r, q + b * N, b, value, Fixed<N>{});
    });
  for (; q + N <= W; q += N)
    march<A, K, 1>(strip, taps, q, count, [&](int64_t r, int, typename Vec<A>::type value) {
      store(r, q, 0, value, Fixed<N>{});
    });
  if (q < W)
    march<A, K, 1>(strip, taps, q, count, [&](int64_t r, int, typename Vec<A>::type value) {
      store(r, q, 0, value, int(W - q));
    });
}

// Y = dwconv(a (X + h); K) + beta of one plane; taps hold a already.
template <class T, class A, int K>
void plane_forward(Strip<A, K>* strip, const T* x, T* y, A shift, const A (&taps)[K * K], A bias,
                   int64_t H, int64_t W) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const V beta = spread(bias);
  if constexpr (K == 1) {
    const int64_t hw = H * W, full = hw / N * N;
    for (int64_t q = 0; q < full; q += N)
      store_as<A>(y + q, (load_as<A>(x + q) + shift) * taps[0] + beta);
    for (int64_t q = full; q < hw; q++) narrow((widen(x[q]) + shift) * taps[0] + bias, y[q]);
  } else {
    for (int64_t r0 = 0; r0 < H; r0 += strip->R) {
      const int64_t count = std::min(strip->R, H - r0);
      strip->fill(x, shift, r0, count);
      T* out = y + r0 * W;
      const T* ahead = strip->next(x, r0, count);
      march_all<A, K>(*strip, taps, count, W, [&](int64_t r, int64_t q, int b, V value, auto n) {
        if (starts_line<T, A>(b)) UBN_PREFETCH(ahead + r * W + q);
        store_part<A>(out + r * W + q, value + beta, n);
      });
    }
  }
}

// dX = a dX_r + slope (X - m) + level of one plane; taps are reversed and hold a already. Where
// there is no slope X is not read: what is not finite in it does not reach the gradient.
template <class T, class A, int K>
void plane_input(Strip<A, K>* strip, const T* x, const T* dy, T* dx, const A (&taps)[K * K],
                 A mean, A slope, A level, int64_t H, int64_t W) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const V base = spread(level);
  if constexpr (K == 1) {
    const int64_t hw = H * W, full = hw / N * N;
    for (int64_t q = 0; q < full; q += N) {
      V value = load_as<A>(dy + q) * taps[0] + base;
      if (slope != 0) value += (load_as<A>(x + q) - mean) * slope;
      store_as<A>(dx + q, value);
    }
    for (int64_t q = full; q < hw; q++) {
      A value = widen(dy[q]) * taps[0] + level;
      if (slope != 0) value += (widen(x[q]) - mean) * slope;
      narrow(value, dx[q]);
    }
  } else {
    for (int64_t r0 = 0; r0 < H; r0 += strip->R) {
      const int64_t count = std::min(strip->R, H - r0);
      strip->fill(dy, A(0), r0, count);
      const T *source = x + r0 * W, *ahead = strip->next(dy, r0, count);
      T* out = dx + r0 * W;
      if (slope != 0)
        march_all<A, K>(*strip, taps, count, W, [&](int64_t r, int64_t q, int b, V value, auto n) {
          if (starts_line<T, A>(b)) {
            UBN_PREFETCH(ahead + r * W + q);
            UBN_PREFETCH(source + (r + count) * W + q);
          }
          const V apart = load_part<A>(source + r * W + q, n) - mean;
          store_part<A>(out + r * W + q, value + (apart * slope + base), n);
        });
      else
        march_all<A, K>(*strip, taps, count, W, [&](int64_t r, int64_t q, int, V value, auto n) {
          store_part<A>(out + r * W + q, value + base, n);
        });
    }
  }
}

// Sums of one plane without a product or a difference that the equations do not have, so that
// what is not finite reaches what it should and no more. `step` is the stride of a pixel.
template <class T, class A, int K>
void exact_sums(const T* x, const T* dy, A shift, int64_t H, int64_t W, int64_t step, A (&P)[K * K],
                A (&inside)[K * K]) {
  constexpr int p = K / 2;
  for (int u = 0; u < K; u++)
    for (int v = 0; v < K; v++) {
      A product = 0, plain = 0;
      for (int64_t i = std::max(0, p - u); i < std::min(H, H + p - u); i++)
        for (int64_t j = std::max(0, p - v); j < std::min(W, W + p - v); j++) {
          const A g = widen(dy[(i * W + j) * step]);
          product += (widen(x[((i + u - p) * W + j + v - p) * step]) + shift) * g;
          plain += g;
        }
      P[u * K + v] = product;
      inside[u * K + v] = plain;
    }
}

// Sum of n numbers.
template <class T, class A>
inline A sum_of(const T* x, int64_t n) {
  constexpr int N = Vec<A>::n;
  typename Vec<A>::type s{};
  int64_t q = 0;
  for (; q + N <= n; q += N) s += load_as<A>(x + q);
  if (q < n) s += load_some<A>(x + q, n - q);
  return sum<A>(s);
}

// Sums of a plane of dY over the outputs whose tap (u, v) lies inside the plane: the sum of all,
// less border rows and columns, and the corners once more. The sum of each column is known.
template <class T, class A, int K>
void inside_sums(const T* dy, A total, const A* column_sums, int64_t H, int64_t W,
                 A (&inside)[K * K]) {
  constexpr int p = K / 2;
  A rows[K] = {}, columns[K] = {};
  for (int e = 1; e <= p; e++) {
    rows[p - e] = rows[p - e + 1] + (e <= H ? sum_of<T, A>(dy + (e - 1) * W, W) : A(0));
    rows[p + e] = rows[p + e - 1] + (e <= H ? sum_of<T, A>(dy + (H - e) * W, W) : A(0));
    columns[p - e] = columns[p - e + 1] + (e <= W ? column_sums[e - 1] : A(0));
    columns[p + e] = columns[p + e - 1] + (e <= W ? column_sums[W - e] : A(0));
  }
  for (int u = 0; u < K; u++)
    for (int v = 0; v < K; v++) {
      A corner = 0;
      if (u != p && v != p) {
        const int64_t high = std::min<int64_t>(std::abs(u - p), H);
        const int64_t wide = std::min<int64_t>(std::abs(v - p), W);
        const int64_t r0 = u < p ? 0 : H - high, c0 = v < p ? 0 : W - wide;
        for (int64_t r = r0; r < r0 + high; r++)
          for (int64_t j = c0; j < c0 + wide; j++) corner += widen(dy[r * W + j]);
      }
      inside[u * K + v] = total - rows[u] - columns[v] + corner;
    }
}

// Adds the products of a vector of columns, row by row: (X + h) of k rows stays in registers. And
// dY to the sums of the columns.
template <class T, class A, int K, class Count>
inline void march_sums(const Strip<A, K>& strip, const T* dy, const T* ahead, int64_t q,
                       int64_t count, int64_t W, Count n, typename Vec<A>::type (&sums)[K * K],
                       A* column_sums) {
  constexpr int P = K / 2;
  typedef typename Vec<A>::type V;
  V s[K * K], total{};
  for (int t = 0; t < K * K; t++) s[t] = V{};
  const A* z = strip.rows + q - P;
  if constexpr (K == 3) {
    V seen[K * K];
    for (int t = 0; t < K * K; t++)
      seen[t] = t < K ? V{} : load<A>(z + (t / K - 1) * strip.pitch + t % K);
    for (int64_t r = 0; r < count; r++) {
      UBN_PREFETCH(ahead + r * W + q);
      UBN_PREFETCH(dy + (r + count) * W + q);
      const V g = load_part<A>(dy + r * W + q, n);
      total += g;
      for (int t = 0; t < K * (K - 1); t++) seen[t] = seen[t + K];
      for (int v = 0; v < K; v++)
        seen[K * (K - 1) + v] = load<A>(z + (r + K - 1) * strip.pitch + v);
      for (int t = 0; t < K * K; t++) s[t] += seen[t] * g;
    }
  } else {
    for (int64_t r = 0; r < count; r++) total += load_part<A>(dy + r * W + q, n);
    for (int u = 0; u < K; u++)
      for (int64_t r = 0; r < count; r++) {
        const V g = load_part<A>(dy + r * W + q, n);
        for (int v = 0; v < K; v++) s[u * K + v] += load<A>(z + (r + u) * strip.pitch + v) * g;
      }
  }
  for (int t = 0; t < K * K; t++) sums[t] += s[t];
  store<A>(column_sums + q, load<A>(column_sums + q) + total);
}

// Of one plane: P_uv = sum of (X + h) seen by tap (u, v), times dY; the sum of dY over the outputs
// whose tap (u, v) lies inside; the sum of dY. The sum of (X + h) D is that of K P and the sum
// of D that of K inside, so D = dX_r itself is not needed.
template <class T, class A, int K>
void plane_sums(Strip<A, K>* strip, const T* x, const T* dy, A shift, int64_t H, int64_t W,
                A (&P)[K * K], A (&inside)[K * K], A& total) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  if constexpr (K == 1) {
    const int64_t hw = H * W;
    V product[2] = {}, plain[2] = {};
    int64_t q = 0;
    for (; q + 2 * N <= hw; q += 2 * N)
      for (int i = 0; i < 2; i++) {
        const V g = load_as<A>(dy + q + i * N);
        product[i] += (load_as<A>(x + q + i * N) + shift) * g;
        plain[i] += g;
      }
    A rest = 0, rest_plain = 0;
    for (; q < hw; q++) {
      rest += (widen(x[q]) + shift) * widen(dy[q]);
      rest_plain += widen(dy[q]);
    }
    P[0] = sum<A>(product[0] + product[1]) + rest;
    inside[0] = total = sum<A>(plain[0] + plain[1]) + rest_plain;
  } else {
    V sums[K * K] = {}, plain{};
    static thread_local Buffer buffer;
    A* column_sums = buffer.get<A>(W + N);
    for (int64_t q = 0; q < W; q += N) store<A>(column_sums + q, plain);
    for (int64_t r0 = 0; r0 < H; r0 += strip->R) {
      const int64_t count = std::min(strip->R, H - r0);
      strip->fill(x, shift, r0, count);
      const T *d = dy + r0 * W, *ahead = strip->next(x, r0, count);
      int64_t q = 0;
      for (; q + N <= W; q += N)
        march_sums<T, A, K>(*strip, d, ahead, q, count, W, Fixed<N>{}, sums, column_sums);
      if (q < W) march_sums<T, A, K>(*strip, d, ahead, q, count, W, int(W - q), sums, column_sums);
    }
    bool finite = true;
    for (int t = 0; t < K * K; t++) finite &= bool(std::isfinite(P[t] = sum<A>(sums[t])));
    for (int64_t q = 0; q < W; q += N) plain += load<A>(column_sums + q);
    total = sum<A>(plain);
    if (finite && std::isfinite(total))
      inside_sums<T, A, K>(dy, total, column_sums, H, W, inside);
    else
      exact_sums<T, A, K>(x, dy, shift, H, W, 1, P, inside);
  }
}

}  // namespace ubn
