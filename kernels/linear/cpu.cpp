// y [n, out] = x [n, in] times weight [out, in] transposed, n <= 8: bound by the reading of the weight, which happens once, in its stored form.
// R rows of the weight are worked on at once, with R * N sums under way to hide the latency of the multiply-add. x is laid out [in / V][n][V], V elements
// a vector, lest its rows, often a power of two apart, fall on one set of the cache; its columns are cut so that they stay in the first-level cache while
// BLOCK rows go by.
#include "cpu.h"

namespace {

constexpr int BLOCK = 16;
constexpr int64_t X_BYTES = 16384;

constexpr int rows_at_once(int n, bool narrow) { // narrow weights take several steps to use up a cache line, of which few may be in use
    if (n == 1) return 1;
    int r = narrow ? W / 4 : W / 2;
    while (r * n > W && r > 1) r /= 2;
    return r;
}

struct Call {
    const void *x;    // [in / V][n][V], float (or bf16 for pairs), whole vectors only
    const void *tail; // [n][in], likewise, for what is left
    const void *weight;
    const float *scale, *zero;
    const void *bias;
    void *y;
    int64_t in, out, group;
    int x_is_bf16;
};

enum Format { FLOAT, BF16, PAIRS, INT8, INT4, INT4_ZERO };

// a[r][n] += weight[row + r] . x[n] over the columns from <= i < to, whole vectors only; says where it ended.
constexpr int AHEAD = 4096; // bytes of a weight fetched ahead where it is read straight on

// One vector: rows follow each other in memory, so reading straight on, with a few sums under way, is what the memory does best.
template <class T> inline int64_t straight(const Call &c, int64_t row, int64_t from, int64_t to, vf &a) {
    const T *w = (const T *)c.weight + row * c.in;
    const float *x = (const float *)c.x;
    vf b[4] = {a, zero(), zero(), zero()};
    int64_t i = from;
    for (; i + 4 * W <= to; i += 4 * W) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            if (j * W * sizeof(T) % 64 == 0) __builtin_prefetch((const char *)(w + i + j * W) + AHEAD, 0, 2);
            b[j] += load(w + i + j * W) * load(x + i + j * W);
        }
    }
    for (; i + W <= to; i += W) b[0] += load(w + i) * load(x + i);
    a = (b[0] + b[1]) + (b[2] + b[3]);
    return i;
}

template <class T, int R, int N> inline int64_t plain(const Call &c, int64_t row, int64_t from, int64_t to, vf (&a)[R][N]) {
    if constexpr (R == 1 && N == 1) return straight<T>(c, row, from, to, a[0][0]);
    const T *w = (const T *)c.weight + row * c.in;
    const float *x = (const float *)c.x;
    int64_t i = from;
    for (; i + W <= to; i += W) {
        vf b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) b[n] = load(x + i * N + n * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (r + BLOCK) * c.in + i);
            vf y = load(w + r * c.in + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) a[r][n] += y * b[n];
        }
    }
    return i;
}

#if HAVE_DPBF16
template <int R, int N> inline int64_t pairs(const Call &c, int64_t row, int64_t from, int64_t to, vf (&a)[R][N]) {
    const bf16 *w = (const bf16 *)c.weight + row * c.in, *x = (const bf16 *)c.x;
    int64_t i = from;
    if constexpr (R == 1 && N == 1) {
        vf b[4] = {a[0][0], zero(), zero(), zero()};
        for (; i + 128 <= to; i += 128) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch((const char *)(w + i + j * 32) + AHEAD, 0, 2);
                b[j] = (vf)_mm512_dpbf16_ps((__m512)b[j], raw<__m512bh>(w + i + j * 32), raw<__m512bh>(x + i + j * 32));
            }
        }
        for (; i + 32 <= to; i += 32) b[0] = (vf)_mm512_dpbf16_ps((__m512)b[0], raw<__m512bh>(w + i), raw<__m512bh>(x + i));
        a[0][0] = (b[0] + b[1]) + (b[2] + b[3]);
        return i;
    }
    for (; i + 32 <= to; i += 32) {
        __m512bh b[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) b[n] = raw<__m512bh>(x + i * N + n * 32);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            __builtin_prefetch(w + (r + BLOCK) * c.in + i);
            __m512bh y = raw<__m512bh>(w + r * c.in + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) a[r][n] = (vf)_mm512_dpbf16_ps((__m512)a[r][n], y, b[n]);
        }
    }
    return i;
}
#endif

