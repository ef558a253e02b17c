/* rotate_blocks: checks and units. The formula is in cpu/rotate_blocks.c. */
#include <stdlib.h>
#include <string.h>

#include "../cpu/dispatch.h"
#include "error.h"

/* Rows that share the preparation of a matrix. */
#define FPTQ_ROTATED_ROWS 64

/* Every channel must stand in the permutation once. */
static fptq_status check_permutation(const int64_t *permutation, int64_t columns)
{
    unsigned char *seen = calloc((size_t)(columns > 0 ? columns : 1), 1);
    if (!seen) {
        return fptq_fail_memory("rotate_blocks", columns);
    }
    fptq_status status = FPTQ_OK;
    for (int64_t i = 0; i < columns && status == FPTQ_OK; i++) {
        const int64_t channel = permutation[i];
        if (channel < 0 || channel >= columns || seen[channel]) {
            status = fptq_fail("rotate_blocks: permutation[%lld] = %lld is outside of 0 .. %lld or stands there twice",
                               (long long)i, (long long)channel, (long long)columns - 1);
        } else {
            seen[channel] = 1;
        }
    }
    free(seen);
    return status;
}

fptq_status fptq_rotate_blocks(const struct fptq_rotate_blocks *args)
{
    const char *op = "rotate_blocks";
    FPTQ_TRY(fptq_check_dtype(op, args->dtype));
    FPTQ_TRY(fptq_check_size(op, "rows", args->rows));
    FPTQ_TRY(fptq_check_size(op, "blocks", args->blocks));
    FPTQ_TRY(fptq_check_size(op, "size", args->size));
    if (args->permutation) {
        FPTQ_TRY(check_permutation(args->permutation, args->blocks * args->size));
    }
    bool out_of_memory = false;
    struct fptq_rotate_blocks launched = *args;
    launched.out_of_memory = &out_of_memory;
    launched.rows_per_unit = FPTQ_ROTATED_ROWS;
    const int64_t units = (args->rows + FPTQ_ROTATED_ROWS - 1) / FPTQ_ROTATED_ROWS;
    const int64_t values = FPTQ_ROTATED_ROWS * args->blocks * args->size;
    /* A sixteenth of the multiplications: they are vectorized (as in hadamard). */
    fptq_launch(FPTQ_KERNEL_rotate_blocks, args->dtype, units, values * (1 + args->size / 16), &launched);
    return out_of_memory ? fptq_fail_memory(op, 3 * FPTQ_ROTATED_ROWS * args->size * (int64_t)sizeof(double)) : FPTQ_OK;
}
