/* Sixteen floats at a time, in the compiler's own vectors: the same source becomes SSE2, AVX2, AVX-512 or
   NEON, by the target that the including file chose. bfloat16 is stored as the upper half of a float. */
#ifndef SEMIPD_SIMD_H
#define SEMIPD_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x16_any __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16_any __attribute__((vector_size(32), aligned(2)));

INLINE f32x16 splat(float x) { return x - (f32x16){0}; }

INLINE f32x16 widen(u16x16 half) { return (f32x16)(__builtin_convertvector(half, u32x16) << 16); }

/* To the nearest bfloat16, ties to even; NaN stays NaN. The instruction takes subnormal numbers for zeros. */
INLINE u16x16 narrow(f32x16 x) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x16 is_nan = (u32x16)(x != x);
    return __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), u16x16);
#endif
}

/* Elements are float, or bfloat16 where `half` says so; `half` is a constant wherever these are used. */
INLINE size_t element_size(int half) { return half ? 2 : 4; }

INLINE f32x16 load16(const void *from, int half) {
    return half ? widen(*(const u16x16_any *)from) : *(const f32x16_any *)from;
}

INLINE void store16(void *to, f32x16 x, int half) {
    if (half) *(u16x16_any *)to = narrow(x);
    else *(f32x16_any *)to = x;
}

/* The first n < 16 elements, zeros after them. */
INLINE f32x16 load_part(const void *from, int n, int half) {
    if (half) {
        u16x16 x = {0};
        memcpy(&x, from, 2 * n);
        return widen(x);
    }
    f32x16 x = {0};
    memcpy(&x, from, 4 * n);
    return x;
}

INLINE void store_part(void *to, f32x16 x, int n, int half) {
    if (half) {
        u16x16 narrowed = narrow(x);
        memcpy(to, &narrowed, 2 * n);
    } else memcpy(to, &x, 4 * n);
}

INLINE f32x16 load_upto(const void *from, int n, int half) {
    return n >= LANES ? load16(from, half) : load_part(from, n, half);
}

INLINE void store_upto(void *to, f32x16 x, int n, int half) {
    if (n >= LANES) store16(to, x, half);
    else store_part(to, x, n, half);
}

INLINE f32x16 largest(f32x16 a, f32x16 b) {
    i32x16 above = a > b;
    return (f32x16)(((i32x16)a & above) | ((i32x16)b & ~above));
}

INLINE float sum16(f32x16 x) {
    f32x16 y = x + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    y += __builtin_shufflevector(y, y, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    y += __builtin_shufflevector(y, y, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return y[0] + y[1];
}

INLINE float max16(f32x16 x) {
    f32x16 y = largest(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    y = largest(y, __builtin_shufflevector(y, y, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    y = largest(y, __builtin_shufflevector(y, y, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return y[0] > y[1] ? y[0] : y[1];
}

/* Lane i of the result is the sum of x[i]: four rounds, each of which halves the vectors. */
INLINE f32x16 sums_of_16(const f32x16 *x) {
    f32x16 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* e^x for x <= 88, within 2 units in the last place; 0 below -87.3 (so e^-inf is 0). Cody and Waite's
   reduction to |r| <= ln(2) / 2 and a polynomial of degree 6. */
INLINE f32x16 exp16(f32x16 x) {
    i32x16 vanishes = x < splat(-87.3f);
    f32x16 bounded = (f32x16)((i32x16)x & ~vanishes);
    f32x16 shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's low bits are the integer */
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = bounded - n * 0.693359375f - n * -2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    i32x16 scaled = (i32x16)p + ((i32x16)shifted << 23);
    return (f32x16)(scaled & ~vanishes);
}

#if defined(__AVX512DQ__)
/* 2^x to within 3e-6 of itself, a hundredth of what bfloat16 keeps; 1 for 0 exactly, 0 for -infinity. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); /* x less its floor */
    __m512 power = _mm512_fmadd_ps(_mm512_set1_ps(0.0134266922f), part, _mm512_set1_ps(0.0522424616f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.241280213f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(0.693044841f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, x);
}
#endif

#endif
