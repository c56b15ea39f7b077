// Copies n pieces of `bytes` bytes, each from its own address to its own address. One thread: the transfer threads share the machine with an engine.
#include <cstdint>
#include <cstring>

extern "C" __attribute__((visibility("default"))) void pdlab_copy_pieces(const int64_t *from, const int64_t *to, int64_t n, int64_t bytes) {
    for (int64_t i = 0; i < n; i++)
        memcpy(reinterpret_cast<void *>(to[i]), reinterpret_cast<const void *>(from[i]), bytes);
}

// n elements to bfloat16, rounded to the nearest, ties to even; what is no number stays none.
extern "C" __attribute__((visibility("default"))) void pdlab_to_bfloat16(const uint32_t *from, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t x = from[i], rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
        to[i] = static_cast<uint16_t>((x & 0x7fffffff) > 0x7f800000 ? (x >> 16) | 0x40 : rounded);
    }
}

extern "C" __attribute__((visibility("default"))) void pdlab_to_float32(const uint16_t *from, uint32_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        to[i] = static_cast<uint32_t>(from[i]) << 16;
}
