// Paged attention on the CPU. Rows are the (query, head of the group) pairs that share a kv head; a task is some rows against a span of keys.
//
// Few rows (decode): vectors lie along head_dim; each key is read once and serves the whole group.
// Many rows (prefill): vectors lie along the rows, so the scores of a key are Q^T times one broadcast element at a time, the softmax needs no
// reduction across lanes, and neither K nor V is ever transposed. bfloat16 uses AVX-512's pair products where the CPU has them.
// KV in fewer bits than the queries is widened a chunk of keys at a time, into memory that stays in the first caches.
// Both keep an online softmax in float32, in base 2. A task whose span is a part of its keys leaves (max, sum, output) for a second pass to merge.
#include "cpu.h"
#include "fp8.h"
#include <algorithm>
#include <vector>

namespace {

constexpr int CHUNK = 64;   // keys at a time
constexpr int FEW = 8;      // rows that the decode kernel takes
constexpr int MV_MOST = 3;  // row vectors of a tile
constexpr int KB = W == 16 ? 8 : 4; // keys (or elements of head_dim) per micro-kernel: KB * MV accumulators
constexpr int TILES = 4;    // row tiles a task may hold, to share the reading of K and V
constexpr float NONE = -1e30f;
constexpr float LOG2E = 1.4426950408889634f;

enum Stored { LIKE_Q, FP8, BF16 }; // cpu.py's too

struct Problem {
    const void *q, *k, *v;
    void *out;
    const int32_t *tables, *starts, *contexts;
    int64_t q_token, q_head, out_token, out_head, table_stride; // strides in elements
    int64_t block_stride, head_stride;                          // of the caches
    int seqs, heads, kv_heads, group, dim, block_tokens, window;
    float scale;
    int stored;         // how the caches are: LIKE_Q, or narrower
    const float *sinks; // of each head, or null: a score that takes its share of the softmax and brings no value
    float *partials;
};

struct Task {
    int seq, head, row0, rows, key0, key1;
    int64_t partial; // row of the partials that is row0's, or -1: write the output
};

struct Merge {
    int seq, head, row0, rows, splits;
    int64_t partial;
};

inline int position(const Problem &p, int seq, int row) {
    int queries = p.starts[seq + 1] - p.starts[seq];
    return p.contexts[seq] - queries + row / p.group;
}
inline int first_seen(const Problem &p, int position) { return p.window ? std::max(0, position - p.window + 1) : 0; }

template <class T> const T *query(const Problem &p, int seq, int head, int row) {
    return (const T *)p.q + (p.starts[seq] + row / p.group) * p.q_token + (head * p.group + row % p.group) * p.q_head;
}
template <class T> T *output(const Problem &p, int seq, int head, int row) {
    return (T *)p.out + (p.starts[seq] + row / p.group) * p.out_token + (head * p.group + row % p.group) * p.out_head;
}

inline void widened(const uint8_t *from, float *to, int dim) { fp8::to_float(from, to, dim); }
inline void widened(const uint8_t *from, bf16 *to, int dim) { fp8::to_bfloat16(from, &to->bits, dim); }
inline void widened(const uint16_t *from, float *to, int dim) {
    for (int d = 0; d < dim; d++) to[d] = fp8::bits_of<float>((uint32_t)from[d] << 16);
}

// The vectors of `n` keys from `key` on, of elements S, made ones of T. What lies together of a block is widened at once.
template <class T, class S> void widen(const Problem &p, const Task &t, int key, int n, const void *cache, T *to) {
    const int32_t *table = p.tables + t.seq * p.table_stride;
    for (int j = 0; j < n;) {
        const int block = (key + j) / p.block_tokens, offset = (key + j) % p.block_tokens, some = std::min(n - j, p.block_tokens - offset);
        const S *from = (const S *)cache + table[block] * p.block_stride + t.head * p.head_stride + (int64_t)offset * p.dim;
        widened(from, to + (int64_t)j * p.dim, some * p.dim);
        j += some;
    }
}

template <class T, class S> void locate_widened(const Problem &p, const Task &t, int key, int n, const T **k, const T **v) {
    thread_local Scratch scratch;
    T *keys = (T *)scratch.get((size_t)2 * CHUNK * p.dim * sizeof(T)), *values = p.k == p.v ? keys : keys + (int64_t)CHUNK * p.dim;
    widen<T, S>(p, t, key, n, p.k, keys);
    if (values != keys) widen<T, S>(p, t, key, n, p.v, values);
    for (int j = 0; j < CHUNK; j++) {
        k[j] = keys + (int64_t)(j < n ? j : 0) * p.dim;
        v[j] = values + (int64_t)(j < n ? j : 0) * p.dim;
    }
}

// The addresses of `n` keys' vectors from `key` on; what is past the end points at the first. Good until the next call.
template <class T> void locate(const Problem &p, const Task &t, int key, int n, const T **k, const T **v) {
    if (p.stored == FP8) return locate_widened<T, uint8_t>(p, t, key, n, k, v);
    if constexpr (sizeof(T) == 4)
        if (p.stored == BF16) return locate_widened<T, uint16_t>(p, t, key, n, k, v);
    const int32_t *table = p.tables + t.seq * p.table_stride;
    int block = key / p.block_tokens, offset = key % p.block_tokens;
    for (int j = 0; j < n;) {
        int64_t base = table[block] * p.block_stride + t.head * p.head_stride;
        for (; j < n && offset < p.block_tokens; j++, offset++) {
            k[j] = (const T *)p.k + base + (int64_t)offset * p.dim;
            v[j] = (const T *)p.v + base + (int64_t)offset * p.dim;
        }
        block++;
        offset = 0;
    }
    for (int j = n; j < CHUNK; j++) k[j] = k[0], v[j] = v[0];
}

// What a sink adds to the sum of a row's exponentials, whose largest score is `max`.
inline float sunk(const Problem &p, int head, int row, float max) {
    return p.sinks ? exp2f(p.sinks[head * p.group + row % p.group] * LOG2E - max) : 0.0f;
}

// Leaves a row's answer: the output itself, or its partial (max, sum, then the unscaled output).
template <class T> void finish(const Problem &p, const Task &t, int row, const float *o, float max, float sum) {
    if (t.partial < 0) {
        T *to = output<T>(p, t.seq, t.head, t.row0 + row);
        float inverse = 1.0f / (sum + sunk(p, t.head, t.row0 + row, max));
        int d = 0;
        for (; d + W <= p.dim; d += W) store(to + d, load(o + d) * inverse);
        for (; d < p.dim; d++) put(to + d, o[d] * inverse);
        return;
    }
    float *to = p.partials + (t.partial + row) * (p.dim + 2);
    to[0] = max;
    to[1] = sum;
    memcpy(to + 2, o, p.dim * sizeof(float));
}

// ---- few rows

// scores[row][j] = q[row] . k[j] for `n` keys; DV vectors a key (0: as many as `dv` says).
template <class T, int DV> void score_rows(const T *const *k, const float *q, int dv, int rows, int n, float *scores) {
    const int vectors = DV ? DV : dv;
    for (int r = 0; r < rows; r++)
        for (int j0 = 0; j0 < n; j0 += W) {
            vf a[W];
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) {
                const T *key = k[j0 + j];
                vf s = zero();
#pragma GCC unroll 8
                for (int i = 0; i < vectors; i++) s += load(key + i * W) * load(q + (r * vectors + i) * W);
                a[j] = s;
            }
            store(scores + r * CHUNK + j0, sums(a));
        }
}

