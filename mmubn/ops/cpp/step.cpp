// A step of UBN, RBN, BNET, IEBN and SyncUBN on the CPU: the passes over X of planes.h and lanes.h,
// and between them all that is small. mmubn/ops/interface.py says what each function does and
// what the symbols mean, docs/speed.md derives the backward pass.
//
// Built once for each T (UBN_T: float, double or ubn::bf16) and k (UBN_K). The interface is plain
// C, so that the library belongs to no version of Python or torch. All tensors are dense, in one
// of two formats: NCHW or, `pixels`, NHWC. Sums are added up in an order that the shape alone
// decides: one thread and many give the same bits.
#include <array>
#include <utility>

#include "lanes.h"
#include "planes.h"

using namespace ubn;

namespace {

typedef UBN_T T;
typedef std::conditional<std::is_same<T, double>::value, double, float>::type A;
constexpr int K = UBN_K, KK = K * K, P = K / 2, N = Vec<A>::n;
typedef Lanes<T, A, K> InPlace;
typedef Lanes<A, A, K> Packed;  // tiles are converted
typedef typename Vec<A>::type V;

// Planes up to this size go through lanes, where vectors of pixels would be mostly tail.
constexpr int64_t SMALL_PLANE = 64;
// Bytes of a tensor that leaves nothing in a last level cache for the next layer.
constexpr int64_t LARGE = 16 << 20;
// Bytes of a strip of rows in channels_last.
constexpr int64_t STRIP = 128 << 10;
// From so many channels on, the sums in channels_last copy PACK blocks at once into tiles of at
// most TILE bytes: pixels so far apart are slow to read, so each is read once, not for each row of
// taps.
constexpr int64_t WIDE = 1024, TILE = 32 << 10;
constexpr int PACK = 2;
// Tasks that there are to be at least: for processors with more cores than images.
constexpr int64_t TASKS = 32;
// As many images at most have their products summed while their moments are.
constexpr int64_t FEW = 4;
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

// A piece of an image: channels c0 ... c1 of rows first ... end. NCHW is cut by channels, NHWC by
// rows: memory is read fastest in its order.
struct Piece {
  int64_t c0, c1, first, end;
  int64_t part;  // number of the rows
};

// How the work is cut, of the shape alone.
struct Plan {
  int64_t B, C, H, W, hw, Cp, block, blocks, parts;
  int threads;
  bool lanes, pixels, wide;

  // Of the sums of the backward pass, or of another pass.
  explicit Plan(const Layer& l, bool sums = false)
      : B(l.batch), C(l.channels), H(l.height), W(l.width), hw(H * W), Cp(padded(C)) {
    pixels = l.pixels;
    wide = sums && pixels && K > 1 && C >= WIDE &&
           Tile<A, K>::size(H, W) * int64_t(sizeof(A)) <= TILE;
    lanes = pixels || (hw <= SMALL_PLANE && 2 * C >= N);
    const int64_t wanted = (TASKS + B - 1) / B;
    parts = pixels && !wide ? std::min(wanted, (H + strip_rows() - 1) / strip_rows()) : 1;
    block = pixels && !wide ? Cp
            : lanes ? padded((C + wanted - 1) / wanted)
                    : std::max<int64_t>(1, C / wanted);
    blocks = (C + block - 1) / block;
    // A task that takes less than waking a thread does is better done here.
    threads = int(std::min<int64_t>(l.threads, 1 + B * C * hw / 16384));
  }
  // Whether tap t sees a pixel anywhere.
  bool sees(int t) const { return std::abs(t / K - P) < H && std::abs(t % K - P) < W; }
  const T* image(const T* x, int64_t n, int64_t c) const {
    return x + n * C * hw + (pixels ? c : c * hw);
  }
  T* image(T* x, int64_t n, int64_t c) const { return x + n * C * hw + (pixels ? c : c * hw); }

  // Copied where what is read around it could leave the tensor. Without a kernel, one row.
  Plane<T> plane(const T* x, int64_t n, int64_t c) const {
    constexpr int64_t margin = Plane<T>::template margin<A, K>;
    const T *pixels = image(x, n, c), *end = x + B * C * hw;
    if (pixels - x < margin || end - (pixels + hw) < margin) {
      static thread_local Buffer buffer;
      T* copy = buffer.get<T>(hw + 2 * margin) + margin;
      std::copy(pixels, pixels + hw, copy);
      pixels = copy;
    }
    const bool row = K == 1 && hw < int64_t(1) << 30;  // columns are counted in 32 bits
    return row ? Plane<T>{pixels, 1, hw} : Plane<T>{pixels, H, W};
  }

  int64_t pieces() const { return blocks * parts; }
  Piece piece(int64_t index) const {
    const int64_t part = index % parts, c = index / parts * block;
    return {c, std::min(C, c + block), first_row(part), first_row(part + 1), part};
  }
  int64_t first_row(int64_t part) const { return H * part / parts; }
  // Where what is summed of part `part` of image n lies in (parts, N, Cp).
  int64_t at(int64_t part, int64_t n) const { return (part * B + n) * Cp; }

