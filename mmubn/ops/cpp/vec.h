// Vectors of the compiler (GCC and Clang), bfloat16, and what memory and threads need.
//
// T is what the tensors hold, A what is computed in: float for float and bfloat16, double for
// double. Nothing here depends on torch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define UBN_PREFETCH(pointer) __builtin_prefetch(pointer, 0, 2)
#define UBN_PREFETCH_TO_WRITE(pointer) __builtin_prefetch(pointer, 1, 2)

namespace ubn {

struct bf16 {
  uint16_t bits;
};

// Whether two vectors of bfloat16 are worked on at once: that needs 32 registers and masks of 32.
#ifdef __AVX512BW__
#define UBN_PAIRS
#endif

#ifdef __AVX512F__
constexpr int VECTOR_BYTES = 64;
#else
constexpr int VECTOR_BYTES = 32;
#endif

// A number that is known when this is compiled, so that loops up to it are unrolled.
template <int value>
using Fixed = std::integral_constant<int, value>;

template <class A>
struct Vec {
  static constexpr int n = VECTOR_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};

template <class A>
inline typename Vec<A>::type load(const A* p) {
  return *reinterpret_cast<const typename Vec<A>::unaligned*>(p);
}
template <class A>
inline void store(A* p, typename Vec<A>::type v) {
  *reinterpret_cast<typename Vec<A>::unaligned*>(p) = v;
}

// Sum of the lanes by halves, so that it does not depend on the compiler's mood.
template <class A, int n>
inline A sum_halves(const A* s) {
  if constexpr (n == 2) {
    return s[0] + s[1];
  } else {
    typedef A Half __attribute__((vector_size(n * sizeof(A) / 2), aligned(sizeof(A)), may_alias));
    Half h = *reinterpret_cast<const Half*>(s) + *reinterpret_cast<const Half*>(s + n / 2);
    return sum_halves<A, n / 2>(reinterpret_cast<const A*>(&h));
  }
}
template <class A>
inline A sum(typename Vec<A>::type v) {
  return sum_halves<A, Vec<A>::n>(reinterpret_cast<const A*>(&v));
}

typedef uint32_t Bits32 __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

inline void narrow(float value, float& out) { out = value; }
inline void narrow(double value, double& out) { out = value; }
inline void narrow(float value, bf16& out) {  // to nearest, ties to even, as torch rounds
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

template <class A, class T>
inline typename Vec<A>::type load_as(const T* p) {
  if constexpr (std::is_same<A, T>::value) {
    return load<A>(p);
  } else {
    static_assert(std::is_same<T, bf16>::value && sizeof(A) == 4, "float from bfloat16");
#if defined(__AVX512F__)  // what GCC makes of the general conversion goes by halves
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (typename Vec<A>::type)((Bits32)_mm512_cvtepu16_epi32(half) << 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (typename Vec<A>::type)((Bits32)_mm256_cvtepu16_epi32(half) << 16);
#else
    const Bits32 bits = __builtin_convertvector(*reinterpret_cast<const Bits16*>(p), Bits32);
    return (typename Vec<A>::type)(bits << 16);
#endif
  }
}

// Floats whose upper half is the bfloat16: to nearest, ties to even, as torch rounds.
inline Bits32 rounded(Vec<float>::type v) {
  const Bits32 bits = (Bits32)v;
  return v != v ? (Bits32{} + 0x7fc00000) : bits + 0x7fff + ((bits >> 16) & 1);
}
// In half a vector.
inline Bits16 narrowed(Vec<float>::type v) {
#if defined(__AVX512BW__)  // one permutation, and none of the slow stores of half vectors
  typedef uint16_t Words __attribute__((vector_size(64)));
  const Words high = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  return (Bits16)_mm512_castsi512_si256(
      _mm512_permutexvar_epi16((__m512i)high, (__m512i)rounded(v)));
#else
  return __builtin_convertvector(rounded(v) >> 16, Bits16);
#endif
}
// Of two vectors, number after number.
inline Bits32 narrowed_pairs(Vec<float>::type first, Vec<float>::type second) {
  return rounded(first) >> 16 | (rounded(second) & 0xffff0000);
}

template <class A, class T>
inline void store_as(T* p, typename Vec<A>::type v) {
  if constexpr (std::is_same<A, T>::value)
    store<A>(p, v);
  else
    *reinterpret_cast<Bits16*>(p) = narrowed(v);
}

// Past the caches, where the processor can: for tensors that do not fit in them, so that memory
// is not read before it is written. p is aligned to what is stored.
template <class A, class T>
inline void store_past(T* p, typename Vec<A>::type v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same<A, T>::value)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
  else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrowed(v));
#elif defined(__AVX2__)
  if constexpr (std::is_same<A, T>::value)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
  else
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrowed(v));
#else
  store_as<A>(p, v);
#endif
}
// Before what was stored past the caches is read by another thread.
inline void store_past_ends() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n numbers and zeros behind, and back; touches nothing else.
template <class A, class T>
inline typename Vec<A>::type load_some(const T* p, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (std::is_same<T, bf16>::value) {
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16(mask), p);
    return (typename Vec<A>::type)((Bits32)_mm512_cvtepu16_epi32(half) << 16);
  } else if constexpr (sizeof(A) == 4) {
    return (typename Vec<A>::type)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  } else {
    return (typename Vec<A>::type)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  }
#else
  alignas(VECTOR_BYTES) A lanes[Vec<A>::n] = {};
  for (int64_t i = 0; i < n; i++) lanes[i] = widen(p[i]);
  return load<A>(lanes);
#endif
}
template <class A, class T>
inline void store_some(T* p, typename Vec<A>::type v, int64_t n) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (std::is_same<T, bf16>::value) {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)narrowed(v));
  } else if constexpr (sizeof(A) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
  }
