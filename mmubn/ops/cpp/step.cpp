// A step of UBN, RBN, BNET, IEBN and SyncUBN on the CPU: the passes over X of planes.h and lanes.h,
// and between them all that is small. mmubn/ops/interface.py says what each function does and
// what the symbols mean, docs/speed.md derives the backward pass.
//
// Built once for each T (UBN_T: float, double or ubn::bf16) and k (UBN_K). The interface is plain
// C, so that the library belongs to no version of Python or torch. All tensors are dense, in one
// of two formats: NCHW or, `pixels`, NHWC. Sums are added up in an order that the shape alone
// decides: one thread and many give the same bits.
#include "lanes.h"
#include "planes.h"

using namespace ubn;

namespace {

typedef UBN_T T;
typedef std::conditional<std::is_same<T, double>::value, double, float>::type A;
constexpr int K = UBN_K, KK = K * K, P = K / 2, N = Vec<A>::n;
typedef Lanes<T, A, K> InPlace;
typedef Lanes<A, A, K> Packed;  // tiles are converted

// Planes up to this size go through lanes, where vectors of pixels would be mostly tail.
constexpr int64_t SMALL_PLANE = 64;
// Bytes of a tensor that leaves nothing in a last level cache for the next layer.
constexpr int64_t LARGE = 16 << 20;
// Bytes of a strip of rows in channels_last.
constexpr int64_t STRIP = 256 << 10;
// Numbers of a block of the similarity: they stay in the first level cache.
constexpr int64_t BLOCK = 4096;

}  // namespace

extern "C" {

// What all functions are given; the pointers of what a layer lacks are null.
struct Layer {
  int64_t batch, channels, height, width, pixels, threads;
  int64_t scale_from_input;
  double eps;
  const A *weight, *kernel, *bias, *center_weight, *scale_weight, *scale_bias;
};

// What a training step moves.
struct State {
  int64_t gated, update, cumulative, warmup;
  double momentum, fct, similarity_weight;
  A *running_mean, *running_var, *running_similarity;
  int64_t* num_batches_tracked;
  unsigned char* gate;
};

}  // extern "C"

namespace {

int64_t padded(int64_t channels) { return (channels + N - 1) / N * N; }

A* scratch(size_t count) {
  static thread_local Buffer buffer;
  return buffer.get<A>(count);
}

// How the work on (image, channels) is cut, of the shape alone.
struct Plan {
  int64_t B, C, H, W, hw, Cp, block, blocks;
  int threads;
  bool lanes, pixels;

  explicit Plan(const Layer& l)
      : B(l.batch), C(l.channels), H(l.height), W(l.width), hw(H * W), Cp(padded(C)) {
    pixels = l.pixels;
    lanes = pixels || (hw <= SMALL_PLANE && 2 * C >= N);
    // As many channels as leave a task for each of some threads: a task has things to set up, and
    // pixels are read fastest with all their channels.
    const int64_t wanted = ((pixels ? 4 : 16) + B - 1) / B;
    block = lanes ? padded((C + wanted - 1) / wanted) : std::max<int64_t>(1, C / wanted);
    if (pixels) block = std::max<int64_t>(block, 4 * N);
    blocks = (C + block - 1) / block;
    // A task that takes less than waking a thread does is better done here.
    threads = int(std::min<int64_t>(l.threads, 1 + B * C * hw / 16384));
  }
  const T* image(const T* x, int64_t n, int64_t c) const {
    return x + n * C * hw + (pixels ? c : c * hw);
  }
  T* image(T* x, int64_t n, int64_t c) const { return x + n * C * hw + (pixels ? c : c * hw); }

  // Copied where what is read around it could leave the tensor.
  Plane<T> plane(const T* x, int64_t n, int64_t c) const {
    constexpr int64_t margin = Plane<T>::template margin<A, K>;
    const T *pixels = image(x, n, c), *end = x + B * C * hw;
    if (K > 1 && (pixels - x < margin || end - (pixels + hw) < margin)) {
      static thread_local Buffer buffer;
      T* copy = buffer.get<T>(hw + 2 * margin) + margin;
      std::copy(pixels, pixels + hw, copy);
      pixels = copy;
    }
    return {pixels, H, W};
  }

