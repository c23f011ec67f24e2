/* Products of pairs of bfloat16 on AVX512-BF16, where there are no tile registers. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>
#define HERE 1
#endif
#include <string.h>

#include "linear.h"

#if HERE
enum { STRETCH = 256, ROWS = 8 }; /* inputs at a time, whose weights stay in the first cache; rows at a time */

__attribute__((always_inline)) static inline void multiply_rows(const uint16_t *x, int64_t x_stride, int rows,
                                                                const uint16_t *weight, int64_t depth, int fresh,
                                                                const char *ahead, int64_t lines, float *sums) {
    __m512 low[ROWS], high[ROWS];
    for (int r = 0; r < rows; r++) {
        low[r] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PAIR);
        high[r] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * PAIR + 16);
    }
    for (int64_t k = 0; k < depth; k += DEPTH, weight += PAIR_TILE, ahead += 64 * lines)
        for (int pair = 0; pair < 16; pair++) {
            const uint16_t *line = weight + 32 * pair;
            ask(ahead, lines, pair, 16);
            __m512bh first = (__m512bh)_mm512_loadu_si512(line), second = (__m512bh)_mm512_loadu_si512(line + 512);
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, x + r * x_stride + k + 2 * pair, sizeof two);
                low[r] = _mm512_dpbf16_ps(low[r], first, (__m512bh)_mm512_set1_epi32(two));
                high[r] = _mm512_dpbf16_ps(high[r], second, (__m512bh)_mm512_set1_epi32(two));
            }
        }
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(sums + r * PAIR, low[r]);
        _mm512_storeu_ps(sums + r * PAIR + 16, high[r]);
    }
}

void multiply_pair_bf16(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth, int fresh,
                        const char *ahead, int64_t lines, float *sums) {
    for (int64_t begin = 0; begin < depth; begin += STRETCH, fresh = 0, ahead += STRETCH / DEPTH * 64 * lines)
        for (int64_t row = 0; row < rows; row += ROWS) {
            const uint16_t *from = (const uint16_t *)x + row * x_stride + begin;
            const uint16_t *tiles = (const uint16_t *)weight + begin / DEPTH * PAIR_TILE;
            int64_t count = depth - begin < STRETCH ? depth - begin : STRETCH;
            float *to = sums + row * PAIR;
            int64_t asked = row ? 0 : lines;
#define CASE(n) \
    case n: multiply_rows(from, x_stride, n, tiles, count, fresh, ahead, asked, to); break;
            switch (rows - row) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
                default: multiply_rows(from, x_stride, 8, tiles, count, fresh, ahead, asked, to);
            }
#undef CASE
        }
}
#else
void multiply_pair_bf16(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth, int fresh,
                        const char *ahead, int64_t lines, float *sums) {
    (void)x, (void)x_stride, (void)rows, (void)weight, (void)depth, (void)fresh;
    (void)ahead, (void)lines, (void)sums;
    __builtin_trap();
}
#endif
