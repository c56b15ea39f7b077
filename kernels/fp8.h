// float8_e4m3fn: a sign, 4 bits of exponent (bias 7), 3 of mantissa. 448 is the largest, there is no infinity, and 0x7f is no number.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace fp8 {

constexpr uint32_t SMALL = 8;         // below, what a magnitude's 7 bits count are 2^-9 each
constexpr uint32_t NO_NUMBER = 0x7f;
constexpr uint32_t LEAST = 0x3c800000; // of float: 2^-6, the least that has a leading one
constexpr uint32_t MOST = 0x43e00000;  // of float: 448

template <class A, class B> inline A bits_of(B b) {
    static_assert(sizeof(A) == sizeof(B), "");
    A a;
    memcpy(&a, &b, sizeof a);
    return a;
}

// A float's bits.
inline uint32_t widened(uint32_t x) {
    const uint32_t m = x & 0x7f, small = bits_of<uint32_t>((float)(int32_t)m * 0x1p-9f), large = (m << 20) + 0x3c000000u;
    const uint32_t number = m < SMALL ? small : large;
    return (m == NO_NUMBER ? 0x7fc00000u : number) | (x & 0x80) << 24;
}

// Of a float's bits: the nearest, ties to even; what is beyond 448 is 448.
inline uint32_t narrowed(uint32_t u) {
    const uint32_t a = u & 0x7fffffff, kept = a < MOST ? a : MOST;
    const uint32_t large = ((kept + 0x7ffff + ((kept >> 20) & 1)) >> 20) - (120u << 3);
    const uint32_t small = bits_of<uint32_t>(bits_of<float>(kept < LEAST ? kept : 0u) + 0x1p14f) - 0x46800000u; // 2^-9 is its last bit
    const uint32_t number = kept < LEAST ? small : large;
    return (a > 0x7f800000 ? NO_NUMBER : number) | (u >> 24 & 0x80);
}

inline void to_float(const uint8_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = bits_of<float>(widened(from[i]));
}

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
struct Halves {
    alignas(64) uint8_t low[128], high[128]; // of each magnitude's bfloat16
    Halves() {
        for (uint32_t m = 0; m < 128; m++) low[m] = widened(m) >> 16 & 0xff, high[m] = widened(m) >> 24;
    }
};
static const Halves halves;

inline void to_bfloat16(const uint8_t *from, uint16_t *to, int64_t n) {
    const __m512i low0 = _mm512_load_si512(halves.low), low1 = _mm512_load_si512(halves.low + 64);
    const __m512i high0 = _mm512_load_si512(halves.high), high1 = _mm512_load_si512(halves.high + 64);
    for (int64_t i = 0; i < n; i += 64) {
        const uint64_t some = n - i < 64 ? (1ull << (n - i)) - 1 : ~0ull;
        const __m512i x = _mm512_maskz_loadu_epi8(some, from + i);
        const __m512i low = _mm512_permutex2var_epi8(low0, x, low1); // by the low 7 bits
        const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, x, high1), _mm512_and_si512(x, _mm512_set1_epi8((char)0x80)));
        auto both = [](__m256i l, __m256i h) { return _mm512_or_si512(_mm512_cvtepu8_epi16(l), _mm512_slli_epi16(_mm512_cvtepu8_epi16(h), 8)); };
        const __m512i first = both(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high));
        const __m512i second = both(_mm512_extracti64x4_epi64(low, 1), _mm512_extracti64x4_epi64(high, 1));
        _mm512_mask_storeu_epi16(to + i, (__mmask32)some, first);
        _mm512_mask_storeu_epi16(to + i + 32, (__mmask32)(some >> 32), second);
    }
}
#else
inline void to_bfloat16(const uint8_t *from, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = (uint16_t)(widened(from[i]) >> 16);
}
#endif

inline void of_float(const float *from, uint8_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = (uint8_t)narrowed(bits_of<uint32_t>(from[i]));
}
inline void of_bfloat16(const uint16_t *from, uint8_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = (uint8_t)narrowed((uint32_t)from[i] << 16);
}

} // namespace fp8