  // f(n, first channel, end) for all tasks.
  template <class F>
  void each(F f) const {
    parallel(B * blocks, threads, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) {
        const int64_t c = task % blocks * block;
        f(task / blocks, c, std::min(C, c + block));
      }
    });
  }
  // f(first channel, end) for all channels: the algebra on numbers an image and channel.
  template <class F>
  void each_channels(F f) const {
    constexpr int64_t size = 64;
    const int64_t few = 1 + B * C / 4096;
    parallel((C + size - 1) / size, int(std::min<int64_t>(threads, few)),
             [&](int64_t begin, int64_t end) { f(begin * size, std::min(C, end * size)); });
  }
  // f(first row, end) for strips of rows with all their channels, which lie side by side: what is
  // read of them channel after channel is to stay in the second level cache.
  template <class F>
  void each_strip(F f) const {
    const int64_t rows = std::max<int64_t>(1, STRIP / (W * C * int64_t(sizeof(T))));
    for (int64_t i = 0; i < H; i += rows) f(i, std::min(H, i + rows));
  }
  // f(whether what is written to `out` is to go past the caches): where it would not stay in them
  // until it is read, and fills whole lines.
  template <class F>
  void with_past(const T* out, F f) const {
    const bool whole = reinterpret_cast<uintptr_t>(out) % 64 == 0 && C * sizeof(T) % 64 == 0;
    if (pixels && whole && B * C * hw * int64_t(sizeof(T)) >= LARGE) {
      f(std::true_type{});
      store_past_ends();
    } else {
      f(std::false_type{});
    }
  }
  // The end of the channels in c0 ... c1 whose lanes can be read where they lie.
  int64_t in_place_until(int64_t c0, int64_t c1) const {
    return pixels ? c0 + (c1 - c0) / N * N : c0;
  }
  // put(v) for each pixel of the block of channels from c on. What comes next is the next block or
  // the same one of the next image.
  template <class F>
  void pack_block(const T* x, int64_t n, int64_t c, F put, bool next_image = false) const {
    const int64_t count = std::min<int64_t>(N, C - c);
    if (pixels)
      pack_tail<T, A>(image(x, n, c), hw, C, count, put);
    else
      pack<T, A>(image(x, n, c), hw, count, x + B * C * hw, (next_image ? C : N) * hw, put);
  }
  // To `tile`, pixel after pixel.
  void pack_block(const T* x, A* tile, int64_t n, int64_t c) const {
    pack_block(x, n, c, [=](typename Vec<A>::type v) mutable {
      store<A>(tile, v);
      tile += N;
    });
  }
  void unpack_block(const A* tile, T* y, int64_t n, int64_t c) const {
    const int64_t count = std::min<int64_t>(N, C - c);
    if (pixels)
      unpack_tail(tile, image(y, n, c), hw, C, count,
                  [](int64_t, typename Vec<A>::type v) { return v; });
    else
      unpack(tile, image(y, n, c), hw, count,
             [](int64_t, int64_t, typename Vec<A>::type v, auto) { return v; });
  }
  // And a block of X, less its mean and times its slope, to what is unpacked.
  void unpack_block_with(const T* x, const A* mean, const A* slope, const A* tile, T* y, int64_t n,
                         int64_t c) const {
    const int64_t count = std::min<int64_t>(N, C - c);
    const T* source = image(x, n, c);
    if (pixels)
      unpack_tail(tile, image(y, n, c), hw, C, count, [&](int64_t q, typename Vec<A>::type v) {
        const auto apart = load_some<A>(source + q * C, count) - load<A>(mean);
        return v + apart * load<A>(slope);
      });
    else
      unpack(tile, image(y, n, c), hw, count,
             [&](int64_t i, int64_t q, typename Vec<A>::type v, auto pixels) {
               return v + (load_chunk<A, 1>(source + i * hw + q, pixels).v[0] - mean[i]) * slope[i];
             });
  }
  A* tiles(int count) const {
    static thread_local Buffer buffer;
    return buffer.get<A>(size_t(count) * Tile<A, K>::size(H, W));
  }
};

void means(const Plan& p, const T* x, int64_t n, int64_t c0, int64_t c1, A* mean) {
  if (!p.lanes) {
    for (int64_t c = c0; c < c1; c++) mean[c - c0] = plane_mean<T, A>(p.image(x, n, c), p.hw);
    return;
  }
  const int64_t side_by_side = p.in_place_until(c0, c1);
  InPlace::mean(p.image(x, n, c0), p.hw, p.C, side_by_side - c0, mean);
  for (int64_t c = side_by_side; c < c1; c += N) {
    A* tile = p.tiles(1);
    p.pack_block(x, tile, n, c);
    Packed::mean(tile, p.hw, N, N, mean + c - c0);
  }
}

void moments(const Plan& p, const T* x, int64_t n, int64_t c0, int64_t c1, A* mean, A* var) {
  if (!p.lanes) {
    for (int64_t c = c0; c < c1; c++)
      plane_moments<T, A>(p.image(x, n, c), p.hw, mean[c - c0], var[c - c0]);
    return;
  }
  const int64_t side_by_side = p.in_place_until(c0, c1);
  InPlace::moments(p.image(x, n, c0), p.hw, p.C, side_by_side - c0, mean, var);
  for (int64_t c = side_by_side; c < c1; c += N) {
    A* tile = p.tiles(1);
    p.pack_block(x, tile, n, c);
    Packed::moments(tile, p.hw, N, N, mean + c - c0, var + c - c0);
  }
}

