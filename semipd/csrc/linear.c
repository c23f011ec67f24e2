/* Linear layers: how the work is cut and shared out. Every output is summed over the inputs in order, in one
   float, whatever the number of rows and threads: a row has the same bits in any company. */

#include <omp.h>

#include "kernels.h"
#include "quantized.h"
#include "simd.h"
#include "team.h"

static MultiplyPair *multiply_of(const Linear *linear) {
    const Kernels *kernels = kernels_of(linear->level);
    if (linear->kind == FLOATS) return kernels->multiply_floats;
    if (linear->level >= AMX) return multiply_pair_amx;
    return linear->level >= AVX512_BF16 ? multiply_pair_bf16 : kernels->multiply_halves;
}

/* Whether to read every pair's weights from end to end. */
static int are_few(const Linear *linear, int64_t rows) {
    return rows <= (linear->inputs <= NARROW ? FEW : STRIP);
}

/* `rows` rows from x times the pairs [first, last), in blocks that stay in the second cache. Meanwhile the strips
   of rows ask for the weights that follow, each for its part. */
static void multiply_block(const Linear *linear, const char *x, int64_t x_stride, int64_t rows, int64_t first,
                           int64_t last, char *out, int64_t out_stride) {
    float sums[GROUP * ROW_BLOCK * PAIR] __attribute__((aligned(64)));
    const Kernels *kernels = kernels_of(linear->level);
    int half = linear->kind == HALVES;
    MultiplyPair *multiply = multiply_of(linear);
    int64_t element = element_size(half), tile = PAIR_TILE * element;
    int64_t tiles = (linear->inputs + DEPTH - 1) / DEPTH, strips = (rows + STRIP - 1) / STRIP;
    int64_t blocks = half && are_few(linear, rows) ? 1 : (linear->inputs + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
    int64_t each = (tiles + blocks - 1) / blocks, lines = (tile / 64 + strips - 1) / strips;
    for (int64_t begin = 0; begin < tiles; begin += each) {
        int64_t end = begin + each < tiles ? begin + each : tiles;
        int64_t depth = (end == tiles ? linear->inputs : end * DEPTH) - begin * DEPTH;
        int64_t next = strips == 1 ? EARLY : end < tiles ? each : (last - first) * tiles - begin; /* tiles away */
        for (int64_t row = 0; row < rows; row += STRIP) {
            int64_t count = rows - row < STRIP ? rows - row : STRIP, part = row / STRIP * lines * 64;
            for (int64_t pair = first; pair < last; pair++) {
                const char *weight = (const char *)linear->weight + (pair * tiles + begin) * tile;
                float *here = sums + ((pair - first) * ROW_BLOCK + row) * PAIR;
                multiply(x + (row * x_stride + begin * DEPTH) * element, x_stride, count, weight, depth, begin == 0,
                         weight + next * tile + part * (end - begin), part < tile ? lines : 0, here);
                if (end == tiles)
                    kernels->finish_pair[half](linear, pair, here, count, out + row * out_stride * element,
                                               out_stride);
            }
        }
    }
}

void linear_in_team(const Linear *linear, const void *x, int64_t x_stride, int64_t rows, void *out,
                    int64_t out_stride, void *scratch) {
    if (linear->kind == QUANTIZED) {
        quantized_in_team((const Quantized *)linear, x, x_stride, rows, out, out_stride, scratch);
        return;
    }
    int64_t threads = omp_get_num_threads(), rounds = (linear->pairs + GROUP * threads - 1) / (GROUP * threads);
    int64_t groups = are_few(linear, rows) ? linear->pairs : rounds * threads; /* as many for every thread */
    int64_t group = (linear->pairs + groups - 1) / groups, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    int64_t each = ROUND_UP((rows + blocks - 1) / blocks, STRIP); /* even blocks, so that no thread waits long */
    size_t element = element_size(linear->kind == HALVES);
    int tiles = linear->kind == HALVES && linear->level >= AMX;
    if (tiles) begin_tiles();
#pragma omp for schedule(static) collapse(2) nowait
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t row = block * each, count = rows - row < each ? rows - row : each;
            int64_t first = g * group, last = first + group < linear->pairs ? first + group : linear->pairs;
            if (count > 0 && first < last)
                multiply_block(linear, (const char *)x + row * x_stride * element, x_stride, count, first, last,
                               (char *)out + row * out_stride * element, out_stride);
        }
    if (tiles) end_tiles();
}

/* x: rows `x_stride` elements apart; out: rows of `outputs` elements, `out_stride` apart. scratch: what a
   quantised layer needs (quantized.h), else NULL. */
EXPORT void semipd_linear(const Linear *linear, const void *x, int64_t x_stride, int64_t rows, void *out,
                          int64_t out_stride, void *scratch) {
#pragma omp parallel
    linear_in_team(linear, x, x_stride, rows, out, out_stride, scratch);
}
