/*
 * fptquant::kronecker(Tensor x, Tensor left, Tensor right) -> Tensor
 * fptquant::kronecker_fake_quant(Tensor x, Tensor left, Tensor right, Tensor scale, Tensor zero_point, int grid, int qmin, int
 * qmax)
 *     -> Tensor
 * and their backwards, whose dy comes first and whose bool x_gradient comes last, and
 * fptquant::kronecker_fake_quant_dynamic(Tensor x, Tensor left, Tensor right, Tensor clip, float clip_ratio, bool symmetric,
 *                                        int grid, int qmin, int qmax)
 *     -> (Tensor y, Tensor scale, Tensor zero_point)                                              like x, and [..., 1] twice
 *
 * The last axis of x holds rows * columns values; an empty factor means the identity, of the size that the other one leaves.
 */
#include "bind.h"

static struct fptq_kronecker_forward arguments_of(const char *op, const struct view *x, const struct view *left,
                                                  const struct view *right)
{
    const int32_t dtype = floating_dtype(op, "x", x), compute = compute_dtype(dtype);
    const struct rows x_rows = rows_of(op, "x", x);
    const bool has_left = left->numel > 0, has_right = right->numel > 0;
    if (!has_left && !has_right) {
        raise_error("%s: give at least one of left and right", op);
    }
    if ((has_left && left->ndim != 2) || (has_right && right->ndim != 2)) {
        raise_error("%s: left and right must be matrices", op);
    }
    const int64_t rows = has_left ? left->sizes[0] : x_rows.length / right->sizes[0];
    const int64_t columns = has_right ? right->sizes[0] : x_rows.length / rows;
    if (rows * columns != x_rows.length) {
        raise_error("%s: the last axis of x has %lld values, not %lld x %lld", op, (long long)x_rows.length, (long long)rows,
                    (long long)columns);
    }
    return (struct fptq_kronecker_forward){
        .x = x->data,
        .left = optional(op, "left", left, rows * rows, compute),
        .right = optional(op, "right", right, columns * columns, compute),
        .blocks = x_rows.count,
        .rows = rows,
        .columns = columns,
        .scales = 1,
        .dtype = dtype,
    };
}

/* Adds the quantizer from its tensors and from `options`: grid, qmin, qmax. */
static void add_quantizer(const char *op, struct fptq_kronecker_forward *args, const struct view *scale,
                          const struct view *zero_point, const stable_value *options)
{
    if (scale->numel != 1 && scale->numel != args->blocks) {
        raise_error("%s: scale must have one entry, or one for each row of x", op);
    }
    expect(op, "scale", scale, scale->numel, compute_dtype(args->dtype));
    args->scale = scale->data;
    args->zero_point = optional(op, "zero_point", zero_point, scale->numel, compute_dtype(args->dtype));
    args->scales = scale->numel;
    args->grid = (fptq_grid){(int32_t)options[0], (int32_t)options[1], (int32_t)options[2]};
}

void boxed_kronecker(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "kronecker";
    OWNED tensor_handle x_tensor = take(stack[0]), left_tensor = take(stack[1]), right_tensor = take(stack[2]);
    const struct view x = view_of(op, "x", x_tensor), left = view_of(op, "left", left_tensor),
                      right = view_of(op, "right", right_tensor);
    struct fptq_kronecker_forward args = arguments_of(op, &x, &left, &right);
    OWNED tensor_handle y = new_like(op, &x);
    args.y = data_of(y);
    check_status(fptq_kronecker_forward(&args));
    stack[0] = give(&y);
}