// sum over a block of coordinates of (sum_n w_n X_n)^2, in double
double squared_block(const T* x, const A* weight, int64_t batch, int64_t size, int64_t first) {
  typedef typename Vec<A>::type V;
  alignas(64) A total[BLOCK];
  const int64_t n = std::min(BLOCK, size - first), full = n / N * N;
  std::memset(total, 0, sizeof(total));
  for (int64_t i = 0; i < batch; i += 2) {  // two images at once: half the traffic of total
    const T* one = x + i * size + first;
    const T* two = i + 1 < batch ? one + size : one;
    const A w1 = weight[i], w2 = i + 1 < batch ? weight[i + 1] : A(0);
    for (int64_t q = 0; q < full; q += N) {
      V sum = load<A>(total + q) + load_as<A>(one + q) * w1;
      if (w2 != 0) sum += load_as<A>(two + q) * w2;
      store<A>(total + q, sum);
    }
    for (int64_t q = full; q < n; q++)
      total[q] += widen(one[q]) * w1 + (w2 != 0 ? widen(two[q]) * w2 : A(0));
  }
  V squares[2] = {};
  for (int64_t q = 0; q < BLOCK; q += 2 * N)
    for (int i = 0; i < 2; i++) {
      const V value = load<A>(total + q + i * N);
      squares[i] += value * value;
    }
  return sum<A>(squares[0] + squares[1]);
}

double squared(const T* x, const A* weight, int64_t batch, int64_t size, int threads) {
  static thread_local Buffer buffer;
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  double* partial = buffer.get<double>(blocks);
  parallel(blocks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      partial[b] = squared_block(x, weight, batch, size, b * BLOCK);
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) total += partial[b];
  return total;
}

// Effective taps, gamma K: (C, k * k) for planes, (k * k, Cp) with zeros behind C for lanes.
void effective_taps(const Plan& p, const Layer& l, A* taps) {
  if (p.lanes) std::memset(taps, 0, KK * p.Cp * sizeof(A));
  for (int64_t c = 0; c < p.C; c++)
    for (int t = 0; t < KK; t++) {
      A tap = l.weight ? l.weight[c] : A(1);
      if (l.kernel) tap *= l.kernel[c * KK + t];
      taps[p.lanes ? t * p.Cp + c : c * KK + t] = tap;
    }
}

// h, a and, if asked for, g of `count` channels, first of which is c.
void coefficients(const Layer& l, const A* mean, const A* mu, const A* rstd, int64_t c,
                  int64_t count, A* shift, A* scale, A* factor) {
  const A *center = l.center_weight ? l.center_weight + c : nullptr, *m = mu + c, *r = rstd + c;
  if (center)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) shift[i] = center[i] * mean[i] - m[i];
  else
    for (int64_t i = 0; i < count; i++) shift[i] = -m[i];
  if (!l.scale_weight) {
    for (int64_t i = 0; i < count; i++) scale[i] = r[i];
    if (factor)
      for (int64_t i = 0; i < count; i++) factor[i] = 1;
    return;
  }
  const A *weight = l.scale_weight + c, *bias = l.scale_bias + c;
  if (l.scale_from_input)
#pragma omp simd
    for (int64_t i = 0; i < count; i++) scale[i] = weight[i] * mean[i] + bias[i];
  else
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
      scale[i] = weight[i] * ((mean[i] + shift[i]) * r[i]) + bias[i];
#pragma omp simd
  for (int64_t i = 0; i < count; i++) scale[i] = sigmoid(scale[i]);
  if (factor) std::memcpy(factor, scale, count * sizeof(A));
#pragma omp simd
  for (int64_t i = 0; i < count; i++) scale[i] *= r[i];
}

