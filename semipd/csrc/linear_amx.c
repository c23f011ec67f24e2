/* Products on tile registers: 16 rows of 64 bytes each. */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512f,avx512bw")
#include <immintrin.h>
#define HERE 1
#endif
#include "linear.h"

#if HERE
/* Tiles 0 and 1: sums of the first 16 rows; 2 and 3: of the next; 4 and 5: inputs; 6 and 7: weights. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t width[16];
    uint8_t height[16];
} __attribute__((aligned(64))) TileShapes;

static __thread int64_t shaped_rows, shaped_depth; /* since this thread's begin_tiles */

void shape_tiles(int64_t rows, int64_t depth) {
    if (shaped_rows == rows && shaped_depth == depth) return;
    TileShapes shapes = {.palette = 1};
    int first = rows < 16 ? rows : 16, second = rows > 16 ? rows - 16 : 1;
    uint8_t height[8] = {first, first, second, second, first, second, depth / 4, depth / 4};
    uint16_t width[8] = {64, 64, 64, 64, depth, depth, 64, 64};
    for (int i = 0; i < 8; i++) shapes.width[i] = width[i], shapes.height[i] = height[i];
    FENCE(&shapes);
    _tile_loadconfig(&shapes);
    shaped_rows = rows, shaped_depth = depth;
}

void begin_tiles(void) { shaped_rows = 0; }
void end_tiles(void) { _tile_release(); }

static void multiply_16(const uint16_t *x, int64_t x_stride, const uint16_t *weight, int64_t depth, int fresh,
                        const char *ahead, int64_t lines, float *sums) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, sums, PAIR * 4);
        _tile_loadd(1, sums + 16, PAIR * 4);
    }
    for (int64_t k = 0; k < depth; k += DEPTH, weight += PAIR_TILE, ahead += 64 * lines) {
        ask(ahead, lines, 0, 1);
        _tile_loadd(4, x + k, x_stride * 2);
        _tile_loadd(6, weight, 64);
        _tile_loadd(7, weight + 512, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, PAIR * 4);
    _tile_stored(1, sums + 16, PAIR * 4);
}

static void multiply_32(const uint16_t *x, int64_t x_stride, const uint16_t *weight, int64_t depth, int fresh,
                        const char *ahead, int64_t lines, float *sums) {
    const uint16_t *below = x + 16 * x_stride;
    float *more = sums + 16 * PAIR;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, PAIR * 4);
        _tile_loadd(1, sums + 16, PAIR * 4);
        _tile_loadd(2, more, PAIR * 4);
        _tile_loadd(3, more + 16, PAIR * 4);
    }
    for (int64_t k = 0; k < depth; k += DEPTH, weight += PAIR_TILE, ahead += 64 * lines) {
        ask(ahead, lines, 0, 1);
        _tile_loadd(6, weight, 64);
        _tile_loadd(4, x + k, x_stride * 2);
        _tile_loadd(7, weight + 512, 64);
        _tile_loadd(5, below + k, x_stride * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, PAIR * 4);
    _tile_stored(1, sums + 16, PAIR * 4);
    _tile_stored(2, more, PAIR * 4);
    _tile_stored(3, more + 16, PAIR * 4);
}

void multiply_pair_amx(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth, int fresh,
                       const char *ahead, int64_t lines, float *sums) {
    shape_tiles(rows, 64);
    if (rows > 16) multiply_32(x, x_stride, weight, depth, fresh, ahead, lines, sums);
    else multiply_16(x, x_stride, weight, depth, fresh, ahead, lines, sums);
}
#else
void shape_tiles(int64_t rows, int64_t depth) { (void)rows, (void)depth; }
void begin_tiles(void) {}
void end_tiles(void) {}
void multiply_pair_amx(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth, int fresh,
                       const char *ahead, int64_t lines, float *sums) {
    (void)x, (void)x_stride, (void)rows, (void)weight, (void)depth, (void)fresh;
    (void)ahead, (void)lines, (void)sums;
    __builtin_trap();
}
#endif
