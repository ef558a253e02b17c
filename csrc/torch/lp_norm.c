/*
 * fptquant::lp_norm_query_key(Tensor weight, Tensor angle, Tensor log_scale, int group, bool inverse, float p)
 *     -> (Tensor value, Tensor dangle, Tensor dlog_scale)
 * fptquant::lp_norm_scale(Tensor weight, Tensor row_log_scale, Tensor column_log_scale, float p)
 *     -> (Tensor value, Tensor drow_log_scale, Tensor dcolumn_log_scale)
 * fptquant::scale_moments(Tensor weight, float p) -> (Tensor row, Tensor column), float64
 *
 * value is a float64 scalar, the gradients have the dtype of their parameters.
 */
#include "bind.h"

void boxed_lp_norm_query_key(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "lp_norm_query_key";
    OWNED tensor_handle weight_tensor = take(stack[0]), angle_tensor = take(stack[1]), log_scale_tensor = take(stack[2]);
    const struct view weight = view_of(op, "weight", weight_tensor), angle = view_of(op, "angle", angle_tensor),
                      log_scale = view_of(op, "log_scale", log_scale_tensor);
    const int32_t dtype = floating_dtype(op, "weight", &weight);
    const int64_t group = (int64_t)stack[3];
    if (weight.ndim < 1 || angle.ndim != 2 || group < 1 || weight.sizes[0] != angle.sizes[0] * group * 2 * angle.sizes[1]) {
        raise_error("%s: weight must have one row for each of kv_heads * group heads times head_dim", op);
    }
    expect(op, "angle", &angle, angle.numel, compute_dtype(dtype));
    expect(op, "log_scale", &log_scale, angle.numel, compute_dtype(dtype));
    OWNED tensor_handle value = new_tensor(op, 0, NULL, torch.aoti_torch_dtype_float64());
    OWNED tensor_handle dangle = new_like(op, &angle);
    OWNED tensor_handle dlog_scale = new_like(op, &angle);
    check_status(fptq_lp_norm_query_key(&(struct fptq_lp_norm_query_key){
        .value = data_of(value),
        .dangle = data_of(dangle),
        .dlog_scale = data_of(dlog_scale),
        .weight = weight.data,
        .angle = angle.data,
        .log_scale = log_scale.data,
        .heads = angle.sizes[0] * group,
        .half = angle.sizes[1],
        .columns = weight.sizes[0] > 0 ? weight.numel / weight.sizes[0] : 0,
        .group = group,
        .inverse = stack[4] != 0,
        .p = as_double(stack[5]),
        .dtype = dtype,
    }));
    stack[0] = give(&value);
    stack[1] = give(&dangle);
    stack[2] = give(&dlog_scale);
}

/* The gradient of a log scale: p times its sums of powers, in the dtype of computation; absent where the scale is. */
static tensor_handle gradient_of(const char *op, const struct view *log_scale, const void *sums_data, double p)
{
    tensor_handle gradient = new_tensor(op, log_scale->ndim, log_scale->sizes, log_scale->torch_dtype);
    const double *sums = sums_data;
    void *data = data_of(gradient);
    for (int64_t i = 0; i < log_scale->numel; i++) {
        if (log_scale->torch_dtype == torch.aoti_torch_dtype_float64()) {
            ((double *)data)[i] = p * sums[i];
        } else {
            ((float *)data)[i] = (float)(p * sums[i]);
        }
    }
    return gradient;
}

void boxed_lp_norm_scale(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "lp_norm_scale";
    OWNED tensor_handle weight_tensor = take(stack[0]), row_tensor = take(stack[1]), column_tensor = take(stack[2]);
    const struct view weight = view_of(op, "weight", weight_tensor), row = view_of(op, "row_log_scale", row_tensor),
                      column = view_of(op, "column_log_scale", column_tensor);
    const int32_t dtype = floating_dtype(op, "weight", &weight), float64 = torch.aoti_torch_dtype_float64();
    if (weight.ndim < 1 || weight.ndim > 2) {
        raise_error("%s: weight must be a matrix or a bias", op);
    }
    const int64_t columns = weight.ndim == 2 ? weight.sizes[1] : 1;
    const double p = as_double(stack[3]);
    OWNED tensor_handle value = new_tensor(op, 0, NULL, float64);
    OWNED tensor_handle row_sums = new_tensor(op, row.ndim, row.sizes, float64);
    OWNED tensor_handle column_sums = new_tensor(op, column.ndim, column.sizes, float64);
    check_status(fptq_lp_norm_scale(&(struct fptq_lp_norm_scale){
        .value = data_of(value),
        .row_sums = data_of(row_sums),
        .column_sums = data_of(column_sums),
        .weight = weight.data,
        .row_log_scale = optional(op, "row_log_scale", &row, weight.sizes[0], compute_dtype(dtype)),
        .column_log_scale = optional(op, "column_log_scale", &column, columns, compute_dtype(dtype)),
        .rows = weight.sizes[0],
        .columns = columns,
        .p = p,
        .dtype = dtype,
    }));
    OWNED tensor_handle drow = gradient_of(op, &row, data_of(row_sums), p);
    OWNED tensor_handle dcolumn = gradient_of(op, &column, data_of(column_sums), p);
    stack[0] = give(&value);
    stack[1] = give(&drow);
    stack[2] = give(&dcolumn);
}

void boxed_scale_moments(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "scale_moments";
    OWNED tensor_handle weight_tensor = take(stack[0]);
    const struct view weight = view_of(op, "weight", weight_tensor);
    const int32_t dtype = floating_dtype(op, "weight", &weight), float64 = torch.aoti_torch_dtype_float64();
    if (weight.ndim != 2) {
        raise_error("%s: weight must be a matrix", op);
    }
    OWNED tensor_handle row_sums = new_tensor(op, 1, weight.sizes, float64);
    OWNED tensor_handle column_sums = new_tensor(op, 1, weight.sizes + 1, float64);
    check_status(fptq_lp_norm_scale(&(struct fptq_lp_norm_scale){
        .row_sums = data_of(row_sums),
        .column_sums = data_of(column_sums),
        .weight = weight.data,
        .rows = weight.sizes[0],
        .columns = weight.sizes[1],
        .p = as_double(stack[1]),
        .dtype = dtype,
    }));
    stack[0] = give(&row_sums);
    stack[1] = give(&column_sums);
}
