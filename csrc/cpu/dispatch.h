/* How an operator runs its kernel: on the chosen instruction set, split over threads. */
#ifndef FPTQ_CPU_DISPATCH_H
#define FPTQ_CPU_DISPATCH_H

#include "kernels.h"

/* Runs units [0, units) of a kernel. `cost` is the elements of one unit; it decides how many units make a thread's share. */
void fptq_launch(enum fptq_kernel_id kernel, int32_t dtype, int64_t units, int64_t cost, const void *args);

#endif
