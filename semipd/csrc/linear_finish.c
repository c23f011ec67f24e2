/* What follows the sums of a linear layer: bias, activation, rounding. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#define HERE 1
#endif
#include "linear.h"
#include "simd.h"

#if HERE
INLINE f32x16 silu16(f32x16 x) {
    f32x16 bounded = largest(x, splat(-87.0f));
    return x / (exp16(-bounded) + 1.0f);
}

void finish_pair(const Linear *linear, int64_t pair, const float *sums, int64_t rows, uint16_t *out,
                 int64_t out_stride) {
    int64_t width = linear->gated ? LANES : PAIR, column = pair * width, left = linear->outputs - column;
    f32x16 bias[2] = {splat(0), splat(0)};
    if (linear->bias)
        for (int p = 0; p < 2; p++) bias[p] = load16(linear->bias + pair * PAIR + p * LANES, 0);
    for (int64_t r = 0; r < rows; r++) {
        f32x16 low = load16(sums + r * PAIR, 0) + bias[0], high = load16(sums + r * PAIR + LANES, 0) + bias[1];
        uint16_t *to = out + r * out_stride + column;
        if (linear->gated) store_upto(to, silu16(low) * high, left, 1);
        else {
            store_upto(to, low, left, 1);
            if (left > LANES) store_upto(to + LANES, high, left - LANES, 1);
        }
    }
}
#else
void finish_pair(const Linear *linear, int64_t pair, const float *sums, int64_t rows, uint16_t *out,
                 int64_t out_stride) {
    (void)linear, (void)pair, (void)sums, (void)rows, (void)out, (void)out_stride;
    __builtin_trap();
}
#endif
