/* Attention of many rows of one sequence on tile registers, over a paged pool, in blocks of keys with running
   maxima and sums (Dao et al., "FlashAttention", 2022). Blocks begin at multiples of KEYS, so a row's result
   does not depend on how its prompt was cut. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>
#define HERE 1
#endif
#include <omp.h>

#include "kernels.h"
#include "simd.h"
#include "team.h"

enum { ROWS = 32, KEYS = PART, MOST_DIM = 256, HEADS = 8, TILE = 512 }; /* HEADS: at once; TILE: elements of a tile */

#if HERE
/* Keys as [padded / 32, head_dim / 32, 2 tiles, 16 pairs of elements, 16 keys, 2] and values as [padded / 32,
   head_dim / 16, 16 pairs of keys, 16 elements, 2]; zeros where nothing may be seen. Packs 32 positions. */
static void pack_32(const PrefillPlan *plan, const uint16_t *layer, int64_t head, int64_t block) {
    int64_t dim = plan->head_dim, end = plan->first_position + plan->count, first = plan->base + block * 32;
    int64_t low = plan->window ? plan->first_position - plan->window + 1 : 0;
    const uint16_t *key[32], *value[32];
    static const uint16_t nothing[MOST_DIM];
    for (int i = 0; i < 32; i++) {
        int64_t at = first + i;
        if (at < low || at >= end) {
            key[i] = value[i] = nothing;
            continue;
        }
        int64_t page = plan->table[at / plan->block_size] * plan->kv_heads + head;
        key[i] = layer + (page * plan->block_size + at % plan->block_size) * dim;
        value[i] = key[i] + plan->value_offset;
    }
    uint16_t *keys = plan->packed + (head * 2 * plan->padded + block * 32) * dim;
    uint16_t *values = keys + plan->padded * dim;
    for (int64_t pair = 0; pair < dim / 2; pair++)
        for (int i = 0; i < 32; i++)
            memcpy(keys + (pair / 16 * 2 + i / 16) * TILE + pair % 16 * 32 + i % 16 * 2, key[i] + 2 * pair, 4);
    for (int64_t tile = 0; tile < dim / 16; tile++)
        for (int i = 0; i < 16; i++)
            for (int e = 0; e < 16; e++) {
                uint16_t *to = values + tile * TILE + i * 32 + 2 * e;
                to[0] = value[2 * i][tile * 16 + e], to[1] = value[2 * i + 1][tile * 16 + e];
            }
}