#if HAVE_DPBF16
template <int DV> void score_pairs(const bf16 *const *k, const bf16 *q, int rows, int n, float *scores) {
    for (int r = 0; r < rows; r++)
        for (int j0 = 0; j0 < n; j0 += W) {
            vf a[W];
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) {
                __m512 s = _mm512_setzero_ps();
#pragma GCC unroll 8
                for (int i = 0; i < DV / 2; i++)
                    s = _mm512_dpbf16_ps(s, raw<__m512bh>(k[j0 + j] + i * 32), raw<__m512bh>(q + (r * DV / 2 + i) * 32));
                a[j] = (vf)s;
            }
            store(scores + r * CHUNK + j0, sums(a));
        }
}
#endif

// o[row] = o[row] * alpha[row] + sum over j of weights[row][j] v[j], VC vectors of head_dim at a time for all rows.
template <class T, int ROWS, int VC>
void value_slice(const T *const *v, const float *weights, const float *alpha, float *o, int dv, int i0, int n) {
    vf a[ROWS][VC];
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VC; c++) a[r][c] = load(o + (r * dv + i0 + c) * W) * alpha[r];
    for (int j = 0; j < n; j++) {
        vf x[VC];
        for (int c = 0; c < VC; c++) x[c] = load(v[j] + (i0 + c) * W);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < VC; c++) a[r][c] += x[c] * weights[r * CHUNK + j];
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < VC; c++) store(o + (r * dv + i0 + c) * W, a[r][c]);
}
template <class T, int ROWS>
void value_rows(const T *const *v, const float *weights, const float *alpha, float *o, int dv, int n) {
    constexpr int VC = W == 16 ? (ROWS <= 3 ? 8 : ROWS <= 6 ? 4 : 2) : (ROWS <= 6 ? 2 : 1);
    int i = 0;
    for (; i + VC <= dv; i += VC) value_slice<T, ROWS, VC>(v, weights, alpha, o, dv, i, n);
    if constexpr (VC == 8)
        for (; i + 4 <= dv; i += 4) value_slice<T, ROWS, 4>(v, weights, alpha, o, dv, i, n);
    for (; i < dv; i++) value_slice<T, ROWS, 1>(v, weights, alpha, o, dv, i, n);
}
template <class T> void value_rows(const T *const *v, const float *w, const float *alpha, float *o, int dv, int rows, int n) {
    switch (rows) {
    case 1: return value_rows<T, 1>(v, w, alpha, o, dv, n);
    case 2: return value_rows<T, 2>(v, w, alpha, o, dv, n);
    case 3: return value_rows<T, 3>(v, w, alpha, o, dv, n);
    case 4: return value_rows<T, 4>(v, w, alpha, o, dv, n);
    case 5: return value_rows<T, 5>(v, w, alpha, o, dv, n);
    case 6: return value_rows<T, 6>(v, w, alpha, o, dv, n);
    case 7: return value_rows<T, 7>(v, w, alpha, o, dv, n);
    default: return value_rows<T, 8>(v, w, alpha, o, dv, n);
    }
}

