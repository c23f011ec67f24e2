/* Whatever the compiler takes for granted. */
#define KERNELS kernels_baseline
#include "variant.inc"
