// y [n, out] = x [n, in] times weight [out, in] transposed, n <= 8: bound by the reading of the weight, which happens once, in its stored form.
// R rows of the weight are worked on at once, so that R * N sums are under way and hide the latency of the multiply-add.
#include "cpu.h"

namespace {

typedef uint8_t vub __attribute__((vector_size(W)));

constexpr int rows_at_once(int n) { return n == 1 ? 8 : n <= 4 ? 4 : 2; }

struct Call {
    const void *x; // [n][in], float (or bf16 for pairs)
    const void *weight;
    const float *scale, *zero;
    const void *bias;
    void *y;
    int64_t in, out, group;
    int x_is_bf16;
};

template <class F, int R, int N> inline void write(const Call &c, int64_t row, F value) {
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            const int64_t at = row + r;
            float y = value(r, n);
            if (c.x_is_bf16)
                put((bf16 *)c.y + n * c.out + at, c.bias ? y + to_float(((const bf16 *)c.bias)[at]) : y);
            else
                put((float *)c.y + n * c.out + at, c.bias ? y + ((const float *)c.bias)[at] : y);
        }
}

template <class T, int R, int N> void plain(const Call &c, int64_t row) {
    const T *w = (const T *)c.weight + row * c.in;
    const float *x = (const float *)c.x;
    vf a[R][N] = {};
    float tail[R][N] = {};
    int64_t i = 0;
    for (; i + W <= c.in; i += W) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vf y = load(w + r * c.in + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) a[r][n] += y * load(x + n * c.in + i);
        }
    }
    for (; i < c.in; i++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) tail[r][n] += to_float(w[r * c.in + i]) * x[n * c.in + i];
    auto value = [&](int r, int n) { return (sum(a[r][n]) + tail[r][n]) * (c.scale ? c.scale[row + r] : 1.0f); };
    write<decltype(value), R, N>(c, row, value);
}

#if HAVE_DPBF16
template <int R, int N> void pairs(const Call &c, int64_t row) {
    const bf16 *w = (const bf16 *)c.weight + row * c.in, *x = (const bf16 *)c.x;
    __m512 a[R][N] = {};
    float tail[R][N] = {};
    int64_t i = 0;
    for (; i + 32 <= c.in; i += 32) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            __m512bh y = raw<__m512bh>(w + r * c.in + i);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) a[r][n] = _mm512_dpbf16_ps(a[r][n], y, raw<__m512bh>(x + n * c.in + i));
        }
    }
    for (; i < c.in; i++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) tail[r][n] += to_float(w[r * c.in + i]) * to_float(x[n * c.in + i]);
    auto value = [&](int r, int n) { return sum((vf)a[r][n]) + tail[r][n]; };
    write<decltype(value), R, N>(c, row, value);
}
#endif

template <int R, int N> void nibbles(const Call &c, int64_t row) {
    const float *x = (const float *)c.x;
    const int64_t groups = c.in / c.group;
    vf a[R][N] = {};
    const vf ramp = __builtin_convertvector(lanes(), vf);
    for (int64_t g = 0; g < groups; g++) {
        vf table[R]; // AVX-512: what each of the 16 codes stands for; else the offset
        float scale[R];
        for (int r = 0; r < R; r++) {
            const int64_t at = (row + r) * groups + g;
            scale[r] = c.scale[at];
            const float zero = c.zero ? c.zero[at] : 8.0f;
            table[r] = W == 16 ? (ramp - zero) * scale[r] : vec(-zero * scale[r]);
        }
        for (int64_t i = g * c.group; i < (g + 1) * c.group; i += 32)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const uint8_t *from = (const uint8_t *)c.weight + (row + r) * (c.in / 2) + i / 2;
                for (int h = 0; h < 16; h += W) {
                    vi code = __builtin_convertvector(raw<vub>(from + h), vi);
                    vf low, high;
                    if (W == 16) {
                        low = __builtin_shuffle(table[r], code);
                        high = __builtin_shuffle(table[r], code >> 4);
                    } else {
                        low = __builtin_convertvector(code & 15, vf) * scale[r] + table[r];
                        high = __builtin_convertvector(code >> 4, vf) * scale[r] + table[r];
                    }
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++)
                        a[r][n] += low * load(x + n * c.in + i + h) + high * load(x + n * c.in + i + 16 + h);
                }
            }
    }
    auto value = [&](int r, int n) { return sum(a[r][n]); };
    write<decltype(value), R, N>(c, row, value);
}

enum Format { FLOAT, BF16, PAIRS, INT8, INT4 };

template <Format F, int R, int N> inline void some(const Call &c, int64_t row) {
    if constexpr (F == FLOAT) plain<float, R, N>(c, row);
    if constexpr (F == BF16) plain<bf16, R, N>(c, row);
    if constexpr (F == INT8) plain<int8_t, R, N>(c, row);
    if constexpr (F == INT4) nibbles<R, N>(c, row);
#if HAVE_DPBF16
    if constexpr (F == PAIRS) pairs<R, N>(c, row);
#endif
}

template <Format F, int N> void all(const Call &c, int threads) {
    constexpr int R = rows_at_once(N);
    const int64_t blocks = c.out / R;
    const int team = c.out * c.in < 32768 ? 1 : threads;
#pragma omp parallel num_threads(team) if (team > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < blocks; b++) some<F, R, N>(c, b * R);
#pragma omp single
        for (int64_t row = blocks * R; row < c.out; row++) some<F, 1, N>(c, row);
    }
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
    Call c{x, weight, scale, zero, bias, y, in, out, group, x_is_bf16};
    const bool as_stored = HAVE_DPBF16 && x_is_bf16 && weight_kind == 1;
    const size_t size = x_is_bf16 ? 2 : 4;
    if (as_stored || !x_is_bf16) {
        if (stride != in && n > 1) {
            char *to = (char *)scratch.get(n * in * size);
            for (int i = 0; i < n; i++) memcpy(to + i * in * size, (const char *)x + i * stride * size, in * size);
            c.x = to;
        }
    } else {
        float *to = (float *)scratch.get(n * in * 4);
        for (int i = 0; i < n; i++)
            for (int64_t j = 0; j < in; j++) to[i * in + j] = to_float(((const bf16 *)x)[i * stride + j]);
        c.x = to;
    }
    if (weight_kind == 0) return product<FLOAT>(c, n, threads);
    if (weight_kind == 2) return product<INT8>(c, n, threads);
    if (weight_kind == 3) return product<INT4>(c, n, threads);
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
