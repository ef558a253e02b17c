/* fake_quant: checks, units and the last additions. The formula is in cpu/fake_quant.c. */
#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "units.h"

static fptq_status check(const char *op, int64_t outer, int64_t channels, int64_t inner, fptq_grid grid, int32_t dtype)
{
    FPTQ_TRY(fptq_check_dtype(op, dtype));
    FPTQ_TRY(fptq_check_size(op, "outer", outer));
    FPTQ_TRY(fptq_check_size(op, "channels", channels));
    FPTQ_TRY(fptq_check_size(op, "inner", inner));
    return fptq_check_grid(op, grid);
}

fptq_status fptq_fake_quant_forward(const struct fptq_fake_quant_forward *args)
{
    FPTQ_TRY(check("fake_quant", args->outer, args->channels, args->inner, args->grid, args->dtype));
    FPTQ_TRY(fptq_check_scale("fake_quant", args->scale, args->channels, args->dtype));
    const int64_t units = args->outer * args->channels * fptq_blocks_per_row(args->inner);
    const int64_t cost = args->inner < FPTQ_BLOCK ? args->inner : FPTQ_BLOCK;
    fptq_launch(FPTQ_KERNEL_fake_quant_forward, args->dtype, units, cost, args);
    return FPTQ_OK;
}

fptq_status fptq_fake_quant_backward(const struct fptq_fake_quant_backward *args)
{
    FPTQ_TRY(check("fake_quant_backward", args->outer, args->channels, args->inner, args->grid, args->dtype));
    FPTQ_TRY(fptq_check_scale("fake_quant_backward", args->scale, args->channels, args->dtype));
    const int64_t blocks = fptq_blocks_per_row(args->inner), units = args->outer * args->channels * blocks;
    const int64_t cost = args->inner < FPTQ_BLOCK ? args->inner : FPTQ_BLOCK;
    struct fptq_fake_quant_backward with_partials = *args;
    with_partials.partials = malloc((size_t)(units > 0 ? units : 1) * 2 * sizeof(double));
    if (!with_partials.partials) {
        return fptq_fail_memory("fake_quant_backward", units * 16);
    }
    fptq_launch(FPTQ_KERNEL_fake_quant_backward, args->dtype, units, cost, &with_partials);
    for (int64_t c = 0; c < args->channels; c++) {
        double dscale = 0, dzero_point = 0;
        for (int64_t o = 0; o < args->outer; o++) {
            for (int64_t b = 0; b < blocks; b++) {
                const double *partial = with_partials.partials + 2 * ((o * args->channels + c) * blocks + b);
                dscale += partial[0];
                dzero_point += partial[1];
            }
        }
        fptq_put(args->dscale, c, args->dtype, dscale);
        if (args->dzero_point) {
            fptq_put(args->dzero_point, c, args->dtype, dzero_point);
        }
    }
    free(with_partials.partials);
    return FPTQ_OK;
}
