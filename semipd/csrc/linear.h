/* y = x W + b with W packed once, and how its kernels are called. */
#ifndef SEMIPD_LINEAR_H
#define SEMIPD_LINEAR_H

#include <stdint.h>

enum {
    PAIR = 32,         /* columns that are computed together: two panels of 16 */
    DEPTH = 32,        /* inputs that one tile of a panel covers */
    PAIR_TILE = 1024,  /* elements of a pair's tile */
    FEW = 64,          /* rows up to which reading the weights takes longest */
    ROW_BLOCK = 512,   /* rows whose inputs stay in the second cache while many columns pass */
    DEPTH_BLOCK = 256, /* inputs at a time; sums wait in float between blocks, so that bits do not change */
    GROUP = 8          /* pairs of columns that share a block of rows */
};

/* HALVES: bfloat16; a pair's tile is [2 panels, 16 pairs of inputs, 16 columns, 2 inputs]. FLOATS: a pair's tile is
   [32 inputs, 32 columns]. QUANTIZED: the head of a `Quantized` (quantized.h), inputs and outputs in
   bfloat16. */
enum { HALVES = 0, FLOATS = 1, QUANTIZED = 2 };

/* weight: [pairs, inputs / 32 rounded up, PAIR_TILE], zero past the last input and output. bias: floats
   [pairs * 32] or NULL. gated: the panels of a pair are gate and up of the same 16 outputs, and
   y = silu(gate) * up. */
typedef struct {
    int64_t kind, level, inputs, outputs, pairs, gated;
    const void *weight;
    const float *bias;
} Linear;

/* sums [rows, 32] (a zero start where `fresh`) += x [rows, depth] W, for one pair of columns. rows <= 32.
   stream: the weights come from memory, so ask for them early. */
typedef void MultiplyPair(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth,
                          int fresh, int stream, float *sums);
/* Add the bias to sums [rows, 32] of a pair, activate where gated, and write outputs. */
typedef void FinishPair(const Linear *linear, int64_t pair, const float *sums, int64_t rows, void *out,
                        int64_t out_stride);

/* The compiler's tile instructions do not say what memory they read: everything written through `pointer` must
   be there before them. */
#define FENCE(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

MultiplyPair multiply_pair_amx, multiply_pair_bf16;
/* Around a thread's use of tiles; and the shapes for up to 32 rows of `depth` bytes of inputs (linear_amx.c). */
void begin_tiles(void), end_tiles(void);
void shape_tiles(int64_t rows, int64_t depth);

#endif
