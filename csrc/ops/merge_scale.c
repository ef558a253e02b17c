/* merge_scale: checks, exponentials of the columns, units and sums over units. The formulas are in cpu/merge_scale.c. */
#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "weights.h"

/* Checks the arguments, gives `inner` a value where nothing is quantized, and computes the column factors (to be freed). */
static fptq_status prepare(const char *op, struct fptq_merge_scale_forward *args, void **factors)
{
    FPTQ_TRY(fptq_check_dtype(op, args->dtype));
    FPTQ_TRY(fptq_check_size(op, "rows", args->rows));
    FPTQ_TRY(fptq_check_size(op, "columns", args->columns));
    if (args->scale) {
        FPTQ_TRY(fptq_check_quantizer(op, args->columns, args->inner, args->scale, args->rows, args->grid, args->dtype));
    } else {
        args->inner = args->columns > 0 ? args->columns : 1;
    }
    FPTQ_TRY(fptq_exp_factors(op, args->column_log_scale, args->columns, args->dtype, factors));
    args->column_factors = *factors;
    return FPTQ_OK;
}

fptq_status fptq_merge_scale_forward(const struct fptq_merge_scale_forward *args)
{
    struct fptq_merge_scale_forward prepared = *args;
    void *factors;
    FPTQ_TRY(prepare("merge_scale", &prepared, &factors));
    fptq_launch(FPTQ_KERNEL_merge_scale_forward, args->dtype, args->rows, args->columns, &prepared);
    free(factors);
    return FPTQ_OK;
}

fptq_status fptq_merge_scale_backward(const struct fptq_merge_scale_backward *args)
{
    const char *op = "merge_scale_backward";
    struct fptq_merge_scale_backward prepared = *args;
    void *factors;
    FPTQ_TRY(prepare(op, &prepared.forward, &factors));
    const struct fptq_merge_scale_forward *forward = &prepared.forward;
    prepared.rows_per_unit = fptq_rows_per_unit(forward->rows);
    const int64_t units = (forward->rows + prepared.rows_per_unit - 1) / prepared.rows_per_unit;
    const int64_t bytes = (units * forward->columns + 1) * (int64_t)sizeof(double);
    prepared.partials = args->dcolumn_log_scale ? malloc((size_t)bytes) : NULL;
    if (args->dcolumn_log_scale && !prepared.partials) {
        free(factors);
        return fptq_fail_memory(op, bytes);
    }
    fptq_launch(FPTQ_KERNEL_merge_scale_backward, forward->dtype, units, 2 * prepared.rows_per_unit * forward->columns, &prepared);
    for (int64_t c = 0; args->dcolumn_log_scale && c < forward->columns; c++) {
        double sum = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            sum += prepared.partials[unit * forward->columns + c];
        }
        fptq_put(args->dcolumn_log_scale, c, forward->dtype, sum);
    }
    free(prepared.partials);
    free(factors);
    return FPTQ_OK;
}