template <class T> void score_any(const T *const *k, const float *q, const bf16 *q16, int dv, int rows, int n, float *scores) {
#if HAVE_DPBF16
    if constexpr (sizeof(T) == 2) {
        if (dv == 4) return score_pairs<4>(k, q16, rows, n, scores);
        if (dv == 8) return score_pairs<8>(k, q16, rows, n, scores);
    }
#endif
    (void)q16;
    if (dv * W == 64) return score_rows<T, 64 / W>(k, q, dv, rows, n, scores);
    if (dv * W == 128) return score_rows<T, 128 / W>(k, q, dv, rows, n, scores);
    return score_rows<T, 0>(k, q, dv, rows, n, scores);
}

template <class T> void few_rows(const Problem &p, const Task &t) {
    thread_local Scratch scratch;
    const int dim = p.dim, padded = (dim + W - 1) / W * W, dv = padded / W, rows = t.rows;
    const bool copy = padded != dim;
    float *q = (float *)scratch.get(((size_t)FEW * padded * 3 + (copy ? 2 * CHUNK * padded : 0)) * 4);
    float *o = q + FEW * padded;
    bf16 *q16 = (bf16 *)(o + FEW * padded);
    float *k_copy = o + 2 * FEW * padded, *v_copy = k_copy + CHUNK * padded;
    memset(q, 0, (size_t)FEW * padded * 2 * 4);
    if (copy) memset(k_copy, 0, (size_t)2 * CHUNK * padded * 4);
    alignas(64) float scores[FEW * CHUNK];
    float max[FEW], total[FEW], alpha[FEW];
    int low[FEW], high[FEW], low_most = 0, high_least = INT32_MAX;
    for (int r = 0; r < rows; r++) {
        const T *from = query<T>(p, t.seq, t.head, t.row0 + r);
        for (int d = 0; d < dim; d++) q[r * padded + d] = to_float(from[d]);
        if (sizeof(T) == 2) memcpy(q16 + r * padded, from, dim * 2);
        max[r] = NONE;
        total[r] = 0;
        high[r] = position(p, t.seq, t.row0 + r);
        low[r] = first_seen(p, high[r]);
        low_most = std::max(low_most, low[r]);
        high_least = std::min(high_least, high[r]);
    }
    const vf scale = vec(p.scale * LOG2E);
    const T *k[CHUNK], *v[CHUNK];
    const float *k_float[CHUNK], *v_float[CHUNK];
    for (int key = t.key0; key < t.key1; key += CHUNK) {
        const int n = std::min(CHUNK, t.key1 - key);
        locate<T>(p, t, key, n, k, v);
        if (copy) {
            for (int j = 0; j < CHUNK; j++) {
                k_float[j] = k_copy + (j < n ? j : 0) * padded;
                v_float[j] = v_copy + (j < n ? j : 0) * padded;
                if (j >= n) continue;
                for (int d = 0; d < dim; d++) {
                    k_copy[j * padded + d] = to_float(k[j][d]);
                    v_copy[j * padded + d] = to_float(v[j][d]);
                }
            }
            score_any<float>(k_float, q, q16, dv, rows, n, scores);
        } else {
            score_any<T>(k, q, q16, dv, rows, n, scores);
        }
        const int full = (n + W - 1) / W * W;
        const bool mask = key < low_most || key + full - 1 > std::min(high_least, t.key1 - 1);
        for (int r = 0; r < rows; r++) {
            float *s = scores + r * CHUNK;
            vf most = vec(NONE);
            for (int j = 0; j < full; j += W) {
                vf x = load(s + j) * scale;
                if (mask) {
                    vi at = lanes() + (key + j);
                    x = (at <= std::min(high[r], t.key1 - 1)) & (at >= low[r]) ? x : vec(NONE);
                }
                store(s + j, x);
                most = vmax(most, x);
            }
            float now = std::max(max[r], largest(most));
            alpha[r] = exp2f(max[r] - now);
            max[r] = now;
            vf added = zero();
            for (int j = 0; j < full; j += W) {
                vf x = exp2v(load(s + j) - now);
                store(s + j, x);
                added += x;
            }
            total[r] = total[r] * alpha[r] + sum(added);
        }
        if (copy)
            value_rows<float>(v_float, scores, alpha, o, dv, rows, n);
        else
            value_rows<T>(v, scores, alpha, o, dv, rows, n);
    }
    for (int r = 0; r < rows; r++) finish<T>(p, t, r, o + r * padded, max[r], total[r]);
}