#else
  alignas(VECTOR_BYTES) A lanes[Vec<A>::n];
  store<A>(lanes, v);
  for (int64_t i = 0; i < n; i++) narrow(lanes[i], p[i]);
#endif
}
// Which lanes of a vector there are in memory.
template <class A>
struct AllLanes {
  static constexpr bool all = true;
  template <class T>
  typename Vec<A>::type load(const T* p) const {
    return load_as<A>(p);
  }
  template <class T>
  void store(T* p, typename Vec<A>::type v) const {
    store_as<A>(p, v);
  }
};
template <class A>
struct FirstLanes {
  static constexpr bool all = false;
  int64_t count;
  template <class T>
  typename Vec<A>::type load(const T* p) const {
    return load_some<A>(p, count);
  }
  template <class T>
  void store(T* p, typename Vec<A>::type v) const {
    store_some<A>(p, v, count);
  }
};
// What keeps some lanes, and a vector with zeros in the others.
template <class A>
struct Mask {
  typedef typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type Int;
  typedef Int type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A>
inline typename Mask<A>::type lane_numbers() {
  typename Mask<A>::type lanes{};
  for (int i = 0; i < Vec<A>::n; i++) lanes[i] = i;
  return lanes;
}
template <class A>
inline typename Vec<A>::type only(typename Mask<A>::type mask, typename Vec<A>::type v) {
  return (typename Vec<A>::type)(mask & (typename Mask<A>::type)v);
}

// M vectors whose numbers lie together in memory, number M * lane + m in lane `lane` of vector m.
// So two vectors of bfloat16 are the halves of one: an instruction each converts them.
template <class A, int M>
struct Chunk {
  static constexpr int count = M, size = M * Vec<A>::n;
  typename Vec<A>::type v[M];
};
template <class A, int M, class T>
inline Chunk<A, M> load_chunk(const T* p) {
  if constexpr (M == 1) {
    return {{load_as<A>(p)}};
  } else {
    static_assert(M == 2 && std::is_same<T, bf16>::value, "float from pairs of bfloat16");
    const Bits32 bits = *reinterpret_cast<const Pairs*>(p);
    typedef typename Vec<A>::type V;
    return {{(V)(bits << 16), (V)(bits & 0xffff0000)}};
  }
}
template <class A, int M, class T>
inline void store_chunk(T* p, const Chunk<A, M>& chunk) {
  if constexpr (M == 1)
    store_as<A>(p, chunk.v[0]);
  else
    *reinterpret_cast<Pairs*>(p) = narrowed_pairs(chunk.v[0], chunk.v[1]);
}
// The first n numbers, or all of them.
template <class A, int M, class T, int n>
inline Chunk<A, M> load_chunk(const T* p, Fixed<n>) {
  return load_chunk<A, M>(p);
}
template <class A, int M, class T>
inline Chunk<A, M> load_chunk(const T* p, int n) {
  if (n == Chunk<A, M>::size) return load_chunk<A, M>(p);
  if constexpr (M == 1) return {{load_some<A>(p, n)}};
#ifdef UBN_PAIRS
  else {
    const __m512i bits = _mm512_maskz_loadu_epi16((uint64_t(1) << n) - 1, p);
    return load_chunk<A, M>(reinterpret_cast<const T*>(&bits));
  }
#endif
}
template <class A, int M, class T, int n>
inline void store_chunk(T* p, const Chunk<A, M>& chunk, Fixed<n>) {
  store_chunk<A, M>(p, chunk);
}
template <class A, int M, class T>
inline void store_chunk(T* p, const Chunk<A, M>& chunk, int n) {
  if (n == Chunk<A, M>::size) return store_chunk<A, M>(p, chunk);
  if constexpr (M == 1) store_some<A>(p, chunk.v[0], n);
#ifdef UBN_PAIRS
  else {
    const Bits32 bits = narrowed_pairs(chunk.v[0], chunk.v[1]);
    _mm512_mask_storeu_epi16(p, (uint64_t(1) << n) - 1, (__m512i)bits);
  }
#endif
}

template <class A>
inline typename Vec<A>::type spread(A value) {
  return typename Vec<A>::type{} + value;
}

// 1 / (1 + exp(-z)). The float one has no branch and no call, so that loops of it vectorise.
inline double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }
inline float sigmoid(float z) {
  float x = -z;  // NaN passes both comparisons
  x = x > 89.0f ? 89.0f : x;  // its power is infinite, so the result is 0
  x = x < -87.0f ? -87.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  uint32_t exponent;  // of 2^n: the integer is in the low bits of the shifted number
  std::memcpy(&exponent, &shifted, 4);
  exponent = (exponent + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return 1 / (1 + p * power);
}

// Memory that a thread keeps from call to call.
class Buffer {
 public:
  ~Buffer() { std::free(memory_); }
  template <class A>
  A* get(size_t count) {
    const size_t bytes = count * sizeof(A) + VECTOR_BYTES;
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 4095) / 4096 * 4096;
      memory_ = std::aligned_alloc(64, size_);
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<A*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Calls f(begin, end) for the shares of 0 ... total. What f computes may not depend on how
// the tasks are shared out, so that results do not depend on the number of threads. Where a thread
// finds no memory, so does the caller.
template <class F>
inline void parallel(int64_t total, int threads, F f) {
  threads = int(std::min<int64_t>(threads, total));
#ifdef _OPENMP
  if (threads > 1) {
    bool failed = false;  // no exception may leave a parallel region
#pragma omp parallel num_threads(threads) reduction(|| : failed)
    {
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      const int64_t begin = total * thread / count, end = total * (thread + 1) / count;
      try {
        if (begin < end) f(begin, end);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  if (total > 0) f(0, total);
}

}  // namespace ubn