// mu, 1 / sigma and the weight of a value in mu, from the rows of all processes; moves the state.
void statistics(const Layer& l, const State& s, const A* rows, int64_t ranks, A* mu, A* rstd,
                A* share) {
  const int64_t C = l.channels, length = 2 * C + 3;
  double total = 0, pairs = 0, similarity = 0;
  for (int64_t r = 0; r < ranks; r++) {
    total += rows[r * length];
    pairs += rows[r * length + 1];
    similarity += double(rows[r * length + 1]) * rows[r * length + 2];
  }
  static thread_local Buffer buffer;
  double* mean = buffer.get<double>(2 * C);
  double* var = mean + C;
  for (int64_t c = 0; c < C; c++) mean[c] = var[c] = 0;
  for (int64_t r = 0; r < ranks; r++) {
    const double weight = rows[r * length] / std::max(total, 1.0);
    for (int64_t c = 0; c < C; c++) mean[c] += weight * rows[r * length + 3 + c];
  }
  for (int64_t r = 0; r < ranks; r++) {
    const double weight = rows[r * length] / std::max(total, 1.0);
    for (int64_t c = 0; c < C; c++) {
      const double apart = rows[r * length + 3 + c] - mean[c];
      var[c] += weight * (rows[r * length + 3 + C + c] + apart * apart);
    }
  }
  bool open = true;
  if (s.gated && s.update) {
    const A newest = A(similarity / pairs);
    if (std::isfinite(newest))
      *s.running_similarity += A(s.similarity_weight) * (newest - *s.running_similarity);
    open = *s.running_similarity > A(s.fct) || *s.num_batches_tracked < s.warmup;
    *s.gate = open;
  } else if (s.gated) {
    open = *s.gate;
  }
  if (s.update && s.running_mean && open && total > 1) {
    const double unbias = total / (total - 1);
    bool finite = true;
    for (int64_t c = 0; c < C; c++)
      finite &= bool(std::isfinite(A(mean[c]))) & bool(std::isfinite(A(var[c] * unbias)));
    if (finite) {
      ++*s.num_batches_tracked;
      const A m = A(s.cumulative ? 1.0 / *s.num_batches_tracked : s.momentum);
      for (int64_t c = 0; c < C; c++) {
        s.running_mean[c] += m * (A(mean[c]) - s.running_mean[c]);
        s.running_var[c] += m * (A(var[c] * unbias) - s.running_var[c]);
      }
    }
  }
  for (int64_t c = 0; c < C; c++) {
    mu[c] = open ? A(mean[c]) : s.running_mean[c];
    rstd[c] = A(1 / std::sqrt((open ? A(var[c]) : s.running_var[c]) + l.eps));
  }
  *share = open ? A(1 / std::max(total, 1.0)) : A(0);
}

void forward(const Plan& p, const T* x, T* y, int64_t n, int64_t c0, int64_t c1, const A* shift,
             const A* scale, const A* taps, const A* bias) {
  if (!p.lanes) {
    for (int64_t c = c0; c < c1; c++) {
      A scaled[KK];
      for (int t = 0; t < KK; t++) scaled[t] = taps[c * KK + t] * scale[c - c0];
      plane_forward<A, K>(p.plane(x, n, c), p.image(y, n, c), shift[c - c0], scaled, bias[c]);
    }
    return;
  }
  const int64_t side_by_side = p.in_place_until(c0, c1);
  p.with_past(y, [&](auto past) {
    p.each_strip([&](int64_t first, int64_t end) {
      InPlace::pairs(c0, side_by_side, [&](int64_t c, auto blocks) {
        InPlace::template forward<blocks, past>(
            p.image(x, n, c), p.image(y, n, c), shift + c - c0, scale + c - c0, taps + c, p.Cp,
            bias + c, first, end, p.H, p.W, p.C);
      });
    });
  });
  if (side_by_side == c1) return;
  A* out = p.tiles(2);
  Tile<A, K> tile(out + p.hw * N, p.H, p.W);
  for (int64_t c = side_by_side; c < c1; c += N) {
    p.pack_block(x, n, c, tile.filling(load<A>(shift + c - c0)));
    typename Vec<A>::type effective[KK];
    for (int t = 0; t < KK; t++)
      effective[t] = load<A>(taps + t * p.Cp + c) * load<A>(scale + c - c0);
    tile.convolve(effective, load<A>(bias + c), out);
    p.unpack_block(out, y, n, c);
  }
}

// How backward_sums is cut: blocks of channels, groups of images that are summed in one.
struct Groups {
  int64_t count, blocks, block;
  explicit Groups(const Plan& p) {
    block = p.pixels ? p.Cp : p.lanes ? N : std::min<int64_t>(p.C, 16);
    blocks = (p.C + block - 1) / block;
    count = std::min<int64_t>(p.B, std::max<int64_t>(1, (32 + blocks - 1) / blocks));
  }
};

// Whether the sums of `count` channels, at least a vector of them, are finite: 0 times what is not
// is NaN.
bool all_finite(const A* products, const A* d_sum, int64_t pitch, int64_t count) {
  typename Vec<A>::type zeros{};
  for (int64_t c = 0; c < count; c += N) {
    zeros += load<A>(d_sum + c) * A(0);
    for (int t = 0; t < KK; t++) zeros += load<A>(products + t * pitch + c) * A(0);
  }
  return sum<A>(zeros) == 0;
}

// Sums of the block of channels from c on, packed.
void block_sums(const Plan& p, const T* x, const T* dy, int64_t n, int64_t c, const A* shift,
                const A* taps, A* products, A* d_sum, int64_t pitch) {
  typedef typename Vec<A>::type V;
  A* memory = p.tiles(2);
  Tile<A, K> tile(memory, p.H, p.W), dy_tile(memory + tile.size(p.H, p.W), p.H, p.W);
  p.pack_block(x, n, c, tile.filling(load<A>(shift)), true);
  p.pack_block(dy, n, c, dy_tile.filling(V{}), true);
  V effective[KK], sums[KK], total, d;
  for (int t = 0; t < KK; t++) effective[t] = load<A>(taps + t * p.Cp);
  tile.sums(dy_tile, effective, sums, total, d);
  for (int t = 0; t < KK; t++) store<A>(products + t * pitch, sums[t]);
  store<A>(products + KK * pitch, total);
  store<A>(d_sum, d);
}

