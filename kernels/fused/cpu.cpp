// The small steps of a layer, one pass each over float32 or bfloat16, float32 inside. Strides are in elements.
#include "cpu.h"

namespace {

constexpr int64_t ALONE = 16384; // elements below which one thread is quicker

inline vf expv(vf x) { return exp2v(x * 1.4426950408889634f); }

template <class T> void rms_norm(const T *x, T *residual, const T *weight, T *out, int64_t tokens, int64_t dim, int64_t stride, float eps, int threads) {
    const int team = tokens * dim < ALONE ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const T *from = x + t * stride;
        T *to = out + t * dim;
        int64_t d = 0;
        vf squares = zero();
        float tail = 0;
        if (residual) {
            T *sum_of = residual + t * dim;
            for (; d + W <= dim; d += W) {
                store(sum_of + d, load(from + d) + load(sum_of + d));
                vf s = load(sum_of + d); // as rounded
                squares += s * s;
            }
            for (; d < dim; d++) {
                put(sum_of + d, to_float(from[d]) + to_float(sum_of[d]));
                tail += to_float(sum_of[d]) * to_float(sum_of[d]);
            }
            from = sum_of;
        } else {
            for (; d + W <= dim; d += W) {
                vf s = load(from + d);
                squares += s * s;
            }
            for (; d < dim; d++) tail += to_float(from[d]) * to_float(from[d]);
        }
        const float scale = 1.0f / sqrtf((sum(squares) + tail) / dim + eps);
        for (d = 0; d + W <= dim; d += W) store(to + d, load(from + d) * scale * load(weight + d));
        for (; d < dim; d++) put(to + d, to_float(from[d]) * scale * to_float(weight[d]));
    }
}

template <class T> void silu_and_mul(const T *x, T *out, int64_t tokens, int64_t ffn, int64_t stride, int threads) {
    const int team = tokens * ffn < ALONE / 4 ? 1 : threads;
    constexpr int64_t PIECE = 512;
    const int64_t pieces = (ffn + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(team) collapse(2) schedule(static) if (team > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t p = 0; p < pieces; p++) {
            const T *gate = x + t * stride, *up = gate + ffn;
            T *to = out + t * ffn;
            int64_t d = p * PIECE;
            const int64_t end = d + PIECE < ffn ? d + PIECE : ffn;
            for (; d + W <= end; d += W) {
                vf g = load(gate + d);
                store(to + d, g / (1.0f + expv(vmin(-g, vec(87.0f)))) * load(up + d));
            }
            for (; d < end; d++) {
                float g = to_float(gate[d]);
                put(to + d, g / (1.0f + expf(-g)) * to_float(up[d]));
            }
        }
}

template <class T> void rotate(T *x, const float *cos, const float *sin, int half) {
    int d = 0;
    for (; d + W <= half; d += W) {
        vf a = load(x + d), b = load(x + half + d), c = load(cos + d), s = load(sin + d);
        store(x + d, a * c - b * s);
        store(x + half + d, b * c + a * s);
    }
    for (; d < half; d++) {
        float a = to_float(x[d]), b = to_float(x[half + d]);
        put(x + d, a * cos[d] - b * sin[d]);
        put(x + half + d, b * cos[d] + a * sin[d]);
    }
}

template <class T>
void rope(T *q, T *k, const int64_t *positions, const float *cos, const float *sin, int64_t tokens, int heads, int kv_heads, int half, int64_t q_token,
          int64_t q_head, int64_t k_token, int64_t k_head, int threads) {
    const int team = tokens * (heads + kv_heads) * half * 2 < ALONE ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + positions[t] * half, *s = sin + positions[t] * half;
        for (int h = 0; h < heads; h++) rotate(q + t * q_token + h * q_head, c, s, half);
        for (int h = 0; h < kv_heads; h++) rotate(k + t * k_token + h * k_head, c, s, half);
    }
}

} // namespace

#define API extern "C" __attribute__((visibility("default"))) void

API pdlab_rms_norm(int is_bf16, const void *x, void *residual, const void *weight, void *out, int64_t tokens, int64_t dim, int64_t stride, float eps, int threads) {
    if (is_bf16)
        rms_norm((const bf16 *)x, (bf16 *)residual, (const bf16 *)weight, (bf16 *)out, tokens, dim, stride, eps, threads);
    else
        rms_norm((const float *)x, (float *)residual, (const float *)weight, (float *)out, tokens, dim, stride, eps, threads);
}

API pdlab_silu_and_mul(int is_bf16, const void *x, void *out, int64_t tokens, int64_t ffn, int64_t stride, int threads) {
    if (is_bf16)
        silu_and_mul((const bf16 *)x, (bf16 *)out, tokens, ffn, stride, threads);
    else
        silu_and_mul((const float *)x, (float *)out, tokens, ffn, stride, threads);
}

API pdlab_rope(int is_bf16, void *q, void *k, const int64_t *positions, const float *cos, const float *sin, int64_t tokens, int heads, int kv_heads, int half,
               int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int threads) {
    if (is_bf16)
        rope((bf16 *)q, (bf16 *)k, positions, cos, sin, tokens, heads, kv_heads, half, q_token, q_head, k_token, k_head, threads);
    else
        rope((float *)q, (float *)k, positions, cos, sin, tokens, heads, kv_heads, half, q_token, q_head, k_token, k_head, threads);
}
