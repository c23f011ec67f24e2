/* Linear layers in bfloat16: how the work is cut and shared out. Every output is summed over the inputs in
   order, in one float, whatever the number of rows and threads: a row has the same bits in any company. */

#include <omp.h>

#include "linear.h"
#include "simd.h"

/* `rows` rows from x times the pairs [first, last), in blocks that stay in the second cache. */
static void multiply_block(const Linear *linear, const uint16_t *x, int64_t x_stride,
                           int64_t rows, int64_t first, int64_t last, uint16_t *out, int64_t out_stride) {
    float sums[GROUP * ROW_BLOCK * PAIR] __attribute__((aligned(64)));
    int64_t inputs = linear->inputs, tiles = inputs / DEPTH;
    int64_t blocks = rows <= FEW ? 1 : (inputs + DEPTH_BLOCK - 1) / DEPTH_BLOCK;
    int64_t each = (tiles + blocks - 1) / blocks;
    for (int64_t begin = 0; begin < tiles; begin += each) {
        int64_t end = begin + each < tiles ? begin + each : tiles;
        for (int64_t pair = first; pair < last; pair++) {
            const uint16_t *weight = linear->weight + (pair * tiles + begin) * PAIR_TILE;
            for (int64_t row = 0; row < rows; row += 32) {
                int64_t count = rows - row < 32 ? rows - row : 32;
                float *here = sums + ((pair - first) * ROW_BLOCK + row) * PAIR;
                multiply_pair_amx(x + row * x_stride + begin * DEPTH, x_stride, count, weight, (end - begin) * DEPTH,
                         begin == 0, rows <= FEW, here);
                if (end == tiles) finish_pair(linear, pair, here, count, out + row * out_stride, out_stride);
            }
        }
    }
}

/* Needs AMX. x: rows `x_stride` elements apart; out: rows of `outputs` elements, `out_stride` apart. */
EXPORT void semipd_linear(const Linear *linear, const uint16_t *x, int64_t x_stride, int64_t rows,
                          uint16_t *out, int64_t out_stride) {
    int64_t threads = omp_get_max_threads(), rounds = (linear->pairs + GROUP * threads - 1) / (GROUP * threads);
    int64_t groups = rows > FEW ? rounds * threads : linear->pairs; /* as many for every thread */
    int64_t group = (linear->pairs + groups - 1) / groups, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    int64_t each = ROUND_UP((rows + blocks - 1) / blocks, 32); /* even blocks, so that no thread waits long */
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(static) collapse(2)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t g = 0; g < groups; g++) {
                int64_t row = block * each, count = rows - row < each ? rows - row : each;
                int64_t first = g * group, last = first + group < linear->pairs ? first + group : linear->pairs;
                if (count > 0 && first < last)
                    multiply_block(linear, x + row * x_stride, x_stride, count, first, last,
                                   out + row * out_stride, out_stride);
            }
        end_tiles();
    }
}