// ---- many rows

// s[j][row] = sum over d of qt[d][row] k[j][d], `keys` a multiple of KB.
template <int MV> void tile_scores(const float *qt, const float *k, int keys, int dim, float *s) {
    constexpr int M = MV * W;
    for (int j = 0; j < keys; j += KB) {
        vf a[KB][MV] = {};
        const float *kj = k + j * dim;
        for (int d = 0; d < dim; d++) {
            vf x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) x[m] = load(qt + d * M + m * W);
#pragma GCC unroll 8
            for (int b = 0; b < KB; b++) {
                vf y = vec(kj[b * dim + d]);
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) a[b][m] += x[m] * y;
            }
        }
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) store(s + (j + b) * M + m * W, a[b][m]);
    }
}

// o[d][row] = o[d][row] * alpha[row] + sum over j of p[j][row] v[j][d]
template <int MV> void tile_values(const float *p, const float *v, int keys, int dim, const vf *alpha, float *o) {
    constexpr int M = MV * W;
    for (int d = 0; d < dim; d += KB) {
        vf a[KB][MV];
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) a[b][m] = load(o + (d + b) * M + m * W) * alpha[m];
        const float *vd = v + d;
        for (int j = 0; j < keys; j++) {
            vf x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) x[m] = load(p + j * M + m * W);
#pragma GCC unroll 8
            for (int b = 0; b < KB; b++) {
                vf y = vec(vd[j * dim + b]);
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) a[b][m] += x[m] * y;
            }
        }
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) store(o + (d + b) * M + m * W, a[b][m]);
    }
}

