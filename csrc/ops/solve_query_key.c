/* solve_query_key: checks and units. The formula is in cpu/solve_query_key.c. */
#include "../cpu/dispatch.h"
#include "error.h"

fptq_status fptq_solve_query_key(const struct fptq_solve_query_key *args)
{
    FPTQ_TRY(fptq_check_size("solve_query_key", "pairs", args->pairs));
    fptq_launch(FPTQ_KERNEL_solve_query_key, FPTQ_F64, args->pairs, 4096, args);
    return FPTQ_OK;
}
