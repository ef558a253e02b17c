/*
 * Statistics for static ranges: least and greatest value, error of each candidate range, histogram.
 *
 *   range_errors   errors[c, k] = sum over x of channel c of |x - fake_quant(x)|^p, range shrunk to ratios[k] * (lo, hi)
 *
 * Layout: x is [outer, channels, inner]; lo, hi are [channels]. Each block of x (FPTQ_BLOCK elements, in cache) is read from
 * memory once and measured against every candidate. NaN and infinities are left out: they carry no range.
 * |e|^p is power.h's in float (products where p is 2, 3 or 4), libm's in double. Sums: FPTQ_LANES fp64 accumulators.
 */
#ifndef STORAGE
#define FPTQ_FILE "set_range.c"
#include <float.h>
#include <stddef.h>

#include "../ops/set_range.h"
#include "../ops/units.h"
#include "power.h"
#include "for_each_dtype.h"
#else

void KERNEL(range_minmax)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_range_minmax *args = context;
    for (int64_t index = begin; index < end; index++) {
        const struct fptq_unit unit = fptq_unit_of(index, args->channels, args->inner);
        const STORAGE *restrict x_row = (const STORAGE *)args->x + unit.begin;
        COMPUTE los[FPTQ_LANES], his[FPTQ_LANES];
        for (int l = 0; l < FPTQ_LANES; l++) {
            los[l] = (COMPUTE)INFINITY;
            his[l] = -(COMPUTE)INFINITY;
        }
        int64_t i = 0;
        for (; i + FPTQ_LANES <= unit.length; i += FPTQ_LANES) {
            for (int l = 0; l < FPTQ_LANES; l++) {
                const COMPUTE x = LOAD(x_row[i + l]);
                const int finite = FABS(x) <= LARGEST;
                los[l] = finite && x < los[l] ? x : los[l];
                his[l] = finite && x > his[l] ? x : his[l];
            }
        }
        for (int l = 0; i < unit.length; i++, l++) {
            const COMPUTE x = LOAD(x_row[i]);
            const int finite = FABS(x) <= LARGEST;
            los[l] = finite && x < los[l] ? x : los[l];
            his[l] = finite && x > his[l] ? x : his[l];
        }
        double lo = INFINITY, hi = -INFINITY;
        for (int l = 0; l < FPTQ_LANES; l++) {
            lo = (double)los[l] < lo ? (double)los[l] : lo;
            hi = (double)his[l] > hi ? (double)his[l] : hi;
        }
        args->partials[2 * index] = lo;
        args->partials[2 * index + 1] = hi;
    }
}

/* |e|^p; `kind` is a constant where this is inlined. */
static inline COMPUTE LOCAL(power)(COMPUTE e, COMPUTE p, int kind)
{
    switch (kind) {
    case FPTQ_POWER_2:
        return e * e;
    case FPTQ_POWER_3:
        return e * e * e;
    case FPTQ_POWER_4:
        return (e * e) * (e * e);
    default:
        return sizeof(COMPUTE) == sizeof(double) ? (COMPUTE)pow((double)e, (double)p) : (COMPUTE)fptq_power((float)e, (float)p);
    }
}

/* Error of x[0 .. length) under one candidate; `kind` is a constant where this is inlined, so each p has its own loop. */
static inline __attribute__((always_inline)) double LOCAL(candidate_error)(const COMPUTE *restrict x, int64_t length, COMPUTE scale,
                                                                           COMPUTE zero, COMPUTE qmin, COMPUTE qmax, COMPUTE p,
                                                                           int kind)
{
    double sums[FPTQ_LANES] = {0};
    for (int64_t i = 0; i < length; i += FPTQ_LANES) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            COMPUTE q = RINT(x[i + l] / scale) + zero;
            q = q < qmin ? qmin : q;
            q = q > qmax ? qmax : q;
            sums[l] += (double)LOCAL(power)(FABS(x[i + l] - (q - zero) * scale), p, kind);
        }
    }
    return fptq_sum_lanes(sums);
}

void KERNEL(range_errors)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_range_errors *args = context;
    const COMPUTE qmin = (COMPUTE)args->grid.qmin, qmax = (COMPUTE)args->grid.qmax, p = (COMPUTE)args->p;
    const int kind = fptq_power_kind(args->p);
    _Alignas(64) COMPUTE x[FPTQ_BLOCK + FPTQ_LANES];

    for (int64_t index = begin; index < end; index++) {
        const struct fptq_unit unit = fptq_unit_of(index, args->channels, args->inner);
        const STORAGE *restrict x_row = (const STORAGE *)args->x + unit.begin;
        for (int64_t i = 0; i < unit.length; i++) {
            const COMPUTE value = LOAD(x_row[i]);
            x[i] = FABS(value) <= LARGEST ? value : 0; /* 0 has no error under any candidate */
        }
        const int64_t length = (unit.length + FPTQ_LANES - 1) / FPTQ_LANES * FPTQ_LANES;
        for (int64_t i = unit.length; i < length; i++) {
            x[i] = 0;
        }
        const double lo = (double)((const COMPUTE *)args->lo)[unit.channel], hi = (double)((const COMPUTE *)args->hi)[unit.channel];
        for (int64_t k = 0; k < args->candidates; k++) {
            double scale_k, zero_k;
            fptq_qparams_of_range(lo * args->ratios[k], hi * args->ratios[k], args->grid, args->symmetric, args->dtype, &scale_k,
                                  &zero_k);
            const COMPUTE scale = (COMPUTE)scale_k, zero = (COMPUTE)zero_k;
            double error;
            switch (kind) {
            case FPTQ_POWER_2:
                error = LOCAL(candidate_error)(x, length, scale, zero, qmin, qmax, p, FPTQ_POWER_2);
                break;
            case FPTQ_POWER_3:
                error = LOCAL(candidate_error)(x, length, scale, zero, qmin, qmax, p, FPTQ_POWER_3);
                break;
            case FPTQ_POWER_4:
                error = LOCAL(candidate_error)(x, length, scale, zero, qmin, qmax, p, FPTQ_POWER_4);
                break;
            default:
                error = LOCAL(candidate_error)(x, length, scale, zero, qmin, qmax, p, FPTQ_POWER_ANY);
            }
            args->partials[index * args->candidates + k] = error;
        }
    }
}

/* One unit is one channel: its counts are written by one thread alone. */
void KERNEL(range_histogram)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_range_histogram *args = context;
    for (int64_t c = begin; c < end; c++) {
        double *counts = args->counts + c * args->bins; /* counts[c, :] */
        const double lo = (double)((const COMPUTE *)args->lo)[c], hi = (double)((const COMPUTE *)args->hi)[c];
        const double per_step = hi > lo ? (double)args->bins / (hi - lo) : 0;
        for (int64_t b = 0; b < args->bins; b++) {
            counts[b] = 0;
        }
        for (int64_t o = 0; o < args->outer; o++) {
            const STORAGE *x_row = (const STORAGE *)args->x + (o * args->channels + c) * args->inner; /* x[o, c, :] */
            for (int64_t i = 0; i < args->inner; i++) {
                const double step = ((double)LOAD(x_row[i]) - lo) * per_step;
                if (step >= 0 && step <= (double)args->bins) { /* NaN and infinities fail both */
                    counts[step < (double)args->bins ? (int64_t)step : args->bins - 1] += 1;
                }
            }
        }
    }
}

#endif