#if HAVE_DPBF16
inline __m512bh pair_of(uint32_t x) { return (__m512bh)_mm512_set1_epi32((int)x); }

// The same in pairs: qt [dim/2][row] holds (q[2i], q[2i+1]), k is as stored.
template <int MV> void tile_scores(const uint32_t *qt, const bf16 *k, int keys, int dim, float *s) {
    constexpr int M = MV * W;
    for (int j = 0; j < keys; j += KB) {
        __m512 a[KB][MV] = {};
        const bf16 *kj = k + j * dim;
        for (int d = 0; d < dim; d += 2) {
            __m512bh x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) x[m] = raw<__m512bh>(qt + d / 2 * M + m * W);
#pragma GCC unroll 8
            for (int b = 0; b < KB; b++) {
                __m512bh y = pair_of(raw<uint32_t>(kj + b * dim + d));
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) a[b][m] = _mm512_dpbf16_ps(a[b][m], x[m], y);
            }
        }
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) store(s + (j + b) * M + m * W, (vf)a[b][m]);
    }
}

// p [keys/2][row] pairs along the keys, v [keys/2][dim] likewise.
template <int MV> void tile_values(const uint32_t *p, const uint32_t *v, int keys, int dim, const vf *alpha, float *o) {
    constexpr int M = MV * W;
    for (int d = 0; d < dim; d += KB) {
        __m512 a[KB][MV];
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) a[b][m] = (__m512)(load(o + (d + b) * M + m * W) * alpha[m]);
        const uint32_t *vd = v + d;
        for (int j = 0; j < keys / 2; j++) {
            __m512bh x[MV];
#pragma GCC unroll 4
            for (int m = 0; m < MV; m++) x[m] = raw<__m512bh>(p + j * M + m * W);
#pragma GCC unroll 8
            for (int b = 0; b < KB; b++) {
                __m512bh y = pair_of(vd[j * dim + b]);
#pragma GCC unroll 4
                for (int m = 0; m < MV; m++) a[b][m] = _mm512_dpbf16_ps(a[b][m], x[m], y);
            }
        }
        for (int b = 0; b < KB; b++)
            for (int m = 0; m < MV; m++) store(o + (d + b) * M + m * W, (vf)a[b][m]);
    }
}
#endif

// How T is held by the tile kernel: float, or pairs of bfloat16.
template <class T> struct Held {
    static constexpr bool pairs = HAVE_DPBF16 && sizeof(T) == 2;
    typedef typename std::conditional<pairs, uint32_t, float>::type Unit; // of Q^T, P and V
    typedef typename std::conditional<pairs, bf16, float>::type Key;
    static constexpr int per = pairs ? 2 : 1; // elements in a unit
};

template <class T> void pack_keys(const T *const *k, const T *const *v, int n, int keys, int dim, typename Held<T>::Key *kc, typename Held<T>::Unit *vc) {
    if constexpr (Held<T>::pairs) {
        for (int j = 0; j < keys; j++) memcpy(kc + j * dim, k[j], dim * 2);
        for (int j = 0; j < keys; j += 2) {
            const uint16_t *a = (const uint16_t *)v[j], *b = (const uint16_t *)v[j + 1];
            for (int d = 0; d < dim; d++) vc[j / 2 * dim + d] = a[d] | (uint32_t)b[d] << 16;
        }
    } else {
        for (int j = 0; j < keys; j++)
            for (int d = 0; d < dim; d++) kc[j * dim + d] = to_float(k[j][d]);
        for (int j = 0; j < keys; j++)
            for (int d = 0; d < dim; d++) vc[j * dim + d] = to_float(v[j][d]);
    }
    (void)n;
}

