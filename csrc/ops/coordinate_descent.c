/* coordinate_descent: checks and units. The formula is in cpu/coordinate_descent.c. */
#include "../cpu/dispatch.h"
#include "error.h"
#include "units.h"
#include "weights.h"

static fptq_status check(const struct fptq_coordinate_descent *args)
{
    if (args->dtype != FPTQ_F32 && args->dtype != FPTQ_F64) {
        return fptq_fail("coordinate_descent: the weight must be float32 or float64; slopes are summed in its own dtype");
    }
    FPTQ_TRY(fptq_check_size("coordinate_descent", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("coordinate_descent", "columns", args->columns));
    FPTQ_TRY(fptq_check_size("coordinate_descent", "groups", args->groups));
    FPTQ_TRY(fptq_check_size("coordinate_descent", "sweeps", args->sweeps));
    FPTQ_TRY(fptq_check_grid("coordinate_descent", args->grid));
    FPTQ_TRY(fptq_check_scale("coordinate_descent", args->scale, args->rows * args->groups, args->dtype));
    return fptq_check_columns("coordinate_descent", "hessian", args->hessian, args->columns, 0, args->columns, args->group,
                              args->groups, args->dtype);
}

fptq_status fptq_coordinate_descent(const struct fptq_coordinate_descent *args)
{
    FPTQ_TRY(check(args));
    bool out_of_memory = false;
    struct fptq_coordinate_descent launched = *args;
    launched.out_of_memory = &out_of_memory;
    const int64_t units = (args->rows + FPTQ_LANES - 1) / FPTQ_LANES;
    fptq_launch(FPTQ_KERNEL_coordinate_descent, args->dtype, units, FPTQ_LANES * args->columns * 64, &launched);
    return out_of_memory ? fptq_fail_memory("coordinate_descent", args->columns * FPTQ_LANES * 32) : FPTQ_OK;
}
