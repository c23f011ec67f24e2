/* Work that the threads of an OpenMP region share out among themselves: every thread of the region calls these
   alike. What is called `in_team` is complete when it returns, but for linears and rotations: a thread returns from
   them when its own part is done, and a barrier is the caller's. */
#ifndef SEMIPD_TEAM_H
#define SEMIPD_TEAM_H

#include "kernels.h"

/* As semipd_linear (linear.c). */
void linear_in_team(const Linear *linear, const void *x, int64_t x_stride, int64_t rows, void *out,
                    int64_t out_stride, void *scratch);
/* As semipd_norm and semipd_rotate (rows.c). */
void norm_in_team(int level, int half, void *x, const void *delta, const void *weight, void *out, int64_t rows,
                  int64_t width, float eps);
void rotate_in_team(const Rotation *rotation, void *qkv, void *layer);
/* As semipd_decode_attention (decode_attention.c) and semipd_prefill_attention (prefill_attention.c). */
void attend_in_team(const DecodePlan *plan, const void *query, const void *layer, void *out);
void prefill_in_team(const PrefillPlan *plan, const void *query, const void *layer, void *out);

#endif
