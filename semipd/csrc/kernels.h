/* What the variants of the kernels (one set per instruction set) offer to the parallel drivers. */
#ifndef SEMIPD_KERNELS_H
#define SEMIPD_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { BASELINE = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4 };

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

typedef struct {
    AttendPart *attend_part[2]; /* float, bfloat16 */
} Kernels;

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

const Kernels *kernels_of(int level);

#endif
