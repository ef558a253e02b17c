/*
 * fptquant::merge_scale(Tensor weight, Tensor row_log_scale, Tensor column_log_scale) -> Tensor
 * fptquant::merge_scale_fake_quant(..., Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax) -> Tensor
 * and their backwards, whose dy comes first and whose bool weight_gradient comes last.
 *
 * weight is [rows, columns] or a bias [rows], seen as [rows, 1]; an empty log scale means 0.
 */
#include "bind.h"

static struct fptq_merge_scale_forward arguments_of(const char *op, const struct view *weight, const struct view *row,
                                                    const struct view *column)
{
    const int32_t dtype = floating_dtype(op, "weight", weight), compute = compute_dtype(dtype);
    if (weight->ndim < 1 || weight->ndim > 2) {
        raise_error("%s: weight must be a matrix or a bias", op);
    }
    const int64_t columns = weight->ndim == 2 ? weight->sizes[1] : 1;
    return (struct fptq_merge_scale_forward){
        .weight = weight->data,
        .row_log_scale = optional(op, "row_log_scale", row, weight->sizes[0], compute),
        .column_log_scale = optional(op, "column_log_scale", column, columns, compute),
        .rows = weight->sizes[0],
        .columns = columns,
        .dtype = dtype,
    };
}

/* Adds the quantizer from its tensors and from `options`: inner, grid, qmin, qmax. */
static void add_quantizer(const char *op, struct fptq_merge_scale_forward *args, const struct view *scale,
                          const struct view *zero_point, const stable_value *options)
{
    const int64_t inner = (int64_t)options[0];
    if (inner < 1 || scale->numel * inner != args->rows * args->columns) {
        raise_error("%s: scale must have one entry for each run of inner = %lld columns", op, (long long)inner);
    }
    expect(op, "scale", scale, scale->numel, compute_dtype(args->dtype));
    args->scale = scale->data;
    args->zero_point = optional(op, "zero_point", zero_point, scale->numel, compute_dtype(args->dtype));
    args->inner = inner;
    args->grid = (fptq_grid){(int32_t)options[1], (int32_t)options[2], (int32_t)options[3]};
}

void boxed_merge_scale(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_scale";
    OWNED tensor_handle weight_tensor = take(stack[0]), row_tensor = take(stack[1]), column_tensor = take(stack[2]);
    const struct view weight = view_of(op, "weight", weight_tensor), row = view_of(op, "row_log_scale", row_tensor),
                      column = view_of(op, "column_log_scale", column_tensor);
    struct fptq_merge_scale_forward args = arguments_of(op, &weight, &row, &column);
    OWNED tensor_handle y = new_like(op, &weight);
    args.y = data_of(y);
    check_status(fptq_merge_scale_forward(&args));
    stack[0] = give(&y);
}

void boxed_merge_scale_fake_quant(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_scale_fake_quant";
    OWNED tensor_handle weight_tensor = take(stack[0]), row_tensor = take(stack[1]), column_tensor = take(stack[2]),
                        scale_tensor = take(stack[3]), zero_tensor = take(stack[4]);
    const struct view weight = view_of(op, "weight", weight_tensor), row = view_of(op, "row_log_scale", row_tensor),
                      column = view_of(op, "column_log_scale", column_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_merge_scale_forward args = arguments_of(op, &weight, &row, &column);
    add_quantizer(op, &args, &scale, &zero_point, stack + 5);
    OWNED tensor_handle y = new_like(op, &weight);
    args.y = data_of(y);
    check_status(fptq_merge_scale_forward(&args));
    stack[0] = give(&y);
}

void boxed_merge_scale_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_scale_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), weight_tensor = take(stack[1]), row_tensor = take(stack[2]),
                        column_tensor = take(stack[3]);
    const struct view dy = view_of(op, "dy", dy_tensor), weight = view_of(op, "weight", weight_tensor),
                      row = view_of(op, "row_log_scale", row_tensor), column = view_of(op, "column_log_scale", column_tensor);
    struct fptq_merge_scale_backward args = {.forward = arguments_of(op, &weight, &row, &column)};
    expect(op, "dy", &dy, weight.numel, weight.torch_dtype);
    const bool wanted = stack[4] != 0;
    OWNED tensor_handle dweight = wanted ? new_like(op, &weight) : new_absent(op, weight.torch_dtype);
    OWNED tensor_handle drow = new_like(op, &row);
    OWNED tensor_handle dcolumn = new_like(op, &column);
    args.dweight = data_of(dweight);
    args.drow_log_scale = data_of(drow);
    args.dcolumn_log_scale = data_of(dcolumn);
    args.dy = dy.data;
    check_status(fptq_merge_scale_backward(&args));
    stack[0] = give(&dweight);
    stack[1] = give(&drow);
    stack[2] = give(&dcolumn);
}

void boxed_merge_scale_fake_quant_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_scale_fake_quant_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), weight_tensor = take(stack[1]), row_tensor = take(stack[2]),
                        column_tensor = take(stack[3]), scale_tensor = take(stack[4]), zero_tensor = take(stack[5]);
    const struct view dy = view_of(op, "dy", dy_tensor), weight = view_of(op, "weight", weight_tensor),
                      row = view_of(op, "row_log_scale", row_tensor), column = view_of(op, "column_log_scale", column_tensor),
                      scale = view_of(op, "scale", scale_tensor), zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_merge_scale_backward args = {.forward = arguments_of(op, &weight, &row, &column)};
    add_quantizer(op, &args.forward, &scale, &zero_point, stack + 6);
    expect(op, "dy", &dy, weight.numel, weight.torch_dtype);
    const bool wanted = stack[10] != 0;
    OWNED tensor_handle dweight = wanted ? new_like(op, &weight) : new_absent(op, weight.torch_dtype);
    OWNED tensor_handle drow = new_like(op, &row);
    OWNED tensor_handle dcolumn = new_like(op, &column);
    OWNED tensor_handle dscale = new_like(op, &scale);
    OWNED tensor_handle dzero_point = new_like(op, &zero_point);
    args.dweight = data_of(dweight);
    args.drow_log_scale = data_of(drow);
    args.dcolumn_log_scale = data_of(dcolumn);
    args.dscale = data_of(dscale);
    args.dzero_point = data_of(dzero_point);
    args.dy = dy.data;
    check_status(fptq_merge_scale_backward(&args));
    stack[0] = give(&dweight);
    stack[1] = give(&drow);
    stack[2] = give(&dcolumn);
    stack[3] = give(&dscale);
    stack[4] = give(&dzero_point);
}
