/*
 * What an operator file needs of PyTorch, in C: owned handles, views of tensors, new tensors, exceptions.
 *
 * PyTorch's C functions have C linkage and a stable ABI, but headers that only C++ can read. They are therefore declared
 * here, once, and resolved by name when the library registers itself; tests/csrc/conformance.cpp compares every declaration
 * with the installed headers.
 */
#ifndef FPTQ_TORCH_BIND_H
#define FPTQ_TORCH_BIND_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../fptq.h"

typedef uint64_t stable_value;               /* one argument or result of a boxed operator */
typedef struct tensor_opaque *tensor_handle; /* owning reference to an at::Tensor */
typedef struct library_opaque *library_handle;
typedef void (*boxed_kernel)(stable_value *stack, uint64_t num_args, uint64_t num_returns);

/* Every function of libtorch used: return type, name, parameters. Those returning int32_t return 0 on success. */
#define TORCH_FUNCTIONS(X)                                                                                                   \
    X(int32_t, aoti_torch_library_init_impl,                                                                                 \
      (const char *ns, const char *key, const char *file, uint32_t line, library_handle *out))                               \
    X(int32_t, torch_library_impl, (library_handle, const char *name, boxed_kernel, uint64_t abi_version))                   \
    X(int32_t, aoti_torch_delete_tensor_object, (tensor_handle))                                                             \
    X(int32_t, aoti_torch_get_dim, (tensor_handle, int64_t *out))                                                            \
    X(int32_t, aoti_torch_get_numel, (tensor_handle, int64_t *out))                                                          \
    X(int32_t, aoti_torch_get_sizes, (tensor_handle, int64_t **out_borrowed))                                                \
    X(int32_t, aoti_torch_get_dtype, (tensor_handle, int32_t *out))                                                          \
    X(int32_t, aoti_torch_is_contiguous, (tensor_handle, bool *out))                                                         \
    X(int32_t, torch_get_const_data_ptr, (tensor_handle, const void **out))                                                  \
    X(int32_t, torch_get_mutable_data_ptr, (tensor_handle, void **out))                                                      \
    X(int32_t, aoti_torch_empty_strided,                                                                                     \
      (int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type, int32_t device_index, \
       tensor_handle *out))                                                                                                  \
    X(int32_t, aoti_torch_dtype_float32, (void))                                                                             \
    X(int32_t, aoti_torch_dtype_float64, (void))                                                                             \
    X(int32_t, aoti_torch_dtype_bfloat16, (void))                                                                            \
    X(int32_t, aoti_torch_dtype_float16, (void))                                                                             \
    X(int32_t, aoti_torch_dtype_int8, (void))                                                                                \
    X(int32_t, aoti_torch_dtype_uint8, (void))                                                                               \
    X(int32_t, aoti_torch_dtype_int64, (void))                                                                               \
    X(int32_t, aoti_torch_device_type_cpu, (void))                                                                           \
    X(int32_t, torch_parallel_for, (int64_t begin, int64_t end, int64_t grain, fptq_parallel_body body, void *context))      \
    X(void, aoti_torch_check, (bool condition, const char *func, const char *file, uint32_t line, const char *message))

struct torch_functions {
#define DECLARE(ret, name, params) ret(*name) params;
    TORCH_FUNCTIONS(DECLARE)
#undef DECLARE
};
extern struct torch_functions torch;

/* Released on every way out of the scope, a thrown exception included: that is what -fexceptions is for. */
void release_tensor(tensor_handle *handle);
#define OWNED __attribute__((cleanup(release_tensor)))

/* Takes ownership of one tensor argument. Take all of them before the first check can raise. */
static inline tensor_handle take(stable_value value)
{
    return (tensor_handle)(uintptr_t)value;
}

/* Gives a result to the caller: the local handle is emptied so that its cleanup releases nothing. */
static inline stable_value give(tensor_handle *handle)
{
    const stable_value value = (stable_value)(uintptr_t)*handle;
    *handle = NULL;
    return value;
}

static inline double as_double(stable_value value)
{
    union {
        stable_value bits;
        double number;
    } bits = {.bits = value};
    return bits.number;
}

