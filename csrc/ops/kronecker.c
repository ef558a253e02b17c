/* kronecker: checks, units and the last additions. The formulas are in cpu/kronecker.c. */
#include <stdlib.h>

#include "../cpu/dispatch.h"
#include "error.h"
#include "weights.h"

static fptq_status check_dynamic(const char *op, const struct fptq_kronecker_forward *args)
{
    if (args->scale || args->zero_point) {
        return fptq_fail("%s: give scales, or let them be found for each block, not both", op);
    }
    FPTQ_TRY(fptq_check_grid(op, args->grid));
    FPTQ_TRY(fptq_check_clip_ratio(op, args->clip_ratio));
    return args->clip ? fptq_check_scale(op, args->clip, 1, args->dtype) : FPTQ_OK;
}

static fptq_status check(const char *op, const struct fptq_kronecker_forward *args)
{
    FPTQ_TRY(fptq_check_dtype(op, args->dtype));
    FPTQ_TRY(fptq_check_size(op, "blocks", args->blocks));
    FPTQ_TRY(fptq_check_size(op, "rows", args->rows));
    FPTQ_TRY(fptq_check_size(op, "columns", args->columns));
    if (args->dynamic_scale) {
        return check_dynamic(op, args);
    }
    if (!args->scale) {
        return FPTQ_OK;
    }
    if (args->scales != 1 && args->scales != args->blocks) {
        return fptq_fail("%s: there are %lld scales for %lld blocks; give one for all, or one for each", op,
                         (long long)args->scales, (long long)args->blocks);
    }
    FPTQ_TRY(fptq_check_grid(op, args->grid));
    return fptq_check_scale(op, args->scale, args->scales, args->dtype);
}

/* Multiplications and additions for each block, a sixteenth: they are vectorized (as in hadamard). */
static int64_t cost_of(const struct fptq_kronecker_forward *args)
{
    return args->rows * args->columns * (1 + (args->rows + args->columns) / 16);
}

static fptq_status fail_memory(const char *op, const struct fptq_kronecker_forward *args)
{
    return fptq_fail_memory(op, (8 * args->rows * args->columns + 4 * args->columns * args->columns) * (int64_t)sizeof(double));
}

fptq_status fptq_kronecker_forward(const struct fptq_kronecker_forward *args)
{
    const char *op = "kronecker";
    FPTQ_TRY(check(op, args));
    bool out_of_memory = false;
    struct fptq_kronecker_forward launched = *args;
    launched.out_of_memory = &out_of_memory;
    if (args->dynamic_scale) { /* each block finds its own, then rounds with it as with a given one */
        launched.scale = args->dynamic_scale;
        launched.zero_point = args->dynamic_zero_point;
        launched.scales = args->blocks;
    }
    fptq_launch(FPTQ_KERNEL_kronecker_forward, args->dtype, args->blocks, cost_of(args), &launched);
    if (out_of_memory) {
        return fail_memory(op, args);
    }
    return args->dynamic_scale ? fptq_check_scale(op, args->dynamic_scale, args->blocks, args->dtype) : FPTQ_OK;
}

/* Adds the units' sums, in order, and writes them; `first` is where they begin in each unit's `width` sums. */
static void finish(void *target, const struct fptq_kronecker_backward *args, int64_t units, int64_t first, int64_t count)
{
    const int64_t rows = args->forward.rows, columns = args->forward.columns, width = rows * rows + columns * columns;
    for (int64_t i = 0; target && i < count; i++) {
        double sum = 0;
        for (int64_t unit = 0; unit < units; unit++) {
            sum += args->partials[unit * width + first + i];
        }
        fptq_put(target, i, args->forward.dtype, sum);
    }
}

/* The gradients of scale and zero point: sums over all blocks that share one. */
static void finish_scales(const struct fptq_kronecker_backward *args)
{
    const struct fptq_kronecker_forward *forward = &args->forward;
    const int64_t blocks = forward->scales == 1 ? forward->blocks : 1;
    for (int64_t s = 0; s < forward->scales; s++) {
        double sums[2] = {0, 0};
        for (int64_t b = s * blocks; b < (s + 1) * blocks; b++) {
            sums[0] += args->scale_partials[2 * b];
            sums[1] += args->scale_partials[2 * b + 1];
        }
        fptq_put(args->dscale, s, forward->dtype, sums[0]);
        if (args->dzero_point) {
            fptq_put(args->dzero_point, s, forward->dtype, sums[1]);
        }
    }
}

fptq_status fptq_kronecker_backward(const struct fptq_kronecker_backward *args)
{
    const char *op = "kronecker_backward";
    const struct fptq_kronecker_forward *forward = &args->forward;
    FPTQ_TRY(check(op, forward));
    const int64_t rows = forward->rows, columns = forward->columns, blocks = forward->blocks;
    struct fptq_kronecker_backward launched = *args;
    bool out_of_memory = false;
    launched.forward.out_of_memory = &out_of_memory;
    launched.blocks_per_unit = fptq_rows_per_unit(blocks);
    const int64_t units = (blocks + launched.blocks_per_unit - 1) / launched.blocks_per_unit;
    const int64_t sums = units * (rows * rows + columns * columns), bytes = (sums + 2 * blocks + 1) * (int64_t)sizeof(double);
    launched.partials = malloc((size_t)bytes);
    if (!launched.partials) {
        return fptq_fail_memory(op, bytes);
    }
    launched.scale_partials = launched.partials + sums;
    fptq_launch(FPTQ_KERNEL_kronecker_backward, forward->dtype, units, 3 * launched.blocks_per_unit * cost_of(forward), &launched);
    if (!out_of_memory) {
        finish(args->dleft, &launched, units, 0, rows * rows);
        finish(args->dright, &launched, units, rows * rows, columns * columns);
        if (forward->scale) {
            finish_scales(&launched);
        }
    }
    free(launched.partials);
    return out_of_memory ? fail_memory(op, forward) : FPTQ_OK;
}
