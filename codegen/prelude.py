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

// ---- small matrix products: sizes and strides are constants, sums run over blocks of k in order, each step one fma ----
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
  else v = x - V{};  // all of x's bits; element by element, g++ writes a masked broadcast each
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
constexpr int VECTOR = 64, SUMS = 24;  // bytes, and how many vectors of sums are in registers beside their operands
#elif defined(__AVX__)
constexpr int VECTOR = 32, SUMS = 12;
#else
constexpr int VECTOR = 16, SUMS = 12;
#endif
template <class T> constexpr int width(int n) {
  int w = VECTOR / sizeof(T);
  while (w > n) w /= 2;
  return w;
}

// out[rows, columns] from x[columns, rows], whose rows are `width` and `step` apart; whole blocks of vectors in registers.
#if defined(__AVX__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKS 1
#else
#define BLOCKS 0
#endif
template <int... i> struct Ints {};
// In each pair of vectors that are HALF apart, the halves of HALF lanes that are not in their place swapped.
template <int HALF, class I, class V, int... i>
static inline __attribute__((always_inline)) void swap_halves(V* a, Ints<i...>) {
  constexpr int W = sizeof...(i);
  typedef I mask __attribute__((vector_size(W * sizeof(I))));
  constexpr mask low = {I(i & HALF ? i - HALF + W : i)...}, high = {I(i & HALF ? i + W : i + HALF)...};
  const V b[W] = {(i & HALF ? __builtin_shuffle(a[i - (i & HALF)], a[i], high) : __builtin_shuffle(a[i], a[i | HALF], low))...};
  ((a[i] = b[i]), ...);
}
template <class T, int... i>
static inline __attribute__((always_inline)) void turn_block(T* out, int64_t columns, const T* x, int64_t step, Ints<i...> all) {
  constexpr int W = sizeof...(i);
  typedef typename Lanes<T, W>::vec vec;
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type I;
  vec a[W] = {load<vec>(x + i * step)...};
  if constexpr (W == 8) swap_halves<4, I>(a, all);
  swap_halves<2, I>(a, all);
  swap_halves<1, I>(a, all);
  (memcpy(out + i * columns, &a[i], sizeof(vec)), ...);
}
template <class T>
static __attribute__((noinline, noclone)) void turn_into(T* __restrict out, int64_t width, int rows, int columns,
                                                         const T* __restrict x, int64_t step) {
  constexpr int W = 32 / sizeof(T);
  const int whole = BLOCKS ? rows / W * W : 0, across = BLOCKS ? columns / W * W : 0;
#if BLOCKS
  typedef typename std::conditional<sizeof(T) == 4, Ints<0, 1, 2, 3, 4, 5, 6, 7>, Ints<0, 1, 2, 3>>::type block;
  for (int i = 0; i < whole; i += W)
    for (int j = 0; j < across; j += W) turn_block(out + i * width + j, width, x + j * step + i, step, block());
#endif
  for (int i = 0; i < rows; i++)
    for (int j = i < whole ? across : 0; j < columns; j++) out[i * width + j] = x[j * step + i];
}