// Sums of the channels c0 ... c1 of one image, to products (KK + 1, pitch) and d_sum, which
// hold nothing yet; pitch is that of the block, its first channel is c0.
void image_sums(const Plan& p, const T* x, const T* dy, int64_t n, int64_t c0, int64_t c1,
                const A* shift, const A* taps, A* products, A* d_sum, int64_t pitch) {
  A sums[KK], own_taps[KK];
  const auto read_taps = [&](int64_t c) {
    for (int t = 0; t < KK; t++) own_taps[t] = taps[p.lanes ? t * p.Cp + c : c * KK + t];
  };
  const auto write_products = [&](int64_t c) {
    for (int t = 0; t < KK; t++) products[t * pitch + c - c0] = sums[t];
  };
  if (!p.lanes) {
    for (int64_t c = c0; c < c1; c++) {
      read_taps(c);
      plane_sums<A, K>(p.plane(x, n, c), p.image(dy, n, c), shift[c - c0], own_taps, sums,
                       d_sum[c - c0], products[KK * pitch + c - c0]);
      write_products(c);
    }
    return;
  }
  std::memset(products, 0, (KK + 1) * pitch * sizeof(A));
  std::memset(d_sum, 0, pitch * sizeof(A));
  const int64_t side_by_side = p.in_place_until(c0, c1);
  p.each_strip([&](int64_t first, int64_t end) {
    for (int64_t c = c0; c < side_by_side; c += N)
      InPlace::sums(p.image(x, n, c), p.image(dy, n, c), shift + c - c0, taps + c, p.Cp,
                    products + c - c0, d_sum + c - c0, pitch, first, end, p.H, p.W, p.C);
  });
  for (int64_t c = side_by_side; c < c1; c += N)
    block_sums(p, x, dy, n, c, shift + c - c0, taps + c, products + c - c0, d_sum + c - c0, pitch);
  if (all_finite(products, d_sum, pitch, c1 - c0)) return;
  for (int64_t c = c0; c < c1; c++) {
    bool finite = std::isfinite(d_sum[c - c0]);
    for (int t = 0; t < KK; t++) finite &= bool(std::isfinite(products[t * pitch + c - c0]));
    if (finite) continue;
    read_taps(c);
    exact_sums<T, A, K>(p.image(x, n, c), p.image(dy, n, c), shift[c - c0], own_taps, p.H, p.W,
                        p.pixels ? p.C : 1, sums, d_sum[c - c0]);
    write_products(c);
  }
}

void input(const Plan& p, const T* x, const T* dy, T* dx, int64_t n, int64_t c0, int64_t c1,
           const A* mean, const A* scale, const A* slope, const A* level, bool has_slope,
           const A* taps) {
  if (!p.lanes) {
    for (int64_t c = c0; c < c1; c++) {
      A scaled[KK];
      for (int t = 0; t < KK; t++) scaled[t] = taps[c * KK + KK - 1 - t] * scale[c - c0];
      plane_input<A, K>(p.plane(dy, n, c), p.image(x, n, c), p.image(dx, n, c), scaled,
                        mean[c - c0], slope[c], level[c - c0]);
    }
    return;
  }
  const int64_t side_by_side = p.in_place_until(c0, c1);
  p.with_past(dx, [&](auto past) {
    p.each_strip([&](int64_t first, int64_t end) {
      InPlace::pairs(c0, side_by_side, [&](int64_t c, auto blocks) {
        InPlace::template input<blocks, past>(
            p.image(x, n, c), p.image(dy, n, c), p.image(dx, n, c), scale + c - c0, taps + c, p.Cp,
            mean + c - c0, slope + c, level + c - c0, has_slope, first, end, p.H, p.W, p.C);
      });
    });
  });
  if (side_by_side == c1) return;
  A* out = p.tiles(2);
  Tile<A, K> dy_tile(out + p.hw * N, p.H, p.W);
  for (int64_t c = side_by_side; c < c1; c += N) {
    const int64_t i = c - c0;
    p.pack_block(dy, n, c, dy_tile.filling(typename Vec<A>::type{}));
    typename Vec<A>::type effective[KK];
    for (int t = 0; t < KK; t++)
      effective[t] = load<A>(taps + (KK - 1 - t) * p.Cp + c) * load<A>(scale + i);
    dy_tile.convolve(effective, load<A>(level + i), out);
    if (has_slope)
      p.unpack_block_with(x, mean + i, slope + c, out, dx, n, c);
    else
      p.unpack_block(out, dx, n, c);
  }
}

}  // namespace

