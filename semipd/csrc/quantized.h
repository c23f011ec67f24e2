/* y = x W + b with W in 4 or 8 bits, groups of inputs with a scale each, and x in 8 bits by the same groups. */
#ifndef SEMIPD_QUANTIZED_H
#define SEMIPD_QUANTIZED_H

#include "kernels.h"

/* An unsigned weight u stands for scale * (u - zero). inputs: outline.inputs padded with zeros to a multiple of
   `group`, itself a multiple of 32. weight: [pairs, inputs / 4, 2 panels, 16 columns, 4] bytes; with 4 bits the panels
   share a byte, the first in its lower half. scale: [pairs, groups, 32]. zeros: the same shape, or NULL where
   all are `zero`. outline: its weight is not used. */
typedef struct {
    Linear outline;
    int64_t bits, inputs, group, zero;
    const uint8_t *weight;
    const float *scale;
    const uint8_t *zeros;
} Quantized;

/* Rows of x in 8 bits: values [rows, inputs], and per row and group a scale and the sum of the values. */
typedef struct {
    const int8_t *values;
    const float *scale;
    const int32_t *sum;
} Rows8;

/* sums [rows, 32] = the products of up to 32 rows from `row` on with one pair of columns, before the bias.
   wide: room for [inputs / 4, 2, 16, 4] bytes; `fresh` says that it does not hold this pair's weights yet. */
typedef void MultiplyQuantized(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t pair,
                               uint8_t *wide, int fresh, float *sums);

MultiplyQuantized multiply_quantized_vnni, multiply_quantized_amx;
void quantize_row(const uint16_t *x, int64_t inputs, int64_t padded, int64_t group, int8_t *values, float *scale,
                  int32_t *sum);

/* As linear_in_team. Needs AVX512-VNNI. scratch: rows * (inputs + 8 * groups) bytes, and inputs * 32 for each
   thread. */
void quantized_in_team(const Quantized *q, const uint16_t *x, int64_t x_stride, int64_t rows, uint16_t *out,
                       int64_t out_stride, uint8_t *scratch);

#endif
