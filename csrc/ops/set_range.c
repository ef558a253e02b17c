/* Range setting: checks, units, sums over units, and the choice of the range. The statistics are in cpu/set_range.c. */
#include "set_range.h"

#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "units.h"

static fptq_status check(const char *op, int64_t outer, int64_t channels, int64_t inner, int32_t dtype)
{
    FPTQ_TRY(fptq_check_dtype(op, dtype));
    FPTQ_TRY(fptq_check_size(op, "outer", outer));
    FPTQ_TRY(fptq_check_size(op, "channels", channels));
    return fptq_check_size(op, "inner", inner);
}

static int64_t cost_of(int64_t inner)
{
    return inner < FPTQ_BLOCK ? inner : FPTQ_BLOCK;
}

fptq_status fptq_range_minmax(const struct fptq_range_minmax *args)
{
    FPTQ_TRY(check("range_minmax", args->outer, args->channels, args->inner, args->dtype));
    const int64_t blocks = fptq_blocks_per_row(args->inner), units = args->outer * args->channels * blocks;
    struct fptq_range_minmax with_partials = *args;
    with_partials.partials = malloc((size_t)(units > 0 ? units : 1) * 2 * sizeof(double));
    if (!with_partials.partials) {
        return fptq_fail_memory("range_minmax", units * 16);
    }
    fptq_launch(FPTQ_KERNEL_range_minmax, args->dtype, units, cost_of(args->inner), &with_partials);
    for (int64_t c = 0; c < args->channels; c++) {
        double lo = INFINITY, hi = -INFINITY;
        for (int64_t o = 0; o < args->outer; o++) {
            for (int64_t b = 0; b < blocks; b++) {
                const double *partial = with_partials.partials + 2 * ((o * args->channels + c) * blocks + b);
                lo = partial[0] < lo ? partial[0] : lo;
                hi = partial[1] > hi ? partial[1] : hi;
            }
        }
        fptq_put(args->lo, c, args->dtype, lo);
        fptq_put(args->hi, c, args->dtype, hi);
    }
    free(with_partials.partials);
    return FPTQ_OK;
}

fptq_status fptq_range_errors(const struct fptq_range_errors *args)
{
    FPTQ_TRY(check("range_errors", args->outer, args->channels, args->inner, args->dtype));
    FPTQ_TRY(fptq_check_grid("range_errors", args->grid));
    FPTQ_TRY(fptq_check_size("range_errors", "candidates", args->candidates));
    if (!(args->p >= 2 && args->p <= 4)) {
        return fptq_fail("range_errors: p = %g must lie in 2..4", args->p);
    }
    for (int64_t k = 0; k < args->candidates; k++) {
        if (!(args->ratios[k] > 0 && args->ratios[k] <= 1)) {
            return fptq_fail("range_errors: ratios[%lld] = %g must lie in (0, 1]", (long long)k, args->ratios[k]);
        }
    }
    const int64_t blocks = fptq_blocks_per_row(args->inner), units = args->outer * args->channels * blocks;
    const int64_t bytes = (units > 0 ? units : 1) * args->candidates * (int64_t)sizeof(double);
    struct fptq_range_errors with_partials = *args;
    with_partials.partials = malloc((size_t)bytes + 1);
    if (!with_partials.partials) {
        return fptq_fail_memory("range_errors", bytes);
    }
    fptq_launch(FPTQ_KERNEL_range_errors, args->dtype, units, cost_of(args->inner) * args->candidates, &with_partials);
    for (int64_t c = 0; c < args->channels; c++) {
        double *errors = args->errors + c * args->candidates; /* errors[c, :] */
        for (int64_t k = 0; k < args->candidates; k++) {
            errors[k] = 0;
        }
        for (int64_t o = 0; o < args->outer; o++) {
            for (int64_t b = 0; b < blocks; b++) {
                const double *partial = with_partials.partials + ((o * args->channels + c) * blocks + b) * args->candidates;
                for (int64_t k = 0; k < args->candidates; k++) {
                    errors[k] += partial[k];
                }
            }
        }
    }
    free(with_partials.partials);
    return FPTQ_OK;
}

fptq_status fptq_range_histogram(const struct fptq_range_histogram *args)
{
    FPTQ_TRY(check("range_histogram", args->outer, args->channels, args->inner, args->dtype));
    if (args->bins < 1) {
        return fptq_fail("range_histogram: bins = %lld must be positive", (long long)args->bins);
    }
    fptq_launch(FPTQ_KERNEL_range_histogram, args->dtype, args->channels, args->outer * args->inner, args);
    return FPTQ_OK;
}

/* Value below which a share of the counts lies, linear within a step. */
static double quantile(const double *counts, int64_t bins, double lo, double hi, double share)
{
    double total = 0, before = 0;
    for (int64_t b = 0; b < bins; b++) {
        total += counts[b];
    }
    for (int64_t b = 0; b < bins; b++) {
        if (counts[b] > 0 && before + counts[b] >= share * total) {
            return lo + (hi - lo) * ((double)b + (share * total - before) / counts[b]) / (double)bins;
        }
        before += counts[b];
    }
    return hi;
}

/* The range of one channel: the whole of it, its best candidate, or its percentiles. */
static void choose_range(const struct fptq_set_range *args, int64_t c, double *lo, double *hi)
{
    const double *evidence = args->evidence ? args->evidence + c * args->n : NULL;
    if (args->rule == FPTQ_RANGE_CANDIDATES) {
        int64_t best = 0;
        for (int64_t k = 1; k < args->n; k++) {
            best = evidence[k] < evidence[best] ? k : best;
        }
        *lo *= args->ratios[best];
        *hi *= args->ratios[best];
    } else if (args->rule == FPTQ_RANGE_PERCENTILE) {
        const double tail = (100 - args->percentile) / 200, whole_lo = *lo, whole_hi = *hi;
        *lo = quantile(evidence, args->n, whole_lo, whole_hi, tail);
        *hi = quantile(evidence, args->n, whole_lo, whole_hi, 1 - tail);
    }
}

fptq_status fptq_set_range(const struct fptq_set_range *args)
{
    FPTQ_TRY(check("set_range", 1, args->channels, args->n, args->dtype));
    FPTQ_TRY(fptq_check_grid("set_range", args->grid));
    if (args->rule < FPTQ_RANGE_MIN_MAX || args->rule > FPTQ_RANGE_PERCENTILE) {
        return fptq_fail("set_range: rule %d is unknown", args->rule);
    }
    if (args->rule == FPTQ_RANGE_PERCENTILE && !(args->percentile > 0 && args->percentile <= 100)) {
        return fptq_fail("set_range: percentile = %g must lie in (0, 100]", args->percentile);
    }
    if (args->rule != FPTQ_RANGE_MIN_MAX && args->n < 1) {
        return fptq_fail("set_range: there is no evidence to choose from (n = %lld)", (long long)args->n);
    }
    for (int64_t c = 0; c < args->channels; c++) {
        double lo = fptq_get(args->lo, c, args->dtype), hi = fptq_get(args->hi, c, args->dtype), scale, zero_point;
        if (lo <= hi) {
            choose_range(args, c, &lo, &hi);
        } else {
            lo = hi = 0; /* nothing finite was seen */
        }
        fptq_qparams_of_range(lo, hi, args->grid, args->symmetric, args->dtype, &scale, &zero_point);
        fptq_put(args->scale, c, args->dtype, scale);
        fptq_put(args->zero_point, c, args->dtype, zero_point);
    }
    return FPTQ_OK;
}