// Scales (by more than 0), masks (where `mask`) and exponentiates s [keys][row] into p; updates the rows' max and sum, and says by how much to scale what they have.
template <class T, int MV>
void tile_softmax(float *s, int key, int keys, bool mask, vf scale, const vi *low, const vi *high, vf *max, vf *total, vf *alpha, typename Held<T>::Unit *p) {
    constexpr int M = MV * W;
    vf now[MV];
    for (int m = 0; m < MV; m++) now[m] = vec(NONE);
    if (mask) {
        for (int j = 0; j < keys; j++)
            for (int m = 0; m < MV; m++) {
                vi at = vi{} + (key + j);
                vf x = (at <= high[m]) & (at >= low[m]) ? load(s + j * M + m * W) : vec(NONE);
                store(s + j * M + m * W, x);
            }
    }
    for (int j = 0; j < keys; j++)
        for (int m = 0; m < MV; m++) now[m] = vmax(now[m], load(s + j * M + m * W));
    vf added[MV] = {};
    for (int m = 0; m < MV; m++) {
        now[m] = vmax(max[m], now[m] * scale);
        alpha[m] = exp2v(max[m] - now[m]);
        max[m] = now[m];
    }
    if constexpr (Held<T>::pairs) {
        for (int j = 0; j < keys; j += 2)
            for (int m = 0; m < MV; m++) {
                vf a = exp2v(load(s + j * M + m * W) * scale - now[m]);
                vf b = exp2v(load(s + (j + 1) * M + m * W) * scale - now[m]);
                added[m] += a + b;
                vu both = (((vu)a + 0x8000u) >> 16) | (((vu)b + 0x8000u) & 0xffff0000u);
                memcpy(p + j / 2 * M + m * W, &both, sizeof both);
            }
    } else {
        for (int j = 0; j < keys; j++)
            for (int m = 0; m < MV; m++) {
                vf a = exp2v(load(s + j * M + m * W) * scale - now[m]);
                added[m] += a;
                store((float *)p + j * M + m * W, a);
            }
    }
    for (int m = 0; m < MV; m++) total[m] = total[m] * alpha[m] + added[m];
}

template <class T, int MV> void many_rows(const Problem &p, const Task &t) {
    typedef typename Held<T>::Unit Unit;
    typedef typename Held<T>::Key Key;
    constexpr int M = MV * W, per = Held<T>::per;
    thread_local Scratch scratch;
    const int dim = p.dim, tiles = (t.rows + M - 1) / M;
    const size_t q_size = (size_t)dim / per * M, o_size = (size_t)(dim + KB - 1) / KB * KB * M; // whole runs of KB
    char *at = (char *)scratch.get(tiles * (q_size + o_size) * 4 + (size_t)CHUNK * (dim * 2 + M * 2) * 4 + 1024);
    auto take = [&at](size_t bytes) {
        char *here = at;
        at += (bytes + 63) / 64 * 64;
        return (void *)here;
    };
    Unit *qt = (Unit *)take(tiles * q_size * 4);
    float *o = (float *)take(tiles * o_size * 4);
    Key *kc = (Key *)take((size_t)CHUNK * dim * sizeof(Key));
    Unit *vc = (Unit *)take((size_t)CHUNK / per * dim * 4);
    float *s = (float *)take((size_t)CHUNK * M * 4);
    Unit *weights = (Unit *)take((size_t)CHUNK / per * M * 4);
    vf max[TILES][MV], total[TILES][MV], alpha[MV];
    vi low[TILES][MV], high[TILES][MV];
    int low_least[TILES], low_most[TILES], high_least[TILES], high_most[TILES];
    memset(o, 0, tiles * o_size * 4);
    for (int i = 0; i < tiles; i++) {
        for (int r = 0; r < M; r++) {
            const int row = std::min(i * M + r, t.rows - 1), at_position = position(p, t.seq, t.row0 + row); // lanes to spare repeat the last row
            const T *from = query<T>(p, t.seq, t.head, t.row0 + row);
            Unit *to = qt + i * q_size + r;
            if constexpr (Held<T>::pairs)
                for (int d = 0; d < dim / 2; d++) to[d * M] = raw<uint32_t>(from + 2 * d);
            else
                for (int d = 0; d < dim; d++) to[d * M] = to_float(from[d]);
            high[i][r / W][r % W] = std::min(at_position, t.key1 - 1);
            low[i][r / W][r % W] = first_seen(p, at_position);
        }
        for (int m = 0; m < MV; m++) max[i][m] = vec(NONE), total[i][m] = zero();
        low_least[i] = low[i][0][0], low_most[i] = low[i][MV - 1][W - 1];
        high_least[i] = high[i][0][0], high_most[i] = high[i][MV - 1][W - 1];
    }
    const vf scale = vec(p.scale * LOG2E);
    const T *k[CHUNK], *v[CHUNK];
    for (int key = t.key0; key < t.key1; key += CHUNK) {
        const int n = std::min(CHUNK, t.key1 - key), keys = (n + KB - 1) / KB * KB;
        locate<T>(p, t, key, n, k, v);
        pack_keys<T>(k, v, n, keys, dim, kc, vc);
        for (int i = 0; i < tiles; i++) {
            if (key > high_most[i] || key + n <= low_least[i]) continue;
            const bool mask = key + keys - 1 > high_least[i] || key < low_most[i];
            const int used = std::min(keys, (high_most[i] - key + KB) / KB * KB);
            tile_scores<MV>(qt + i * q_size, kc, used, dim, s);
            tile_softmax<T, MV>(s, key, used, mask, scale, low[i], high[i], max[i], total[i], alpha, weights);
            tile_values<MV>(weights, vc, used, dim, alpha, o + i * o_size);
        }
    }
    float *row = s; // [dim], s is no longer needed and is at least that long
    for (int r = 0; r < t.rows; r++) {
        const int i = r / M, lane = r % M;
        for (int d = 0; d < dim; d++) row[d] = o[i * o_size + d * M + lane];
        finish<T>(p, t, r, row, max[i][lane / W][lane % W], total[i][lane / W][lane % W]);
    }
}

