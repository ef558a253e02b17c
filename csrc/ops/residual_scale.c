/* residual_scale: checks. The formulas are in cpu/residual_scale.c. */
#include "../cpu/dispatch.h"
#include "error.h"

static fptq_status check(const char *op, int64_t tokens, int64_t hidden, double eps, const void *running_scale, int32_t dtype)
{
    FPTQ_TRY(fptq_check_dtype(op, dtype));
    FPTQ_TRY(fptq_check_size(op, "tokens", tokens));
    FPTQ_TRY(fptq_check_size(op, "hidden", hidden));
    if (!(eps >= 0)) {
        return fptq_fail("%s: eps = %g must not be negative", op, eps);
    }
    for (int64_t t = 0; t < tokens; t++) {
        const double value = fptq_get(running_scale, t, dtype);
        if (value <= 0) { /* NaN and infinity may come from the residual and go on as such */
            return fptq_fail("%s: running_scale[%lld] = %g must be positive", op, (long long)t, value);
        }
    }
    return FPTQ_OK;
}

fptq_status fptq_residual_scale_forward(const struct fptq_residual_scale_forward *args)
{
    FPTQ_TRY(check("residual_scale", args->tokens, args->hidden, args->eps, args->running_scale, args->dtype));
    fptq_launch(FPTQ_KERNEL_residual_scale_forward, args->dtype, args->tokens, args->hidden, args);
    return FPTQ_OK;
}

fptq_status fptq_residual_scale_backward(const struct fptq_residual_scale_backward *args)
{
    FPTQ_TRY(check("residual_scale_backward", args->tokens, args->hidden, args->eps, args->running_scale, args->dtype));
    fptq_launch(FPTQ_KERNEL_residual_scale_backward, args->dtype, args->tokens, 2 * args->hidden, args);
    return FPTQ_OK;
}