  // f(n, piece) for all tasks.
  template <class F>
  void each(F f) const {
    parallel(B * pieces(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) f(task / pieces(), piece(task % pieces()));
    });
  }
  // f(first channel, end) for all channels: the algebra on numbers an image and channel.
  template <class F>
  void each_channels(F f) const {
    parallel((C + N - 1) / N, threads,
             [&](int64_t begin, int64_t end) { f(begin * N, std::min(C, end * N)); });
  }
  int64_t strip_rows() const {
    return std::max<int64_t>(1, STRIP / (W * C * int64_t(sizeof(T))));
  }
  // f(strip, c, how many blocks, which of their lanes there are) for the blocks of channels, up to
  // M at once, of each strip of a piece. A strip stays in the second level cache.
  template <int M, class F>
  void each_block(const Piece& piece, F f) const {
    for (int64_t i = piece.first; i < piece.end; i += strip_rows()) {
      const Strip strip{i, std::min(piece.end, i + strip_rows()), H, W, C};
      InPlace::each_blocks<M>(piece.c0, piece.c1, [&](int64_t c, auto blocks, auto lanes) {
        f(strip, c, blocks, lanes);
      });
    }
  }
  // What the block of channels from c on prefetches: its share of the strip after this one, which
  // begins `halo` rows behind it.
  const T* ahead(const T* x, int64_t n, const Strip& s, int64_t c, int64_t halo) const {
    return image(x, n, 0) + (s.end + halo) * W * C + c * (s.end - s.first) * W;
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
  // f(hw, how many channels there are of the N from c on), as constants where that pays.
  template <class F>
  void with_sizes(int64_t c, F f) const {
    if (c + N > C)
      f(hw, C - c);
    else if (hw == N)
      f(Fixed<N>{}, Fixed<N>{});
    else
      f(hw, Fixed<N>{});
  }
  // put(v) for each pixel of the N planes from c on. What comes next is the next block or the same
  // one of the next image.
  template <class F>
  void pack_block(const T* x, int64_t n, int64_t c, F put, bool next_image = false) const {
    const int64_t ahead = (next_image ? C : N) * hw;
    with_sizes(c, [&](auto hw, auto count) {
      pack<T, A>(image(x, n, c), hw, count, ahead, put);
    });
  }
  // Back, with f(which channel, pixel, v, how many) of each vector of pixels.
  template <class F>
  void unpack_block(const A* tile, T* y, int64_t n, int64_t c, F f) const {
    unpack(tile, image(y, n, c), hw, std::min<int64_t>(N, C - c), f);
  }
  // Memory of a packed block.
  A* packed() const {
    static thread_local Buffer buffer;
    return buffer.get<A>(size_t(hw) * N);
  }
  // Tiles of this thread. Their borders are zeros, inside is what was left there.
  template <int count>
  std::array<Tile<A, K>, count> tiles() const {
    static thread_local struct {
      Buffer buffer;
      A* memory = nullptr;
      int64_t H = 0, W = 0;
    } kept;
    const int64_t size = Tile<A, K>::size(H, W);
    const A* before = std::exchange(kept.memory, nullptr);  // what get() frees, even if it throws
    A* memory = kept.buffer.template get<A>(count * size);
    const bool clear = before != memory || kept.H != H || kept.W != W;
    std::array<Tile<A, K>, count> tiles;
    for (int i = 0; i < count; i++) {
      tiles[i] = Tile<A, K>(memory + i * size, H, W);
      if (clear) tiles[i].clear_border();
    }
    kept.memory = memory, kept.H = H, kept.W = W;
    return tiles;
  }
};

// Sums over images of M vectors of channels, in double.
template <int M>
struct Sums {
  typedef double Wide __attribute__((vector_size(N * sizeof(double))));
  Wide all[M] = {};
  void add(int b, V v) { all[b] += __builtin_convertvector(v, Wide); }
  void add_product(int b, V v, V w) {
    all[b] += __builtin_convertvector(v, Wide) * __builtin_convertvector(w, Wide);
  }
  double& operator[](int64_t i) { return reinterpret_cast<double*>(all)[i]; }
};

// Adds a piece to the means and, if wanted, the sums of squared distances from them, which lie from
// c0 on and in which the rows before are already, if it is part of a larger one.
template <bool squared>
void add_moments(const Plan& p, const T* x, int64_t n, const Piece& piece, A* mean, A* squares,
                 int64_t rows_before = 0) {
  const int64_t c0 = piece.c0, count = piece.c1 - c0;
  if (p.pixels) {
    if (!rows_before) {
      std::memset(mean, 0, padded(count) * sizeof(A));
      if (squared) std::memset(squares, 0, padded(count) * sizeof(A));
    }
    InPlace::template add_moments<squared>(p.image(x, n, c0) + piece.first * p.W * p.C,
                                           (piece.end - piece.first) * p.W, p.C, count,
                                           rows_before * p.W, mean, squares);
  } else if (p.lanes) {
    for (int64_t c = 0; c < count; c += N)
      p.with_sizes(c0 + c, [&](auto hw, auto planes) {
        small_plane_moments<squared>(p.image(x, n, c0 + c), hw, planes, mean + c, squares + c);
      });
  } else {
    for (int64_t c = 0; c < count; c++) {
      if constexpr (squared)
        plane_moments<T, A>(p.image(x, n, c0 + c), p.hw, mean[c], squares[c]);
      else
        mean[c] = plane_mean<T, A>(p.image(x, n, c0 + c), p.hw);
    }
  }
}

// Joins the parts of channels c0 ... c1 to the first one, as lanes.h joins chunks.
template <bool squared>
void join_parts(const Plan& p, int64_t c0, int64_t c1, A* mean, A* squares) {
  for (int64_t part = 1; part < p.parts; part++) {
    const int64_t first = p.first_row(part), end = p.first_row(part + 1);
    const A weight = A(end - first) / A(end), both = A(first * p.W) * weight;
    for (int64_t n = 0; n < p.B; n++) {
      const int64_t to = p.at(0, n), from = p.at(part, n);
#pragma omp simd
      for (int64_t c = c0; c < c1; c++) {
        const A old = mean[to + c], move = mean[from + c] - old;
        mean[to + c] = old * 0 == 0 ? old + move * weight : old + mean[from + c];
        if (squared) squares[to + c] += squares[from + c] + move * move * both;
      }
    }
  }
}

// m of all images, to (N, pitch).
void image_means(const Plan& p, const T* x, A* out, int64_t pitch) {
  static thread_local Buffer buffer;
  A* mean = buffer.get<A>(p.at(p.parts, 0));
  p.each([&](int64_t n, const Piece& piece) {
    add_moments<false>(p, x, n, piece, mean + p.at(piece.part, n) + piece.c0, nullptr);
  });
  join_parts<false>(p, 0, p.C, mean, nullptr);
  for (int64_t n = 0; n < p.B; n++)
    std::memcpy(out + n * pitch, mean + p.at(0, n), p.C * sizeof(A));
}

// Adds to `products` sum X_i X_j of each pair of B images, `size` apart, over `count` numbers.
template <int B>
void add_products(const T* x, int64_t size, int64_t count, double* products) {
  constexpr int PAIRS = B * (B - 1) / 2, SUMS = B == 2 ? 4 : 2;  // chains of additions
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t end = std::min(count, first + BLOCK);
    V sums[SUMS][PAIRS] = {}, v[B];
    const auto add = [&](V(&sum)[PAIRS]) {
      for (int i = 0, pair = 0; i < B; i++)
        for (int j = 0; j < i; j++) sum[pair++] += v[i] * v[j];
    };
    int64_t q = first;
    for (; q + SUMS * N <= end; q += SUMS * N)
      for (int s = 0; s < SUMS; s++) {
        for (int i = 0; i < B; i++) v[i] = load_as<A>(x + i * size + q + s * N);
        add(sums[s]);
      }
    for (; q < end; q += N) {
      for (int i = 0; i < B; i++)
        v[i] = load_some<A>(x + i * size + q, std::min<int64_t>(N, end - q));
      add(sums[0]);
    }
    for (int pair = 0; pair < PAIRS; pair++)
      for (int s = 0; s < SUMS; s++) products[pair] += sum<A>(sums[s][pair]);
  }
}