template <class T> void run(const Problem &p, const Task &t) {
    if (t.rows <= FEW) return few_rows<T>(p, t);
    if (t.rows <= W) return many_rows<T, 1>(p, t);
    if (t.rows <= 2 * W) return many_rows<T, 2>(p, t);
    return many_rows<T, 3>(p, t);
}

template <class T> void merge(const Problem &p, const Merge &g) {
    thread_local Scratch scratch;
    float *o = (float *)scratch.get(p.dim * sizeof(float));
    for (int r = 0; r < g.rows; r++) {
        float max = NONE, total = 0;
        memset(o, 0, p.dim * sizeof(float));
        auto part = [&](int s) { return p.partials + (g.partial + (int64_t)s * g.rows + r) * (p.dim + 2); };
        for (int s = 0; s < g.splits; s++) max = std::max(max, part(s)[0]);
        for (int s = 0; s < g.splits; s++) {
            const float *from = part(s), weight = exp2f(from[0] - max);
            total += weight * from[1];
            for (int d = 0; d < p.dim; d++) o[d] += weight * from[2 + d];
        }
        total += sunk(p, g.head, g.row0 + r, max);
        T *to = output<T>(p, g.seq, g.head, g.row0 + r);
        for (int d = 0; d < p.dim; d++) put(to + d, o[d] / total);
    }
}