/* scores [32, KEYS] of `rows` queries with 32 packed keys. */
static void score(const uint16_t *query, int64_t stride, int64_t rows, const uint16_t *keys, int64_t dim,
                  float *scores) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < dim; d += 32, keys += 2 * TILE) {
        _tile_loadd(6, keys, 64);
        _tile_loadd(7, keys + TILE, 64);
        _tile_loadd(4, query + d, stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows > 16) {
            _tile_loadd(5, query + 16 * stride + d, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, scores, KEYS * 4);
    _tile_stored(1, scores + 16, KEYS * 4);
    if (rows > 16) {
        _tile_stored(2, scores + 16 * KEYS, KEYS * 4);
        _tile_stored(3, scores + 16 * KEYS + 16, KEYS * 4);
    }
}

/* One row's scores [count] -> weights in bfloat16, nothing outside [low, high). scale: of scores, for powers of two.
   Brings the running maximum (before scaling) and sum along; returns what to multiply the row's earlier result by. */
INLINE float weigh(float *scores, uint16_t *weights, int64_t count, int64_t low, int64_t high, float scale,
                   float *most, float *sum) {
    i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 score = _mm512_load_ps(scores + i);
        if (i < low || i + LANES > high) {
            __m512i at = (__m512i)(lane + (int32_t)i);
            __mmask16 seen = _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int32_t)low)) &
                             _mm512_cmplt_epi32_mask(at, _mm512_set1_epi32((int32_t)high));
            score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), score);
            _mm512_store_ps(scores + i, score);
        }
        highest = _mm512_max_ps(highest, score);
    }
    float now = _mm512_reduce_max_ps(highest), before = *most;
    if (now < before) now = before;
    if (now == -INFINITY) { /* nothing seen so far */
        memset(weights, 0, count * 2);
        return 1.0f;
    }
    __m512 total = _mm512_setzero_ps(), by = _mm512_set1_ps(scale), base = _mm512_set1_ps(now * scale);
    for (int64_t i = 0; i < count; i += LANES) {
        __m512 weight = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + i), by, base));
        total = _mm512_add_ps(total, weight);
        _mm256_storeu_si256((__m256i *)(weights + i), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    float factor = before == now ? 1.0f : before == -INFINITY ? 0.0f : exp2f((before - now) * scale);
    *most = now;
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

/* mixed [32, dim] += weights [32, KEYS] x packed values, for `count` keys. */
static void mix(const uint16_t *weights, int64_t rows, const uint16_t *values, int64_t count, int64_t dim,
                float *mixed) {
    for (int64_t d = 0; d < dim; d += 32) {
        float *to = mixed + d, *below = to + 16 * dim;
        const uint16_t *value = values + d * 32;
        _tile_loadd(0, to, dim * 4);
        _tile_loadd(1, to + 16, dim * 4);
        if (rows > 16) {
            _tile_loadd(2, below, dim * 4);
            _tile_loadd(3, below + 16, dim * 4);
        }
        for (int64_t k = 0; k < count; k += 32, value += 32 * dim) {
            _tile_loadd(6, value, 64);
            _tile_loadd(7, value + TILE, 64);
            _tile_loadd(4, weights + k, KEYS * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            if (rows > 16) {
                _tile_loadd(5, weights + 16 * KEYS + k, KEYS * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, to, dim * 4);
        _tile_stored(1, to + 16, dim * 4);
        if (rows > 16) {
            _tile_stored(2, below, dim * 4);
            _tile_stored(3, below + 16, dim * 4);
        }
    }
}

/* What one query head of up to 32 rows has come to so far. */
typedef struct {
    float mixed[ROWS * MOST_DIM], most[ROWS], sum[ROWS];
} __attribute__((aligned(64))) Running;

/* Bring `rows` rows of a head, the first at `position`, along by the `count` keys from `begin` on. */
static void attend_block(const PrefillPlan *plan, const uint16_t *query, int64_t rows, int64_t position,
                         int64_t begin, int64_t count, const uint16_t *keys, const uint16_t *values, Running *run) {
    float scores[ROWS * KEYS] __attribute__((aligned(64)));
    uint16_t weights[ROWS * KEYS] __attribute__((aligned(64)));
    int64_t dim = plan->head_dim;
    float scale = plan->scale * 1.44269504f; /* log2(e) */
    for (int64_t k = 0; k < count; k += 32)
        score(query, plan->query_stride, rows, keys + k * dim, dim, scores + k);
    FENCE(scores);
    for (int64_t r = 0; r < rows; r++) {
        int64_t own = position + r + 1, from = plan->window && own > plan->window ? own - plan->window : 0;
        float factor = weigh(scores + r * KEYS, weights + r * KEYS, count, from - begin, own - begin, scale,
                             run->most + r, run->sum + r);
        if (factor != 1.0f)
            for (int64_t i = 0; i < dim; i += LANES)
                store16(run->mixed + r * dim + i, load16(run->mixed + r * dim + i, 0) * factor, 0);
    }
    FENCE(run);
    FENCE(weights);
    mix(weights, rows, values, count, dim, run->mixed);
    FENCE(run);
}

/* Up to 32 rows from `first` (counted in the slice) on, of `heads` query heads from `head` on that share a KV head,
   whose keys and values are read once for all of them. */
static void attend_32(const PrefillPlan *plan, const uint16_t *query, int64_t head, int64_t heads, int64_t first,
                      uint16_t *out) {
    Running run[HEADS];
    int64_t dim = plan->head_dim, rows = plan->count - first < ROWS ? plan->count - first : ROWS;
    int64_t position = plan->first_position + first, end = position + rows, row = plan->row + first;
    int64_t low = plan->window && position >= plan->window ? position - plan->window + 1 : 0;
    int64_t kv_head = head / (plan->heads / plan->kv_heads);
    const uint16_t *keys = plan->packed + kv_head * 2 * plan->padded * dim, *values = keys + plan->padded * dim;
    query += row * plan->query_stride + head * dim;
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t r = 0; r < rows; r++) run[h].most[r] = -INFINITY, run[h].sum[r] = 0;
        for (int64_t i = 0; i < rows * dim; i += LANES) store16(run[h].mixed + i, splat(0), 0);
    }
    shape_tiles(rows, 64);
    for (int64_t begin = low / KEYS * KEYS; begin < end; begin += KEYS) {
        int64_t count = end - begin < KEYS ? ROUND_UP(end - begin, 32) : KEYS, at = (begin - plan->base) * dim;
        for (int64_t h = 0; h < heads; h++)
            attend_block(plan, query + h * dim, rows, position, begin, count, keys + at, values + at, run + h);
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < dim; i += LANES)
                store16(out + ((row + r) * plan->heads + head + h) * dim + i,
                        load16(run[h].mixed + r * dim + i, 0) * (1.0f / run[h].sum[r]), 1);
}

/* How many parts a group of heads is cut into, so that every thread gets several pieces of work. */
static int64_t parts_of(int64_t group, int64_t others) {
    int64_t parts = (group + HEADS - 1) / HEADS, wanted = (4 * omp_get_num_threads() + others - 1) / others;
    return wanted < parts ? parts : wanted < group ? wanted : group;
}

void prefill_in_team(const PrefillPlan *plan, const void *query, const void *layer, void *out) {
    int64_t blocks = plan->padded / 32, tiles = (plan->count + ROWS - 1) / ROWS, group = plan->heads / plan->kv_heads;
    int64_t parts = parts_of(group, tiles * plan->kv_heads), each = plan->kv_heads * parts;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * plan->kv_heads; i++) pack_32(plan, layer, i / blocks, i % blocks);
    begin_tiles();
    /* Later rows see more keys: longest first, so that threads end together. */
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles * each; i++) {
        int64_t part = i % parts, from = part * group / parts, to = (part + 1) * group / parts;
        attend_32(plan, query, i / parts % plan->kv_heads * group + from, to - from, (tiles - 1 - i / each) * ROWS,
                  out);
    }
    end_tiles();
}
#else
void prefill_in_team(const PrefillPlan *plan, const void *query, const void *layer, void *out) {
    (void)plan, (void)query, (void)layer, (void)out;
    __builtin_trap();
}
#endif

/* Needs AMX. query: rows of heads * head_dim elements, `query_stride` apart; layer: of the pool, holding the
   slice's own keys and values; out: [rows, heads * head_dim]. */
EXPORT void semipd_prefill_attention(const PrefillPlan *plan, const void *query, const void *layer, void *out) {
#pragma omp parallel
    prefill_in_team(plan, query, layer, out);
}
