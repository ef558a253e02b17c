/*
 * fptquant::rotate_blocks(Tensor x, Tensor matrices, Tensor permutation, bool transpose) -> Tensor
 *
 * matrices is [blocks, size, size], permutation int64 [blocks * size] or empty.
 */
#include "bind.h"

void boxed_rotate_blocks(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "rotate_blocks";
    OWNED tensor_handle x_tensor = take(stack[0]), matrices_tensor = take(stack[1]), permutation_tensor = take(stack[2]);
    const struct view x = view_of(op, "x", x_tensor), matrices = view_of(op, "matrices", matrices_tensor),
                      permutation = view_of(op, "permutation", permutation_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    const struct rows rows = rows_of(op, "x", &x);
    if (matrices.ndim != 3 || matrices.sizes[1] != matrices.sizes[2] || matrices.sizes[0] * matrices.sizes[1] != rows.length) {
        raise_error("%s: matrices must be square, one for each block of the %lld channels of x", op, (long long)rows.length);
    }
    expect(op, "matrices", &matrices, matrices.numel, compute_dtype(dtype));
    OWNED tensor_handle y = new_like(op, &x);
    check_status(fptq_rotate_blocks(&(struct fptq_rotate_blocks){
        .y = data_of(y),
        .x = x.data,
        .matrices = matrices.data,
        .permutation = optional(op, "permutation", &permutation, rows.length, torch.aoti_torch_dtype_int64()),
        .rows = rows.count,
        .blocks = matrices.sizes[0],
        .size = matrices.sizes[1],
        .transpose = stack[3] != 0,
        .dtype = dtype,
    }));
    stack[0] = give(&y);
}
