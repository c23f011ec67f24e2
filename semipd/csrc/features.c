/* What this processor can do, and which kernels that means. */

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel hands out the tile registers only on request, once per process (and to what it forks). */
static int may_use_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}

static int has_tiles(void) {
    unsigned a = 7, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1); /* bf16, tiles, int8 */
}

EXPORT int semipd_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BASELINE;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    if (!__builtin_cpu_supports("avx512vnni")) return AVX512;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512_VNNI;
    return has_tiles() && may_use_tiles() ? AMX : AVX512_BF16;
}
#else
EXPORT int semipd_level(void) { return BASELINE; }
#endif

const Kernels *kernels_of(int level) {
    if (level >= AVX512_BF16) return &kernels_avx512_bf16;
    return level >= AVX512 ? &kernels_avx512 : level == AVX2 ? &kernels_avx2 : &kernels_baseline;
}