// The moments of all images, a few, and sum X_i X_j of their pairs: X is read once.
template <int B>
void moments_and_products(const Plan& p, const T* x, A* mean, A* squares, double* products) {
  constexpr int PAIRS = B * (B - 1) / 2;
  const int64_t size = p.C * p.hw, pieces = p.pieces();
  static thread_local Buffer buffer;
  double* partial = buffer.get<double>(pieces * PAIRS);
  std::memset(partial, 0, pieces * PAIRS * sizeof(double));
  parallel(pieces, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
      const Piece piece = p.piece(index);
      const auto take = [&](const Piece& small, int64_t offset, int64_t count) {
        for (int64_t n = 0; n < B; n++) {
          const int64_t at = p.at(piece.part, n) + small.c0;
          add_moments<true>(p, x, n, small, mean + at, squares + at, small.first - piece.first);
        }
        add_products<B>(x + offset, size, count, partial + index * PAIRS);
      };
      Piece small = piece;
      if (p.pixels) {
        const int64_t rows = (p.strip_rows() + B - 1) / B, row = p.W * p.C;
        for (int64_t i = piece.first; i < piece.end; i += rows) {
          small.first = i, small.end = std::min(piece.end, i + rows);
          take(small, i * row, (small.end - i) * row);
        }
      } else {
        const int64_t channels = p.lanes ? N : 1;
        for (int64_t c = piece.c0; c < piece.c1; c += channels) {
          small.c0 = c, small.c1 = std::min(piece.c1, c + channels);
          take(small, c * p.hw, (small.c1 - c) * p.hw);
        }
      }
    }
  });
  for (int64_t i = 0; i < pieces * PAIRS; i++) products[i % PAIRS] += partial[i];
}

// sum over a block of coordinates of (sum_n w_n X_n)^2, in double
double squared_block(const T* x, const A* weight, int64_t batch, int64_t size, int64_t first) {
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
    for (int64_t b = end; b-- > begin;)  // what the moments read last is still in a cache
      partial[b] = squared_block(x, weight, batch, size, b * BLOCK);
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; b++) total += partial[b];
  return total;
}

// Effective taps, gamma K, of channels c0 ... c1: (k * k, Cp), zeros behind C.
void effective_taps(const Plan& p, const Layer& l, int64_t c0, int64_t c1, A* taps) {
  for (int64_t c = c0; c < (c1 == p.C ? p.Cp : c1); c++) {
    const A weight = c >= p.C ? A(0) : l.weight ? l.weight[c] : A(1);
    for (int t = 0; t < KK; t++)
      taps[t * p.Cp + c] = l.kernel && c < p.C ? weight * l.kernel[c * KK + t] : weight;
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

// As torch's: exact at both ends.
A lerp(A start, A end, A weight) {
  const A apart = end - start;
  return weight < A(0.5) ? start + weight * apart : end - apart * (1 - weight);
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
      *s.running_similarity = lerp(*s.running_similarity, newest, A(s.similarity_weight));
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
        s.running_mean[c] = lerp(s.running_mean[c], A(mean[c]), m);
        s.running_var[c] = lerp(s.running_var[c], A(var[c] * unbias), m);
      }
    }
  }
  for (int64_t c = 0; c < C; c++) {
    mu[c] = open ? A(mean[c]) : s.running_mean[c];
    rstd[c] = A(1 / std::sqrt((open ? A(var[c]) : s.running_var[c]) + l.eps));
  }
  *share = open ? A(1 / std::max(total, 1.0)) : A(0);
}

void forward(const Plan& p, const T* x, T* y, int64_t n, const Piece& piece, const A* shift,
             const A* scale, const A* taps, const A* bias) {
  const int64_t c0 = piece.c0, c1 = piece.c1;
  if (p.pixels) {
    p.with_past(y, [&](auto past) {
      p.each_block<2>(piece, [&](const Strip& s, int64_t c, auto blocks, auto lanes) {
        InPlace::forward<blocks, past>(lanes, s, p.image(x, n, c), p.image(y, n, c),
                                       p.ahead(x, n, s, c, P), shift + c - c0, scale + c - c0,
                                       taps + c, p.Cp, bias + c);
      });
    });
  } else if (p.lanes) {
    A* out = p.packed();
    auto [tile] = p.tiles<1>();
    for (int64_t c = c0; c < c1; c += N) {
      p.pack_block(x, n, c, tile.filling(load<A>(shift + c - c0)));
      V effective[KK];
      Packed::scaled(taps + c, p.Cp, load<A>(scale + c - c0), effective);
      tile.convolve(effective, load<A>(bias + c), out);
      p.unpack_block(out, y, n, c, [](int64_t, int64_t, V v, auto) { return v; });
    }
  } else {
    for (int64_t c = c0; c < c1; c++) {
      A scaled[KK];
      for (int t = 0; t < KK; t++) scaled[t] = taps[t * p.Cp + c] * scale[c - c0];
      plane_forward<A, K>(p.plane(x, n, c), p.image(y, n, c), shift[c - c0], scaled, bias[c]);
    }
  }
}

