/*
 * fptquant::merge_query_key(Tensor weight, Tensor angle, Tensor log_scale, int group, bool inverse) -> Tensor
 * fptquant::merge_query_key_fake_quant(..., Tensor scale, Tensor zero_point, int group, bool inverse, int inner, int grid,
 *     int qmin, int qmax) -> Tensor
 * and their backwards, whose dy comes first and whose bool weight_gradient comes last.
 *
 * weight is [heads * 2 * half, columns] or a bias [heads * 2 * half]; angle is [heads / group, half].
 */
#include "bind.h"

/* Fills the arguments that all four operators share from their tensors and from `options`: group, inverse. */
static struct fptq_merge_query_key_forward arguments_of(const char *op, const struct view *weight, const struct view *angle,
                                                        const struct view *log_scale, const stable_value *options)
{
    const int32_t dtype = floating_dtype(op, "weight", weight);
    const int64_t group = (int64_t)options[0];
    if (weight->ndim < 1 || angle->ndim != 2 || group < 1 || weight->sizes[0] != angle->sizes[0] * group * 2 * angle->sizes[1]) {
        raise_error("%s: weight must have one row for each of kv_heads * group heads times head_dim", op);
    }
    expect(op, "angle", angle, angle->numel, compute_dtype(dtype));
    expect(op, "log_scale", log_scale, angle->numel, compute_dtype(dtype));
    return (struct fptq_merge_query_key_forward){
        .weight = weight->data,
        .angle = angle->data,
        .log_scale = log_scale->data,
        .heads = angle->sizes[0] * group,
        .half = angle->sizes[1],
        .columns = weight->sizes[0] > 0 ? weight->numel / weight->sizes[0] : 0,
        .group = group,
        .inverse = options[1] != 0,
        .dtype = dtype,
    };
}

/* Adds the quantizer from its tensors and from `options`: inner, grid, qmin, qmax. */
static void add_quantizer(const char *op, struct fptq_merge_query_key_forward *args, const struct view *scale,
                          const struct view *zero_point, const stable_value *options)
{
    const int64_t inner = (int64_t)options[0], rows = args->heads * 2 * args->half;
    if (inner < 1 || scale->numel * inner != rows * args->columns) {
        raise_error("%s: scale must have one entry for each run of inner = %lld columns", op, (long long)inner);
    }
    expect(op, "scale", scale, scale->numel, compute_dtype(args->dtype));
    args->scale = scale->data;
    args->zero_point = optional(op, "zero_point", zero_point, scale->numel, compute_dtype(args->dtype));
    args->inner = inner;
    args->grid = (fptq_grid){(int32_t)options[1], (int32_t)options[2], (int32_t)options[3]};
}

void boxed_merge_query_key(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_query_key";
    OWNED tensor_handle weight_tensor = take(stack[0]), angle_tensor = take(stack[1]), log_scale_tensor = take(stack[2]);
    const struct view weight = view_of(op, "weight", weight_tensor), angle = view_of(op, "angle", angle_tensor),
                      log_scale = view_of(op, "log_scale", log_scale_tensor);
    struct fptq_merge_query_key_forward args = arguments_of(op, &weight, &angle, &log_scale, stack + 3);
    OWNED tensor_handle y = new_like(op, &weight);
    args.y = data_of(y);
    check_status(fptq_merge_query_key_forward(&args));
    stack[0] = give(&y);
}

