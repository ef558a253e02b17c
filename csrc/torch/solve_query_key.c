/* fptquant::solve_query_key(Tensor key_moments, Tensor query_moments) -> (Tensor angle, Tensor log_scale), all float64
 *
 * The moments are [..., 5]; the results have the same shape without the last axis.
 */
#include "bind.h"

void boxed_solve_query_key(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "solve_query_key";
    OWNED tensor_handle key_tensor = take(stack[0]), query_tensor = take(stack[1]);
    const struct view key = view_of(op, "key_moments", key_tensor), query = view_of(op, "query_moments", query_tensor);
    const int32_t float64 = torch.aoti_torch_dtype_float64();
    if (key.ndim < 1 || key.sizes[key.ndim - 1] != 5 || key.torch_dtype != float64) {
        raise_error("%s: key_moments must be [..., 5] float64", op);
    }
    expect(op, "query_moments", &query, key.numel, float64);
    OWNED tensor_handle angle = new_tensor(op, key.ndim - 1, key.sizes, float64);
    OWNED tensor_handle log_scale = new_tensor(op, key.ndim - 1, key.sizes, float64);
    check_status(fptq_solve_query_key(&(struct fptq_solve_query_key){
        .angle = data_of(angle),
        .log_scale = data_of(log_scale),
        .key = key.data,
        .query = query.data,
        .pairs = key.numel / 5,
    }));
    stack[0] = give(&angle);
    stack[1] = give(&log_scale);
}
