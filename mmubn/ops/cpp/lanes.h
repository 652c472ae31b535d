// The passes over X with channels in the lanes: blocks of N channels of one image, whose pixels
// lie `step` numbers apart. So channels_last is read as it is (step = C). Small planes of NCHW, in
// which vectors of pixels would be mostly tail, are packed into tiles first.
//
// Coefficients are those of the block, N each; taps are (k * k, pitch), tap after tap. While the
// blocks of a strip are worked on, one after the other, each prefetches its share of the next
// strip, `ahead`, so that memory is read in its order.
#pragma once
#include <utility>

#include "vec.h"

namespace ubn {

// Rows first ... end of an image of H rows of W pixels, which lie `step` numbers apart.
struct Strip {
  int64_t first, end, H, W, step;
};

template <class T, class A, int K>
struct Lanes {
  static constexpr int P = K / 2, N = Vec<A>::n;
  typedef typename Vec<A>::type V;

  // Pixels that are read together, all channels of each, so that memory is read in its order.
  // Sums of a chunk and then of those sums are also more exact than one long sum.
  static constexpr int64_t CHUNK = 16;

  // Calls f(c, how many blocks, which of their lanes there are) for the channels from c0 to c1, B
  // blocks at once where there are as many.
  template <int B, class F>
  static inline void each_blocks(int64_t c0, int64_t c1, F f) {
    int64_t c = c0;
    for (; c + B * N <= c1; c += B * N) f(c, Fixed<B>{}, AllLanes<A>{});
    for (; c + N <= c1; c += N) f(c, Fixed<1>{}, AllLanes<A>{});
    if (c < c1) f(c, Fixed<1>{}, FirstLanes<A>{c1 - c});
  }

  // Adds pixels to the means of `count` channels and, if wanted, to the sums of squared distances
  // from them, in which `seen` pixels are already. Pixels lie `step` apart.
  template <bool squared>
  static void add_moments(const T* x, int64_t pixels, int64_t step, int64_t count, int64_t seen,
                          A* mean, A* squares) {
    for (int64_t q = 0; q < pixels; q += CHUNK) {
      const int64_t n = std::min(CHUNK, pixels - q);
      const A weight = A(n) / A(seen + q + n);
      each_blocks<4>(0, count, [&](int64_t c, auto blocks, auto lanes) {
        constexpr int B = blocks;
        const T *from = x + q * step + c, *ahead = x + (q + n) * step + c * n;
        V part[B] = {}, about[B] = {};
        for (int64_t i = 0; i < n; i++)
          for (int b = 0; b < B; b++) part[b] += lanes.load(from + i * step + b * N);
        for (V& sum : part) sum /= A(n);
        for (int64_t i = 0; i < n; i++)
          for (int b = 0; b < B; b++) {
            UBN_PREFETCH(ahead + (i * B + b) * N);
            if constexpr (squared) {
              const V d = lanes.load(from + i * step + b * N) - part[b];
              about[b] += d * d;
            }
          }
        for (int b = 0; b < B; b++) {
          const V old = load<A>(mean + c + b * N);
          const V move = part[b] - old;
          // Infinity stays infinity, as in a sum.
          store<A>(mean + c + b * N, old * 0 == 0 ? old + move * weight : old + part[b]);
          if constexpr (squared) {  // Chan's update; of the first chunk 0, whatever move is
            about[b] += move * (move * (A(seen + q) * weight));
            store<A>(squares + c + b * N, load<A>(squares + c + b * N) + about[b]);
          }
        }
      });
    }
  }