// An axis of a matrix whose elements are views of memory: element (i, j, k) of sizes N0, N1, N2 lies at i S0 + j S1 + k S2.
template <int N0, int64_t S0, int N1, int64_t S1, int N2, int64_t S2> struct Axis {
  static constexpr int outer = N0 * N1, inner = N2, size = outer * inner;
  static constexpr int64_t step = S2;
  static int64_t start(int q) { return q / N1 * S0 + q % N1 * S1; }
};
constexpr int TERMS = 256;  // of a sum that are added up before they are added to the result
// R rows and V vectors of columns of c[., N] = a b, the terms [from, to) of K; the last vector ends at column N.
template <class T, int W, int R, int V, int N, class K, int64_t AR, int64_t BR, bool PACKED>
static inline __attribute__((always_inline)) void tile(T* __restrict c, const T* a, const T* b, int first, int from, int to) {
  typedef typename Lanes<T, W>::vec vec;
  vec sum[R][V];
  int column[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) column[v] = at_most((first + v) * W, N - W);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[r][v] = splat<vec, T>(0);
  for (int q = from; q < to; q++) {
    const T* x = a + K::start(q);
#pragma GCC unroll 4
    for (int k = 0; k < K::inner; k++, x += K::step, b += BR) {
      vec row[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) row[v] = load<vec>(b + (PACKED ? v * W : column[v]));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const vec y = splat<vec>(x[r * AR]);
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sum[r][v] = fma_(y, row[v], sum[r][v]);
      }
    }
  }
  if (from > 0)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[r][v] = sum[r][v] + load<vec>(c + r * N + column[v]);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) memcpy(c + r * N + column[v], &sum[r][v], sizeof(vec));
}
// The same for terms of a that lie at `at`, and of b that are in order: one function for all large products of these R and V.
template <class T, int W, int R, int V>
static __attribute__((noinline, noclone)) void large_tile(T* __restrict c, int64_t N, const int* column, const T* a, int64_t step,
                                                 const int64_t* at, const T* __restrict b, int terms, bool more) {
  typedef typename Lanes<T, W>::vec vec;
  vec sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sum[r][v] = splat<vec, T>(0);
  for (int k = 0; k < terms; k++, b += V * W) {
    const T* x = a + at[k];
    vec row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) row[v] = load<vec>(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const vec y = splat<vec>(x[r * step]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[r][v] = fma_(y, row[v], sum[r][v]);
    }
  }
  if (more)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[r][v] = sum[r][v] + load<vec>(c + r * N + column[v]);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) memcpy(c + r * N + column[v], &sum[r][v], sizeof(vec));
}
// V vectors of columns of c = a b, in blocks of terms; a block of b that many rows read is first put in order.
// `after` follows each group of rows that is done, if this is the last panel.
template <class T, int W, int V, int N, class M, class K, int64_t BR, int64_t BC, class F>
static inline __attribute__((always_inline)) void panel(T* c, const T* a, const T* b, int first, bool last, F after) {
  constexpr int most = at_least(1, at_most(12, SUMS / V)), groups = (M::inner + most - 1) / most;
  constexpr int R = (M::inner + groups - 1) / groups, rest = M::inner % R, start = M::inner - rest;
  constexpr int step = at_most(K::outer, at_least(1, TERMS / K::inner)), terms = step * K::inner;
  constexpr bool packed = M::size >= 32 && BR != V * W && terms * V * W * sizeof(T) <= 65536;
  static_assert(packed || BC == 1, "b is read in order");
  constexpr int64_t stride = packed ? V * W : BR;
  constexpr bool large = M::size >= 32 && terms >= 16 && (packed || (BR == V * W && N == BR));
  alignas(64) T block[packed ? terms * V * W : 1];
  int64_t at[large ? terms : 1];
  int column[V];
  for (int v = 0; v < V; v++) column[v] = at_most((first + v) * W, N - W);
  for (int from = 0; from < K::outer; from += step) {
    const int to = at_most(from + step, K::outer);
    const T* right = b + int64_t(from) * K::inner * BR;
    if constexpr (packed) {
      const int count = (to - from) * K::inner;
      if constexpr (BC == 1)
        for (int k = 0; k < count; k++)
          for (int v = 0; v < V; v++) memcpy(block + (k * V + v) * W, right + k * BR + column[v], W * sizeof(T));
      else
        for (int v = 0; v < V; v++) turn_into(block + v * W, V * W, count, W, right + column[v] * BC, BC);
      right = block;
    }
    if constexpr (large)
      for (int q = from; q < to; q++)
        for (int k = 0; k < K::inner; k++) at[(q - from) * K::inner + k] = K::start(q) + k * K::step;
    for (int o = 0; o < M::outer; o++) {
      const T* left = a + M::start(o);
      const int above = o * M::inner;
      const auto rows = [&](auto count, int i) __attribute__((always_inline)) {
        T* out = c + int64_t(above + i) * N;
        const T* x = left + i * M::step;
        if constexpr (large) large_tile<T, W, count, V>(out, N, column, x, M::step, at, right, (to - from) * K::inner, from > 0);
        else tile<T, W, count, V, N, K, M::step, stride, packed>(out, x, right, first, from, to);
        if (last && to == K::outer) after(above + i, above + i + count);
      };
      for (int i = 0; i + R <= M::inner; i += R) rows(std::integral_constant<int, R>(), i);
      if constexpr (rest > 0) rows(std::integral_constant<int, rest>(), start);
    }
  }
}
struct Nothing {
  void operator()(int64_t, int64_t) const {}
};
// c[M, N] = a b: the rows of a are the axis M, its columns the axis K, b[k, j] = b[k * BR + j * BC]; where BC is not 1, BR
// is, and blocks of b are turned when they are put in order. `after(begin, end)` is called when these rows are done.
template <class T, int N, int64_t BR, class M, class K, int64_t BC = 1, class F = Nothing>
static __attribute__((noinline)) void mm(T* c, const T* a, const T* b, F after = F()) {
  constexpr int W = width<T>(N), vectors = (N + W - 1) / W, rows = M::inner;
  constexpr int most = at_most(8, SUMS / at_most(rows, 6));
  constexpr int groups = (vectors + most - 1) / most, V = (vectors + groups - 1) / groups, rest = vectors % V;
  for (int v = 0; v + V <= vectors; v += V) panel<T, W, V, N, M, K, BR, BC>(c, a, b, v, v + V == vectors, after);
  if constexpr (rest > 0) panel<T, W, rest, N, M, K, BR, BC>(c, a, b, vectors - rest, true, after);
}
// The sum of a vector's lanes and of the products of the K elements behind those in it: halves are added until one is left,
// each with half as many of the rest.
template <class T, int W, int K>
static inline __attribute__((always_inline)) T total(typename Lanes<T, W>::vec sum, const T* a, const T* b) {
  if constexpr (W == 1) {
    return sum;
  } else {
    typedef typename Lanes<T, W / 2>::vec half;
    half x = part<half>(sum, 0) + part<half>(sum, 1);
    constexpr int more = K >= W / 2 ? W / 2 : 0;
    if constexpr (more > 0) x = fma_(load<half>(a), load<half>(b), x);
    return total<T, W / 2, K - more>(x, a + more, b + more);
  }
}
// c[M, N] = a b', a[i, k] = a[i * AR + k], b[j, k] = b[j * BC + k]: dot products, lanes along k.
template <class T, int M, int N, int K, int64_t AR, int64_t BC>
static __attribute__((noinline)) void dots(T* __restrict c, const T* a, const T* b) {
  constexpr int W = width<T>(K), whole = K / W * W;
  typedef typename Lanes<T, W>::vec vec;
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) {
      vec sum = {};
#pragma GCC unroll 8
      for (int k = 0; k < whole; k += W) sum = fma_(load<vec>(a + i * AR + k), load<vec>(b + j * BC + k), sum);
      c[i * N + j] = total<T, W, K - whole>(sum, a + i * AR + whole, b + j * BC + whole);
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

// ---- the largest value of each window and its place: the first of equal ones; a NaN wins ----
template <class T, int64_t PLANES, int H, int W, int OH, int OW, int KH, int KW, int SH, int SW, int PH, int PW, int DH, int DW>
static void max_pool(T* __restrict out, int64_t* __restrict places, const T* __restrict x) {
  constexpr bool inside = PH == 0 && PW == 0 && (OH - 1) * SH + (KH - 1) * DH < H && (OW - 1) * SW + (KW - 1) * DW < W;
  for (int64_t plane = 0; plane < PLANES; plane++, x += H * W)
    for (int i = 0; i < OH; i++)
      for (int j = 0; j < OW; j++) {
        int top = i * SH - PH, left = j * SW - PW;
        const int bottom = inside ? top + KH * DH : at_most(top + KH * DH, H);
        const int right = inside ? left + KW * DW : at_most(left + KW * DW, W);
        if (!inside) {
          while (top < 0) top += DH;
          while (left < 0) left += DW;
        }
        T most = -T(INFINITY);
        int64_t at = top * W + left;
        for (int r = top; r < bottom; r += DH)
          for (int s = left; s < right; s += DW) {
            const T y = x[r * W + s];
            const bool more = y > most || y != y;
            most = more ? y : most, at = more ? r * W + s : at;
          }
        *out++ = most, *places++ = at;
      }
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
