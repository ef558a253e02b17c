/*
 * fptquant::gptq_(Tensor(a!) weight, Tensor factor, Tensor scale, Tensor zero_point, Tensor group, int begin, int end, int grid,
 * int qmin, int qmax) -> Tensor loss
 *
 * weight [rows, columns], factor [columns, columns], scale and zero_point [rows, groups], group int64 [columns] or empty, loss
 * float64 [rows]. Columns [begin, end) of the weight are quantized in place, those behind take over the errors.
 */
#include "bind.h"

void boxed_gptq_(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "gptq_";
    OWNED tensor_handle weight_tensor = take(stack[0]), factor_tensor = take(stack[1]), scale_tensor = take(stack[2]),
                        zero_tensor = take(stack[3]), group_tensor = take(stack[4]);
    void *values = data_of(weight_tensor); /* before the view: memory that is shared until written moves here */
    const struct view weight = view_of(op, "weight", weight_tensor), factor = view_of(op, "factor", factor_tensor),
                      scale = view_of(op, "scale", scale_tensor), zero = view_of(op, "zero_point", zero_tensor),
                      group = view_of(op, "group", group_tensor);
    const int32_t dtype = floating_dtype(op, "weight", &weight);
    if (weight.ndim != 2 || scale.ndim != 2) {
        raise_error("%s: weight must be [rows, columns] and scale [rows, groups]", op);
    }
    const int64_t rows = weight.sizes[0], columns = weight.sizes[1], groups = scale.sizes[1];
    expect(op, "factor", &factor, columns * columns, weight.torch_dtype);
    expect(op, "scale", &scale, rows * groups, compute_dtype(dtype));
    const void *zero_point = optional(op, "zero_point", &zero, rows * groups, compute_dtype(dtype));
    const int64_t *group_of = optional(op, "group", &group, columns, torch.aoti_torch_dtype_int64());
    OWNED tensor_handle loss = new_tensor(op, 1, weight.sizes, torch.aoti_torch_dtype_float64());
    check_status(fptq_gptq(&(struct fptq_gptq){
        .weight = values,
        .loss = data_of(loss),
        .factor = factor.data,
        .scale = scale.data,
        .zero_point = zero_point,
        .group = group_of,
        .rows = rows,
        .columns = columns,
        .groups = groups,
        .begin = (int64_t)stack[5],
        .end = (int64_t)stack[6],
        .grid = {(int32_t)stack[7], (int32_t)stack[8], (int32_t)stack[9]},
        .dtype = dtype,
    }));
    stack[0] = give(&loss);
}
