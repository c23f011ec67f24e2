/* Products of 8 bit rows with 4 or 8 bit weights, on AVX512-VNNI and on tiles. Both give the same bits. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,avx2,fma,prefer-vector-width=512")
#include <immintrin.h>
#define HERE 1
#endif
#include "quantized.h"
#include "simd.h"

#if HERE
void quantize_row(const uint16_t *x, int64_t inputs, int64_t padded, int64_t group, int8_t *values, float *scale,
                  int32_t *sum) {
    for (int64_t g = 0; g < padded / group; g++, values += group) {
        int64_t count = inputs - g * group < group ? inputs - g * group : group;
        const uint16_t *from = x + g * group;
        __m512 high = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += LANES)
            high = _mm512_max_ps(high, _mm512_abs_ps((__m512)load_upto(from + i, count - i, 1)));
        float most = _mm512_reduce_max_ps(high), inverse = most > 0 ? 127.0f / most : 0.0f;
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = 0; i < group; i += LANES) {
            __m512 value = (__m512)(i < count ? load_upto(from + i, count - i, 1) : splat(0));
            __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(inverse)));
            total = _mm512_add_epi32(total, rounded);
            _mm_storeu_si128((__m128i *)(values + i), _mm512_cvtsepi32_epi8(rounded));
        }
        scale[g] = most / 127.0f;
        sum[g] = _mm512_reduce_add_epi32(total);
    }
}

/* sums += (dots - zero * sum of the row's values) * both scales. */
INLINE __m512 scaled(__m512 sums, __m512i dots, const Quantized *q, int64_t at, int32_t row_sum, float row_scale) {
    __m512i excess = _mm512_set1_epi32((int32_t)q->zero * row_sum);
    if (q->zeros)
        excess = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(q->zeros + at))),
                                    _mm512_set1_epi32(row_sum));
    __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(q->scale + at), _mm512_set1_ps(row_scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(dots, excess)), factor, sums);
}

INLINE void multiply_rows(const Quantized *q, const Rows8 *x, int64_t row, int rows, int64_t pair, int bits,
                          float *sums) {
    int64_t groups = q->inputs / q->group, quads = q->group / 4, line = bits == 4 ? 64 : 128;
    const uint8_t *w = q->weight + pair * (q->inputs / 4) * line;
    const int8_t *values = x->values + row * q->inputs;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[8][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i dots[8][2];
        for (int r = 0; r < rows; r++) dots[r][0] = dots[r][1] = _mm512_setzero_si512();
        for (int64_t k = 0; k < quads; k++, w += line) {
            __m512i low = _mm512_loadu_si512(w), high;
            _mm_prefetch(w + 4096, _MM_HINT_T1);
            if (bits == 4) {
                high = _mm512_and_si512(_mm512_srli_epi16(low, 4), nibble);
                low = _mm512_and_si512(low, nibble);
            } else {
                high = _mm512_loadu_si512(w + 64);
                _mm_prefetch(w + 4096 + 64, _MM_HINT_T1);
            }
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, values + r * q->inputs + g * q->group + 4 * k, 4);
                dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], low, _mm512_set1_epi32(four));
                dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], high, _mm512_set1_epi32(four));
            }
        }
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++)
                total[r][p] = scaled(total[r][p], dots[r][p], q, (pair * groups + g) * PAIR + p * LANES,
                                     x->sum[(row + r) * groups + g], x->scale[(row + r) * groups + g]);
    }
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < 2; p++) _mm512_storeu_ps(sums + r * PAIR + p * LANES, total[r][p]);
}

void multiply_quantized_vnni(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t pair,
                             uint8_t *wide, int fresh, float *sums) {
    (void)wide, (void)fresh;
    while (rows) {
        int n = rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
        if (q->bits == 4) {
            if (n == 8) multiply_rows(q, x, row, 8, pair, 4, sums);
            else if (n == 4) multiply_rows(q, x, row, 4, pair, 4, sums);
            else if (n == 2) multiply_rows(q, x, row, 2, pair, 4, sums);
            else multiply_rows(q, x, row, 1, pair, 4, sums);
        } else {
            if (n == 8) multiply_rows(q, x, row, 8, pair, 8, sums);
            else if (n == 4) multiply_rows(q, x, row, 4, pair, 8, sums);
            else if (n == 2) multiply_rows(q, x, row, 2, pair, 8, sums);
            else multiply_rows(q, x, row, 1, pair, 8, sums);
        }
        row += n, rows -= n, sums += n * PAIR;
    }
}

/* A pair's 4 bit weights less their zeros: what is left to do with sums is to scale them. */
static void widen_pair(const Quantized *q, int64_t pair, int8_t *wide) {
    const uint8_t *w = q->weight + pair * q->inputs * 16;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i zero[2] = {_mm512_set1_epi8((char)q->zero), _mm512_set1_epi8((char)q->zero)};
    int64_t quads = q->group / 4, groups = q->inputs / q->group;
    for (int64_t g = 0; g < groups; g++) {
        if (q->zeros)
            for (int p = 0; p < 2; p++) {
                const uint8_t *zeros = q->zeros + (pair * groups + g) * PAIR + p * LANES;
                zero[p] = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros)),
                                             _mm512_set1_epi32(0x01010101));
            }
        for (int64_t k = 0; k < quads; k++, w += 64, wide += 128) {
            __m512i both = _mm512_loadu_si512(w), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
            _mm_prefetch(w + 4096, _MM_HINT_T1);
            _mm512_storeu_si512(wide, _mm512_sub_epi8(_mm512_and_si512(both, nibble), zero[0]));
            _mm512_storeu_si512(wide + 64, _mm512_sub_epi8(high, zero[1]));
        }
    }
}

