/*
 * fptquant::range_minmax(Tensor x, int channels, int inner) -> (Tensor lo, Tensor hi)                        [channels]
 * fptquant::range_errors(Tensor x, Tensor lo, Tensor hi, Tensor ratios, int inner, float p, bool symmetric, int grid, int qmin,
 *     int qmax) -> Tensor                                                                         [channels, candidates] float64
 * fptquant::range_histogram(Tensor x, Tensor lo, Tensor hi, int inner, int bins) -> Tensor        [channels, bins] float64
 * fptquant::range_qparams(Tensor lo, Tensor hi, Tensor evidence, Tensor ratios, int rule, float percentile, bool symmetric,
 *     int grid, int qmin, int qmax) -> (Tensor scale, Tensor zero_point)                                     [channels]
 */
#include "bind.h"

void boxed_range_minmax(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "range_minmax";
    OWNED tensor_handle x_tensor = take(stack[0]);
    const struct view x = view_of(op, "x", x_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    const int64_t channels = (int64_t)stack[1];
    const struct layout layout = layout_of(op, &x, channels, (int64_t)stack[2]);

    OWNED tensor_handle lo = new_tensor(op, 1, &channels, compute_dtype(dtype));
    OWNED tensor_handle hi = new_tensor(op, 1, &channels, compute_dtype(dtype));
    check_status(fptq_range_minmax(&(struct fptq_range_minmax){
        .lo = data_of(lo),
        .hi = data_of(hi),
        .x = x.data,
        .outer = layout.outer,
        .channels = layout.channels,
        .inner = layout.inner,
        .dtype = dtype,
    }));
    stack[0] = give(&lo);
    stack[1] = give(&hi);
}

void boxed_range_errors(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "range_errors";
    OWNED tensor_handle x_tensor = take(stack[0]), lo_tensor = take(stack[1]), hi_tensor = take(stack[2]),
                        ratios_tensor = take(stack[3]);
    const struct view x = view_of(op, "x", x_tensor), lo = view_of(op, "lo", lo_tensor), hi = view_of(op, "hi", hi_tensor),
                      ratios = view_of(op, "ratios", ratios_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    const struct layout layout = layout_of(op, &x, lo.numel, (int64_t)stack[4]);
    expect(op, "lo", &lo, layout.channels, compute_dtype(dtype));
    expect(op, "hi", &hi, layout.channels, compute_dtype(dtype));
    expect(op, "ratios", &ratios, ratios.numel, torch.aoti_torch_dtype_float64());

    const int64_t sizes[2] = {layout.channels, ratios.numel};
    OWNED tensor_handle errors = new_tensor(op, 2, sizes, torch.aoti_torch_dtype_float64());
    check_status(fptq_range_errors(&(struct fptq_range_errors){
        .errors = data_of(errors),
        .x = x.data,
        .lo = lo.data,
        .hi = hi.data,
        .ratios = ratios.data,
        .outer = layout.outer,
        .channels = layout.channels,
        .inner = layout.inner,
        .candidates = ratios.numel,
        .grid = {(int32_t)stack[7], (int32_t)stack[8], (int32_t)stack[9]},
        .symmetric = stack[6] != 0,
        .p = as_double(stack[5]),
        .dtype = dtype,
    }));
    stack[0] = give(&errors);
}

void boxed_range_histogram(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "range_histogram";
    OWNED tensor_handle x_tensor = take(stack[0]), lo_tensor = take(stack[1]), hi_tensor = take(stack[2]);
    const struct view x = view_of(op, "x", x_tensor), lo = view_of(op, "lo", lo_tensor), hi = view_of(op, "hi", hi_tensor);
    const int32_t dtype = floating_dtype(op, "x", &x);
    const struct layout layout = layout_of(op, &x, lo.numel, (int64_t)stack[3]);
    expect(op, "lo", &lo, layout.channels, compute_dtype(dtype));
    expect(op, "hi", &hi, layout.channels, compute_dtype(dtype));
    const int64_t bins = (int64_t)stack[4], sizes[2] = {layout.channels, bins > 0 ? bins : 0};

    OWNED tensor_handle counts = new_tensor(op, 2, sizes, torch.aoti_torch_dtype_float64());
    check_status(fptq_range_histogram(&(struct fptq_range_histogram){
        .counts = data_of(counts),
        .x = x.data,
        .lo = lo.data,
        .hi = hi.data,
        .outer = layout.outer,
        .channels = layout.channels,
        .inner = layout.inner,
        .bins = bins,
        .dtype = dtype,
    }));
    stack[0] = give(&counts);
}

void boxed_range_qparams(stable_value *stack, uint64_t num_args, uint64_t num_returns)
{
    (void)num_args, (void)num_returns;
    const char *op = "range_qparams";
    OWNED tensor_handle lo_tensor = take(stack[0]), hi_tensor = take(stack[1]), evidence_tensor = take(stack[2]),
                        ratios_tensor = take(stack[3]);
    const struct view lo = view_of(op, "lo", lo_tensor), hi = view_of(op, "hi", hi_tensor),
                      evidence = view_of(op, "evidence", evidence_tensor), ratios = view_of(op, "ratios", ratios_tensor);
    const int32_t dtype = floating_dtype(op, "lo", &lo);
    const int64_t channels = lo.numel, n = channels ? evidence.numel / channels : 0;
    expect(op, "lo", &lo, channels, compute_dtype(dtype));
    expect(op, "hi", &hi, channels, compute_dtype(dtype));
    expect(op, "evidence", &evidence, channels * n, torch.aoti_torch_dtype_float64());
    if (stack[4] == FPTQ_RANGE_CANDIDATES) {
        expect(op, "ratios", &ratios, n, torch.aoti_torch_dtype_float64());
    }

    OWNED tensor_handle scale = new_tensor(op, 1, &channels, compute_dtype(dtype));
    OWNED tensor_handle zero_point = new_tensor(op, 1, &channels, compute_dtype(dtype));
    check_status(fptq_set_range(&(struct fptq_set_range){
        .scale = data_of(scale),
        .zero_point = data_of(zero_point),
        .lo = lo.data,
        .hi = hi.data,
        .evidence = evidence.data,
        .ratios = ratios.data,
        .channels = channels,
        .n = n,
        .rule = (int32_t)stack[4],
        .grid = {(int32_t)stack[7], (int32_t)stack[8], (int32_t)stack[9]},
        .symmetric = stack[6] != 0,
        .percentile = as_double(stack[5]),
        .dtype = dtype,
    }));
    stack[0] = give(&scale);
    stack[1] = give(&zero_point);
}
