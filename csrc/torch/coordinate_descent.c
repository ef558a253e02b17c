/*
 * fptquant::coordinate_descent_(Tensor(a!) quantized, Tensor weight, Tensor hessian, Tensor scale, Tensor zero_point, Tensor group,
 * int sweeps, int grid, int qmin, int qmax) -> Tensor loss
 *
 * quantized and weight [rows, columns], hessian [columns, columns], scale and zero_point [rows, groups], group int64 [columns] or
 * empty, loss float64 [rows].
 */
#include "bind.h"

void boxed_coordinate_descent_(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "coordinate_descent_";
    OWNED tensor_handle quantized_tensor = take(stack[0]), weight_tensor = take(stack[1]), hessian_tensor = take(stack[2]),
                        scale_tensor = take(stack[3]), zero_tensor = take(stack[4]), group_tensor = take(stack[5]);
    void *values = data_of(quantized_tensor); /* before the view: memory that is shared until written moves here */
    const struct view quantized = view_of(op, "quantized", quantized_tensor), weight = view_of(op, "weight", weight_tensor),
                      hessian = view_of(op, "hessian", hessian_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero = view_of(op, "zero_point", zero_tensor), group = view_of(op, "group", group_tensor);
    const int32_t dtype = floating_dtype(op, "quantized", &quantized);
    if (quantized.ndim != 2 || scale.ndim != 2) {
        raise_error("%s: quantized must be [rows, columns] and scale [rows, groups]", op);
    }
    const int64_t rows = quantized.sizes[0], columns = quantized.sizes[1], groups = scale.sizes[1];
    expect(op, "weight", &weight, rows * columns, quantized.torch_dtype);
    expect(op, "hessian", &hessian, columns * columns, quantized.torch_dtype);
    expect(op, "scale", &scale, rows * groups, compute_dtype(dtype));
    const void *zero_point = optional(op, "zero_point", &zero, rows * groups, compute_dtype(dtype));
    const int64_t *group_of = optional(op, "group", &group, columns, torch.aoti_torch_dtype_int64());
    OWNED tensor_handle loss = new_tensor(op, 1, quantized.sizes, torch.aoti_torch_dtype_float64());
    check_status(fptq_coordinate_descent(&(struct fptq_coordinate_descent){
        .quantized = values,
        .loss = data_of(loss),
        .weight = weight.data,
        .hessian = hessian.data,
        .scale = scale.data,
        .zero_point = zero_point,
        .group = group_of,
        .rows = rows,
        .columns = columns,
        .groups = groups,
        .sweeps = (int64_t)stack[6],
        .grid = {(int32_t)stack[7], (int32_t)stack[8], (int32_t)stack[9]},
        .dtype = dtype,
    }));
    stack[0] = give(&loss);
}