  // f(j, b, sum over the taps u in [u0, u1) of K z) for the outputs j of a row in B blocks side by
  // side, z = in + shift; `in` is the row that tap p sees. A column goes to the k outputs that it
  // touches. `ahead` is prefetched: B vectors a column.
  template <int B, class U0, class U1, class Some, class F>
  static inline void row(U0 u0, U1 u1, Some lanes, const T* in, const T* ahead,
                         const V (&shift)[B], const V (&taps)[B][K * K], int64_t W, int64_t step,
                         F f) {
    V open[B][K] = {};  // outputs j - p ... j + p
    const int64_t R = W * step;
    for (int64_t j = 0; j < W; j++) {
      for (int b = 0; b < B; b++) {
        UBN_PREFETCH(ahead + (j * B + b) * N);
        for (int u = u0; u < u1; u++) {
          const V z = lanes.load(in + (u - P) * R + j * step + b * N) + shift[b];
          for (int t = 0; t < K; t++) open[b][t] += z * taps[b][u * K + K - 1 - t];
        }
        if (j >= P) f(j - P, b, open[b][0]);
        for (int t = 0; t + 1 < K; t++) open[b][t] = open[b][t + 1];
        open[b][K - 1] = V{};
      }
    }
    for (int t = 0; t < P; t++) {
      const int64_t j = W - P + t;
      if (j >= 0)
        for (int b = 0; b < B; b++) f(j, b, open[b][t]);
    }
  }

  // k = factor taps, of one block; `mirrored` for the transposed convolution.
  template <bool mirrored = false>
  static inline void scaled(const A* taps, int64_t pitch, V factor, V (&k)[K * K]) {
    for (int t = 0; t < K * K; t++)
      k[t] = load<A>(taps + (mirrored ? K * K - 1 - t : t) * pitch) * factor;
  }

  template <bool past, class Some>
  static inline void put(Some lanes, T* out, int64_t next_row, V value) {
    if constexpr (past && lanes.all) {
      store_past<A>(out, value);
    } else {
      UBN_PREFETCH_TO_WRITE(out + next_row);
      lanes.store(out, value);
    }
  }

  // g(i, R, u0, u1) for rows i ... i + R: of those that their taps see, u0 ... u1 lie inside of H,
  // as constants where that pays.
  template <int R, class G>
  static inline void with_taps(int64_t i, int64_t H, G g) {
    constexpr int all = K + R - 1;
    const int u0 = int(std::max<int64_t>(0, P - i)), u1 = int(std::min<int64_t>(all, H - i + P));
    if (u0 == 0 && u1 == all) return g(i, Fixed<R>{}, Fixed<0>{}, Fixed<all>{});
    if constexpr (K == 3) {
      if (u0 == 1 && u1 == all) return g(i, Fixed<R>{}, Fixed<1>{}, Fixed<all>{});
      if (u0 == 0) return g(i, Fixed<R>{}, Fixed<0>{}, Fixed<all - 1>{});
      return g(i, Fixed<R>{}, Fixed<1>{}, Fixed<all - 1>{});
    } else {
      return g(i, Fixed<R>{}, u0, u1);
    }
  }

  // Y = dwconv(a (X + h); K) + beta in a strip. `past`: what is stored goes past the caches.
  template <int B, bool past, class Some>
  static void forward(Some lanes, const Strip& s, const T* x, T* y, const T* ahead, const A* shift,
                      const A* scale, const A* taps, int64_t pitch, const A* bias) {
    V k[B][K * K], h[B], beta[B];
    for (int b = 0; b < B; b++) {
      h[b] = load<A>(shift + b * N);
      beta[b] = load<A>(bias + b * N);
      scaled(taps + b * N, pitch, load<A>(scale + b * N), k[b]);
    }
    const int64_t R = s.W * s.step;
    for (int64_t i = s.first; i < s.end; i++, ahead += s.W * B * N) {
      T* out = y + i * R;
      with_taps<1>(i, s.H, [&](int64_t, auto, auto u0, auto u1) {
        row<B>(u0, u1, lanes, x + i * R, ahead, h, k, s.W, s.step,
               [&](int64_t j, int b, V value) {
                 put<past>(lanes, out + j * s.step + b * N, R, value + beta[b]);
               });
      });
    }
  }

