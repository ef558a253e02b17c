/* gptq: checks and units. The formula is in cpu/gptq.c. */
#include "../cpu/dispatch.h"
#include "error.h"
#include "units.h"
#include "weights.h"

static fptq_status check(const struct fptq_gptq *args)
{
    if (args->dtype != FPTQ_F32 && args->dtype != FPTQ_F64) {
        return fptq_fail("gptq: the weight must be float32 or float64; errors are spread in its own dtype");
    }
    FPTQ_TRY(fptq_check_size("gptq", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("gptq", "columns", args->columns));
    FPTQ_TRY(fptq_check_size("gptq", "groups", args->groups));
    FPTQ_TRY(fptq_check_grid("gptq", args->grid));
    if (args->begin < 0 || args->end < args->begin || args->columns < args->end) {
        return fptq_fail("gptq: columns %lld to %lld are not within 0 and %lld", (long long)args->begin, (long long)args->end,
                         (long long)args->columns);
    }
    FPTQ_TRY(fptq_check_scale("gptq", args->scale, args->rows * args->groups, args->dtype));
    return fptq_check_columns("gptq", "factor", args->factor, args->columns, args->begin, args->end, args->group, args->groups,
                              args->dtype);
}

fptq_status fptq_gptq(const struct fptq_gptq *args)
{
    FPTQ_TRY(check(args));
    bool out_of_memory = false;
    struct fptq_gptq launched = *args;
    launched.out_of_memory = &out_of_memory;
    const int64_t columns = args->columns - args->begin;
    fptq_launch(FPTQ_KERNEL_gptq, args->dtype, (args->rows + FPTQ_LANES - 1) / FPTQ_LANES, FPTQ_LANES * columns * 64, &launched);
    return out_of_memory ? fptq_fail_memory("gptq", columns * FPTQ_LANES * 8) : FPTQ_OK;
}
