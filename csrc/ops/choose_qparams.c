/* choose_qparams: checks. The formula is in cpu/choose_qparams.c. */
#include "../cpu/dispatch.h"
#include "error.h"

fptq_status fptq_choose_qparams(const struct fptq_choose_qparams *args)
{
    FPTQ_TRY(fptq_check_dtype("choose_qparams", args->dtype));
    FPTQ_TRY(fptq_check_size("choose_qparams", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("choose_qparams", "columns", args->columns));
    FPTQ_TRY(fptq_check_grid("choose_qparams", args->grid));
    FPTQ_TRY(fptq_check_clip_ratio("choose_qparams", args->clip_ratio));
    fptq_launch(FPTQ_KERNEL_choose_qparams, args->dtype, args->rows, args->columns, args);
    return FPTQ_OK;
}