/* Throws: Python sees a RuntimeError with this text. They do not return. */
void raise_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Throws the core's message unless the status is FPTQ_OK. */
void check_status(fptq_status status);

/* A contiguous tensor's facts; `data` is NULL for a tensor without elements. */
struct view {
    const int64_t *sizes;
    int64_t ndim, numel;
    int32_t torch_dtype;
    const void *data;
};

/* Views a tensor; raises where it is not contiguous. */
struct view view_of(const char *op, const char *name, tensor_handle tensor);
/* The core's dtype of a floating-point tensor; raises on any other. */
int32_t floating_dtype(const char *op, const char *name, const struct view *view);
/* PyTorch's dtype of computation (float32, or float64 for float64). */
int32_t compute_dtype(int32_t dtype);
/* Raises unless the view has `numel` elements of this PyTorch dtype. */
void expect(const char *op, const char *name, const struct view *view, int64_t numel, int32_t torch_dtype);
/* The data of a tensor that may be absent, which is an empty tensor: NULL then, else as `expect`. */
const void *optional(const char *op, const char *name, const struct view *view, int64_t numel, int32_t torch_dtype);

/* A tensor seen as rows of its last axis; raises where it has no axis. */
struct rows {
    int64_t count, length;
};
struct rows rows_of(const char *op, const char *name, const struct view *view);
/* Raises unless the view has the shape and dtype of another. */
void expect_like(const char *op, const char *name, const struct view *view, const struct view *other, const char *other_name);

/* A tensor seen as [outer, channels, inner] with one scale per channel; raises where the sizes do not fit. */
struct layout {
    int64_t outer, channels, inner;
};
struct layout layout_of(const char *op, const struct view *x, int64_t channels, int64_t inner);

/* A new contiguous CPU tensor, and where to write it. */
tensor_handle new_tensor(const char *op, int64_t ndim, const int64_t *sizes, int32_t torch_dtype);
/* The same with the shape and dtype of a tensor at hand; and a tensor without elements, which stands for none. */
tensor_handle new_like(const char *op, const struct view *view);
tensor_handle new_absent(const char *op, int32_t torch_dtype);
/* One value for each row of a tensor of floating point numbers, [..., 1], in its dtype of computation. */
tensor_handle new_row_values(const char *op, const struct view *view);
void *data_of(tensor_handle tensor);

/* One entry per boxed operator: its name and kernel. A file adds its own below. */
#define FPTQ_OPERATORS(X)                  \
    X(fake_quant)                          \
    X(fake_quant_backward)                 \
    X(choose_qparams)                      \
    X(range_minmax)                        \
    X(range_errors)                        \
    X(range_histogram)                     \
    X(range_qparams)                       \
    X(hadamard)                            \
    X(kronecker)                           \
    X(kronecker_backward)                  \
    X(kronecker_fake_quant)                \
    X(kronecker_fake_quant_backward)       \
    X(kronecker_fake_quant_dynamic)        \
    X(rotate_blocks)                       \
    X(merge_query_key)                     \
    X(merge_query_key_backward)            \
    X(merge_query_key_fake_quant)          \
    X(merge_query_key_fake_quant_backward) \
    X(query_key_moments)                   \
    X(solve_query_key)                     \
    X(merge_scale)                         \
    X(merge_scale_backward)                \
    X(merge_scale_fake_quant)              \
    X(merge_scale_fake_quant_backward)     \
    X(lp_norm_query_key)                   \
    X(lp_norm_scale)                       \
    X(scale_moments)                       \
    X(residual_scale)                      \
    X(residual_scale_backward)             \
    X(divergence)                          \
    X(divergence_)                         \
    X(divergence_backward)                 \
    X(cross_entropy)                       \
    X(cross_entropy_)                      \
    X(gptq_)                               \
    X(coordinate_descent_)                 \
    X(pack_int4)                           \
    X(unpack_int4)
#define DECLARE(name) void boxed_##name(stable_value *stack, uint64_t num_args, uint64_t num_returns);
FPTQ_OPERATORS(DECLARE)
#undef DECLARE

#endif
