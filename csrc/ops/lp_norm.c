/* lp_norm: checks, units and sums over units. The formulas are in cpu/lp_norm.c. */
#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "weights.h"

static fptq_status check_exponent(const char *op, double p)
{
    return p >= 1 && p <= 16 ? FPTQ_OK : fptq_fail("%s: p = %g must lie between 1 and 16", op, p);
}

fptq_status fptq_lp_norm_query_key(const struct fptq_lp_norm_query_key *args)
{
    const char *op = "lp_norm_query_key";
    FPTQ_TRY(fptq_check_pairs(op, args->heads, args->half, args->columns, args->group, args->dtype));
    FPTQ_TRY(check_exponent(op, args->p));
    const int64_t units = args->heads * args->half;
    struct fptq_lp_norm_query_key prepared = *args;
    prepared.partials = malloc((size_t)(units > 0 ? units : 1) * 2 * sizeof(double));
    if (!prepared.partials) {
        return fptq_fail_memory(op, units * 16);
    }
    fptq_launch(FPTQ_KERNEL_lp_norm_query_key, args->dtype, units, 2 * args->columns, &prepared);
    double total = 0;
    for (int64_t parameter = 0; parameter < units / args->group; parameter++) {
        const double value = fptq_sum_group(prepared.partials, parameter, args->half, args->group, 0);
        total += value;
        fptq_put(args->dangle, parameter, args->dtype, fptq_sum_group(prepared.partials, parameter, args->half, args->group, 1));
        fptq_put(args->dlog_scale, parameter, args->dtype, args->inverse ? -args->p * value : args->p * value);
    }
    *args->value = total;
    free(prepared.partials);
    return FPTQ_OK;
}

/* Adds the partial sums in order and writes what is wanted. */
static void finish(const struct fptq_lp_norm_scale *args, int64_t units)
{
    double total = 0;
    for (int64_t r = 0; r < args->rows; r++) {
        total += args->partials[r];
        if (args->row_sums) {
            args->row_sums[r] = args->partials[r];
        }
    }
    if (args->value) {
        *args->value = total;
    }
    for (int64_t c = 0; args->column_sums && c < args->columns; c++) {
        args->column_sums[c] = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            args->column_sums[c] += args->partials[args->rows + unit * args->columns + c];
        }
    }
}

fptq_status fptq_lp_norm_scale(const struct fptq_lp_norm_scale *args)
{
    const char *op = "lp_norm_scale";
    FPTQ_TRY(fptq_check_dtype(op, args->dtype));
    FPTQ_TRY(fptq_check_size(op, "rows", args->rows));
    FPTQ_TRY(fptq_check_size(op, "columns", args->columns));
    FPTQ_TRY(check_exponent(op, args->p));
    struct fptq_lp_norm_scale prepared = *args;
    void *factors;
    FPTQ_TRY(fptq_exp_factors(op, args->column_log_scale, args->columns, args->dtype, &factors));
    prepared.column_factors = factors;
    prepared.rows_per_unit = fptq_rows_per_unit(args->rows);
    const int64_t units = (args->rows + prepared.rows_per_unit - 1) / prepared.rows_per_unit;
    const int64_t bytes = (args->rows + (args->column_sums ? units * args->columns : 0) + 1) * (int64_t)sizeof(double);
    prepared.partials = malloc((size_t)bytes);
    if (!prepared.partials) {
        free(factors);
        return fptq_fail_memory(op, bytes);
    }
    fptq_launch(FPTQ_KERNEL_lp_norm_scale, args->dtype, units, prepared.rows_per_unit * args->columns, &prepared);
    finish(&prepared, units);
    free(prepared.partials);
    free(factors);
    return FPTQ_OK;
}
