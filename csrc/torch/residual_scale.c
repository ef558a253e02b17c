/*
 * fptquant::residual_scale(Tensor residual, Tensor running_scale, float eps) -> (Tensor normalized, Tensor new_running_scale)
 * fptquant::residual_scale_backward(Tensor dnormalized, Tensor dnew_running_scale, Tensor residual, Tensor running_scale,
 *     float eps) -> (Tensor dresidual, Tensor drunning_scale)
 *
 * residual is [..., hidden], running_scale has one entry per token.
 */
#include "bind.h"

/* Checks both tensors and returns the number of tokens. */
static int64_t tokens_of(const char *op, const struct view *residual, const struct view *running_scale, int32_t dtype)
{
    if (residual->ndim < 1 || residual->sizes[residual->ndim - 1] < 1) {
        raise_error("%s: residual must be [..., hidden] with at least one element per token", op);
    }
    const int64_t tokens = residual->numel / residual->sizes[residual->ndim - 1];
    expect(op, "running_scale", running_scale, tokens, compute_dtype(dtype));
    return tokens;
}

void boxed_residual_scale(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "residual_scale";
    OWNED tensor_handle residual_tensor = take(stack[0]), running_tensor = take(stack[1]);
    const struct view residual = view_of(op, "residual", residual_tensor), running = view_of(op, "running_scale", running_tensor);
    const int32_t dtype = floating_dtype(op, "residual", &residual);
    const int64_t tokens = tokens_of(op, &residual, &running, dtype);
    OWNED tensor_handle normalized = new_like(op, &residual);
    OWNED tensor_handle new_running = new_like(op, &running);
    check_status(fptq_residual_scale_forward(&(struct fptq_residual_scale_forward){
        .normalized = data_of(normalized),
        .new_running_scale = data_of(new_running),
        .residual = residual.data,
        .running_scale = running.data,
        .tokens = tokens,
        .hidden = residual.sizes[residual.ndim - 1],
        .eps = as_double(stack[2]),
        .dtype = dtype,
    }));
    stack[0] = give(&normalized);
    stack[1] = give(&new_running);
}

void boxed_residual_scale_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "residual_scale_backward";
    OWNED tensor_handle dnormalized_tensor = take(stack[0]), dnew_tensor = take(stack[1]), residual_tensor = take(stack[2]),
                        running_tensor = take(stack[3]);
    const struct view dnormalized = view_of(op, "dnormalized", dnormalized_tensor),
                      dnew = view_of(op, "dnew_running_scale", dnew_tensor), residual = view_of(op, "residual", residual_tensor),
                      running = view_of(op, "running_scale", running_tensor);
    const int32_t dtype = floating_dtype(op, "residual", &residual);
    const int64_t tokens = tokens_of(op, &residual, &running, dtype);
    expect(op, "dnormalized", &dnormalized, residual.numel, residual.torch_dtype);
    expect(op, "dnew_running_scale", &dnew, tokens, running.torch_dtype);
    OWNED tensor_handle dresidual = new_like(op, &residual);
    OWNED tensor_handle drunning = new_like(op, &running);
    check_status(fptq_residual_scale_backward(&(struct fptq_residual_scale_backward){
        .dresidual = data_of(dresidual),
        .drunning_scale = data_of(drunning),
        .dnormalized = dnormalized.data,
        .dnew_running_scale = dnew.data,
        .residual = residual.data,
        .running_scale = running.data,
        .tokens = tokens,
        .hidden = residual.sizes[residual.ndim - 1],
        .eps = as_double(stack[4]),
        .dtype = dtype,
    }));
    stack[0] = give(&dresidual);
    stack[1] = give(&drunning);
}
