// Routed experts: tokens are sorted by expert, and each chosen expert's two matrices are read once for every MOST tokens that chose it, by the products
// of pdlab_matvec, which is given. Between them, and in the weighted sum, arithmetic is float32.
#include "cpu.h"
#include <vector>

namespace {

constexpr int MOST = 8; // vectors that a product takes

struct Linear { // as the decode step lays it out
    const void *weight;
    const float *scale, *zero;
    const void *bias;
    int64_t kind, in, out, group;
};

typedef void (*Matvec)(int, int, const void *, int64_t, int, const void *, const float *, const float *, const void *, void *, int64_t, int64_t, int64_t, int);

struct Pair {
    int32_t token, place;
};

// gate * sigmoid(alpha * gate) * (up + shift) of [gate, up] into the first half's place.
template <class T> void activate(T *gate_up, int64_t width, float alpha, float limit, float shift) {
    constexpr float LOG2E = 1.4426950408889634f;
    T *up = gate_up + width;
    auto one = [&](vf g, vf u) {
        if (limit > 0) {
            g = vmin(g, vec(limit));
            u = vmax(vmin(u, vec(limit)), vec(-limit));
        }
        const vf z = alpha * g * LOG2E; // 2^-|z| never overflows
        const vf e = exp2v(z < 0 ? z : -z);
        return g * ((z < 0 ? e : vec(1.0f)) / (1.0f + e)) * (u + shift);
    };
    int64_t i = 0;
    for (; i + W <= width; i += W) store(gate_up + i, one(load(gate_up + i), load(up + i)));
    for (; i < width; i++) put(gate_up + i, one(vec(to_float(gate_up[i])), vec(to_float(up[i])))[0]);
}

template <class T> void run(Matvec matvec, const Linear *gate_up, const Linear *down, const T *x, const int64_t *ids, const float *weights, T *out, int64_t stride,
                            int64_t tokens, int64_t chosen, int64_t count, int64_t hidden, int64_t width, float alpha, float limit, float shift, int threads) {
    thread_local Scratch scratch;
    thread_local std::vector<Pair> pairs;
    thread_local std::vector<int32_t> ends;
    constexpr int is_bf16 = sizeof(T) == 2;
    pairs.resize(tokens * chosen);
    ends.assign(count + 2, 0); // the last are those of no expert here
    auto expert = [&](int64_t i) { return ids[i] >= 0 && ids[i] < count ? ids[i] : count; };
    for (int64_t i = 0; i < tokens * chosen; i++) ends[expert(i) + 1]++;
    for (int64_t e = 0; e <= count; e++) ends[e + 1] += ends[e];
    for (int64_t i = 0; i < tokens * chosen; i++) pairs[ends[expert(i)]++] = {(int32_t)(i / chosen), (int32_t)(i % chosen)};
    const int64_t wide = (2 * width + 31) / 32 * 32, deep = (hidden + 31) / 32 * 32;
    float *total = (float *)scratch.get((size_t)tokens * deep * 4 + (size_t)MOST * (wide + 2 * deep) * sizeof(T));
    T *rows = (T *)(total + tokens * deep), *inner = rows + MOST * deep, *made = inner + MOST * wide;
    memset(total, 0, (size_t)tokens * deep * 4);
    for (int64_t e = 0; e < count; e++)
        for (int64_t at = e ? ends[e - 1] : 0; at < ends[e]; at += MOST) {
            const int n = (int)(ends[e] - at < MOST ? ends[e] - at : MOST);
            const T *from = x + pairs[at].token * stride;
            if (n > 1) {
                for (int i = 0; i < n; i++) memcpy(rows + i * hidden, x + pairs[at + i].token * stride, hidden * sizeof(T));
                from = rows;
            }
            const Linear &g = gate_up[e], &d = down[e];
            matvec(is_bf16, (int)g.kind, from, hidden, n, g.weight, g.scale, g.zero, g.bias, inner, g.in, g.out, g.group, threads);
            for (int i = 0; i < n; i++) activate<T>(inner + i * 2 * width, width, alpha, limit, shift);
            matvec(is_bf16, (int)d.kind, inner, 2 * width, n, d.weight, d.scale, d.zero, d.bias, made, d.in, d.out, d.group, threads);
            for (int i = 0; i < n; i++) {
                const Pair &p = pairs[at + i];
                const float weight = weights[p.token * chosen + p.place];
                float *sum = total + p.token * deep;
                const T *one = made + i * hidden;
                int64_t j = 0;
                for (; j + W <= hidden; j += W) store(sum + j, load(sum + j) + load(one + j) * weight);
                for (; j < hidden; j++) sum[j] += to_float(one[j]) * weight;
            }
        }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t j = 0; j < hidden; j++) put(out + t * hidden + j, total[t * deep + j]);
}

} // namespace

// x [tokens][hidden], `stride` elements between them; ids and weights [tokens][chosen]; out [tokens][hidden] of x's type; `count` experts.
extern "C" __attribute__((visibility("default"))) void pdlab_experts(Matvec matvec, int is_bf16, const Linear *gate_up, const Linear *down, const void *x,
                                                                     const int64_t *ids, const float *weights, void *out, int64_t stride, int64_t tokens,
                                                                     int64_t chosen, int64_t count, int64_t hidden, int64_t width, float alpha, float limit,
                                                                     float shift, int threads) {
    if (is_bf16)
        run<bf16>(matvec, gate_up, down, (const bf16 *)x, ids, weights, (bf16 *)out, stride, tokens, chosen, count, hidden, width, alpha, limit, shift, threads);
    else
        run<float>(matvec, gate_up, down, (const float *)x, ids, weights, (float *)out, stride, tokens, chosen, count, hidden, width, alpha, limit, shift, threads);
}