// How the sums of the backward pass are cut: blocks of channels; groups of images, or of parts of
// these, that are summed in one.
struct Groups {
  int64_t count, blocks, block;
  explicit Groups(const Plan& p) {
    const bool whole = p.pixels && !p.wide && p.hw > SMALL_PLANE;  // else sums would fill the cache
    block = whole ? p.Cp : p.pixels ? 4 * N : N;
    blocks = (p.C + block - 1) / block;
    count = std::min<int64_t>(p.B * p.parts, std::max<int64_t>(1, (TASKS + blocks - 1) / blocks));
  }
};

// Whether the sums of `count` channels, at least a vector of them, are finite: 0 times what is not
// is NaN.
bool all_finite(const A* products, const A* d_sum, int64_t pitch, int64_t count) {
  V zeros{};
  for (int64_t c = 0; c < count; c += N) {
    zeros += load<A>(d_sum + c) * A(0);
    for (int t = 0; t < KK; t++) zeros += load<A>(products + t * pitch + c) * A(0);
  }
  return sum<A>(zeros) == 0;
}

// Sums of a block of channels, of X + h and dY in tiles.
void tile_sums(const Plan& p, const Tile<A, K>& tile, const Tile<A, K>& dy_tile, const A* taps,
               A* products, A* d_sum, int64_t pitch) {
  V effective[KK], sums[KK], total, d;
  for (int t = 0; t < KK; t++) effective[t] = load<A>(taps + t * p.Cp);
  tile.sums(dy_tile, effective, sums, total, d);
  for (int t = 0; t < KK; t++) store<A>(products + t * pitch, sums[t]);
  store<A>(products + KK * pitch, total);
  store<A>(d_sum, d);
}

// Copies M blocks side by side of an image in channels_last, shifted, into tiles.
template <int M, class Some>
void fill_tiles(const Plan& p, Some lanes, const T* x, const A* shift, Tile<A, K>* tiles) {
  V h[M] = {};
  for (int b = 0; shift && b < M; b++) h[b] = load<A>(shift + b * N);
  for (int64_t i = 0; i < p.H; i++)
    for (int64_t j = 0; j < p.W; j++, x += p.C)
      for (int b = 0; b < M; b++) {
        UBN_PREFETCH(x + (M + b) * N);
        store<A>(tiles[b].at(i, j), lanes.load(x + b * N) + h[b]);
      }
}