  // dX = a dX_r + slope (X - m) + level in a strip.
  template <int B, bool past, class Some>
  static void input(Some lanes, const Strip& s, const T* x, const T* dy, T* dx, const T* ahead,
                    const A* scale, const A* taps, int64_t pitch, const A* mean, const A* slope,
                    const A* level, bool has_slope) {
    V k[B][K * K], zero[B] = {};
    for (int b = 0; b < B; b++)
      scaled<true>(taps + b * N, pitch, load<A>(scale + b * N), k[b]);
    const int64_t R = s.W * s.step;
    for (int64_t i = s.first; i < s.end; i++, ahead += s.W * B * N) {
      const T* source = x + i * R;
      T* out = dx + i * R;
      with_taps<1>(i, s.H, [&](int64_t, auto, auto u0, auto u1) {
        row<B>(u0, u1, lanes, dy + i * R, ahead, zero, k, s.W, s.step,
               [&](int64_t j, int b, V value) {
                 const int64_t at = j * s.step + b * N;
                 value += load<A>(level + b * N);
                 if (has_slope) {
                   UBN_PREFETCH(source + R + at);
                   const V apart = lanes.load(source + at) - load<A>(mean + b * N);
                   value += apart * load<A>(slope + b * N);
                 }
                 put<past>(lanes, out + at, R, value);
               });
      });
    }
  }