void boxed_merge_query_key_fake_quant(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_query_key_fake_quant";
    OWNED tensor_handle weight_tensor = take(stack[0]), angle_tensor = take(stack[1]), log_scale_tensor = take(stack[2]),
                        scale_tensor = take(stack[3]), zero_tensor = take(stack[4]);
    const struct view weight = view_of(op, "weight", weight_tensor), angle = view_of(op, "angle", angle_tensor),
                      log_scale = view_of(op, "log_scale", log_scale_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_merge_query_key_forward args = arguments_of(op, &weight, &angle, &log_scale, stack + 5);
    add_quantizer(op, &args, &scale, &zero_point, stack + 7);
    OWNED tensor_handle y = new_like(op, &weight);
    args.y = data_of(y);
    check_status(fptq_merge_query_key_forward(&args));
    stack[0] = give(&y);
}

void boxed_merge_query_key_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_query_key_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), weight_tensor = take(stack[1]), angle_tensor = take(stack[2]),
                        log_scale_tensor = take(stack[3]);
    const struct view dy = view_of(op, "dy", dy_tensor), weight = view_of(op, "weight", weight_tensor),
                      angle = view_of(op, "angle", angle_tensor), log_scale = view_of(op, "log_scale", log_scale_tensor);
    struct fptq_merge_query_key_backward args = {.forward = arguments_of(op, &weight, &angle, &log_scale, stack + 4)};
    expect(op, "dy", &dy, weight.numel, weight.torch_dtype);
    const bool wanted = stack[6] != 0;
    OWNED tensor_handle dweight = wanted ? new_like(op, &weight) : new_absent(op, weight.torch_dtype);
    OWNED tensor_handle dangle = new_like(op, &angle);
    OWNED tensor_handle dlog_scale = new_like(op, &angle);
    args.dweight = data_of(dweight);
    args.dangle = data_of(dangle);
    args.dlog_scale = data_of(dlog_scale);
    args.dy = dy.data;
    check_status(fptq_merge_query_key_backward(&args));
    stack[0] = give(&dweight);
    stack[1] = give(&dangle);
    stack[2] = give(&dlog_scale);
}

void boxed_merge_query_key_fake_quant_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "merge_query_key_fake_quant_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), weight_tensor = take(stack[1]), angle_tensor = take(stack[2]),
                        log_scale_tensor = take(stack[3]), scale_tensor = take(stack[4]), zero_tensor = take(stack[5]);
    const struct view dy = view_of(op, "dy", dy_tensor), weight = view_of(op, "weight", weight_tensor),
                      angle = view_of(op, "angle", angle_tensor), log_scale = view_of(op, "log_scale", log_scale_tensor),
                      scale = view_of(op, "scale", scale_tensor), zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_merge_query_key_backward args = {.forward = arguments_of(op, &weight, &angle, &log_scale, stack + 6)};
    add_quantizer(op, &args.forward, &scale, &zero_point, stack + 8);
    expect(op, "dy", &dy, weight.numel, weight.torch_dtype);
    const bool wanted = stack[12] != 0;
    OWNED tensor_handle dweight = wanted ? new_like(op, &weight) : new_absent(op, weight.torch_dtype);
    OWNED tensor_handle dangle = new_like(op, &angle);
    OWNED tensor_handle dlog_scale = new_like(op, &angle);
    OWNED tensor_handle dscale = new_like(op, &scale);
    OWNED tensor_handle dzero_point = new_like(op, &zero_point);
    args.dweight = data_of(dweight);
    args.dangle = data_of(dangle);
    args.dlog_scale = data_of(dlog_scale);
    args.dscale = data_of(dscale);
    args.dzero_point = data_of(dzero_point);
    args.dy = dy.data;
    check_status(fptq_merge_query_key_backward(&args));
    stack[0] = give(&dweight);
    stack[1] = give(&dangle);
    stack[2] = give(&dlog_scale);
    stack[3] = give(&dscale);
    stack[4] = give(&dzero_point);
}

/* fptquant::query_key_moments(Tensor weight, int head_dim) -> Tensor [heads, head_dim / 2, 5] float64 */
void boxed_query_key_moments(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "query_key_moments";
    OWNED tensor_handle weight_tensor = take(stack[0]);
    const struct view weight = view_of(op, "weight", weight_tensor);
    const int64_t head_dim = (int64_t)stack[1];
    const int32_t dtype = floating_dtype(op, "weight", &weight);
    if (weight.ndim != 2 || head_dim < 2 || head_dim % 2 != 0 || weight.sizes[0] % head_dim != 0) {
        raise_error("%s: weight must be a matrix whose rows are heads of head_dim = %lld rows", op, (long long)head_dim);
    }
    const int64_t sizes[3] = {weight.sizes[0] / head_dim, head_dim / 2, 5};
    OWNED tensor_handle moments = new_tensor(op, 3, sizes, torch.aoti_torch_dtype_float64());
    check_status(fptq_query_key_moments(&(struct fptq_query_key_moments){
        .moments = data_of(moments),
        .weight = weight.data,
        .heads = sizes[0],
        .half = sizes[1],
        .columns = weight.sizes[1],
        .dtype = dtype,
    }));
    stack[0] = give(&moments);
}