void boxed_kronecker_fake_quant(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "kronecker_fake_quant";
    OWNED tensor_handle x_tensor = take(stack[0]), left_tensor = take(stack[1]), right_tensor = take(stack[2]),
                        scale_tensor = take(stack[3]), zero_tensor = take(stack[4]);
    const struct view x = view_of(op, "x", x_tensor), left = view_of(op, "left", left_tensor),
                      right = view_of(op, "right", right_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_kronecker_forward args = arguments_of(op, &x, &left, &right);
    add_quantizer(op, &args, &scale, &zero_point, stack + 5);
    OWNED tensor_handle y = new_like(op, &x);
    args.y = data_of(y);
    check_status(fptq_kronecker_forward(&args));
    stack[0] = give(&y);
}

void boxed_kronecker_fake_quant_dynamic(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "kronecker_fake_quant_dynamic";
    OWNED tensor_handle x_tensor = take(stack[0]), left_tensor = take(stack[1]), right_tensor = take(stack[2]),
                        clip_tensor = take(stack[3]);
    const struct view x = view_of(op, "x", x_tensor), left = view_of(op, "left", left_tensor),
                      right = view_of(op, "right", right_tensor), clip = view_of(op, "clip", clip_tensor);
    struct fptq_kronecker_forward args = arguments_of(op, &x, &left, &right);
    args.clip = optional(op, "clip", &clip, 1, compute_dtype(args.dtype));
    args.clip_ratio = as_double(stack[4]);
    args.symmetric = stack[5] != 0;
    args.grid = (fptq_grid){(int32_t)stack[6], (int32_t)stack[7], (int32_t)stack[8]};
    OWNED tensor_handle y = new_like(op, &x);
    OWNED tensor_handle scale = new_row_values(op, &x), zero_point = new_row_values(op, &x);
    args.y = data_of(y);
    args.dynamic_scale = data_of(scale);
    args.dynamic_zero_point = data_of(zero_point);
    check_status(fptq_kronecker_forward(&args));
    stack[0] = give(&y);
    stack[1] = give(&scale);
    stack[2] = give(&zero_point);
}

void boxed_kronecker_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "kronecker_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), x_tensor = take(stack[1]), left_tensor = take(stack[2]),
                        right_tensor = take(stack[3]);
    const struct view dy = view_of(op, "dy", dy_tensor), x = view_of(op, "x", x_tensor), left = view_of(op, "left", left_tensor),
                      right = view_of(op, "right", right_tensor);
    struct fptq_kronecker_backward args = {.forward = arguments_of(op, &x, &left, &right)};
    expect(op, "dy", &dy, x.numel, x.torch_dtype);
    OWNED tensor_handle dx = stack[4] != 0 ? new_like(op, &x) : new_absent(op, x.torch_dtype);
    OWNED tensor_handle dleft = new_like(op, &left);
    OWNED tensor_handle dright = new_like(op, &right);
    args.dx = data_of(dx);
    args.dleft = data_of(dleft);
    args.dright = data_of(dright);
    args.dy = dy.data;
    check_status(fptq_kronecker_backward(&args));
    stack[0] = give(&dx);
    stack[1] = give(&dleft);
    stack[2] = give(&dright);
}

void boxed_kronecker_fake_quant_backward(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "kronecker_fake_quant_backward";
    OWNED tensor_handle dy_tensor = take(stack[0]), x_tensor = take(stack[1]), left_tensor = take(stack[2]),
                        right_tensor = take(stack[3]), scale_tensor = take(stack[4]), zero_tensor = take(stack[5]);
    const struct view dy = view_of(op, "dy", dy_tensor), x = view_of(op, "x", x_tensor), left = view_of(op, "left", left_tensor),
                      right = view_of(op, "right", right_tensor), scale = view_of(op, "scale", scale_tensor),
                      zero_point = view_of(op, "zero_point", zero_tensor);
    struct fptq_kronecker_backward args = {.forward = arguments_of(op, &x, &left, &right)};
    add_quantizer(op, &args.forward, &scale, &zero_point, stack + 6);
    expect(op, "dy", &dy, x.numel, x.torch_dtype);
    OWNED tensor_handle dx = stack[9] != 0 ? new_like(op, &x) : new_absent(op, x.torch_dtype);
    OWNED tensor_handle dleft = new_like(op, &left);
    OWNED tensor_handle dright = new_like(op, &right);
    OWNED tensor_handle dscale = new_like(op, &scale);
    OWNED tensor_handle dzero_point = new_like(op, &zero_point);
    args.dx = data_of(dx);
    args.dleft = data_of(dleft);
    args.dright = data_of(dright);
    args.dscale = data_of(dscale);
    args.dzero_point = data_of(dzero_point);
    args.dy = dy.data;
    check_status(fptq_kronecker_backward(&args));
    stack[0] = give(&dx);
    stack[1] = give(&dleft);
    stack[2] = give(&dright);
    stack[3] = give(&dscale);
    stack[4] = give(&dzero_point);
}
