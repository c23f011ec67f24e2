/* Decode attention over a paged pool: work items of fixed size, spread over OpenMP's threads.

   A context is cut into parts of PART positions by its own length alone, and parts are combined in order, so
   a row's result depends neither on the other sequences nor on the number of threads. */

#include "kernels.h"
#include "simd.h"
#include "team.h"

static void combine(const float *out, const float *stats, int64_t parts, int64_t group, int64_t head_dim,
                    int64_t g, void *to, int half) {
    int64_t stride = ROUND_UP(head_dim, LANES);
    float most = stats[2 * g];
    for (int64_t p = 1; p < parts; p++)
        if (stats[2 * (p * group + g)] > most) most = stats[2 * (p * group + g)];
    float total = 0, factor[parts];
    for (int64_t p = 0; p < parts; p++) {
        factor[p] = expf(stats[2 * (p * group + g)] - most);
        total += factor[p] * stats[2 * (p * group + g) + 1];
    }
    for (int64_t i = 0; i < head_dim; i += LANES) {
        f32x16 sum = splat(0);
        for (int64_t p = 0; p < parts; p++) sum += factor[p] * load16(out + (p * group + g) * stride + i, 0);
        store_upto((char *)to + i * element_size(half), sum * (1.0f / total), head_dim - i, half);
    }
}

void attend_in_team(const DecodePlan *plan, const void *query, const void *layer, void *out) {
    const Kernels *kernels = kernels_of(plan->level);
    int half = plan->half;
    int64_t count = plan->count, group = plan->group, head_dim = plan->head_dim;
    int64_t stride = ROUND_UP(head_dim, LANES);
    size_t element = element_size(half);
    const char *values = (const char *)layer + plan->value_offset * element;
    Pool pool = {layer, values, plan->kv_heads, group, head_dim, plan->block_size, plan->scale};
    float *weighted = plan->scratch, *stats = weighted + count * group * stride;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
        const DecodeItem *item = plan->items + i;
        const char *from = (const char *)query +
                           (item->row * plan->query_stride + item->head * group * head_dim) * element;
        kernels->attend_part[half](&pool, from, plan->tables + item->sequence * plan->table_stride, item->head,
                                   item->first, item->last, weighted + i * group * stride, stats + 2 * i * group);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const DecodeItem *item = plan->items + i;
        if (item->part != 0) continue; /* combined with the first part */
        int64_t parts = 1;
        while (i + parts < count && plan->items[i + parts].part != 0) parts++;
        char *to = (char *)out + (item->row * plan->heads + item->head * group) * head_dim * element;
        for (int64_t g = 0; g < group; g++)
            combine(weighted + i * group * stride, stats + 2 * i * group, parts, group, head_dim, g,
                    to + g * head_dim * element, half);
    }
}

EXPORT void semipd_decode_attention(const DecodePlan *plan, const void *query, const void *layer, void *out) {
#pragma omp parallel
    attend_in_team(plan, query, layer, out);
}
