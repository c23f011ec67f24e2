/* Tokens of rows of logits, each by a rule of its own. */

#include <omp.h>

#include "kernels.h"

/* The token of each row of logits, [rows, count], by its rule: the first largest where the temperature is 0 or the
   largest is not finite, else one that is drawn. best: the largest. scratch: for each of `threads` as many floats as
   a row has, rounded up to 16. */
EXPORT void semipd_draw(int level, const float *logits, int64_t rows, int64_t count, const DrawRule *rules,
                        int64_t threads, float *scratch, int64_t *tokens, float *best) {
    Draw *draw = kernels_of(level)->draw;
    int64_t each = (count + 15) / 16 * 16;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t row = 0; row < rows; row++) {
        Best found = draw(rules + row, logits + row * count, count, scratch + omp_get_thread_num() * each);
        tokens[row] = found.index, best[row] = found.value;
    }
}