extern "C" {

// Numbers that `rest` of the backward pass holds: m, a, d_shift and d_gap, each (N, Cp).
int64_t ubn_rest_size(int64_t batch, int64_t channels) { return 4 * batch * padded(channels); }

// m to image_mean (N, C), and the row (2 C + 3); the similarity where `similar`.
void ubn_measure(const Layer* layer, const T* x, int similar, A* image_mean, A* row) {
  const Layer& l = *layer;
  const Plan p(l);
  const int64_t B = p.B, C = p.C, Cp = p.Cp;
  A *mean = scratch(2 * B * Cp + B), *var = mean + B * Cp, *weight = var + B * Cp;
  p.each([&](int64_t n, int64_t c0, int64_t c1) {
    moments(p, x, n, c0, c1, mean + n * Cp + c0, var + n * Cp + c0);
  });
  static thread_local Buffer buffer;
  double* sums = buffer.get<double>(3 * C);
  double *mu = sums, *inner = sums + C, *between = sums + 2 * C;
  std::memset(sums, 0, 3 * C * sizeof(double));
  p.each_channels([&](int64_t c0, int64_t c1) {
    for (int64_t n = 0; n < B; n++)
      for (int64_t c = c0; c < c1; c++) {
        const A m = mean[n * Cp + c];
        image_mean[n * C + c] = m;
        inner[c] += var[n * Cp + c];
        mu[c] += m * (1 + (l.center_weight ? l.center_weight[c] : A(0)));
      }
    for (int64_t c = c0; c < c1; c++) mu[c] /= B;
    for (int64_t n = 0; n < B; n++)
      for (int64_t c = c0; c < c1; c++) {
        const A pooled = mean[n * Cp + c] * (1 + (l.center_weight ? l.center_weight[c] : A(0)));
        const double apart = pooled - mu[c];
        between[c] += apart * apart;
      }
    for (int64_t c = c0; c < c1; c++) {
      row[3 + c] = A(mu[c]);
      row[3 + C + c] = A((inner[c] + between[c]) / B);
    }
  });
  bool finite = true;
  int64_t nonzero = 0;
  for (int64_t n = 0; similar && n < B; n++) {
    const A *m = mean + n * Cp, *v = var + n * Cp;
    double norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t c = 0; c < C; c++) norm += v[c] + m[c] * m[c];
    const A squared_norm = A(norm * p.hw);
    finite &= bool(std::isfinite(squared_norm));
    nonzero += squared_norm > 0;
    weight[n] = squared_norm > 0 ? 1 / std::sqrt(squared_norm) : 0;
  }
  row[0] = A(B * p.hw);
  row[1] = row[2] = 0;
  if (similar && B > 1 && finite) {
    const double pairs = double(B) * (B - 1);
    const double similarity = (squared(x, weight, B, C * p.hw, p.threads) - nonzero) / pairs;
    if (std::isfinite(similarity)) {
      row[1] = A(pairs);
      row[2] = A(similarity);
    }
  }
}

// Y and statistics (2 C + 1). Without rows it is evaluation, which fills image_mean if there is
// one.
void ubn_normalize(const Layer* layer, const State* state, const T* x, A* image_mean,
                   const A* rows, int64_t ranks, T* y, A* out) {
  const Layer& l = *layer;
  const Plan p(l);
  A *mu = out, *rstd = out + p.C;
  if (rows) {
    statistics(l, *state, rows, ranks, mu, rstd, out + 2 * p.C);
  } else {
    for (int64_t c = 0; c < p.C; c++) {
      mu[c] = state->running_mean[c];
      rstd[c] = A(1 / std::sqrt(state->running_var[c] + l.eps));
    }
    out[2 * p.C] = 0;
  }
  A *taps = scratch((KK + 1) * p.Cp), *bias = taps + KK * p.Cp;
  effective_taps(p, l, taps);
  for (int64_t c = 0; c < p.Cp; c++) bias[c] = l.bias && c < p.C ? l.bias[c] : A(0);
  p.each([&](int64_t n, int64_t c0, int64_t c1) {
    static thread_local Buffer buffer;
    A* shift = buffer.get<A>(3 * p.Cp);
    A *scale = shift + p.Cp, *mean = scale + p.Cp, *known = nullptr;
    for (int64_t c = c1 - c0; c < padded(c1 - c0); c++) shift[c] = scale[c] = 0;
    if (image_mean) {
      known = image_mean + n * p.C + c0;
      if (!rows) {
        means(p, x, n, c0, c1, mean);
        std::memcpy(known, mean, (c1 - c0) * sizeof(A));
      }
    }
    coefficients(l, known, mu, rstd, c0, c1 - c0, shift, scale, nullptr);
    forward(p, x, y, n, c0, c1, shift, scale, taps, bias);
  });
}

