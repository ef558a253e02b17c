/*
 * fptquant::pack_int4(Tensor q, bool signed) -> Tensor          q: int8 [rows, columns] -> uint8 [rows, (columns + 1) / 2]
 * fptquant::unpack_int4(Tensor packed, int columns, bool signed) -> Tensor
 */
#include "bind.h"

void boxed_pack_int4(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "pack_int4";
    OWNED tensor_handle q_tensor = take(stack[0]);
    const struct view q = view_of(op, "q", q_tensor);
    if (q.ndim != 2 || q.torch_dtype != torch.aoti_torch_dtype_int8()) {
        raise_error("%s: q must be an int8 matrix", op);
    }
    const int64_t sizes[2] = {q.sizes[0], (q.sizes[1] + 1) / 2};
    OWNED tensor_handle packed = new_tensor(op, 2, sizes, torch.aoti_torch_dtype_uint8());
    check_status(fptq_pack_int4(&(struct fptq_pack_int4){
        .packed = data_of(packed),
        .q = q.data,
        .rows = q.sizes[0],
        .columns = q.sizes[1],
        .is_signed = stack[1] != 0,
    }));
    stack[0] = give(&packed);
}

void boxed_unpack_int4(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "unpack_int4";
    OWNED tensor_handle packed_tensor = take(stack[0]);
    const struct view packed = view_of(op, "packed", packed_tensor);
    const int64_t columns = (int64_t)stack[1];
    if (packed.ndim != 2 || packed.torch_dtype != torch.aoti_torch_dtype_uint8() || columns < 0 ||
        packed.sizes[1] != (columns + 1) / 2) {
        raise_error("%s: packed must be a uint8 matrix of (columns + 1) / 2 columns, columns = %lld", op, (long long)columns);
    }
    const int64_t sizes[2] = {packed.sizes[0], columns};
    OWNED tensor_handle q = new_tensor(op, 2, sizes, torch.aoti_torch_dtype_int8());
    check_status(fptq_unpack_int4(&(struct fptq_unpack_int4){
        .q = data_of(q),
        .packed = packed.data,
        .rows = sizes[0],
        .columns = columns,
        .is_signed = stack[2] != 0,
    }));
    stack[0] = give(&q);
}