  // The sums of planes.h over the rows of a strip: adds to P (k * k, pitch), behind which the sum
  // of dY lies, and to d_sum the sum of K dY over the taps that lie inside.
  template <class Some>
  static void sums(Some lanes, const Strip& s, const T* x, const T* dy, const T* ahead_x,
                   const T* ahead_dy, const A* shift, const A* taps, int64_t taps_pitch,
                   A* products, A* d_sum, int64_t pitch) {
    const int64_t W = s.W, step = s.step;
    const V h = load<A>(shift);
    V sum[K * K] = {}, total{};
    V inside[K * K] = {};  // dY where the tap lies inside
    const auto add_rows = [&](int64_t i, auto count, auto u0, auto u1) {
      constexpr int R = count, SEEN = K + R - 1;
      const T *px = x + i * W * step, *pd = dy + i * W * step;
      const auto read = [&](int u, int64_t j) {
        return j < W ? lanes.load(px + ((u - P) * W + j) * step) + h : V{};
      };
      V all[R] = {}, seen[SEEN][K] = {};  // X + h in columns j - p ... j + p
      for (int u = u0; u < u1; u++)
        for (int v = P; v < K - 1; v++) seen[u][v + 1] = read(u, v - P);
      for (int64_t j = 0; j < W; j++) {
        V g[R];
        for (int r = 0; r < R; r++) {
          UBN_PREFETCH(ahead_dy + (r * W + j) * N);
          UBN_PREFETCH(ahead_x + (r * W + j) * N);
          all[r] += g[r] = lanes.load(pd + (r * W + j) * step);
        }
        for (int u = u0; u < u1; u++) {
          for (int v = 0; v + 1 < K; v++) seen[u][v] = seen[u][v + 1];
          seen[u][K - 1] = read(u, j + P);
          for (int r = 0; r < R; r++)
            if (u >= r && u < r + K)
              for (int v = 0; v < K; v++) sum[(u - r) * K + v] += seen[u][v] * g[r];
        }
      }
      for (int r = 0; r < R; r++, pd += W * step) {
        V left[P + 1] = {}, right[P + 1] = {};
        for (int e = 1; e <= P; e++) {  // sums of the e outer columns
          left[e] = left[e - 1] + (e <= W ? lanes.load(pd + (e - 1) * step) : V{});
          right[e] = right[e - 1] + (e <= W ? lanes.load(pd + (W - e) * step) : V{});
        }
        for (int u = std::max<int>(u0 - r, 0); u < std::min<int>(u1 - r, K); u++)
          for (int v = 0; v < K; v++)
            inside[u * K + v] += all[r] - (v < P ? left[P - v] : right[v - P]);
        total += all[r];
      }
      ahead_x += count * W * N, ahead_dy += count * W * N;
    };
    constexpr int ROWS = K == 3 ? 2 : 1;  // at once: a row of X that both see is read once
    int64_t i = s.first;
    for (; i + ROWS <= s.end; i += ROWS) with_taps<ROWS>(i, s.H, add_rows);
    for (; i < s.end; i++) with_taps<1>(i, s.H, add_rows);
    V d = load<A>(d_sum);
    for (int t = 0; t < K * K; t++) {
      d += inside[t] * load<A>(taps + t * taps_pitch);
      store<A>(products + t * pitch, load<A>(products + t * pitch) + sum[t]);
    }
    store<A>(d_sum, d);
    A* at = products + K * K * pitch;
    store<A>(at, load<A>(at) + total);
  }
};

// Lanes of a with bit `half` for those of b without it.
template <class A, int half, int... lane>
inline void exchange(typename Vec<A>::type& first, typename Vec<A>::type& second,
                     std::integer_sequence<int, lane...>) {
  constexpr int N = Vec<A>::n;
  const auto a = first, b = second;
#if defined(__clang__) || __GNUC__ >= 12
  first = __builtin_shufflevector(a, b, (lane & half ? N + lane - half : lane)...);
  second = __builtin_shufflevector(a, b, (lane & half ? N + lane : lane + half)...);
#else
  using Order = typename Mask<A>::type;
  first = __builtin_shuffle(a, b, Order{(lane & half ? N + lane - half : lane)...});
  second = __builtin_shuffle(a, b, Order{(lane & half ? N + lane : lane + half)...});
#endif
}
template <class A>
using AllLaneNumbers = std::make_integer_sequence<int, Vec<A>::n>;

// N vectors of N lanes, lanes and vectors exchanged.
template <class A, int half = Vec<A>::n / 2>
inline void transpose(typename Vec<A>::type (&v)[Vec<A>::n]) {
  if constexpr (half > 0) {
    for (int i = 0; i < Vec<A>::n; i++)
      if (!(i & half)) exchange<A, half>(v[i], v[i + half], AllLaneNumbers<A>{});
    transpose<A, half / 2>(v);
  }
}
// The sum of vector i in lane i.
template <class A, int half = Vec<A>::n / 2>
inline typename Vec<A>::type sum_each(typename Vec<A>::type (&v)[Vec<A>::n]) {
  if constexpr (half > 0) {
    for (int i = 0; i < half; i++) {
      exchange<A, half>(v[i], v[i + half], AllLaneNumbers<A>{});
      v[i] += v[i + half];
    }
    return sum_each<A, half / 2>(v);
  }
  return v[0];
}

// Means of `count` small planes, hw numbers each, and, if wanted, sums of squared distances from
// them: those of N planes to the N lanes.
template <bool squared, class T, class A, class Size, class Count>
inline void small_plane_moments(const T* planes, Size hw, Count count, A* mean, A* squares) {
  constexpr int N = Vec<A>::n;
  typedef typename Vec<A>::type V;
  const int64_t full = hw / N * N;
  const auto is_there = lane_numbers<A>() < int(hw - full);
  // The sum of f(c, numbers of plane c) in lane c.
  const auto sum_of = [&](auto f) {
    V sums[N] = {};
    for (int64_t c = 0; c < count; c++) {
      const T* x = planes + c * hw;
      for (int64_t q = 0; q < full; q += N) sums[c] += f(c, load_as<A>(x + q));
      if (full < hw) sums[c] += only<A>(is_there, f(c, load_some<A>(x + full, hw - full)));
    }
    return sum_each<A>(sums);
  };
  store<A>(mean, sum_of([](int64_t, V v) { return v; }) / A(hw));
  if constexpr (squared)
    store<A>(squares, sum_of([=](int64_t c, V v) { return (v - mean[c]) * (v - mean[c]); }));
}

// Calls put(v) for each pixel, in order, of planes of `count` channels, hw numbers each: the N
// channels of it, zeros behind `count`. What is packed next lies `ahead` numbers behind.
template <class T, class A, class Size, class Count, class F>
inline void pack(const T* planes, Size hw, Count count, int64_t ahead, F put) {
  constexpr int N = Vec<A>::n;
  typename Vec<A>::type v[N];
  int64_t q = 0;
  if constexpr (std::is_same<Count, Fixed<N>>::value)
    for (; q + N <= hw; q += N) {  // unrolled, so that v stays in registers
      const T* next = planes + ahead + q * N;  // the planes lie together
      for (int c = 0; c < N; c++) {
        UBN_PREFETCH(next + c * N);
        v[c] = load_as<A>(planes + c * hw + q);
      }
      transpose<A>(v);
      for (int j = 0; j < N; j++) put(v[j]);
    }
  for (; q < hw; q += N) {
    const int64_t pixels = std::min<int64_t>(N, hw - q);
    for (int64_t c = 0; c < N; c++)
      v[c] = c < count ? load_some<A>(planes + c * hw + q, pixels) : typename Vec<A>::type{};
    transpose<A>(v);
    for (int64_t j = 0; j < pixels; j++) put(v[j]);
  }
}
// Back, each vector v of pixels q of channel c as f(c, q, v, how many).
template <class T, class A, class F>
inline void unpack(const A* tile, T* planes, int64_t hw, int64_t count, F f) {
  constexpr int N = Vec<A>::n;
  int64_t q = 0;
  typename Vec<A>::type v[N];
  for (; q + N <= hw; q += N) {
    for (int j = 0; j < N; j++) v[j] = load<A>(tile + (q + j) * N);
    transpose<A>(v);
    if (count == N)
      for (int c = 0; c < N; c++) store_as<A>(planes + c * hw + q, f(c, q, v[c], Fixed<N>{}));
    else
      for (int64_t c = 0; c < count; c++)
        store_as<A>(planes + c * hw + q, f(c, q, v[c], Fixed<N>{}));
  }
  if (q == hw) return;
  const int64_t pixels = hw - q;
  for (int64_t j = 0; j < N; j++) v[j] = load<A>(tile + std::min(q + j, hw - 1) * N);
  transpose<A>(v);
  for (int64_t c = 0; c < count; c++)
    store_some<A>(planes + c * hw + q, f(c, q, v[c], int(pixels)), pixels);
}
// The pixels of N channels of an image, converted. Around them are p zeros, once the border has
// been cleared.
template <class A, int K>
class Tile {
 public:
  static constexpr int P = K / 2, N = Vec<A>::n, KK = K * K;
  typedef typename Vec<A>::type V;

