// Copies KV blocks between the cache [layers, 2, blocks, piece] and a buffer [n, layers, 2, piece]; a piece is one block of one half of one layer.
#include <cstdint>
#include <cstring>
#include <omp.h>

extern "C" __attribute__((visibility("default"))) void pdlab_copy_blocks(
    char *kv, char *buffer, const int64_t *ids, int64_t n, int64_t blocks, int64_t planes, int64_t piece, int into_buffer, int threads) {
    const int team = n * planes * piece < (1 << 18) ? 1 : threads;
    // a plane is a half of a layer: going through them one by one keeps the cache side's addresses near one another
#pragma omp parallel for num_threads(team) collapse(2) schedule(static) if (team > 1)
    for (int64_t p = 0; p < planes; p++)
        for (int64_t i = 0; i < n; i++) {
            char *stored = kv + (p * blocks + ids[i]) * piece, *packed = buffer + (i * planes + p) * piece;
            if (into_buffer)
                memcpy(packed, stored, piece);
            else
                memcpy(stored, packed, piece);
        }
}
