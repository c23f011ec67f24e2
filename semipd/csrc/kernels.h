/* What the variants of the kernels (one set per instruction set) offer to the parallel drivers. */
#ifndef SEMIPD_KERNELS_H
#define SEMIPD_KERNELS_H

#include <stdint.h>

#include "linear.h"

#define EXPORT __attribute__((visibility("default")))

enum { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_VNNI = 3, AVX512_BF16 = 4, AMX = 5 };

/* One layer of a KV pool, [2, blocks, kv_heads, block_size, head_dim], and the queries that read it. */
typedef struct {
    const void *keys, *values; /* first block */
    int64_t kv_heads, group, head_dim, block_size; /* group: query heads that share a KV head */
    float scale;
} Pool;

/* Attention of one KV head's `group` queries to the positions [first, last) of one sequence. The result is
   unnormalised: out [group, head_dim rounded up to 16] weighted values, and the maximum and the sum of the
   weights in stats [group, 2]. */
typedef void AttendPart(const Pool *pool, const void *query, const int32_t *table, int64_t kv_head,
                        int64_t first, int64_t last, float *out, float *stats);

#define PART 256 /* positions of a context that are one part; also in model/kernels.py */

/* A part of the context of one row's queries on one KV head. Parts of a (row, head) follow one another;
   their numbers start at 0. sequence: the row's block table. */
typedef struct {
    int64_t row, sequence, head, first, last, part;
} DecodeItem;

/* What is the same in every layer of a step. query_stride: elements from one row's queries to the next's.
   value_offset: elements from a layer's keys to its values. scratch: items * group * (head_dim rounded up
   to 16, plus 2) floats. The result is [rows, heads * head_dim]. */
typedef struct {
    int64_t level, half, kv_heads, group, heads, head_dim, block_size, value_offset, query_stride;
    const int32_t *tables;
    int64_t table_stride;
    const DecodeItem *items;
    int64_t count;
    float *scratch;
    float scale;
} DecodePlan;

/* One slice of a step: positions first_position .. + count - 1, whose queries begin at row `row`. window: positions
   that a query sees, 0 for all. packed: room for kv_heads * 2 * padded * head_dim elements, where `padded` covers the
   positions from `base` (a multiple of PART) to the end, rounded up to 32. */
typedef struct {
    int64_t kv_heads, heads, head_dim, block_size, value_offset, query_stride;
    int64_t row, first_position, count, window, base, padded;
    const int32_t *table;
    uint16_t *packed;
    float scale;
} PrefillPlan;

/* out = x / rms(x) * weight; with delta, x += delta first. */
typedef void NormRow(void *x, const void *delta, const void *weight, void *out, int64_t width, float eps);

/* What turns a step's queries and keys. where: [rows, 2 * kv_heads], which row of a layer (seen as rows of
   `dim`) each key and value belongs to. cosine, sine: [rows, dim / 2]. Norms are NULL in families without. */
typedef struct {
    int64_t level, half, rows, heads, kv_heads, dim;
    const int64_t *where;
    const float *cosine, *sine;
    const void *query_norm, *key_norm;
    float eps;
} Rotation;

typedef void RotateRow(const Rotation *rotation, int64_t row, void *qkv, const float *cosine, const float *sine,
                       void *layer);

/* The first largest of the elements [0, count) of a row of logits; where one is NaN, that one. */
typedef struct {
    float value;
    int32_t index;
} Best;

typedef Best FindBest(const void *row, int64_t count);

/* How to choose a token of a row; see model/sampler.py. number: from [0, 1), picks one. */
typedef struct {
    double number;
    float temperature, top_p, min_p;
    int32_t top_k;
} DrawRule;

/* The token, and the largest logit. weights: room for `count` rounded up to 16. */
typedef Best Draw(const DrawRule *rule, const float *row, int64_t count, float *weights);

typedef struct { /* those in arrays for float and for bfloat16 */
    AttendPart *attend_part[2];
    NormRow *norm_row[2];
    RotateRow *rotate_row[2];
    FindBest *find_best[2];
    Draw *draw;
    FinishPair *finish_pair[2];
    MultiplyPair *multiply_floats, *multiply_halves;
} Kernels;

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

const Kernels *kernels_of(int level);

#endif