  static int64_t size(int64_t H, int64_t W) { return (H + 2 * P) * (W + 2 * P) * N; }

  Tile() = default;
  Tile(A* memory, int64_t H, int64_t W)
      : H_(H), W_(W), pitch_((W + 2 * P) * N), first_(memory + P * pitch_ + P * N) {}

  void clear_border() const {
    const int64_t row = W_ * N;
    clear(first_ - P * pitch_ - P * N, first_);
    for (int64_t i = 0; i + 1 < H_; i++)
      clear(first_ + i * pitch_ + row, first_ + (i + 1) * pitch_);
    A* last = first_ + (H_ - 1) * pitch_ + row;
    clear(last, last + P * pitch_ + P * N);
  }

  A* at(int64_t i, int64_t j) const { return first_ + i * pitch_ + j * N; }

  // What takes the pixels one after the other.
  auto filling(V shift) {
    return [=, target = first_, j = int64_t(0)](V v) mutable {
      store<A>(target, v + shift);
      target += N;
      if (++j == W_) j = 0, target += 2 * P * N;
    };
  }

  // out = dwconv(this; taps) + base
  void convolve(const V (&taps)[KK], V base, A* out) const {
    for (int64_t i = 0; i < H_; i++)
      for (int64_t j = 0; j < W_; j++, out += N) {
        const A* z = first_ + (i - P) * pitch_ + (j - P) * N;
        V value = base;
        for (int u = 0; u < K; u++) {
          V sum = load<A>(z + u * pitch_) * taps[u * K];
          for (int v = 1; v < K; v++) sum += load<A>(z + u * pitch_ + v * N) * taps[u * K + v];
          value += sum;
        }
        store<A>(out, value);
      }
  }

