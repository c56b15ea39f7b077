// What the CPU kernels share: vectors of W floats by GCC's vector extensions (AVX-512, AVX2, NEON or plain, as -march says), bfloat16, scratch memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAVE_DPBF16 1
#else
#define HAVE_DPBF16 0
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef uint8_t vub __attribute__((vector_size(W)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

template <class V, class P> inline V raw(const P *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline vf vec(float x) { return x - vf{}; }
inline vf zero() { return vf{}; }
inline vf load(const float *p) { return raw<vf>(p); }
// Widening W narrow integers: GCC 12 takes many instructions for what is one.
#if defined(__AVX512F__)
inline vi widen(const int8_t *p) { return (vi)_mm512_cvtepi8_epi32(raw<__m128i>(p)); }
inline vi widen(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(raw<__m128i>(p)); }
inline vi widen(const uint16_t *p) { return (vi)_mm512_cvtepu16_epi32(raw<__m256i>(p)); }
inline vf look_up(vf table, vi at) { return (vf)_mm512_permutexvar_ps((__m512i)at, (__m512)table); } // by the low 4 bits
#elif defined(__AVX2__)
inline vi widen(const int8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(raw<int64_t>(p))); }
inline vi widen(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(raw<int64_t>(p))); }
inline vi widen(const uint16_t *p) { return (vi)_mm256_cvtepu16_epi32(raw<__m128i>(p)); }
#else
inline vi widen(const int8_t *p) { return __builtin_convertvector(raw<vb>(p), vi); }
inline vi widen(const uint8_t *p) { return __builtin_convertvector(raw<vub>(p), vi); }
inline vi widen(const uint16_t *p) { return __builtin_convertvector(raw<vh>(p), vi); }
#endif
inline vf load(const bf16 *p) { return (vf)(widen(&p->bits) << 16); }
inline vf load(const int8_t *p) { return __builtin_convertvector(widen(p), vf); }
inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
inline vh round_bf16(vf v) {
    vu u = (vu)v;
    vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vi nan = v != v;
    r = (r & ~(vu)nan) | ((vu)nan & 0x7fc0u);
    return __builtin_convertvector(r, vh);
}
inline void store(bf16 *p, vf v) {
    vh h = round_bf16(v);
    memcpy(p, &h, sizeof h);
}
inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline void put(float *p, float x) { *p = x; }
inline void put(bf16 *p, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vi lanes() {
    vi v;
    for (int i = 0; i < W; i++) v[i] = i;
    return v;
}
inline float sum(vf v) {
    float t[W], s = 0;
    memcpy(t, &v, sizeof t);
    for (int w = W / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] += t[i + w];
    s = t[0];
    return s;
}
inline float largest(vf v) {
    float t[W];
    memcpy(t, &v, sizeof t);
    for (int w = W / 2; w; w /= 2)
        for (int i = 0; i < w; i++) t[i] = t[i] > t[i + w] ? t[i] : t[i + w];
    return t[0];
}

// 2^x for x <= 0 or moderate; below -126 it is 2^-126, next to nothing. Relative error 2e-7: minimax polynomial on [-1/2, 1/2].
inline vf exp2v(vf x) {
    x = vmax(x, vec(-126.0f));
    const vf magic = vec(12582912.0f);
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vf p = vec(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

// Lane j of the answer is the sum of a[j]'s lanes: a tree of log2(W) rounds, each halving the number of vectors. In a round, of every run of 2H
// lanes, the low half of two vectors are laid side by side and added to the high halves, likewise.
template <int H> struct Halves {
    int32_t low[W] = {}, high[W] = {};
    constexpr Halves() {
        for (int i = 0; i < W; i++) {
            low[i] = i / (2 * H) * 2 * H + i % H + (i % (2 * H) >= H ? W : 0);
            high[i] = low[i] + H;
        }
    }
};
template <int H> inline void fold(vf *a) {
    static constexpr Halves<H> halves;
    const vi low = raw<vi>(halves.low), high = raw<vi>(halves.high);
#pragma GCC unroll 16
    for (int i = 0; i < H; i++) a[i] = __builtin_shuffle(a[i], a[i + H], low) + __builtin_shuffle(a[i], a[i + H], high);
}
inline vf sums(vf *a) {
#if defined(__AVX512F__)
    fold<8>(a);
#endif
    fold<4>(a);
    fold<2>(a);
    fold<1>(a);
    return a[0];
}

// Memory that a thread keeps between calls, 64-byte aligned.
struct Scratch {
    char *at = nullptr;
    size_t bytes = 0;
    void *get(size_t n) {
        if (n > bytes) {
            free(at);
            bytes = (n + n / 4 + 4095) / 4096 * 4096;
            at = (char *)aligned_alloc(4096, bytes);
        }
        return at;
    }
    ~Scratch() { free(at); }
};