// Gradients of the parameters but the center weight (those that the layer has, the bias always),
// of the statistics (2, C), and rest. Without image_mean it is computed, if `needs_mean`.
void ubn_backward_sums(const Layer* layer, const T* x, const T* dy, const A* image_mean,
                       int needs_mean, const A* kept, A* d_statistics, A* d_weight, A* d_kernel,
                       A* d_bias, A* d_scale_weight, A* d_scale_bias, A* rest) {
  const Layer& l = *layer;
  const Plan p(l);
  const Groups g(p);
  const int64_t B = p.B, C = p.C, Cp = p.Cp;
  const A *mu = kept, *rstd = kept + C;
  A *mean = rest, *scale = mean + B * Cp, *d_shift = scale + B * Cp, *d_gap = d_shift + B * Cp;
  const int64_t padding = g.blocks * g.block;  // channels of the blocks, the last one's tail too
  A* work = scratch(3 * B * Cp + KK * Cp + g.count * (KK + 1) * padding);
  A *shift = work, *factor = shift + B * Cp, *d_scale = factor + B * Cp, *taps = d_scale + B * Cp;
  A* parts = taps + KK * Cp;
  effective_taps(p, l, taps);
  auto prepare = [&](int64_t n, int64_t c0, int64_t c1) {  // m, h, a and g
    const int64_t at = n * Cp + c0, channels = c1 - c0;
    if (image_mean)
      std::memcpy(mean + at, image_mean + n * C + c0, channels * sizeof(A));
    else if (needs_mean)
      means(p, x, n, c0, c1, mean + at);
    else
      std::memset(mean + at, 0, channels * sizeof(A));
    coefficients(l, mean + at, mu, rstd, c0, channels, shift + at, scale + at, factor + at);
    if (c1 == C)
      for (A* array : {mean, shift, scale})
        std::fill(array + n * Cp + C, array + (n + 1) * Cp, A(0));
  };
  // Blocks of small planes are short: each would wait for its own mean, gate and sums in turn.
  const bool tiles = p.lanes && !p.pixels;
  if (tiles) p.each(prepare);
  parallel(g.count * g.blocks, p.threads, [&](int64_t begin, int64_t end) {
    static thread_local Buffer buffer;
    A *products = buffer.get<A>((KK + 2) * g.block), *d_sum = products + (KK + 1) * g.block;
    for (int64_t task = begin; task < end; task++) {
      const int64_t group = task / g.blocks, c0 = task % g.blocks * g.block;
      const int64_t c1 = std::min(C, c0 + g.block);
      A* total = parts + (group * g.blocks + task % g.blocks) * (KK + 1) * g.block;
      std::memset(total, 0, (KK + 1) * g.block * sizeof(A));
      for (int64_t n = B * group / g.count; n < B * (group + 1) / g.count; n++) {
        const int64_t at = n * Cp + c0, channels = c1 - c0;
        if (!tiles) prepare(n, c0, c1);
        image_sums(p, x, dy, n, c0, c1, shift + at, taps, products, d_sum, g.block);
        const A *a = scale + at, *plain = products + KK * g.block;
        A *dot = d_scale + at, *d_h = d_shift + at, *sum_plain = total + KK * g.block;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
          dot[c] = 0;
          d_h[c] = a[c] * d_sum[c];
          sum_plain[c] += plain[c];
        }
        for (int t = 0; t < KK; t++) {
          const A* product = products + t * g.block;
          A* sum = total + t * g.block;
#pragma omp simd
          for (int64_t c = 0; c < channels; c++) sum[c] += a[c] * product[c];
          if (p.lanes) {
            const A* tap = taps + t * Cp + c0;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) dot[c] += product[c] * tap[c];
          } else {
            const A* tap = taps + c0 * KK + t;
            for (int64_t c = 0; c < channels; c++) dot[c] += product[c] * tap[c * KK];
          }
        }
      }
    }
  });
  static thread_local Buffer buffer;
  double* sums = buffer.get<double>(4 * C);
  std::memset(sums, 0, 4 * C * sizeof(double));
  p.each_channels([&](int64_t c0, int64_t c1) {
    double *by_mean = sums, *by_rstd = sums + C, *by_weight = sums + 2 * C, *by_bias = sums + 3 * C;
    for (int64_t c = c0; c < c1; c++) {
      A d_taps[KK + 1] = {};
      for (int64_t group = 0; group < g.count; group++) {
        const A* part = parts + (group * g.blocks + c / g.block) * (KK + 1) * g.block;
        for (int t = 0; t <= KK; t++) d_taps[t] += part[t * g.block + c % g.block];
      }
      d_bias[c] = d_taps[KK];
      if (d_kernel) {
        A along = 0;
        for (int t = 0; t < KK; t++) {
          along += d_taps[t] * l.kernel[c * KK + t];
          d_kernel[c * KK + t] = d_taps[t] * l.weight[c];
        }
        d_weight[c] = along;
      } else if (d_weight) {
        d_weight[c] = d_taps[0];
      }
    }
    for (int64_t n = 0; n < B; n++) {
      const int64_t at = n * Cp;
      if (!l.scale_weight) {
#pragma omp simd
        for (int64_t c = c0; c < c1; c++) {
          by_rstd[c] += d_scale[at + c];
          by_mean[c] -= d_shift[at + c];
          d_gap[at + c] = 0;
        }
        continue;
      }
      const A* scale_weight = l.scale_weight;
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) {
        const int64_t i = at + c;
        const A f = factor[i], logit = d_scale[i] * rstd[c] * f * (1 - f);
        by_rstd[c] += d_scale[i] * f;
        by_bias[c] += logit;
        d_gap[i] = logit * scale_weight[c];
      }
      if (l.scale_from_input) {
#pragma omp simd
        for (int64_t c = c0; c < c1; c++) {
          const int64_t i = at + c;
          by_weight[c] += d_scale[i] * rstd[c] * factor[i] * (1 - factor[i]) * mean[i];
        }
      } else {
#pragma omp simd
        for (int64_t c = c0; c < c1; c++) {
          const int64_t i = at + c;
          const A f = factor[i], logit = d_scale[i] * rstd[c] * f * (1 - f);
          const A centred = mean[i] + shift[i];
          by_weight[c] += logit * centred * rstd[c];
          by_rstd[c] += d_gap[i] * centred;
          d_gap[i] *= rstd[c];
          d_shift[i] += d_gap[i];
        }
      }
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) by_mean[c] -= d_shift[at + c];
    }
    for (int64_t c = c0; c < c1; c++) {
      d_statistics[c] = A(by_mean[c]);
      d_statistics[C + c] = A(-0.5 * rstd[c] * rstd[c] * rstd[c] * by_rstd[c]);
      if (l.scale_weight) {
        d_scale_weight[c] = A(by_weight[c]);
        d_scale_bias[c] = A(by_bias[c]);
      }
    }
  });
}

