/* y = x W + b with W packed once, and how its kernels are called. */
#ifndef SEMIPD_LINEAR_H
#define SEMIPD_LINEAR_H

#include <stdint.h>

enum {
    PAIR = 32,         /* columns that are computed together: two panels of 16 */
    DEPTH = 32,        /* inputs that one tile of a panel covers */
    PAIR_TILE = 1024,  /* elements of a pair's tile */
    FEW = 64,          /* rows up to which reading the weights takes longest, */
    NARROW = 1024,     /* where there are no more inputs than these; with more, up to STRIP rows */
    STRIP = 32,        /* rows that are computed together */
    ROW_BLOCK = 256,   /* rows whose inputs stay in the second cache while many columns pass */
    DEPTH_BLOCK = 256, /* inputs at a time; sums wait in float between blocks, so that bits do not change */
    GROUP = 8,         /* pairs of columns that share a block of rows */
    EARLY = 6          /* tiles that a single strip asks for its weights early */
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
   ahead: weights that are wanted later and may still be in memory, asked for by `lines` cache lines with each tile. */
typedef void MultiplyPair(const void *x, int64_t x_stride, int64_t rows, const void *weight, int64_t depth,
                          int fresh, const char *ahead, int64_t lines, float *sums);
/* Add the bias to sums [rows, 32] of a pair, activate where gated, and write outputs. */
typedef void FinishPair(const Linear *linear, int64_t pair, const float *sums, int64_t rows, void *out,
                        int64_t out_stride);

/* Ask for a part of `lines` cache lines, into the second cache: what computes long asks for a little at a time. */
static inline void ask(const char *ahead, int64_t lines, int64_t part, int64_t parts) {
    for (; part < lines; part += parts) __builtin_prefetch(ahead + 64 * part, 0, 2);
}

/* The compiler's tile instructions do not say what memory they read: everything written through `pointer` must
   be there before them. */
#define FENCE(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

MultiplyPair multiply_pair_amx, multiply_pair_bf16;
/* Around a thread's use of tiles; and the shapes for up to 32 rows of `depth` bytes of inputs (linear_amx.c). */
void begin_tiles(void), end_tiles(void);
void shape_tiles(int64_t rows, int64_t depth);

#endif