// Sums of a piece of an image, to products (KK + 1, pitch) and d_sum, which hold nothing yet; pitch
// is that of the block, its first channel is c0.
void image_sums(const Plan& p, const T* x, const T* dy, int64_t n, const Piece& piece,
                const A* shift, const A* taps, A* products, A* d_sum, int64_t pitch) {
  const int64_t c0 = piece.c0, c1 = piece.c1;
  A sums[KK], own_taps[KK];
  const auto read_taps = [&](int64_t c) {
    for (int t = 0; t < KK; t++) own_taps[t] = taps[t * p.Cp + c];
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
  if (p.wide) {
    InPlace::each_blocks<PACK>(c0, c1, [&](int64_t c, auto blocks, auto lanes) {
      auto tiles = p.tiles<2 * blocks>();
      fill_tiles<blocks>(p, lanes, p.image(x, n, c), shift + c - c0, tiles.data());
      fill_tiles<blocks>(p, lanes, p.image(dy, n, c), nullptr, tiles.data() + blocks);
      for (int b = 0; b < blocks; b++) {
        const int64_t i = c - c0 + b * N;
        tile_sums(p, tiles[b], tiles[blocks + b], taps + c + b * N, products + i, d_sum + i, pitch);
      }
    });
  } else if (p.pixels) {
    std::memset(products, 0, (KK + 1) * pitch * sizeof(A));
    std::memset(d_sum, 0, pitch * sizeof(A));
    p.each_block<1>(piece, [&](const Strip& s, int64_t c, auto, auto lanes) {
      InPlace::sums(lanes, s, p.image(x, n, c), p.image(dy, n, c), p.ahead(x, n, s, c, P),
                    p.ahead(dy, n, s, c, 0), shift + c - c0, taps + c, p.Cp, products + c - c0,
                    d_sum + c - c0, pitch);
    });
  } else {
    auto [tile, dy_tile] = p.tiles<2>();
    for (int64_t c = c0; c < c1; c += N) {
      p.pack_block(x, n, c, tile.filling(load<A>(shift + c - c0)), true);
      p.pack_block(dy, n, c, dy_tile.filling(V{}), true);
      tile_sums(p, tile, dy_tile, taps + c, products + c - c0, d_sum + c - c0, pitch);
    }
  }
  if (all_finite(products, d_sum, pitch, c1 - c0)) return;
  for (int64_t c = c0; c < c1; c++) {
    bool finite = std::isfinite(d_sum[c - c0]);
    for (int t = 0; t < KK; t++) finite &= bool(std::isfinite(products[t * pitch + c - c0]));
    if (finite) continue;
    read_taps(c);
    exact_sums<T, A, K>(p.image(x, n, c), p.image(dy, n, c), shift[c - c0], own_taps, piece.first,
                        piece.end, p.H, p.W, p.pixels ? p.C : 1, sums, d_sum[c - c0]);
    write_products(c);
  }
}

void input(const Plan& p, const T* x, const T* dy, T* dx, int64_t n, const Piece& piece,
           const A* mean, const A* scale, const A* slope, const A* level, bool has_slope,
           const A* taps) {
  const int64_t c0 = piece.c0, c1 = piece.c1;
  if (p.pixels) {
    p.with_past(dx, [&](auto past) {
      p.each_block<2>(piece, [&](const Strip& s, int64_t c, auto blocks, auto lanes) {
        InPlace::input<blocks, past>(lanes, s, p.image(x, n, c), p.image(dy, n, c),
                                     p.image(dx, n, c), p.ahead(dy, n, s, c, P), scale + c - c0,
                                     taps + c, p.Cp, mean + c - c0, slope + c, level + c - c0,
                                     has_slope);
      });
    });
  } else if (p.lanes) {
    A* out = p.packed();
    auto [dy_tile] = p.tiles<1>();
    for (int64_t c = c0; c < c1; c += N) {
      const A *m = mean + c - c0, *slopes = slope + c;
      p.pack_block(dy, n, c, dy_tile.filling(V{}));
      V effective[KK];
      Packed::scaled<true>(taps + c, p.Cp, load<A>(scale + c - c0), effective);
      dy_tile.convolve(effective, load<A>(level + c - c0), out);
      p.unpack_block(out, dx, n, c, [=](int64_t i, int64_t q, V v, auto pixels) {
        if (!has_slope) return v;
        const V here = load_chunk<A, 1>(p.image(x, n, c + i) + q, pixels).v[0];
        return v + (here - m[i]) * slopes[i];
      });
    }
  } else {
    for (int64_t c = c0; c < c1; c++) {
      A scaled[KK];
      for (int t = 0; t < KK; t++) scaled[t] = taps[(KK - 1 - t) * p.Cp + c] * scale[c - c0];
      plane_input<A, K>(p.plane(dy, n, c), p.image(x, n, c), p.image(dx, n, c), scaled,
                        mean[c - c0], slope[c], level[c - c0]);
    }
  }
}

// m to image_mean (N, C), and the row (2 C + 3); the similarity where `similar`.
void measure(const Layer& l, const T* x, bool similar, A* image_mean, A* row) {
  const Plan p(l);
  const int64_t B = p.B, C = p.C, Cp = p.Cp;
  const int64_t vectors = Cp / N;
  A *mean = scratch(2 * p.at(p.parts, 0) + B * (vectors + 1));
  A *squares = mean + p.at(p.parts, 0), *weight = squares + p.at(p.parts, 0);
  A* norms = weight + B;  // ||X_n||^2 / HW of each vector of channels
  double products[FEW * (FEW - 1) / 2] = {};  // sum X_i X_j, where images are few
  const bool few = similar && B > 1 && B <= FEW;
  if (!few)
    p.each([&](int64_t n, const Piece& piece) {
      const int64_t at = p.at(piece.part, n) + piece.c0;
      add_moments<true>(p, x, n, piece, mean + at, squares + at);
    });
  else
    (B == 2   ? moments_and_products<2>
     : B == 3 ? moments_and_products<3>
              : moments_and_products<4>)(p, x, mean, squares, products);
  p.each_channels([&](int64_t c0, int64_t c1) {
    join_parts<true>(p, c0, c1, mean, squares);
    InPlace::each_blocks<2>(c0, c1, [&](int64_t c, auto blocks, auto lanes) {
      constexpr int M = blocks;
      V growth[M];  // 1 + w_m
      for (int b = 0; b < M; b++)
        growth[b] = 1 + (l.center_weight ? lanes.load(l.center_weight + c + b * N) : V{});
      Sums<M> pooled, inner, between;
      for (int64_t n = 0; n < B; n++)
        for (int b = 0; b < M; b++) {
          const int64_t i = c + b * N;
          const V m = lanes.load(mean + n * Cp + i);
          const V v = lanes.load(squares + n * Cp + i) / A(p.hw);
          lanes.store(image_mean + n * C + i, m);
          norms[n * vectors + i / N] = sum<A>(v + m * m);
          pooled.add_product(b, m, growth[b]);  // not rounded, as it is not below with fma
          inner.add(b, v);
        }
      V high[M], low[M];  // of mu: their sum is as exact as a double
      for (int i = 0; i < M * N; i++) {
        const double mu = pooled[i] /= B;
        high[i / N][i % N] = A(mu);
        low[i / N][i % N] = A(mu - A(mu));
      }
      for (int64_t n = 0; n < B; n++)
        for (int b = 0; b < M; b++) {
          const V m = lanes.load(mean + n * Cp + c + b * N);
          const V apart = (m * growth[b] - high[b]) - low[b];
          between.add(b, apart * apart);
        }
      for (int64_t i = 0; i < std::min<int64_t>(M * N, c1 - c); i++) {
        row[3 + c + i] = A(pooled[i]);
        row[3 + C + c + i] = A((inner[i] + between[i]) / B);
      }
    });
  });
  bool finite = true;
  int64_t nonzero = 0;
  for (int64_t n = 0; similar && n < B; n++) {
    double norm = 0;
    for (int64_t i = 0; i < vectors; i++) norm += norms[n * vectors + i];
    const A squared_norm = A(norm * p.hw);
    finite &= bool(std::isfinite(squared_norm));
    nonzero += squared_norm > 0;
    weight[n] = squared_norm > 0 ? 1 / std::sqrt(squared_norm) : 0;
  }
  row[0] = A(B * p.hw);
  row[1] = row[2] = 0;
  if (similar && B > 1 && finite) {
    const double pairs = double(B) * (B - 1);
    double total = 0;
    if (few) {
      for (int64_t i = 0, pair = 0; i < B; i++)
        for (int64_t j = 0; j < i; j++) total += 2 * products[pair++] * weight[i] * weight[j];
    } else {
      total = squared(x, weight, B, C * p.hw, p.threads) - nonzero;
    }
    const double similarity = total / pairs;
    if (std::isfinite(similarity)) {
      row[1] = A(pairs);
      row[2] = A(similarity);
    }
  }
}

// Y and statistics (2 C + 1). Without rows it is evaluation, which fills image_mean if there is
// one.
void normalize(const Layer& l, const State& state, const T* x, A* image_mean, const A* rows,
               int64_t ranks, T* y, A* out) {
  const Plan p(l);
  A *mu = out, *rstd = out + p.C;
  if (rows) {
    statistics(l, state, rows, ranks, mu, rstd, out + 2 * p.C);
  } else {
    for (int64_t c = 0; c < p.C; c++) {
      mu[c] = state.running_mean[c];
      rstd[c] = A(1 / std::sqrt(state.running_var[c] + l.eps));
    }
    out[2 * p.C] = 0;
  }
  // Of evaluation. Where an image is one task, it is read again while it is in the cache.
  const bool fresh = image_mean && !rows;
  if (fresh && p.parts > 1) image_means(p, x, image_mean, p.C);
  parallel(p.B * p.pieces(), p.threads, [&](int64_t begin, int64_t end) {
    static thread_local Buffer buffer;
    A *taps = buffer.get<A>((KK + 4) * p.Cp), *bias = taps + KK * p.Cp;
    A *shift = bias + p.Cp, *scale = shift + p.Cp, *mean = scale + p.Cp;
    effective_taps(p, l, 0, p.C, taps);
    for (int64_t c = 0; c < p.Cp; c++) bias[c] = l.bias && c < p.C ? l.bias[c] : A(0);
    for (int64_t task = begin; task < end; task++) {
      const int64_t n = task / p.pieces();
      const Piece piece = p.piece(task % p.pieces());
      const int64_t c0 = piece.c0, count = piece.c1 - c0;
      for (int64_t c = count; c < padded(count); c++) shift[c] = scale[c] = 0;
      A* known = image_mean ? image_mean + n * p.C + c0 : nullptr;
      if (fresh && p.parts == 1) {
        add_moments<false>(p, x, n, piece, mean, nullptr);
        std::memcpy(known, mean, count * sizeof(A));
      }
      coefficients(l, known, mu, rstd, c0, count, shift, scale, nullptr);
      forward(p, x, y, n, piece, shift, scale, taps, bias);
    }
  });
}

// Where the gradients of the parameters go (those that the layer has, the bias always), and those
// of the statistics, (2, C).
struct Gradients {
  A *statistics, *weight, *kernel, *bias, *scale_weight, *scale_bias;
};

// What the backward pass of a step keeps, `rest`: m, a, d_shift and d_gap, each (N, Cp), and the
// effective taps.
struct Rest {
  A *mean, *scale, *d_shift, *d_gap, *taps;

  Rest(const Plan& p, A* memory) {
    for (A** array : {&mean, &scale, &d_shift, &d_gap, &taps}) {
      *array = memory;
      memory += p.B * p.Cp;
    }
  }
  static int64_t size(int64_t batch, int64_t channels) {
    return (4 * batch + KK) * padded(channels);
  }
};

// The sums over pixels and what is made of them. Channels do not meet: prepare, add_up and finish
// may be called for one block after the other.
class BackwardSums {
 public:
  const Plan p;
  const Groups g;

  // Without image_mean it is computed, if `needs_mean`.
  BackwardSums(const Layer& layer, const T* x, const T* dy, const A* image_mean, bool needs_mean,
               const A* kept, const Gradients& out, A* rest)
      : p(layer, true), g(p), l(layer), x(x), dy(dy), image_mean(image_mean),
        needs_mean(needs_mean), mu(kept), rstd(kept + p.C), out(out), rest(p, rest) {
    const int64_t units = p.B * p.parts;
    shift = scratch(2 * p.B * p.Cp + 2 * units * p.Cp + g.count * (KK + 1) * p.Cp);
    factor = shift + p.B * p.Cp;
    d_scale = factor + p.B * p.Cp;
    d_shifts = d_scale + units * p.Cp;
    totals = d_shifts + units * p.Cp;
    if (!image_mean && needs_mean && p.pixels) image_means(p, x, this->rest.mean, p.Cp);
  }

  // m, h, a, g and the taps.
  void prepare(int64_t c0, int64_t c1) const {
    effective_taps(p, l, c0, c1, rest.taps);
    const int64_t count = c1 - c0;
    for (int64_t n = 0; n < p.B; n++) {
      const int64_t at = n * p.Cp + c0;
      A* mean = rest.mean + at;
      if (image_mean)
        std::memcpy(mean, image_mean + n * p.C + c0, count * sizeof(A));
      else if (!needs_mean)
        std::memset(mean, 0, count * sizeof(A));
      else if (!p.pixels)
        add_moments<false>(p, x, n, Piece{c0, c1, 0, p.H, 0}, mean, nullptr);
      coefficients(l, mean, mu, rstd, c0, count, shift + at, rest.scale + at, factor + at);
      if (c1 == p.C)
        for (A* array : {rest.mean, shift, rest.scale})
          std::fill(array + n * p.Cp + p.C, array + (n + 1) * p.Cp, A(0));
    }
  }

  // The sums of a block of channels over a group of images.
  void add_up(int64_t group, int64_t block) const {
    static thread_local Buffer buffer;
    const int64_t pitch = g.block, c0 = block * pitch, c1 = std::min(p.C, c0 + pitch);
    A *products = buffer.get<A>((KK + 2) * pitch), *d_sum = products + (KK + 1) * pitch;
    std::memset(products, 0, (KK + 2) * pitch * sizeof(A));  // the lanes behind C, too
    A* total = totals + group * (KK + 1) * p.Cp;
    for (int t = 0; t <= KK; t++) std::fill(total + t * p.Cp + c0, total + t * p.Cp + c1, A(0));
    const int64_t units = p.B * p.parts;
    for (int64_t unit = units * group / g.count; unit < units * (group + 1) / g.count; unit++) {
      const int64_t n = unit / p.parts, part = unit % p.parts, at = n * p.Cp + c0;
      const Piece piece{c0, c1, p.first_row(part), p.first_row(part + 1), part};
      image_sums(p, x, dy, n, piece, shift + at, rest.taps, products, d_sum, pitch);
      InPlace::each_blocks<1>(c0, c1, [&](int64_t c, auto, auto lanes) {
        const V a = lanes.load(rest.scale + n * p.Cp + c);
        V dot{};
        for (int t = 0; t <= KK; t++) {  // the last one is the sum of dY
          const V product = load<A>(products + t * pitch + c - c0);
          A* sum = total + t * p.Cp + c;
          lanes.store(sum, lanes.load(sum) + (t < KK ? a * product : product));
          if (t < KK) dot += product * lanes.load(rest.taps + t * p.Cp + c);
        }
        lanes.store(d_scale + p.at(part, n) + c, dot);
        lanes.store(d_shifts + p.at(part, n) + c, a * load<A>(d_sum + c - c0));
      });
    }
  }

  // The gradients, d_shift and d_gap.
  void finish(int64_t c0, int64_t c1) const {
    InPlace::each_blocks<2>(c0, c1, [&](int64_t c, auto blocks, auto lanes) {
      constexpr int M = blocks;
      const int64_t channels = std::min<int64_t>(M * N, c1 - c);
      V d_taps[KK + 1][M] = {}, r[M], scale_weight[M] = {};
      for (int b = 0; b < M; b++) {
        for (int t = 0; t <= KK; t++)
          for (int64_t group = 0; group < g.count; group++)
            if (t == KK || p.sees(t))
              d_taps[t][b] += lanes.load(totals + (group * (KK + 1) + t) * p.Cp + c + b * N);
        r[b] = lanes.load(rstd + c + b * N);
        if (l.scale_weight) scale_weight[b] = lanes.load(l.scale_weight + c + b * N);
      }
      write_parameter_gradients(c, channels, reinterpret_cast<const A*>(d_taps), M * N);
      Sums<M> by_mean, by_rstd, by_weight, by_bias;
      for (int64_t n = 0; n < p.B; n++)
        for (int b = 0; b < M; b++) {
          const int64_t i = c + b * N, at = n * p.Cp + i;
          V d_a = lanes.load(d_scale + at), d_h = lanes.load(d_shifts + at);
          for (int64_t part = 1; part < p.parts; part++) {
            d_a += lanes.load(d_scale + p.at(part, n) + i);
            d_h += lanes.load(d_shifts + p.at(part, n) + i);
          }
          V gap{}, d_r = d_a;
          if (l.scale_weight) {
            const V f = lanes.load(factor + at), logit = d_a * r[b] * f * (1 - f);
            const V m = lanes.load(rest.mean + at);
            d_r *= f;
            by_bias.add(b, logit);
            gap = logit * scale_weight[b];
            if (l.scale_from_input) {
              by_weight.add(b, logit * m);
            } else {
              const V centred = m + lanes.load(shift + at);
              by_weight.add(b, logit * centred * r[b]);
              d_r += gap * centred;
              gap *= r[b];
              d_h += gap;
            }
          }
          by_rstd.add(b, d_r);
          by_mean.add(b, d_h);
          lanes.store(rest.d_shift + at, d_h);
          lanes.store(rest.d_gap + at, gap);
        }
      for (int64_t i = 0; i < channels; i++) {
        const double own = r[i / N][i % N];
        out.statistics[c + i] = A(-by_mean[i]);
        out.statistics[p.C + c + i] = A(-0.5 * own * own * own * by_rstd[i]);
        if (l.scale_weight) {
          out.scale_weight[c + i] = A(by_weight[i]);
          out.scale_bias[c + i] = A(by_bias[i]);
        }
      }
    });
  }

 private:
  // Of `channels` channels from c on; the sums of a P and of dY over all images, (KK + 1, pitch).
  // How many channels come at once depends on the threads. With fma they all round alike: left to
  // the compiler, only some products are rounded before they are added.
  void write_parameter_gradients(int64_t c, int64_t channels, const A* sums, int64_t pitch) const {
    for (int64_t i = 0; i < channels; i++, c++) {
      out.bias[c] = sums[KK * pitch + i];
      if (out.kernel) {
        A along = 0;
        for (int t = 0; t < KK; t++) {
          along = std::fma(sums[t * pitch + i], l.kernel[c * KK + t], along);
          out.kernel[c * KK + t] = sums[t * pitch + i] * l.weight[c];
        }
        out.weight[c] = along;
      } else if (out.weight) {
        out.weight[c] = sums[i];
      }
    }
  }

  const Layer& l;
  const T *x, *dy;
  const A* image_mean;
  const bool needs_mean;
  const A *mu, *rstd;
  const Gradients out;
  const Rest rest;
  A *shift, *factor;      // h and g, (N, Cp)
  A *d_scale, *d_shifts;  // (parts, N, Cp)
  A* totals;              // sums of a P and of dY, (groups, KK + 1, Cp)
};

// dX, and the gradient of the center weight where there is one. Channels do not meet here either.
class BackwardInput {
 public:
  const Plan p;

  BackwardInput(const Layer& layer, const T* x, const T* dy, const A* kept, const A* d_statistics,
                A* rest, T* dx, A* d_center_weight)
      : p(layer), l(layer), x(x), dy(dy), mu(kept), share(kept[2 * p.C]),
        d_statistics(d_statistics), rest(p, rest), dx(dx), d_center_weight(d_center_weight) {
    static thread_local Buffer buffer;
    level = buffer.get<A>((p.B + 1) * p.Cp);
    slope = level + p.B * p.Cp;
  }

  void prepare(int64_t c0, int64_t c1) const {
    InPlace::each_blocks<2>(c0, c1, [&](int64_t c, auto blocks, auto lanes) {
      constexpr int M = blocks;
      V center[M] = {}, own_mu[M], d_mean[M], d_square[M];
      for (int b = 0; b < M; b++) {
        const int64_t i = c + b * N;
        own_mu[b] = lanes.load(mu + i);
        if (l.center_weight) center[b] = lanes.load(l.center_weight + i);
        // statistics of the batch depend on X, running ones do not
        d_mean[b] = share > 0 ? lanes.load(d_statistics + i) * share : V{};
        d_square[b] = share > 0 ? 2 * lanes.load(d_statistics + p.C + i) * share : V{};
        lanes.store(slope + i, d_square[b]);
      }
      Sums<M> by_center;
      for (int64_t n = 0; n < p.B; n++)
        for (int b = 0; b < M; b++) {
          const int64_t at = n * p.Cp + c + b * N;
          const V m = lanes.load(rest.mean + at);
          V reaches{};
          if (share > 0) {
            // (1 + w_m) m - mu, as the forward pass rounds it
            const V centred = m + (center[b] * m - own_mu[b]);
            reaches = (d_mean[b] + d_square[b] * centred) * A(p.hw);
          }
          if (l.center_weight) {
            const V through = lanes.load(rest.d_shift + at) + reaches;
            by_center.add(b, through * m);
            reaches += center[b] * through;
          }
          lanes.store(level + at, (reaches + lanes.load(rest.d_gap + at)) / A(p.hw));
        }
      for (int64_t i = 0; l.center_weight && i < std::min<int64_t>(M * N, c1 - c); i++)
        d_center_weight[c + i] = A(by_center[i]);
    });
  }

  void write(int64_t n, const Piece& piece) const {
    const int64_t at = n * p.Cp + piece.c0;
    input(p, x, dy, dx, n, piece, rest.mean + at, rest.scale + at, slope, level + at, share > 0,
          rest.taps);
  }

 private:
  const Layer& l;
  const T *x, *dy;
  const A* mu;
  const A share;
  const A* d_statistics;
  const Rest rest;
  T* dx;
  A* d_center_weight;
  A *level, *slope;  // (N, Cp) and (Cp)
};

// One after the other, of all channels.
void add_up(const BackwardSums& sums) {
  sums.p.each_channels([&](int64_t c0, int64_t c1) { sums.prepare(c0, c1); });
  const int64_t count = sums.g.count;
  parallel(count * sums.g.blocks, sums.p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) sums.add_up(task % count, task / count);
  });
  sums.p.each_channels([&](int64_t c0, int64_t c1) { sums.finish(c0, c1); });
}
void write(const BackwardInput& input) {
  input.p.each_channels([&](int64_t c0, int64_t c1) { input.prepare(c0, c1); });
  input.p.each([&](int64_t n, const Piece& piece) { input.write(n, piece); });
}