// dX, and the gradient of the center weight where there is one.
void ubn_backward_input(const Layer* layer, const T* x, const T* dy, const A* kept,
                        const A* d_statistics, const A* rest, T* dx, A* d_center_weight) {
  const Layer& l = *layer;
  const Plan p(l);
  const int64_t B = p.B, C = p.C, Cp = p.Cp;
  const A* mu = kept;
  const A share = kept[2 * C];
  const A *mean = rest, *scale = mean + B * Cp, *d_shift = scale + B * Cp,
          *d_gap = d_shift + B * Cp;
  A* work = scratch(B * Cp + (KK + 2) * Cp);
  A *level = work, *taps = level + B * Cp, *d_mean = taps + KK * Cp, *slope = d_mean + Cp;
  effective_taps(p, l, taps);
  std::memset(d_mean, 0, 2 * Cp * sizeof(A));
  if (share > 0)  // statistics of the batch depend on X, running ones do not
    for (int64_t c = 0; c < C; c++) {
      d_mean[c] = d_statistics[c] * share;
      slope[c] = 2 * d_statistics[C + c] * share;
    }
  static thread_local Buffer buffer;
  double* by_center = buffer.get<double>(C);
  std::memset(by_center, 0, C * sizeof(double));
  const A pixels = A(p.hw);
  p.each_channels([&](int64_t c0, int64_t c1) {
    for (int64_t n = 0; n < B; n++) {
      for (int64_t c = c0; c < c1; c++) {
        const int64_t i = n * Cp + c;
        const A center = l.center_weight ? l.center_weight[c] : A(0);
        // (1 + w_m) m - mu, as the forward pass rounds it
        const A centred = mean[i] + (center * mean[i] - mu[c]);
        A reaches = share > 0 ? (d_mean[c] + slope[c] * centred) * pixels : A(0);
        if (l.center_weight) {
          const A through = d_shift[i] + reaches;
          by_center[c] += through * mean[i];
          reaches += center * through;
        }
        level[i] = (reaches + d_gap[i]) / pixels;
      }
      if (c1 == C)
        for (int64_t c = C; c < Cp; c++) level[n * Cp + c] = 0;
    }
    if (l.center_weight)
      for (int64_t c = c0; c < c1; c++) d_center_weight[c] = A(by_center[c]);
  });
  p.each([&](int64_t n, int64_t c0, int64_t c1) {
    const int64_t at = n * Cp + c0;
    input(p, x, dy, dx, n, c0, c1, mean + at, scale + at, slope, level + at, share > 0, taps);
  });
}

double ubn_squared_sum(const T* x, const A* weight, int64_t batch, int64_t size, int64_t threads) {
  return squared(x, weight, batch, size, int(std::min<int64_t>(threads, 1 + batch * size / 16384)));
}

}  // extern "C"
