/*
 * The list of CPU kernels. A kernel does units [begin, end) of an operator whose arguments it gets as the operator's struct;
 * units are independent, so any split over threads gives the same result. To add one: a line here, a body in cpu/<op>.c.
 */
#ifndef FPTQ_CPU_KERNELS_H
#define FPTQ_CPU_KERNELS_H

#include "../fptq.h"

#define FPTQ_KERNELS(X)         \
    X(fake_quant_forward)       \
    X(fake_quant_backward)      \
    X(choose_qparams)           \
    X(range_minmax)             \
    X(range_errors)             \
    X(range_histogram)          \
    X(hadamard)                 \
    X(kronecker_forward)        \
    X(kronecker_backward)       \
    X(rotate_blocks)            \
    X(merge_query_key_forward)  \
    X(merge_query_key_backward) \
    X(query_key_moments)        \
    X(solve_query_key)          \
    X(merge_scale_forward)      \
    X(merge_scale_backward)     \
    X(lp_norm_query_key)        \
    X(lp_norm_scale)            \
    X(residual_scale_forward)   \
    X(residual_scale_backward)  \
    X(divergence)               \
    X(divergence_backward)      \
    X(cross_entropy)            \
    X(gptq)                     \
    X(coordinate_descent)       \
    X(pack_int4)                \
    X(unpack_int4)

enum fptq_kernel_id {
#define X(name) FPTQ_KERNEL_##name,
    FPTQ_KERNELS(X)
#undef X
        FPTQ_NUM_KERNELS
};

typedef void (*fptq_kernel)(int64_t begin, int64_t end, const void *args);
typedef const fptq_kernel fptq_kernel_table[FPTQ_NUM_KERNELS][FPTQ_NUM_DTYPES];

#endif
