/* merge_query_key, query_key_moments: checks, units and sums over heads. The formulas are in cpu/merge_query_key.c. */
#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "weights.h"

/* Checks the arguments and gives `inner` a value where nothing is quantized: one run of all columns. */
static fptq_status check(const char *op, struct fptq_merge_query_key_forward *args)
{
    FPTQ_TRY(fptq_check_pairs(op, args->heads, args->half, args->columns, args->group, args->dtype));
    if (args->scale) {
        return fptq_check_quantizer(op, args->columns, args->inner, args->scale, args->heads * 2 * args->half, args->grid,
                                    args->dtype);
    }
    args->inner = args->columns > 0 ? args->columns : 1;
    return FPTQ_OK;
}

fptq_status fptq_merge_query_key_forward(const struct fptq_merge_query_key_forward *args)
{
    struct fptq_merge_query_key_forward checked = *args;
    FPTQ_TRY(check("merge_query_key", &checked));
    fptq_launch(FPTQ_KERNEL_merge_query_key_forward, args->dtype, args->heads * args->half, 2 * args->columns, &checked);
    return FPTQ_OK;
}

fptq_status fptq_merge_query_key_backward(const struct fptq_merge_query_key_backward *args)
{
    const char *op = "merge_query_key_backward";
    struct fptq_merge_query_key_backward checked = *args;
    FPTQ_TRY(check(op, &checked.forward));
    const struct fptq_merge_query_key_forward *forward = &checked.forward;
    const int64_t units = forward->heads * forward->half;
    checked.partials = malloc((size_t)(units > 0 ? units : 1) * 2 * sizeof(double));
    if (!checked.partials) {
        return fptq_fail_memory(op, units * 16);
    }
    fptq_launch(FPTQ_KERNEL_merge_query_key_backward, forward->dtype, units, 4 * forward->columns, &checked);
    for (int64_t parameter = 0; parameter < units / forward->group; parameter++) {
        const double dlog_scale = fptq_sum_group(checked.partials, parameter, forward->half, forward->group, 1);
        fptq_put(args->dangle, parameter, forward->dtype,
                 fptq_sum_group(checked.partials, parameter, forward->half, forward->group, 0));
        fptq_put(args->dlog_scale, parameter, forward->dtype, forward->inverse ? -dlog_scale : dlog_scale);
    }
    free(checked.partials);
    return FPTQ_OK;
}

fptq_status fptq_query_key_moments(const struct fptq_query_key_moments *args)
{
    FPTQ_TRY(fptq_check_pairs("query_key_moments", args->heads, args->half, args->columns, 1, args->dtype));
    fptq_launch(FPTQ_KERNEL_query_key_moments, args->dtype, args->heads * args->half, 2 * args->columns, args);
    return FPTQ_OK;
}
