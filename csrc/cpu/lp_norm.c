/*
 * lp_norm: sums of |y|^p of a merged weight y that is never stored, with what its gradients need.
 *
 *   query_key   y as in merge_query_key.c:  value = sum |y|^p,  d value / d angle = p sum (g_j y_i - g_i y_j) with
 *               g = |y|^(p-1) sign(y),  d value / d log_scale = +-p sum |y|^p
 *   scale       y as in merge_scale.c: the sums of |y|^p over each row and over each column; p times them is the gradient
 *
 * Layout: weight is [heads, 2, half, columns], one unit a pair of rows; or [rows, columns], one unit a run of rows.
 * y is rounded to COMPUTE as the merged weight is; powers and sums are fp64: products where p is 2, 3 or 4, else libm's pow.
 * Sums: FPTQ_LANES interleaved accumulators, added pairwise; columns are added row by row, units in order by the operator.
 */
#ifndef STORAGE
#define FPTQ_FILE "lp_norm.c"
#include <math.h>

#include "../ops/units.h"
#include "rotation.h"

/* |y|^(p-1) sign(y) for a whole p from 2 to 4, or any p >= 1 (p = 0 stands for "any", with the exponent in `any`). */
static inline __attribute__((always_inline)) double fptq_power_slope(double y, int p, double any)
{
    switch (p) {
    case 2:
        return y;
    case 3:
        return y * fabs(y);
    case 4:
        return y * y * y;
    default:
        return y == 0 ? 0 : copysign(pow(fabs(y), any - 1), y);
    }
}

/* Calls function(..., p) with p = 2, 3 or 4 as a constant where the exponent is that, else with 0. */
#define FPTQ_WITH_POWER(exponent, function, ...) \
    do {                                         \
        if ((exponent) == 4) {                   \
            function(__VA_ARGS__, 4);            \
        } else if ((exponent) == 3) {            \
            function(__VA_ARGS__, 3);            \
        } else if ((exponent) == 2) {            \
            function(__VA_ARGS__, 2);            \
        } else {                                 \
            function(__VA_ARGS__, 0);            \
        }                                        \
    } while (0)
#include "for_each_dtype.h"
#else

#include "chunks.h"

static inline __attribute__((always_inline)) void LOCAL(norm_of_pairs)(int64_t begin, int64_t end,
                                                                       const struct fptq_lp_norm_query_key *args, int p)
{
    const int64_t columns = args->columns;
    for (int64_t index = begin; index < end; index++) {
        const struct fptq_pair pair = fptq_pair_of(index, args->half, args->group);
        const STORAGE *first = (const STORAGE *)args->weight + pair.first * columns, *second = first + args->half * columns;
        double wide_cosine, wide_sine, value[FPTQ_LANES] = {0}, dangle[FPTQ_LANES] = {0};
        fptq_rotation((double)((const COMPUTE *)args->angle)[pair.parameter],
                      (double)((const COMPUTE *)args->log_scale)[pair.parameter], args->inverse, &wide_cosine, &wide_sine);
        const COMPUTE cosine = (COMPUTE)wide_cosine, sine = (COMPUTE)wide_sine;
        for (int64_t c = 0; c < columns; c += FPTQ_LANES) {
            COMPUTE w_i[FPTQ_LANES], w_j[FPTQ_LANES];
            LOCAL(load_chunk)(w_i, first + c, columns - c);
            LOCAL(load_chunk)(w_j, second + c, columns - c);
            for (int l = 0; l < FPTQ_LANES; l++) {
                const double y_i = (double)(cosine * w_i[l] - sine * w_j[l]), y_j = (double)(sine * w_i[l] + cosine * w_j[l]);
                const double g_i = fptq_power_slope(y_i, p, args->p), g_j = fptq_power_slope(y_j, p, args->p);
                value[l] += g_i * y_i + g_j * y_j;
                dangle[l] += g_j * y_i - g_i * y_j;
            }
        }
        args->partials[2 * index] = fptq_sum_lanes(value);
        args->partials[2 * index + 1] = args->p * fptq_sum_lanes(dangle);
    }
}

void KERNEL(lp_norm_query_key)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_lp_norm_query_key *args = context;
    FPTQ_WITH_POWER(args->p, LOCAL(norm_of_pairs), begin, end, args);
}

/* One row: returns its sum of |y|^p and adds each column's to column_sums unless that is NULL. */
static inline __attribute__((always_inline)) double LOCAL(norm_of_row)(const struct fptq_lp_norm_scale *args, int64_t r,
                                                                       double *column_sums, int p)
{
    const int64_t columns = args->columns;
    const COMPUTE *factors = args->column_factors;
    const STORAGE *w_row = (const STORAGE *)args->weight + r * columns; /* weight[r, :] */
    const COMPUTE row_factor = args->row_log_scale ? (COMPUTE)exp((double)((const COMPUTE *)args->row_log_scale)[r]) : 1;
    double sums[FPTQ_LANES] = {0};
    for (int64_t c = 0; c < columns; c += FPTQ_LANES) {
        COMPUTE y[FPTQ_LANES];
        double power[FPTQ_LANES];
        LOCAL(load_chunk)(y, w_row + c, columns - c);
        LOCAL(scale_chunk)(y, row_factor, factors ? factors + c : NULL, columns - c);
        for (int l = 0; l < FPTQ_LANES; l++) {
            power[l] = fptq_power_slope((double)y[l], p, args->p) * (double)y[l];
            sums[l] += power[l];
        }
        if (column_sums) {
            LOCAL(add_chunk)(column_sums + c, power, columns - c);
        }
    }
    return fptq_sum_lanes(sums);
}

static inline __attribute__((always_inline)) void LOCAL(norm_of_rows)(int64_t begin, int64_t end,
                                                                      const struct fptq_lp_norm_scale *args, int p)
{
    for (int64_t unit = begin; unit < end; unit++) {
        double *column_sums = args->column_sums ? args->partials + args->rows + unit * args->columns : NULL;
        const int64_t first = unit * args->rows_per_unit, rest = args->rows - first;
        for (int64_t c = 0; column_sums && c < args->columns; c++) {
            column_sums[c] = 0;
        }
        for (int64_t r = first; r < first + (rest < args->rows_per_unit ? rest : args->rows_per_unit); r++) {
            args->partials[r] = LOCAL(norm_of_row)(args, r, column_sums, p);
        }
    }
}

void KERNEL(lp_norm_scale)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_lp_norm_scale *args = context;
    FPTQ_WITH_POWER(args->p, LOCAL(norm_of_rows), begin, end, args);
}

#endif