  // The sums of planes.h with this as X + h: P_uv, dY, and the sum of K times what lies inside.
  void sums(const Tile& dy, const V (&taps)[KK], V (&products)[KK], V& total, V& d_sum) const {
    for (V& product : products) product = V{};
    if constexpr (K <= 3) {  // the products stay in registers
      dy.each([&](const A* g, int64_t at) { add_products<0, K>(load<A>(g), at, products); });
    } else {
      dy.each_tap_row([&](auto u) {
        dy.each([&](const A* g, int64_t at) { add_products<u, u + 1>(load<A>(g), at, products); });
      });
    }
    dy.sums_inside(taps, total, d_sum);
  }

 private:
  static void clear(A* from, A* to) {
    for (; from < to; from += N) store<A>(from, V{});
  }
  V row_sum(int64_t i) const {
    V sum{};
    for (int64_t j = 0; j < W_; j++) sum += load<A>(first_ + i * pitch_ + j * N);
    return sum;
  }
  V column_sum(int64_t j) const {
    V sum{};
    for (int64_t i = 0; i < H_; i++) sum += load<A>(first_ + i * pitch_ + j * N);
    return sum;
  }
  // f(pixel, its place)
  template <class F>
  void each(F f) const {
    for (int64_t i = 0; i < H_; i++)
      for (int64_t j = 0; j < W_; j++) f(first_ + i * pitch_ + j * N, i * pitch_ + j * N);
  }
  template <class F>
  static void each_tap_row(F f) {
    f(Fixed<0>{}), f(Fixed<1>{}), f(Fixed<2>{}), f(Fixed<3>{}), f(Fixed<4>{});
    if constexpr (K > 5) f(Fixed<5>{}), f(Fixed<6>{});
  }
  template <int u0, int u1>
  void add_products(V g, int64_t at, V (&products)[KK]) const {
    const A* z = first_ + at - P * pitch_ - P * N;
    for (int u = u0; u < u1; u++)
      for (int v = 0; v < K; v++) products[u * K + v] += load<A>(z + u * pitch_ + v * N) * g;
  }
  // Sum of all, and the sum over taps of K times the sum of the outputs whose tap lies inside:
  // that of all, less border rows and columns, and the corners once more.
  void sums_inside(const V (&taps)[KK], V& total, V& d_sum) const {
    V rows[K] = {}, columns[K] = {};
    total = V{};
    for (int64_t i = 0; i < H_; i++) total += row_sum(i);
    for (int e = 1; e <= P; e++) {
      rows[P - e] = rows[P - e + 1] + (e <= H_ ? row_sum(e - 1) : V{});
      rows[P + e] = rows[P + e - 1] + (e <= H_ ? row_sum(H_ - e) : V{});
      columns[P - e] = columns[P - e + 1] + (e <= W_ ? column_sum(e - 1) : V{});
      columns[P + e] = columns[P + e - 1] + (e <= W_ ? column_sum(W_ - e) : V{});
    }
    d_sum = V{};
    for (int u = 0; u < K; u++)
      for (int v = 0; v < K; v++)
        d_sum += (total - rows[u] - columns[v] + corner(u - P, v - P)) * taps[u * K + v];
  }
  V corner(int64_t u, int64_t v) const {
    const int64_t high = std::min<int64_t>(std::abs(u), H_);
    const int64_t wide = std::min<int64_t>(std::abs(v), W_);
    const A* from = first_ + (u < 0 ? 0 : H_ - high) * pitch_ + (v < 0 ? 0 : W_ - wide) * N;
    V sum{};
    for (int64_t i = 0; i < high; i++)
      for (int64_t j = 0; j < wide; j++) sum += load<A>(from + i * pitch_ + j * N);
    return sum;
  }

  int64_t H_ = 0, W_ = 0, pitch_ = 0;
  A* first_ = nullptr;
};

}  // namespace ubn
