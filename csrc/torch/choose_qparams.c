/*
 * fptquant::choose_qparams(Tensor x, float clip_ratio, bool symmetric, int grid, int qmin, int qmax)
 *     -> (Tensor scale, Tensor zero_point)                                                                        [..., 1]
 */
#include "bind.h"

void boxed_choose_qparams(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "choose_qparams";
    OWNED tensor_handle x_tensor = take(stack[0]);
    const struct view x = view_of(op, "x", x_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    const struct rows rows = rows_of(op, "x", &x);
    OWNED tensor_handle scale = new_row_values(op, &x), zero_point = new_row_values(op, &x);
    check_status(fptq_choose_qparams(&(struct fptq_choose_qparams){
        .scale = data_of(scale),
        .zero_point = data_of(zero_point),
        .x = x.data,
        .rows = rows.count,
        .columns = rows.length,
        .grid = {(int32_t)stack[3], (int32_t)stack[4], (int32_t)stack[5]},
        .symmetric = stack[2] != 0,
        .clip_ratio = as_double(stack[1]),
        .dtype = dtype,
    }));
    stack[0] = give(&scale);
    stack[1] = give(&zero_point);
}
