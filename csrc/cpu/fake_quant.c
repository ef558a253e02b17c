/*
 * fake_quant, forward and backward.
 *
 *   q = rint(x / scale) + zero_point,  y = (clamp(q, qmin, qmax) - zero_point) * scale       zero_point is rounded first
 *
 * Layout: x, y, dx, dy are [outer, channels, inner], contiguous; scale and zero_point are [channels].
 * Division (a reciprocal would differ at ties), ties to even, in COMPUTE. NaN gives NaN, infinities clamp.
 *
 * Backward: straight-through where qmin <= q <= qmax; dscale is the LSQ gradient (Esser et al., arXiv 1902.08153):
 *   inside   dx = dy   dscale += dy * (rint(x / scale) - x / scale)
 *   outside  dx = 0    dscale += dy * (clamped q - zero_point)         dzero_point += -dy * scale
 * Sums: FPTQ_LANES interleaved fp64 accumulators per unit, added pairwise; the operator adds the units in order.
 */
#ifndef STORAGE
#define FPTQ_FILE "fake_quant.c"
#include "../ops/units.h"
#include "for_each_dtype.h"
#else

void KERNEL(fake_quant_forward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_fake_quant_forward *args = context;
    const COMPUTE *scale = args->scale, *zero_point = args->zero_point;
    const COMPUTE qmin = (COMPUTE)args->grid.qmin, qmax = (COMPUTE)args->grid.qmax;

    for (int64_t index = begin; index < end; index++) {
        const struct fptq_unit unit = fptq_unit_of(index, args->channels, args->inner);
        const STORAGE *restrict x_row = (const STORAGE *)args->x + unit.begin; /* x[o, c, block] */
        STORAGE *restrict y_row = (STORAGE *)args->y + unit.begin;             /* y[o, c, block] */
        const COMPUTE scale_c = scale[unit.channel];
        const COMPUTE zero_c = zero_point ? RINT(zero_point[unit.channel]) : 0;
        for (int64_t i = 0; i < unit.length; i++) {
            COMPUTE q = RINT(LOAD(x_row[i]) / scale_c) + zero_c;
            q = q < qmin ? qmin : q;
            q = q > qmax ? qmax : q;
            y_row[i] = STORE((q - zero_c) * scale_c);
        }
    }
}

/* Gradients of one element; the three results are what the formulas above say. */
static inline void LOCAL(fake_quant_element)(COMPUTE dy, COMPUTE x, COMPUTE scale, COMPUTE zero_point, COMPUTE qmin, COMPUTE qmax,
                                             COMPUTE *dx, COMPUTE *dscale, COMPUTE *dzero_point)
{
    const COMPUTE ratio = x / scale, rounded = RINT(ratio), q = rounded + zero_point;
    COMPUTE clamped = q < qmin ? qmin : q;
    clamped = clamped > qmax ? qmax : clamped;
    const int inside = clamped == q;
    *dx = inside ? dy : 0;
    *dscale = dy * (inside ? rounded - ratio : clamped - zero_point);
    *dzero_point = inside ? 0 : -dy * scale;
}

/* One unit. `asymmetric` is a constant where this is inlined: the sums for zero_point cost a third of the time. */
static inline __attribute__((always_inline)) void LOCAL(fake_quant_backward_unit)(const struct fptq_fake_quant_backward *args,
                                                                                  int64_t index, const int asymmetric)
{
    const struct fptq_unit unit = fptq_unit_of(index, args->channels, args->inner);
    const STORAGE *restrict x_row = (const STORAGE *)args->x + unit.begin;   /* x[o, c, block] */
    const STORAGE *restrict dy_row = (const STORAGE *)args->dy + unit.begin; /* dy[o, c, block] */
    STORAGE *restrict dx_row = (STORAGE *)args->dx + unit.begin;             /* dx[o, c, block] */
    const COMPUTE qmin = (COMPUTE)args->grid.qmin, qmax = (COMPUTE)args->grid.qmax;
    const COMPUTE scale = ((const COMPUTE *)args->scale)[unit.channel];
    const COMPUTE zero = asymmetric ? RINT(((const COMPUTE *)args->zero_point)[unit.channel]) : 0;
    double dscale[FPTQ_LANES] = {0}, dzero_point[FPTQ_LANES] = {0};

    int64_t i = 0;
    for (; i + FPTQ_LANES <= unit.length; i += FPTQ_LANES) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            COMPUTE dx, dscale_l, dzero_l;
            LOCAL(fake_quant_element)(LOAD(dy_row[i + l]), LOAD(x_row[i + l]), scale, zero, qmin, qmax, &dx, &dscale_l, &dzero_l);
            dx_row[i + l] = STORE(dx);
            dscale[l] += (double)dscale_l;
            if (asymmetric) {
                dzero_point[l] += (double)dzero_l;
            }
        }
    }
    for (int l = 0; i < unit.length; i++, l++) {
        COMPUTE dx, dscale_l, dzero_l;
        LOCAL(fake_quant_element)(LOAD(dy_row[i]), LOAD(x_row[i]), scale, zero, qmin, qmax, &dx, &dscale_l, &dzero_l);
        dx_row[i] = STORE(dx);
        dscale[l] += (double)dscale_l;
        dzero_point[l] += asymmetric ? (double)dzero_l : 0;
    }
    args->partials[2 * index] = fptq_sum_lanes(dscale);
    args->partials[2 * index + 1] = fptq_sum_lanes(dzero_point);
}

void KERNEL(fake_quant_backward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_fake_quant_backward *args = context;
    for (int64_t index = begin; index < end; index++) {
        if (args->zero_point) {
            LOCAL(fake_quant_backward_unit)(args, index, 1);
        } else {
            LOCAL(fake_quant_backward_unit)(args, index, 0);
        }
    }
}

#endif