/* dots [32, 32] of one group; `bits` is a constant. Tiles 0 to 3: dots of 16 rows with a panel; 4, 5: rows; 6, 7:
   weights. */
INLINE void dot_group(const int8_t *x, int64_t stride, int64_t rows, const void *weight, int64_t group,
                      int64_t depth, int bits, int stream, int32_t *dots) {
    const char *w = weight;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < group; k += depth, w += depth * 32) {
        if (stream)
            for (int line = 0; line < depth / 2; line++) _mm_prefetch(w + 8192 + 64 * line, _MM_HINT_T1);
        _tile_loadd(6, w, 128);
        _tile_loadd(7, w + 64, 128);
        _tile_loadd(4, x + k, stride);
        if (bits == 4) {
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
        } else {
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
        }
        if (rows <= 16) continue;
        _tile_loadd(5, x + 16 * stride + k, stride);
        if (bits == 4) {
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(3, 5, 7);
        } else {
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
    }
    _tile_stored(0, dots, PAIR * 4);
    _tile_stored(1, dots + 16, PAIR * 4);
    if (rows > 16) {
        _tile_stored(2, dots + 16 * PAIR, PAIR * 4);
        _tile_stored(3, dots + 16 * PAIR + 16, PAIR * 4);
    }
}

/* sums [rows, 32] += dots * both scales; dots are less their zeros already. */
INLINE void scale_dots(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t at, int64_t g,
                       int fresh, const int32_t *dots, float *sums) {
    int64_t groups = q->inputs / q->group;
    const float *row_scale = x->scale + row * groups + g;
    __m512 low = _mm512_loadu_ps(q->scale + at), high = _mm512_loadu_ps(q->scale + at + LANES);
    for (int r = 0; r < rows; r++, dots += PAIR, sums += PAIR) {
        __m512 one = _mm512_set1_ps(row_scale[r * groups]);
        __m512 first = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums);
        __m512 second = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + LANES);
        _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots)), _mm512_mul_ps(low, one),
                                              first));
        _mm512_store_ps(sums + LANES, _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots + LANES)),
                                                      _mm512_mul_ps(high, one), second));
    }
}

void multiply_quantized_amx(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t pair,
                            uint8_t *wide, int fresh, float *sums) {
    int64_t groups = q->inputs / q->group, depth = q->group % 64 ? 32 : 64, stride = q->inputs;
    int32_t dots[2][32 * PAIR] __attribute__((aligned(64)));
    if (q->bits == 4 && fresh) widen_pair(q, pair, (int8_t *)wide);
    const uint8_t *w = q->bits == 4 ? wide : q->weight + pair * q->inputs * 32;
    FENCE(w);
    shape_tiles(rows, depth);
    if (q->bits == 8)
        for (int64_t i = 0; i < rows * PAIR; i += LANES) store16(sums + i, splat(0), 0);
    for (int64_t g = 0; g < groups; g++, w += q->group * PAIR) {
        const int8_t *values = x->values + row * stride + g * q->group;
        int32_t *now = dots[g & 1];
        int64_t at = (pair * groups + g) * PAIR;
        if (q->bits == 4) {
            dot_group(values, stride, rows, w, q->group, depth, 4, 0, now);
            FENCE(dots);
            scale_dots(q, x, row, rows, at, g, g == 0, now, sums);
            continue;
        }
        dot_group(values, stride, rows, w, q->group, depth, 8, fresh, now);
        FENCE(dots);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < 2; p++) {
                float *to = sums + r * PAIR + p * LANES;
                __m512i dot = _mm512_load_si512(now + r * PAIR + p * LANES);
                _mm512_store_ps(to, scaled(_mm512_load_ps(to), dot, q, at + p * LANES, x->sum[(row + r) * groups + g],
                                           x->scale[(row + r) * groups + g]));
            }
    }
}
#else
void quantize_row(const uint16_t *x, int64_t inputs, int64_t padded, int64_t group, int8_t *values, float *scale,
                  int32_t *sum) {
    (void)x, (void)inputs, (void)padded, (void)group, (void)values, (void)scale, (void)sum;
    __builtin_trap();
}
void multiply_quantized_vnni(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t pair,
                             uint8_t *wide, int fresh, float *sums) {
    (void)q, (void)x, (void)row, (void)rows, (void)pair, (void)wide, (void)fresh, (void)sums;
    __builtin_trap();
}
void multiply_quantized_amx(const Quantized *q, const Rows8 *x, int64_t row, int64_t rows, int64_t pair,
                            uint8_t *wide, int fresh, float *sums) {
    multiply_quantized_vnni(q, x, row, rows, pair, wide, fresh, sums);
}
#endif
