/* Where the threads of a team run. */

#define _GNU_SOURCE

#include <omp.h>
#include <sched.h>

#include "kernels.h"

/* Tie thread i of the team of `count` to cores[i]; one that cannot be had leaves its thread where it may be now. */
EXPORT void semipd_tie(const int32_t *cores, int64_t count) {
#pragma omp parallel num_threads((int)count)
    {
        int32_t core = cores[omp_get_thread_num()];
        cpu_set_t set;
        CPU_ZERO(&set);
        if (core < CPU_SETSIZE) {
            CPU_SET(core, &set);
            sched_setaffinity(0, sizeof set, &set);
        }
    }
}
