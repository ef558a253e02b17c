/* hadamard: checks and the plan of the size (hadamard_matrix.c). The transform is in cpu/hadamard.c. */
#include "../cpu/dispatch.h"
#include "error.h"

fptq_status fptq_hadamard(const struct fptq_hadamard *args)
{
    struct fptq_hadamard_plan plan;
    bool out_of_memory = false;
    FPTQ_TRY(fptq_check_dtype("hadamard", args->dtype));
    FPTQ_TRY(fptq_check_size("hadamard", "blocks", args->blocks));
    FPTQ_TRY(fptq_hadamard_plan_of(args->size, &plan));
    struct fptq_hadamard with_plan = *args;
    with_plan.plan = &plan;
    with_plan.out_of_memory = &out_of_memory;
    int64_t additions = plan.power;
    for (int64_t f = 0; f < plan.num_factors; f++) {
        additions += plan.order[f];
    }
    /* A sixteenth: additions are vectorized, what dispatch.c counts as the cost of an element is mostly memory. */
    fptq_launch(FPTQ_KERNEL_hadamard, args->dtype, args->blocks, args->size * (1 + additions / 16), &with_plan);
    return out_of_memory ? fptq_fail_memory("hadamard", 2 * args->size * (int64_t)sizeof(double)) : FPTQ_OK;
}
