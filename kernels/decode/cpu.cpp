// All layers of a decode step of few sequences in one call: the other kernels, called one after the other without Python between them. They are given
// as functions, so that this holds no arithmetic of its own.
#include "cpu.h"

namespace {

struct Functions {
    void (*matvec)(int, int, const void *, int64_t, int, const void *, const float *, const float *, const void *, void *, int64_t, int64_t, int64_t, int);
    void (*rms_norm)(int, const void *, void *, const void *, void *, int64_t, int64_t, int64_t, float, int);
    void (*silu_and_mul)(int, const void *, void *, int64_t, int64_t, int64_t, int);
    void (*rope)(int, void *, void *, const int64_t *, const float *, const float *, int64_t, int, int, int, int64_t, int64_t, int64_t, int64_t, int);
    void (*store_kv)(int, int, const void *, const void *, void *, void *, const int64_t *, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int, int);
    void (*attention)(int, int, const void *, const void *, const void *, void *, const int32_t *, const int32_t *, const int32_t *, int64_t, int64_t, int64_t,
                      int64_t, int64_t, int, int, int, int, int, int, float, const float *, int);
    int (*all_reduce)(void *, void *, int64_t, int); // null, where one rank has all of each layer
};

struct Linear {
    const void *weight;
    const float *scale, *zero;
    const void *bias;
    int64_t kind, in, out, group;
};

struct Layer {
    Linear qkv, out, gate_up, down;
    const void *input_norm, *post_norm, *q_norm, *k_norm; // the last two may be null
    void *k_cache, *v_cache;
    int64_t window;
};

struct Shape {
    int64_t is_bf16, stored, layers, tokens, sequences, hidden, heads, kv_heads, dim, ffn, block_tokens, table_stride;
    double eps, scale;
};

struct Step {
    const int64_t *positions, *slots;
    const int32_t *tables, *starts, *contexts;
    const float *cos, *sin;
};

} // namespace

// residual [tokens, hidden] holds the embeddings, and takes what the layers add; x [tokens, hidden] gets the last layer's own output, not yet added.
// work: at least tokens * max(heads + 2 * kv_heads times dim, 2 * ffn) elements, twice. sum: for all_reduce, the ranks that have a part of each layer.
// -1: done; else a rank that has not come.
extern "C" __attribute__((visibility("default"))) int pdlab_decode(const Functions *f, const Shape *s, const Layer *layers, const Step *step, void *sum,
                                                                   char *residual, char *x, char *work, char *other, int threads) {
    const int bf = (int)s->is_bf16, stored = (int)s->stored, n = (int)s->tokens, heads = (int)s->heads, kv = (int)s->kv_heads, dim = (int)s->dim;
    const int64_t size = bf ? 2 : 4, width = (heads + 2 * kv) * dim;
    const float eps = (float)s->eps;
    auto product = [&](const Linear &l, const char *from, char *to) {
        f->matvec(bf, (int)l.kind, from, l.in, n, l.weight, l.scale, l.zero, l.bias, to, l.in, l.out, l.group, threads);
    };
    auto added_up = [&](char *part) { return f->all_reduce ? f->all_reduce(sum, part, n * s->hidden, bf) : -1; };
    for (int64_t i = 0; i < s->layers; i++) {
        const Layer &l = layers[i];
        if (i)
            f->rms_norm(bf, x, residual, l.input_norm, x, n, s->hidden, s->hidden, eps, threads);
        else
            f->rms_norm(bf, residual, nullptr, l.input_norm, x, n, s->hidden, s->hidden, eps, threads);
        product(l.qkv, x, work);
        char *q = work, *k = work + heads * dim * size, *v = k + kv * dim * size;
        if (l.q_norm)
            for (int t = 0; t < n; t++) { // a sequence's heads are rows
                f->rms_norm(bf, q + t * width * size, nullptr, l.q_norm, q + t * width * size, heads, dim, dim, eps, 1);
                f->rms_norm(bf, k + t * width * size, nullptr, l.k_norm, k + t * width * size, kv, dim, dim, eps, 1);
            }
        f->rope(bf, q, k, step->positions, step->cos, step->sin, n, heads, kv, dim / 2, width, dim, width, dim, threads);
        f->store_kv(bf, stored, k, v, l.k_cache, l.v_cache, step->slots, n, width * size, dim * size, width * size, dim * size, kv, (int)s->block_tokens, dim,
                    threads);
        f->attention(bf, stored, q, l.k_cache, l.v_cache, other, step->tables, step->starts, step->contexts, width, dim, heads * dim, dim, s->table_stride,
                     (int)s->sequences, heads, kv, dim, (int)s->block_tokens, (int)l.window, (float)s->scale, nullptr, threads);
        product(l.out, other, x);
        if (const int late = added_up(x); late >= 0)
            return late;
        f->rms_norm(bf, x, residual, l.post_norm, x, n, s->hidden, s->hidden, eps, threads);
        product(l.gate_up, x, work);
        f->silu_and_mul(bf, work, other, n, s->ffn, 2 * s->ffn, threads);
        product(l.down, other, x);
        if (const int late = added_up(x); late >= 0)
            return late;
    }
    return -1;
}