template <class T> void attend(Problem &p, int threads) {
    thread_local std::vector<Task> tasks, whole;
    thread_local std::vector<Merge> merges;
    thread_local Scratch partials;
    whole.clear();
    tasks.clear();
    merges.clear();
    int64_t all_rows = 0, cost = 0;
    for (int s = 0; s < p.seqs; s++) all_rows += (int64_t)(p.starts[s + 1] - p.starts[s]) * p.group * p.kv_heads;
    const int M = MV_MOST * W;
    const int tiles = (int)std::max<int64_t>(1, std::min<int64_t>(TILES, all_rows / ((int64_t)M * threads * 6)));
    for (int s = 0; s < p.seqs; s++) {
        const int rows = (p.starts[s + 1] - p.starts[s]) * p.group;
        for (int row = 0; row < rows; row += tiles * M) {
            const int some = std::min(tiles * M, rows - row);
            const int key1 = position(p, s, row + some - 1) + 1, key0 = first_seen(p, position(p, s, row));
            for (int h = 0; h < p.kv_heads; h++) whole.push_back({s, h, row, some, key0, key1, -1});
            cost += (int64_t)p.kv_heads * (key1 - key0) * some;
        }
    }
    const int64_t share = std::max<int64_t>(1, cost / (threads * 4));
    int64_t rows_used = 0;
    for (Task &t : whole) {
        const int keys = t.key1 - t.key0;
        int splits = threads == 1 ? 1 : (int)std::min<int64_t>(((int64_t)keys * t.rows + share - 1) / share, keys / 256);
        if (splits <= 1) {
            tasks.push_back(t);
            continue;
        }
        const int span = ((keys + splits - 1) / splits + CHUNK - 1) / CHUNK * CHUNK;
        splits = (keys + span - 1) / span;
        merges.push_back({t.seq, t.head, t.row0, t.rows, splits, rows_used});
        for (int i = 0; i < splits; i++) {
            tasks.push_back({t.seq, t.head, t.row0, t.rows, t.key0 + i * span, std::min(t.key1, t.key0 + (i + 1) * span), rows_used});
            rows_used += t.rows;
        }
    }
    p.partials = (float *)partials.get((size_t)rows_used * (p.dim + 2) * 4);
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task &a, const Task &b) {
        return (int64_t)a.rows * (a.key1 - a.key0) > (int64_t)b.rows * (b.key1 - b.key0); // the longest first
    });
    const Task *todo = tasks.data(); // the vectors are this thread's own
    const Merge *left = merges.data();
    const int count = (int)tasks.size(), parts = (int)merges.size();
    const int team = cost * p.dim < 16384 ? 1 : threads; // never between: libgomp ends the threads that a smaller team leaves over
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < count; i++) run<T>(p, todo[i]);
#pragma omp for schedule(static)
        for (int i = 0; i < parts; i++) merge<T>(p, left[i]);
    }
}

} // namespace

extern "C" __attribute__((visibility("default"))) void pdlab_paged_attention(
    int is_bf16, int stored, const void *q, const void *k, const void *v, void *out, const int32_t *tables, const int32_t *starts, const int32_t *contexts,
    int64_t q_token, int64_t q_head, int64_t out_token, int64_t out_head, int64_t table_stride, int seqs, int heads, int kv_heads, int dim,
    int block_tokens, int window, float scale, const float *sinks, int threads) {
    Problem p{q, k, v, out, tables, starts, contexts, q_token, q_head, out_token, out_head, table_stride,
              (int64_t)kv_heads * block_tokens * dim, (int64_t)block_tokens * dim, seqs, heads, kv_heads, heads / kv_heads, dim,
              block_tokens, window, scale, stored, sinks, nullptr};
    if (is_bf16)
        attend<bf16>(p, threads);
    else
        attend<float>(p, threads);
}

namespace {

// One token's vector of `dim` elements into a cache.
inline void store_row(int is_bf16, int stored, const char *from, char *to, int dim) {
    if (stored == LIKE_Q)
        memcpy(to, from, dim * (is_bf16 ? 2 : 4));
    else if (stored == FP8 && is_bf16)
        fp8::of_bfloat16((const uint16_t *)from, (uint8_t *)to, dim);
    else if (stored == FP8)
        fp8::of_float((const float *)from, (uint8_t *)to, dim);
    else
        for (int d = 0; d < dim; d++) put((bf16 *)to + d, ((const float *)from)[d]);
}

} // namespace

// Strides of k and v, between tokens and heads, are in bytes.
extern "C" __attribute__((visibility("default"))) void pdlab_store_kv(
    int is_bf16, int stored, const char *k, const char *v, char *k_cache, char *v_cache, const int64_t *slots, int64_t tokens, int64_t k_token,
    int64_t k_head, int64_t v_token, int64_t v_head, int kv_heads, int block_tokens, int dim, int threads) {
    const int64_t row = (int64_t)dim * (stored == FP8 ? 1 : stored == BF16 || is_bf16 ? 2 : 4);
    const int team = tokens * kv_heads * row < 65536 ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t t = 0; t < tokens; t++) {
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / block_tokens, offset = slots[t] % block_tokens;
        for (int h = 0; h < kv_heads; h++) {
            const int64_t to = ((block * kv_heads + h) * block_tokens + offset) * row;
            store_row(is_bf16, stored, k + t * k_token + h * k_head, k_cache + to, dim);
            if (v_cache != k_cache) store_row(is_bf16, stored, v + t * v_token + h * v_head, v_cache + to, dim);
        }
    }
}
