/*
 * fptquant::hadamard(Tensor x, int block_size, bool transpose) -> Tensor
 *
 * The last axis of x is cut into blocks of block_size values.
 */
#include "bind.h"

void boxed_hadamard(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "hadamard";
    OWNED tensor_handle x_tensor = take(stack[0]);
    const int64_t size = (int64_t)stack[1];
    const struct view x = view_of(op, "x", x_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    if (x.ndim < 1 || size < 1 || x.sizes[x.ndim - 1] % size != 0) {
        raise_error("%s: block_size = %lld does not divide the last axis of x", op, (long long)size);
    }
    OWNED tensor_handle y = new_like(op, &x);
    check_status(fptq_hadamard(&(struct fptq_hadamard){
        .y = data_of(y),
        .x = x.data,
        .blocks = x.numel / size,
        .size = size,
        .transpose = stack[2] != 0,
        .dtype = dtype,
    }));
    stack[0] = give(&y);
}