template <bool ZERO, int R, int N> inline int64_t nibbles(const Call &c, int64_t row, int64_t first, int64_t to, vf (&a)[R][N]) {
    const float *x = (const float *)c.x;
    const int64_t groups = c.in / c.group;
    const vf ramp = __builtin_convertvector(lanes(), vf) - 8.0f;
    for (int64_t g = first / c.group; g < to / c.group; g++) {
        vf table[R]; // AVX-512: what each of the 16 codes stands for; else the offset
        for (int r = 0; r < R; r++) {
            const int64_t at = (row + r) * groups + g;
            const float scale = c.scale[at], shift = ZERO ? c.zero[at] - 8.0f : 0.0f;
            table[r] = W == 16 ? (ZERO ? ramp - shift : ramp) * scale : vec((-8.0f - shift) * scale);
        }
        for (int64_t i = g * c.group; i < (g + 1) * c.group; i += 32)
            for (int h = 0; h < 16; h += W) {
                vf b[N][2];
#pragma GCC unroll 8
                for (int n = 0; n < N; n++) b[n][0] = load(x + (i + h) * N + n * W), b[n][1] = load(x + (i + 16 + h) * N + n * W);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    const uint8_t *from = (const uint8_t *)c.weight + (row + r) * (c.in / 2) + i / 2 + h;
                    __builtin_prefetch(from + BLOCK * c.in / 2);
                    vi code = widen(from);
#if defined(__AVX512F__)
                    vf low = look_up(table[r], code), high = look_up(table[r], code >> 4);
#else
                    const float scale = c.scale[(row + r) * groups + g];
                    vf low = __builtin_convertvector(code & 15, vf) * scale + table[r];
                    vf high = __builtin_convertvector(code >> 4, vf) * scale + table[r];
#endif
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++) a[r][n] += low * b[n][0] + high * b[n][1];
                }
            }
    }
    return to;
}

template <Format F, int R, int N> inline int64_t add(const Call &c, int64_t row, int64_t from, int64_t to, vf (&a)[R][N]) {
    if constexpr (F == FLOAT) return plain<float, R, N>(c, row, from, to, a);
    if constexpr (F == BF16) return plain<bf16, R, N>(c, row, from, to, a);
    if constexpr (F == INT8) return plain<int8_t, R, N>(c, row, from, to, a);
    if constexpr (F == INT4) return nibbles<false, R, N>(c, row, from, to, a);
    if constexpr (F == INT4_ZERO) return nibbles<true, R, N>(c, row, from, to, a);
#if HAVE_DPBF16
    if constexpr (F == PAIRS) return pairs<R, N>(c, row, from, to, a);
#endif
    return to;
}

// The product of what is left of a row after the whole vectors.
template <Format F> float rest(const Call &c, int64_t row, int n, int64_t from) {
    float total = 0;
    for (int64_t i = from; i < c.in; i++) {
        const int64_t w = row * c.in + i, x = n * c.in + i;
        if constexpr (F == FLOAT) total += ((const float *)c.weight)[w] * ((const float *)c.tail)[x];
        if constexpr (F == BF16) total += to_float(((const bf16 *)c.weight)[w]) * ((const float *)c.tail)[x];
        if constexpr (F == INT8) total += ((const int8_t *)c.weight)[w] * ((const float *)c.tail)[x];
        if constexpr (F == PAIRS) total += to_float(((const bf16 *)c.weight)[w]) * to_float(((const bf16 *)c.tail)[x]);
    }
    return total;
}

template <Format F, class T> inline void leave(const Call &c, int64_t row, int n, float value) {
    if (F == INT8) value *= c.scale[row];
    if (c.bias) value += to_float(((const T *)c.bias)[row]);
    put((T *)c.y + n * c.out + row, value);
}

// Rows row to row + W of vector n, from their sums.
template <Format F, class T> inline void leave(const Call &c, int64_t row, int n, vf value) {
    if (F == INT8) value *= load(c.scale + row);
    if (c.bias) value += load((const T *)c.bias + row);
    store((T *)c.y + n * c.out + row, value);
}

