/* What range search and its kernels share: the scale of a range, and which powers have a loop of their own. */
#ifndef FPTQ_OPS_SET_RANGE_H
#define FPTQ_OPS_SET_RANGE_H

#include <float.h>
#include <math.h>

#include "../fptq.h"

enum { FPTQ_POWER_ANY, FPTQ_POWER_2, FPTQ_POWER_3, FPTQ_POWER_4 };

static inline int fptq_power_kind(double p)
{
    return p == 2 ? FPTQ_POWER_2 : p == 3 ? FPTQ_POWER_3 : p == 4 ? FPTQ_POWER_4 : FPTQ_POWER_ANY;
}

/* Scale and zero point that cover [min(lo, 0), max(hi, 0)]; an empty or zero range gets scale 1. Rounded to the dtype. */
static inline void fptq_qparams_of_range(double lo, double hi, fptq_grid grid, bool symmetric, int32_t dtype, double *scale,
                                         double *zero_point)
{
    const double smallest = dtype == FPTQ_F64 ? DBL_MIN : (double)FLT_MIN;
    lo = lo < 0 ? lo : 0;
    hi = hi > 0 ? hi : 0;
    double value = symmetric ? (hi > -lo ? hi : -lo) / grid.qmax : (hi - lo) / (grid.qmax - grid.qmin);
    value = !(value > 0) || !isfinite(value) ? 1 : value < smallest ? smallest : value;
    *scale = dtype == FPTQ_F64 ? value : (double)(float)value;
    const double zero = rint(grid.qmin - lo / *scale);
    *zero_point = symmetric ? 0 : zero > grid.qmax ? grid.qmax : zero;
}

#endif
