/* choose_qparams: checks. The formula is in cpu/choose_qparams.c. */
#include "../cpu/dispatch.h"
#include "error.h"

fptq_status fptq_choose_qparams(const struct fptq_choose_qparams *args)
{
    FPTQ_TRY(fptq_check_dtype("choose_qparams", args->dtype));
    FPTQ_TRY(fptq_check_size("choose_qparams", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("choose_qparams", "columns", args->columns));
    FPTQ_TRY(fptq_check_grid("choose_qparams", args->grid));
    if (!(args->clip_ratio > 0 && args->clip_ratio <= 1)) {
        return fptq_fail("choose_qparams: clip_ratio = %g must lie in (0, 1]", args->clip_ratio);
    }
    fptq_launch(FPTQ_KERNEL_choose_qparams, args->dtype, args->rows, args->columns, args);
    return FPTQ_OK;
}
