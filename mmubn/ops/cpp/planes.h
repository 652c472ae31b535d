// The passes over X with pixels in the lanes: planes of H*W numbers, one after the other (NCHW).
//
// A strip of rows is copied into a scratch in the first level cache, k times, copy v shifted
// by v - p columns and with zeros where a tap would leave its row; rows outside the plane are
// zeros. A k x k convolution is then one flat loop of k^2 multiply-adds without any border,
// whatever W is. p is k / 2.
#pragma once
#include "vec.h"

namespace ubn {

#define UBN_PREFETCH(pointer) __builtin_prefetch(pointer, 0, 2)

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

// The k copies of a strip of R rows.
template <class A, int K>
class Strip {
 public:
  static constexpr int P = K / 2, N = Vec<A>::n;
  static constexpr int64_t NUMBERS = 4096;  // in all copies: 16 KB of float

  int64_t R;      // rows of a strip
  int64_t pitch;  // from copy to copy
  A* c;           // copy v at output q of the strip, seen by tap row u: c[v * pitch + u * W + q]

  Strip(int64_t H, int64_t W) : H_(H), W_(W) {
    R = std::max<int64_t>(1, std::min(H, NUMBERS / K / W - 2 * P));
    pitch = ((R + 2 * P) * W + 3 * N) / N * N;
    static thread_local Buffer memory;
    A* base = memory.template get<A>(K * pitch + 2 * N);
    std::memset(base, 0, (K * pitch + 2 * N) * sizeof(A));
    c = base + N;
  }

  // Takes rows r0 - p ... r0 + rows + p of plane x, plus a shift.
  template <class T>
  void fill(const T* x, A shift, int64_t r0, int64_t rows) {
    const int64_t low = std::max<int64_t>(0, r0 - P), high = std::min(H_, r0 + rows + P);
    const int64_t first = (low - (r0 - P)) * W_, count = (high - low) * W_;
    const T* source = x + low * W_;
    A* target[K];
    for (int v = 0; v < K; v++) target[v] = c + v * pitch + first - (v - P);
    int64_t q = 0;
    for (; q + N <= count; q += N) {
      const auto value = load_as<A>(source + q) + shift;
      for (int v = 0; v < K; v++) store<A>(target[v] + q, value);
    }
    for (; q < count; q++) {
      const A value = widen(source[q]) + shift;
      for (int v = 0; v < K; v++) target[v][q] = value;
    }
    const int64_t all = rows + 2 * P;
    if (R < H_)  // else the rows outside the plane are zeros from the beginning
      for (int v = 0; v < K; v++) {
        std::memset(c + v * pitch, 0, first * sizeof(A));
        std::memset(c + v * pitch + first + count, 0, (all * W_ - first - count + N) * sizeof(A));
      }
    for (int v = 0; v < K; v++) {
      const int64_t columns = std::min<int64_t>(W_, std::abs(v - P));
      A* edge = c + v * pitch + (v < P ? 0 : W_ - columns);
      for (int64_t i = 0; i < all; i++)
        for (int64_t j = 0; j < columns; j++) edge[i * W_ + j] = 0;
    }
  }

  // Where the strip after this one begins, to be prefetched while this one is worked on.
  template <class T>
  const T* next(const T* x, int64_t r0, int64_t rows) const {
    return x + std::min(H_, r0 + rows + P) * W_;
  }

  inline typename Vec<A>::type at(int u, int v, int64_t q) const {
    return load<A>(c + v * pitch + u * W_ + q);
  }
  inline typename Vec<A>::type convolve(const A* taps, int64_t q, typename Vec<A>::type sum) const {
    for (int u = 0; u < K; u++)
      for (int v = 0; v < K; v++) sum += at(u, v, q) * taps[u * K + v];
    return sum;
  }

 private:
  int64_t H_, W_;
};

// Y = dwconv(a (X + h); K) + beta of one plane; taps hold a already.
template <class T, class A, int K>
void plane_forward(Strip<A, K>* strip, const T* x, T* y, A shift, const A* taps, A bias, int64_t H,
                   int64_t W) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const V beta = spread(bias);
  if constexpr (K == 1) {
    const int64_t hw = H * W, blocks = hw / N * N;
    for (int64_t q = 0; q < blocks; q += N)
      store_as<A>(y + q, (load_as<A>(x + q) + shift) * taps[0] + beta);
    for (int64_t q = blocks; q < hw; q++) narrow((widen(x[q]) + shift) * taps[0] + bias, y[q]);
  } else {
    for (int64_t r = 0; r < H; r += strip->R) {
      const int64_t rows = std::min(strip->R, H - r), n = rows * W;
      strip->fill(x, shift, r, rows);
      const T* ahead = strip->next(x, r, rows);
      T* out = y + r * W;
      int64_t q = 0;
      for (; q + N <= n; q += N) {
        UBN_PREFETCH(ahead + q);
        store_as<A>(out + q, strip->convolve(taps, q, beta));
      }
      if (q < n) store_some<A>(out + q, strip->convolve(taps, q, beta), n - q);
    }
  }
}

