/* Linear layers with 4 and 8 bit weights: how the work is cut and shared out. Sums within a group are exact
   integers, and groups are added in order, so a row has the same bits in any company. */

#include <omp.h>
#include <stdlib.h>

#include "quantized.h"
#include "simd.h"

enum { ROWS = 32, FEW_4 = 12, FEW_8 = 8, BLOCK = 256 }; /* at most FEW_4 and FEW_8 rows go without tiles */

static void multiply_block(const Quantized *q, const Rows8 *x, int64_t first_row, int64_t last_row,
                           int64_t first, int64_t last, uint8_t *wide, int few, uint16_t *out,
                           int64_t out_stride) {
    float sums[ROWS * PAIR] __attribute__((aligned(64)));
    MultiplyQuantized *multiply = q->outline.level >= AMX && !few ? multiply_quantized_amx : multiply_quantized_vnni;
    FinishPair *finish = kernels_of(q->outline.level)->finish_pair[1];
    for (int64_t pair = first; pair < last; pair++)
        for (int64_t row = first_row; row < last_row; row += ROWS) {
            int64_t count = last_row - row < ROWS ? last_row - row : ROWS;
            multiply(q, x, row, count, pair, wide, row == first_row, sums);
            finish(&q->outline, pair, sums, count, out + row * out_stride, out_stride);
        }
}

void quantized_in_team(const Quantized *q, const uint16_t *x, int64_t x_stride, int64_t rows, uint16_t *out,
                       int64_t out_stride, uint8_t *scratch) {
    int64_t inputs = q->inputs, groups = inputs / q->group, pairs = q->outline.pairs, few = rows <= (q->bits == 4 ? FEW_4 : FEW_8);
    float *scale = (float *)scratch;
    int32_t *sum = (int32_t *)(scale + rows * groups);
    int8_t *values = (int8_t *)(sum + rows * groups);
    uint8_t *wide = (uint8_t *)(values + rows * inputs);
    Rows8 quantized = {values, scale, sum};
    int64_t threads = omp_get_num_threads(), blocks = few ? 1 : (rows + BLOCK - 1) / BLOCK;
    int64_t each = ROUND_UP((rows + blocks - 1) / blocks, ROWS);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        quantize_row(x + row * x_stride, q->outline.inputs, inputs, q->group, values + row * inputs,
                     scale + row * groups, sum + row * groups);
    int tiles = q->outline.level >= AMX && !few;
    if (tiles) begin_tiles();
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t t = 0; t < threads; t++) {
            int64_t row = block * each, end = row + each < rows ? row + each : rows;
            multiply_block(q, &quantized, row, end, pairs * t / threads, pairs * (t + 1) / threads,
                           wide + omp_get_thread_num() * inputs * PAIR, few, out, out_stride);
        }
    if (tiles) end_tiles();
}
