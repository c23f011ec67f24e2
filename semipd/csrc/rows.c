/* Row by row work, spread over threads where there is enough of it. */

#include "kernels.h"
#include "simd.h"
#include "team.h"

enum { WORTH_SHARING = 1 << 15 }; /* elements: below, waking threads costs more than it saves */

void norm_in_team(int level, int half, void *x, const void *delta, const void *weight, void *out, int64_t rows,
                  int64_t width, float eps) {
    NormRow *norm = kernels_of(level)->norm_row[half];
    size_t bytes = width * element_size(half);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        norm((char *)x + row * bytes, delta ? (const char *)delta + row * bytes : NULL, weight,
             (char *)out + row * bytes, width, eps);
}

void rotate_in_team(const Rotation *rotation, void *qkv, void *layer) {
    RotateRow *rotate = kernels_of(rotation->level)->rotate_row[rotation->half];
    int64_t width = (rotation->heads + 2 * rotation->kv_heads) * rotation->dim, middle = rotation->dim / 2;
    size_t bytes = width * element_size(rotation->half);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rotation->rows; row++)
        rotate(rotation, row, (char *)qkv + row * bytes, rotation->cosine + row * middle,
               rotation->sine + row * middle, layer);
}

/* x, delta (or NULL), out: [rows, width]. See norm_row. */
EXPORT void semipd_norm(int level, int half, void *x, const void *delta, const void *weight, void *out,
                        int64_t rows, int64_t width, float eps) {
#pragma omp parallel if (rows * width > WORTH_SHARING)
    norm_in_team(level, half, x, delta, weight, out, rows, width, eps);
}

/* qkv [rows, heads + 2 * kv_heads, dim]: norm and rotate queries in place; norm and rotate keys into the layer,
   and copy values there. The keys in qkv are undefined afterwards. */
EXPORT void semipd_rotate(const Rotation *rotation, void *qkv, void *layer) {
#pragma omp parallel if (rotation->rows * (rotation->heads + 2 * rotation->kv_heads) * rotation->dim > WORTH_SHARING)
    rotate_in_team(rotation, qkv, layer);
}

/* cosine, sine [rows, pairs], times `factor`, of the angles by which a position turns each pair. Angles are
   float32 products, as the field's checkpoints were trained with. */
EXPORT void semipd_angles(const int64_t *positions, int64_t rows, const float *frequencies, int64_t pairs,
                          double factor, float *cosine, float *sine) {
#pragma omp parallel for schedule(static) if (rows * pairs > 1 << 10)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < pairs; i++) {
            float angle = (float)positions[row] * frequencies[i];
            cosine[row * pairs + i] = (float)(cos(angle) * factor);
            sine[row * pairs + i] = (float)(sin(angle) * factor);
        }
}