template <Format F, class T, int N> void block(const Call &c, int64_t row, int64_t step) {
    constexpr int R = rows_at_once(N, F >= INT8);
    if (row + BLOCK > c.out) {
        for (; row < c.out; row++) {
            vf a[1][N] = {};
            const int64_t end = add<F, 1, N>(c, row, 0, c.in, a);
            for (int n = 0; n < N; n++) leave<F, T>(c, row, n, sum(a[0][n]) + rest<F>(c, row, n, end));
        }
        return;
    }
    vf kept[BLOCK][N];
    int64_t end = 0;
    for (int64_t from = 0; from < c.in; from += step) {
        const int64_t to = from + step < c.in ? from + step : c.in;
        for (int g = 0; g < BLOCK; g += R) {
            vf a[R][N];
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) a[r][n] = from ? kept[g + r][n] : zero();
            end = add<F, R, N>(c, row + g, from, to, a);
            for (int r = 0; r < R; r++)
                for (int n = 0; n < N; n++) kept[g + r][n] = a[r][n];
        }
    }
    for (int n = 0; n < N; n++)
        for (int g = 0; g < BLOCK; g += W) {
            vf all[W];
            for (int r = 0; r < W; r++) all[r] = kept[g + r][n];
            vf value = sums(all);
            if (end < c.in)
                for (int r = 0; r < W; r++) value[r] += rest<F>(c, row + g + r, n, end);
            leave<F, T>(c, row + g, n, value);
        }
}

template <Format F, int N> void all(const Call &c, int threads) {
    const int64_t blocks = (c.out + BLOCK - 1) / BLOCK;
    const int64_t multiple = F >= INT4 ? c.group : 64, x_size = F == PAIRS ? 2 : 4;
    const int64_t columns = (X_BYTES / (N * x_size) + multiple - 1) / multiple * multiple;
    const int64_t step = N * c.in * x_size <= 24576 ? c.in : columns;
    const int team = c.out * c.in < 32768 ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t b = 0; b < blocks; b++)
        if (c.x_is_bf16)
            block<F, bf16, N>(c, b * BLOCK, step);
        else
            block<F, float, N>(c, b * BLOCK, step);
}

template <Format F> void product(const Call &c, int n, int threads) {
    switch (n) {
    case 1: return all<F, 1>(c, threads);
    case 2: return all<F, 2>(c, threads);
    case 3: return all<F, 3>(c, threads);
    case 4: return all<F, 4>(c, threads);
    case 5: return all<F, 5>(c, threads);
    case 6: return all<F, 6>(c, threads);
    case 7: return all<F, 7>(c, threads);
    case 8: return all<F, 8>(c, threads);
    }
}

} // namespace

#define API extern "C" __attribute__((visibility("default")))

// x is [n][in] with `stride` elements between vectors; bias (or null) and y, [n][out], are of x's type. weight_kind: 0 float, 1 bfloat16, 2 int8, 3 int4.
API void pdlab_matvec(int x_is_bf16, int weight_kind, const void *x, int64_t stride, int n, const void *weight, const float *scale, const float *zero,
                      const void *bias, void *y, int64_t in, int64_t out, int64_t group, int threads) {
    thread_local Scratch scratch;
    const bool as_stored = HAVE_DPBF16 && x_is_bf16 && weight_kind == 1;
    const int64_t vector = as_stored ? 32 : W, size = as_stored ? 2 : 4, whole = in / vector * vector, room = (n * in * size + 63) / 64 * 64;
    char *laid = (char *)scratch.get(2 * room), *rows = laid + room;
    for (int i = 0; i < n; i++) {
        if (as_stored || !x_is_bf16)
            memcpy(rows + i * in * size, (const char *)x + i * stride * size, in * size);
        else
            for (int64_t j = 0; j < in; j++) ((float *)rows)[i * in + j] = to_float(((const bf16 *)x)[i * stride + j]);
        for (int64_t j = 0; j < whole; j += vector) memcpy(laid + (j * n + i * vector) * size, rows + (i * in + j) * size, vector * size);
    }
    const Call c{laid, rows, weight, scale, zero, bias, y, in, out, group, x_is_bf16};
    if (weight_kind == 0) return product<FLOAT>(c, n, threads);
    if (weight_kind == 2) return product<INT8>(c, n, threads);
    if (weight_kind == 3) return zero ? product<INT4_ZERO>(c, n, threads) : product<INT4>(c, n, threads);
#if HAVE_DPBF16
    if (as_stored) return product<PAIRS>(c, n, threads);
#endif
    product<BF16>(c, n, threads);
}

// For benchmarks: reads `bytes` with all threads, as fast as this machine's memory gives them.
API float pdlab_read(const char *p, int64_t bytes, int threads) {
    float total = 0;
    const int64_t step = 8 * W * 4, steps = bytes / step;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < steps; i++) {
        vf a = zero();
        for (int j = 0; j < 8; j++) a += load((const float *)(p + i * step) + j * W);
        total += a[0];
    }
    return total;
}
