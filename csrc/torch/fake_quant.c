/*
 * fptquant::fake_quant(Tensor x, Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax) -> Tensor
 * fptquant::fake_quant_backward(Tensor dy, Tensor x, Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax)
 *     -> (Tensor dx, Tensor dscale, Tensor dzero_point)
 *
 * x is [outer, channels, inner] with channels = scale.numel() and outer = x.numel() / (channels * inner). An empty zero_point
 * means 0.
 */
#include "bind.h"

void boxed_fake_quant(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "fake_quant";
    OWNED tensor_handle x_tensor = take(stack[0]), scale_tensor = take(stack[1]), zero_tensor = take(stack[2]);
    const struct view x = view_of(op, "x", x_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x), compute = compute_dtype(dtype);
    const struct layout layout = layout_of(op, &x, scale.numel, (int64_t)stack[3]);
    expect(op, "scale", &scale, layout.channels, compute);

    OWNED tensor_handle y = new_like(op, &x);
    check_status(fptq_fake_quant_forward(&(struct fptq_fake_quant_forward){
        .y = data_of(y),
        .x = x.data,
        .scale = scale.data,
        .zero_point = optional(op, "zero_point", &zero_point, layout.channels, compute),
        .outer = layout.outer,
        .channels = layout.channels,
        .inner = layout.inner,
        .grid = {(int32_t)stack[4], (int32_t)stack[5], (int32_t)stack[6]},
        .dtype = dtype,
    }));
    stack[0] = give(&y);
}

void boxed_fake_quant_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "fake_quant_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), x_tensor = take(stack[1]), scale_tensor = take(stack[2]),
                        zero_tensor = take(stack[3]);
    const struct view dy = view_of(op, "dy", dy_tensor), x = view_of(op, "x", x_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x), compute = compute_dtype(dtype);
    const struct layout layout = layout_of(op, &x, scale.numel, (int64_t)stack[4]);
    expect(op, "scale", &scale, layout.channels, compute);
    expect(op, "dy", &dy, x.numel, x.torch_dtype);

    OWNED tensor_handle dx = new_like(op, &x);
    OWNED tensor_handle dscale = new_tensor(op, scale.ndim, scale.sizes, compute);
    OWNED tensor_handle dzero_point = new_tensor(op, zero_point.ndim, zero_point.sizes, compute);
    check_status(fptq_fake_quant_backward(&(struct fptq_fake_quant_backward){
        .dx = data_of(dx),
        .dscale = data_of(dscale),
        .dzero_point = data_of(dzero_point),
        .dy = dy.data,
        .x = x.data,
        .scale = scale.data,
        .zero_point = optional(op, "zero_point", &zero_point, layout.channels, compute),
        .outer = layout.outer,
        .channels = layout.channels,
        .inner = layout.inner,
        .grid = {(int32_t)stack[5], (int32_t)stack[6], (int32_t)stack[7]},
        .dtype = dtype,
    }));
    stack[0] = give(&dx);
    stack[1] = give(&dscale);
    stack[2] = give(&dzero_point);
}