// Of small planes, a thread takes one block of channels after the other from the sums to dX: it
// finds what it needs in its own caches.
void backward(const BackwardSums& sums, const BackwardInput& input) {
  const Plan& p = sums.p;
  const Groups& g = sums.g;
  const bool even = g.blocks >= 4 * p.threads || g.blocks % p.threads == 0;
  if (!p.lanes || p.hw > SMALL_PLANE || !even) {
    add_up(sums);
    write(input);
    return;
  }
  parallel(g.blocks, p.threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t c0 = block * g.block, c1 = std::min(p.C, c0 + g.block);
      sums.prepare(c0, c1);
      for (int64_t group = 0; group < g.count; group++) sums.add_up(group, block);
      sums.finish(c0, c1);
      input.prepare(c0, c1);
      for (int64_t n = 0; n < p.B; n++) input.write(n, Piece{c0, c1, 0, p.H, 0});
    }
  });
}

// 0, or 1 where there was no memory for f.
template <class F>
int done(F f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

// All but the first return 1 where there was no memory for what they compute.
extern "C" {

// Numbers that `rest` of the backward pass holds.
int64_t ubn_rest_size(int64_t batch, int64_t channels) { return Rest::size(batch, channels); }

int ubn_measure(const Layer* layer, const T* x, int similar, A* image_mean, A* row) {
  return done([&] { measure(*layer, x, similar, image_mean, row); });
}

int ubn_normalize(const Layer* layer, const State* state, const T* x, A* image_mean, const A* rows,
                  int64_t ranks, T* y, A* out) {
  return done([&] { normalize(*layer, *state, x, image_mean, rows, ranks, y, out); });
}

int ubn_backward_sums(const Layer* layer, const T* x, const T* dy, const A* image_mean,
                      int needs_mean, const A* kept, A* d_statistics, A* d_weight, A* d_kernel,
                      A* d_bias, A* d_scale_weight, A* d_scale_bias, A* rest) {
  return done([&] {
    const Gradients out{d_statistics, d_weight, d_kernel, d_bias, d_scale_weight, d_scale_bias};
    add_up(BackwardSums(*layer, x, dy, image_mean, needs_mean, kept, out, rest));
  });
}

int ubn_backward_input(const Layer* layer, const T* x, const T* dy, const A* kept,
                       const A* d_statistics, A* rest, T* dx, A* d_center_weight) {
  return done([&] {
    write(BackwardInput(*layer, x, dy, kept, d_statistics, rest, dx, d_center_weight));
  });
}

// A step of one process: the functions above, one after the other.
int ubn_forward(const Layer* layer, const State* state, const T* x, A* image_mean, int similar,
                T* y, A* out) {
  return done([&] {
    static thread_local Buffer buffer;
    A* row = buffer.get<A>(2 * layer->channels + 3);
    measure(*layer, x, similar, image_mean, row);
    normalize(*layer, *state, x, image_mean, row, 1, y, out);
  });
}

int ubn_backward(const Layer* layer, const T* x, const T* dy, const A* image_mean, int needs_mean,
                 const A* kept, A* d_weight, A* d_kernel, A* d_bias, A* d_center_weight,
                 A* d_scale_weight, A* d_scale_bias, T* dx) {
  return done([&] {
    static thread_local Buffer buffer;
    const int64_t size = ubn_rest_size(layer->batch, layer->channels);
    A *rest = buffer.get<A>(size + 2 * layer->channels), *d_statistics = rest + size;
    const Gradients out{d_statistics, d_weight, d_kernel, d_bias, d_scale_weight, d_scale_bias};
    backward(BackwardSums(*layer, x, dy, image_mean, needs_mean, kept, out, rest),
             BackwardInput(*layer, x, dy, kept, d_statistics, rest, dx, d_center_weight));
  });
}

int ubn_squared_sum(const T* x, const A* weight, int64_t batch, int64_t size, int64_t threads,
                    double* total) {
  const int few = int(std::min<int64_t>(threads, 1 + batch * size / 16384));
  return done([&] { *total = squared(x, weight, batch, size, few); });
}

}  // extern "C"
