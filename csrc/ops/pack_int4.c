/* pack_int4, unpack_int4: checks. The layout is in cpu/pack_int4.c. */
#include "../cpu/dispatch.h"
#include "error.h"

fptq_status fptq_pack_int4(const struct fptq_pack_int4 *args)
{
    bool out_of_range = false;
    struct fptq_pack_int4 checked = *args;
    FPTQ_TRY(fptq_check_size("pack_int4", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("pack_int4", "columns", args->columns));
    checked.out_of_range = &out_of_range;
    fptq_launch(FPTQ_KERNEL_pack_int4, FPTQ_F32, args->rows, args->columns, &checked);
    if (out_of_range) {
        return fptq_fail("pack_int4: a value lies outside %s", args->is_signed ? "-8..7" : "0..15");
    }
    return FPTQ_OK;
}

fptq_status fptq_unpack_int4(const struct fptq_unpack_int4 *args)
{
    FPTQ_TRY(fptq_check_size("unpack_int4", "rows", args->rows));
    FPTQ_TRY(fptq_check_size("unpack_int4", "columns", args->columns));
    fptq_launch(FPTQ_KERNEL_unpack_int4, FPTQ_F32, args->rows, args->columns, args);
    return FPTQ_OK;
}
