"""What a C++ translation unit begins with: `prelude`. Templates of products, moves and sums, and functions of libmvec."""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import cxx


def prelude(parts: Sequence[str]) -> str:
    """What a translation unit with these parts begins with."""
    used = sorted(set(re.findall(r"\blanes_(\w+)\(", "\n".join(parts))))
    return _PRELUDE.replace("@VECTORS@", "".join(map(_lanes_of, used)))


def _lanes_of(name: str) -> str:
    """`lanes_NAME`: the function of libm, or all versions of it that the compiler takes for vectors by the one of libmvec.

    GCC takes a version by its name: b, c, d and e are SSE, AVX, AVX2 and AVX-512. A value has the same bits in each of them, and
    alone, for all are the one of AVX2: kernels may compute a value twice and compare.
    """
    if name not in cxx.vectorised():
        return f"#define lanes_{name} {name}\n"
    t, n = ("float", 8) if name.endswith("f") and name != "erf" else ("double", 4)
    params = "xy"[: 2 if name.removesuffix("f") in cxx.PAIRS else 1]
    kinds = {lanes: f"Lanes<{t}, {lanes}>::vec" for lanes in (n // 2, n, n * 2)}
    symbol = f"_ZGVdN{n}{'v' * len(params)}_{name}"

    def call(form: str) -> str:
        return f"{symbol}({', '.join(form.format(p) for p in params)})"

    def define(kind: str, called: str, body: str) -> str:
        return f"HIDDEN {kind} {called}({', '.join(f'{kind} {p}' for p in params)}) {{ return {body}; }}"

    def version(isa: str, lanes: int, body: str) -> str:
        return define(kinds[lanes], f"_ZGV{isa}N{lanes}{'v' * len(params)}_lanes_{name}", body)

    both = [call(f"part<{kinds[n]}>({{}}, {i})") for i in (0, 1)]
    lines = [
        'extern "C" {',
        f"{kinds[n]} {symbol}({', '.join([kinds[n]] * len(params))});",
        version("b", n // 2, f"part<{kinds[n // 2]}>({call(f'joined<{kinds[n]}>({{0}}, {{0}})')}, 0)"),
        version("c", n, call("{}")),
        version("d", n, call("{}")),
        "#ifdef __AVX512F__",
        version("e", n * 2, f"joined<{kinds[n * 2]}>({', '.join(both)})"),
        "#endif",
        define(t, f"alone_{name}", call(f"splat<{kinds[n]}>({{}})") + "[0]"),
        f'HIDDEN __attribute__((simd("notinbranch"))) {t} lanes_{name}({", ".join([t] * len(params))});',
        "}",
        f'asm(".globl lanes_{name}\\n.hidden lanes_{name}\\n.set lanes_{name}, alone_{name}");',
    ]
    return "\n".join(lines) + "\n"


_PRELUDE = r"""
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#include <type_traits>

// ---- half precision: stored as such, computed as float ----
typedef _Float16 half;
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};

// c ? a : b by their bits: g++ makes several choices that depend on each other jumps, and then no vectors.
template <class T> static inline __attribute__((always_inline)) T choose(bool c, T a, T b) {
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type I;
  I x, y;
  memcpy(&x, &a, sizeof x);
  memcpy(&y, &b, sizeof y);
  const I mask = -I(c), z = (x & mask) | (y & ~mask);
  T r;
  memcpy(&r, &z, sizeof r);
  return r;
}
// ---- as ATen: a NaN wins; // rounds down and % has the sign of the divisor ----
template <class T> static inline T maximum(T a, T b) { return a > b || a != a ? a : b; }
template <class T> static inline T minimum(T a, T b) { return (a < b || a != a) ? a : b; }
template <class T> static inline T fmod_int(T a, T b) { return b == 0 || b == T(-1) ? 0 : a % b; }
template <class T> static inline T truncdiv_int(T a, T b) { return b == 0 ? 0 : b == T(-1) ? T(0 - a) : T(a / b); }
template <class T> static inline T rem_int(T a, T b) {
  T r = fmod_int(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
template <class T> static inline T floordiv_int(T a, T b) {
  T r = fmod_int(a, b), q = truncdiv_int(a, b);
  return r != 0 && (r < 0) != (b < 0) ? q - 1 : q;
}
template <class T> static inline T rem_float(T a, T b) {
  T r = fmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
template <class T> static inline T floordiv_float(T a, T b) {
  if (b == 0) return a / b;
  T r = fmod(a, b), q = (a - r) / b;
  if (r != 0 && (r < 0) != (b < 0)) q = q - 1;
  if (q == 0) return T(copysign(T(0), a / b));
  T f = floor(q);
  return q - f > T(0.5) ? f + 1 : f;
}
// One value of N lanes (a power of two), always by the same tree.
template <int N, class T, class F> static inline __attribute__((always_inline)) T fold(const T* x, F f) {
  if constexpr (N == 1) return x[0];
  else return f(fold<N / 2>(x, f), fold<N / 2>(x + N / 2, f));
}

// ---- small matrix products: sizes and strides are constants, sums run over k in order, each step one fma ----
template <class T, int W> struct Lanes { typedef T vec __attribute__((vector_size(W * sizeof(T)))); };
template <class T> struct Lanes<T, 1> { typedef T vec; };
#if defined(__clang__) && __has_builtin(__builtin_elementwise_fma)
template <class V> static inline V fma_(V a, V b, V c) { return __builtin_elementwise_fma(a, b, c); }
#else
static inline float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <class V> static inline V fma_(V a, V b, V c) {
  if constexpr (!std::is_arithmetic<V>::value) {
    constexpr int size = sizeof(V);
#if defined(__AVX512F__) && defined(__GNUC__)
    if constexpr (size == 64 && sizeof(a[0]) == 4) return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
    if constexpr (size == 64 && sizeof(a[0]) == 8) return __builtin_ia32_vfmaddpd512_mask(a, b, c, -1, 4);
#endif
#if defined(__FMA__) && defined(__GNUC__)
    if constexpr (size == 32 && sizeof(a[0]) == 4) return __builtin_ia32_vfmaddps256(a, b, c);
    if constexpr (size == 32 && sizeof(a[0]) == 8) return __builtin_ia32_vfmaddpd256(a, b, c);
    if constexpr (size == 16 && sizeof(a[0]) == 4) return __builtin_ia32_vfmaddps(a, b, c);
    if constexpr (size == 16 && sizeof(a[0]) == 8) return __builtin_ia32_vfmaddpd(a, b, c);
#endif
    return a * b + c;
  }
}
#endif
template <class V, class T> static inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> static inline V splat(T x) {
  V v;
  if constexpr (std::is_arithmetic<V>::value) v = x;
  else v = x - V{};  // one broadcast; g++ gathers what it has scattered lane by lane, at a third to a tenth of the speed
  return v;
}
// Part `i` of a vector, and a vector of two parts.
template <class V, class W> static inline V part(W x, int i) {
  V v;
  memcpy(&v, (char*)&x + i * sizeof v, sizeof v);
  return v;
}
template <class W, class V> static inline W joined(V a, V b) {
  W w;
  memcpy(&w, &a, sizeof a);
  memcpy((char*)&w + sizeof a, &b, sizeof b);
  return w;
}
#define HIDDEN __attribute__((visibility("hidden"), used))
@VECTORS@
constexpr int at_least(int a, int b) { return a > b ? a : b; }
constexpr int at_most(int a, int b) { return a < b ? a : b; }
#ifdef __AVX512F__
constexpr int VECTOR = 64;
#elif defined(__AVX__)
constexpr int VECTOR = 32;
#else
constexpr int VECTOR = 16;
#endif
template <class T> constexpr int width(int n) {
  int w = VECTOR / sizeof(T);
  while (w > n) w /= 2;
  return w;
}

// R rows and V vectors of columns of c[., N] = a b, from row 0 and column 0 on; the last vector ends at column N.
template <class T, int W, int R, int V, int N, int K, int64_t AR, int64_t AC, int64_t BR>
static inline __attribute__((always_inline)) void tile(T* __restrict c, const T* a, const T* b, int first) {
  typedef typename Lanes<T, W>::vec vec;
  vec sum[R][V];
  int column[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) column[v] = at_most((first + v) * W, N - W);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[r][v] = splat<vec, T>(0);
  for (int k = 0; k < K; k++) {
    vec row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) row[v] = load<vec>(b + k * BR + column[v]);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec x = splat<vec>(a[r * AR + k * AC]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[r][v] = fma_(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) memcpy(c + r * N + column[v], &sum[r][v], sizeof(vec));
}
template <class T, int W, int V, int M, int N, int K, int64_t AR, int64_t AC, int64_t BR>
static inline __attribute__((always_inline)) void rows(T* __restrict c, const T* a, const T* b, int first) {
  constexpr int most = at_least(1, at_most(8, 12 / V)), groups = (M + most - 1) / most, R = (M + groups - 1) / groups;
  for (int i = 0; i + R <= M; i += R) tile<T, W, R, V, N, K, AR, AC, BR>(c + i * N, a + i * AR, b, first);
  constexpr int rest = M % R, start = M - rest;
  if constexpr (rest > 0) tile<T, W, rest, V, N, K, AR, AC, BR>(c + start * N, a + start * AR, b, first);
}
// c[M, N] = a b, a[i, k] = a[i * AR + k * AC], b[k, j] = b[k * BR + j].
template <class T, int M, int N, int K, int64_t AR, int64_t AC, int64_t BR>
static __attribute__((noinline)) void mm(T* __restrict c, const T* a, const T* b) {
  constexpr int W = width<T>(N), vectors = (N + W - 1) / W, most = M == 1 ? 8 : M == 2 ? 6 : 3;
  constexpr int groups = (vectors + most - 1) / most, V = (vectors + groups - 1) / groups;
  for (int v = 0; v + V <= vectors; v += V) rows<T, W, V, M, N, K, AR, AC, BR>(c, a, b, v);
  constexpr int rest = vectors % V;
  if constexpr (rest > 0) rows<T, W, rest, M, N, K, AR, AC, BR>(c, a, b, vectors - rest);
}
// c[M, N] = a b', a[i, k] = a[i * AR + k], b[j, k] = b[j * BC + k]: dot products, lanes along k.
template <class T, int M, int N, int K, int64_t AR, int64_t BC>
static __attribute__((noinline)) void dots(T* __restrict c, const T* a, const T* b) {
  constexpr int W = width<T>(K), whole = K / W * W;
  typedef typename Lanes<T, W>::vec vec;
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j += 4) {
      const int count = at_most(4, N - j);
      vec sum[4] = {};
      for (int k = 0; k < whole; k += W) {
        const vec x = load<vec>(a + i * AR + k);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sum[v] = fma_(x, load<vec>(b + (j + (v < count ? v : 0)) * BC + k), sum[v]);
      }
      for (int v = 0; v < count; v++) {
        T x[W];
        memcpy(x, &sum[v], sizeof x);
        T total = fold<W>(x, [](T p, T q) -> T { return p + q; });
        for (int k = whole; k < K; k++) total = fma_(a[i * AR + k], b[(j + v) * BC + k], total);
        c[i * N + j + v] = total;
      }
    }
}

// ---- moves: blocks of memory, and by an index that must be in range ----
template <class T, int64_t N, int64_t WIDTH, int64_t STEP> static inline void put(T* __restrict out, const T* __restrict x) {
  for (int64_t i = 0; i < N; i++) memcpy(out + i * STEP, x + i * WIDTH, WIDTH * sizeof(T));
}
static inline int64_t in_range(int64_t index, int64_t dim, int64_t size, int64_t* bad) {
  if (index >= 0 && index < size) return index;
  __atomic_store_n(bad, index, __ATOMIC_RELAXED);
  __atomic_store_n(bad + 1, dim, __ATOMIC_RELAXED);
  __atomic_store_n(bad + 2, size, __ATOMIC_RELAXED);
  return 0;
}
// f(place in the index, place in what it indexes) for every element of an index.
template <int64_t OUTER, int64_t SIZE, int64_t N, int64_t INNER, int DIM, class F>
static inline __attribute__((always_inline)) void indexed(const int64_t* index, int64_t* bad, F f) {
  for (int64_t o = 0; o < OUTER; o++)
    for (int64_t k = 0; k < N; k++)
      for (int64_t i = 0; i < INNER; i++) {
        const int64_t at = (o * N + k) * INNER + i;
        f(at, (o * SIZE + in_range(index[at], DIM, SIZE, bad)) * INNER + i);
      }
}
template <class T, int64_t OUTER, int64_t SIZE, int64_t N, int64_t INNER, int DIM>
static inline void gather(T* __restrict out, const T* __restrict x, const int64_t* __restrict index, int64_t* bad) {
  indexed<OUTER, SIZE, N, INNER, DIM>(index, bad, [=](int64_t at, int64_t from) { out[at] = x[from]; });
}
template <class T, int64_t OUTER, int64_t SIZE, int64_t N, int64_t INNER, int DIM>
static inline void scatter_add(T* __restrict out, const int64_t* __restrict index, const T* __restrict x, int64_t* bad) {
  indexed<OUTER, SIZE, N, INNER, DIM>(index, bad, [=](int64_t at, int64_t to) { out[to] = out[to] + x[at]; });
}

// out[R, C] from x[C, R], whose rows are STEP apart; whole blocks of vectors in registers.
#if defined(__AVX__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKS 1
#else
#define BLOCKS 0
#endif
template <class T, int W>
static inline __attribute__((always_inline)) void turn_block(T* out, int64_t columns, const T* x, int64_t step) {
  typedef typename Lanes<T, W>::vec vec;
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type I;
  typedef I mask __attribute__((vector_size(W * sizeof(T))));
  vec a[W], b[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i++) a[i] = load<vec>(x + i * step);
#pragma GCC unroll 3
  for (int half = W / 2; half > 0; half /= 2) {  // swaps the halves of pairs of vectors, then their halves
    mask low, high;
#pragma GCC unroll 8
    for (int i = 0; i < W; i++) low[i] = i & half ? i - half + W : i, high[i] = i & half ? i + W : i + half;
#pragma GCC unroll 8
    for (int i = 0; i < W; i++)
      b[i] = i & half ? __builtin_shuffle(a[i - half], a[i], high) : __builtin_shuffle(a[i], a[i + half], low);
#pragma GCC unroll 8
    for (int i = 0; i < W; i++) a[i] = b[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < W; i++) memcpy(out + i * columns, &a[i], sizeof(vec));
}
template <class T, int R, int C, int64_t STEP>
static __attribute__((noinline)) void turn(T* __restrict out, const T* __restrict x) {
  constexpr int W = 32 / sizeof(T), rows = BLOCKS ? R / W * W : 0, columns = BLOCKS ? C / W * W : 0;
#if BLOCKS
  for (int i = 0; i < rows; i += W)
    for (int j = 0; j < columns; j += W) turn_block<T, W>(out + i * C + j, C, x + j * STEP + i, STEP);
#endif
  for (int i = 0; i < R; i++)
    for (int j = i < rows ? columns : 0; j < C; j++) out[i * C + j] = x[j * STEP + i];
}

// ---- sums over the tasks: each block of tasks in order, then the blocks in order ----
template <class T> static inline void add_to(T* __restrict sum, const T* __restrict x, int64_t n, bool first) {
  if (first) memcpy(sum, x, n * sizeof(T));
  else for (int64_t i = 0; i < n; i++) sum[i] = sum[i] + x[i];
}
template <class T> static inline void sum_blocks(T* __restrict out, const T* __restrict parts, int64_t blocks, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = parts[i];
  for (int64_t block = 1; block < blocks; block++)
    for (int64_t i = 0; i < n; i++) out[i] = out[i] + parts[block * n + i];
}
"""
