// Pieces of `bytes` bytes, each at an address of its own. One thread: the transfer threads share the machine with an engine.
#include "fp8.h"
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <sys/socket.h>
#include <sys/uio.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define API extern "C" __attribute__((visibility("default")))

API void pdlab_copy_pieces(const int64_t *from, const int64_t *to, int64_t n, int64_t bytes) {
    for (int64_t i = 0; i < n; i++)
        memcpy(reinterpret_cast<void *>(to[i]), reinterpret_cast<const void *>(from[i]), bytes);
}

// The same past the caches: what lies scattered over much memory is not read before it is written over, and the next piece is on its way
// while this one is written.
API void pdlab_stream_pieces(const int64_t *from, const int64_t *to, int64_t n, int64_t bytes) {
#ifdef __SSE2__
    bool fits = bytes % 64 == 0;
    for (int64_t i = 0; i < n && fits; i++)
        fits = to[i] % 16 == 0;
    if (fits) {
        for (int64_t i = 0; i < n; i++) {
            const char *source = reinterpret_cast<const char *>(from[i]), *next = reinterpret_cast<const char *>(from[i + 1 < n ? i + 1 : i]);
            char *target = reinterpret_cast<char *>(to[i]);
            for (int64_t k = 0; k < bytes; k += 64) {
                _mm_prefetch(next + k, _MM_HINT_T0);
                const __m128i *in = reinterpret_cast<const __m128i *>(source + k);
                __m128i *out = reinterpret_cast<__m128i *>(target + k);
                const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
                _mm_stream_si128(out, a);
                _mm_stream_si128(out + 1, b);
                _mm_stream_si128(out + 2, c);
                _mm_stream_si128(out + 3, d);
            }
        }
        _mm_sfence();
        return;
    }
#endif
    pdlab_copy_pieces(from, to, n, bytes);
}

// Sends them over a socket one after another, from byte `done` of all on, until it takes no more. The new `done`, or -errno.
API int64_t pdlab_send_pieces(int fd, const int64_t *from, int64_t n, int64_t bytes, int64_t done) {
    constexpr int64_t kMost = 1024;  // Linux's UIO_MAXIOV
    iovec some[kMost];
    while (done < n * bytes) {
        const int64_t first = done / bytes, count = n - first < kMost ? n - first : kMost;
        for (int64_t i = 0; i < count; i++)
            some[i] = {reinterpret_cast<void *>(from[first + i]), static_cast<size_t>(bytes)};
        const int64_t skip = done % bytes;
        some[0] = {static_cast<char *>(some[0].iov_base) + skip, static_cast<size_t>(bytes - skip)};
        msghdr message{};
        message.msg_iov = some;
        message.msg_iovlen = count;
        const ssize_t sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno == EAGAIN || errno == EWOULDBLOCK ? done : -errno;
        }
        done += sent;
    }
    return done;
}

// n elements to bfloat16, rounded to the nearest, ties to even; what is no number stays none.
API void pdlab_to_bfloat16(const uint32_t *from, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t x = from[i], rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
        to[i] = static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? (x >> 16) | 0x40 : rounded);
    }
}

API void pdlab_to_float32(const uint16_t *from, uint32_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        to[i] = static_cast<uint32_t>(from[i]) << 16;
}

// To and from float8_e4m3fn; what is beyond its largest is that.
API void pdlab_float32_to_fp8(const float *from, uint8_t *to, int64_t n) { fp8::of_float(from, to, n); }
API void pdlab_bfloat16_to_fp8(const uint16_t *from, uint8_t *to, int64_t n) { fp8::of_bfloat16(from, to, n); }
API void pdlab_fp8_to_float32(const uint8_t *from, float *to, int64_t n) { fp8::to_float(from, to, n); }
API void pdlab_fp8_to_bfloat16(const uint8_t *from, uint16_t *to, int64_t n) { fp8::to_bfloat16(from, to, n); }