// dX = a dX_r + slope (X - m) + level of one plane; taps are reversed and hold a already. Where
// there is no slope X is not read: what is not finite in it does not reach the gradient.
template <class T, class A, int K>
void plane_input(Strip<A, K>* strip, const T* x, const T* dy, T* dx, const A* taps, A mean,
                 A slope, A level, int64_t H, int64_t W) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const V base = spread(level);
  if constexpr (K == 1) {
    const int64_t hw = H * W, blocks = hw / N * N;
    for (int64_t q = 0; q < blocks; q += N) {
      V value = load_as<A>(dy + q) * taps[0] + base;
      if (slope != 0) value += (load_as<A>(x + q) - mean) * slope;
      store_as<A>(dx + q, value);
    }
    for (int64_t q = blocks; q < hw; q++) {
      A value = widen(dy[q]) * taps[0] + level;
      if (slope != 0) value += (widen(x[q]) - mean) * slope;
      narrow(value, dx[q]);
    }
  } else {
    for (int64_t r = 0; r < H; r += strip->R) {
      const int64_t rows = std::min(strip->R, H - r), n = rows * W;
      strip->fill(dy, A(0), r, rows);
      const T *ahead = strip->next(dy, r, rows), *source = x + r * W;
      T* out = dx + r * W;
      int64_t q = 0;
      if (slope != 0) {
        for (; q + N <= n; q += N) {
          UBN_PREFETCH(ahead + q);
          UBN_PREFETCH(source + q + n);
          const V through = (load_as<A>(source + q) - mean) * slope + base;
          store_as<A>(out + q, strip->convolve(taps, q, through));
        }
      } else {
        for (; q + N <= n; q += N) store_as<A>(out + q, strip->convolve(taps, q, base));
      }
      if (q < n) {
        V through = base;
        if (slope != 0) through += (load_some<A>(source + q, n - q) - mean) * slope;
        store_some<A>(out + q, strip->convolve(taps, q, through), n - q);
      }
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

// Sums of a plane of dY over the outputs whose tap (u, v) lies inside the plane: the sum of all,
// less border rows and columns, and the corners once more.
template <class T, class A, int K>
void inside_sums(const T* dy, A total, int64_t H, int64_t W, A (&inside)[K * K]) {
  constexpr int p = K / 2;
  A rows[K] = {}, columns[K] = {};
  for (int e = 1; e <= p; e++) {
    const int64_t top = std::min<int64_t>(e, H), left = std::min<int64_t>(e, W);
    A first = 0, last = 0;
#pragma omp simd reduction(+ : first, last)
    for (int64_t q = 0; q < top * W; q++) {
      first += widen(dy[q]);
      last += widen(dy[H * W - 1 - q]);
    }
    rows[p - e] = first;
    rows[p + e] = last;
    first = last = 0;
    for (int64_t j = 0; j < left; j++)
#pragma omp simd reduction(+ : first, last)
      for (int64_t r = 0; r < H; r++) {
        first += widen(dy[r * W + j]);
        last += widen(dy[r * W + W - 1 - j]);
      }
    columns[p - e] = first;
    columns[p + e] = last;
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
    for (int64_t r = 0; r < H; r += strip->R) {
      const int64_t rows = std::min(strip->R, H - r), n = rows * W;
      strip->fill(x, shift, r, rows);
      const T *ahead = strip->next(x, r, rows), *d = dy + r * W;
      int64_t q = 0;
      for (; q + N <= n; q += N) {
        UBN_PREFETCH(ahead + q);
        UBN_PREFETCH(d + q + n);
        const V g = load_as<A>(d + q);
        plain += g;
        for (int u = 0; u < K; u++)
          for (int v = 0; v < K; v++) sums[u * K + v] += strip->at(u, v, q) * g;
      }
      if (q < n) {
        const V g = load_some<A>(d + q, n - q);
        plain += g;
        for (int u = 0; u < K; u++)
          for (int v = 0; v < K; v++) sums[u * K + v] += strip->at(u, v, q) * g;
      }
    }
    bool finite = true;
    for (int t = 0; t < K * K; t++) finite &= bool(std::isfinite(P[t] = sum<A>(sums[t])));
    total = sum<A>(plain);
    if (finite && std::isfinite(total))
      inside_sums<T, A, K>(dy, total, H, W, inside);
    else
      exact_sums<T, A, K>(x, dy, shift, H, W, 1, P, inside);
  }
}

}  // namespace ubn
