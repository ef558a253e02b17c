/* Resolves libtorch's C functions, registers the operators, and the helpers that operator files share. */
#define _GNU_SOURCE
#include "bind.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <stdarg.h>
#include <stdio.h>

#define MAX_NDIM 16

struct torch_functions torch;

void release_tensor(tensor_handle *handle)
{
    if (*handle) {
        torch.aoti_torch_delete_tensor_object(*handle);
    }
}

void raise_error(const char *format, ...)
{
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    torch.aoti_torch_check(false, "fptquant", __FILE__, __LINE__, message);
}

void check_status(fptq_status status)
{
    if (status != FPTQ_OK) {
        raise_error("%s", fptq_last_error());
    }
}

struct view view_of(const char *op, const char *name, tensor_handle tensor)
{
    struct view view = {0};
    bool contiguous = false;
    int64_t *sizes = NULL;
    if (torch.aoti_torch_get_dim(tensor, &view.ndim) || torch.aoti_torch_get_numel(tensor, &view.numel) ||
        torch.aoti_torch_get_sizes(tensor, &sizes) || torch.aoti_torch_get_dtype(tensor, &view.torch_dtype) ||
        torch.aoti_torch_is_contiguous(tensor, &contiguous)) {
        raise_error("%s: %s could not be read", op, name);
    }
    if (!contiguous) {
        raise_error("%s: %s must be contiguous; call .contiguous() first", op, name);
    }
    view.sizes = sizes;
    if (view.numel > 0 && torch.torch_get_const_data_ptr(tensor, &view.data)) {
        raise_error("%s: %s has no memory", op, name);
    }
    return view;
}

int32_t floating_dtype(const char *op, const char *name, const struct view *view)
{
    if (view->torch_dtype == torch.aoti_torch_dtype_float32()) {
        return FPTQ_F32;
    }
    if (view->torch_dtype == torch.aoti_torch_dtype_float64()) {
        return FPTQ_F64;
    }
    if (view->torch_dtype == torch.aoti_torch_dtype_bfloat16()) {
        return FPTQ_BF16;
    }
    if (view->torch_dtype != torch.aoti_torch_dtype_float16()) {
        raise_error("%s: %s must be float32, float64, bfloat16 or float16", op, name);
    }
    return FPTQ_F16;
}

int32_t compute_dtype(int32_t dtype)
{
    return dtype == FPTQ_F64 ? torch.aoti_torch_dtype_float64() : torch.aoti_torch_dtype_float32();
}

void expect(const char *op, const char *name, const struct view *view, int64_t numel, int32_t torch_dtype)
{
    if (view->numel != numel) {
        raise_error("%s: %s has %lld entries, expected %lld", op, name, (long long)view->numel, (long long)numel);
    }
    if (view->torch_dtype != torch_dtype) {
        raise_error("%s: %s must have the dtype of computation: float64 for float64 tensors, else float32", op, name);
    }
}

const void *optional(const char *op, const char *name, const struct view *view, int64_t numel, int32_t torch_dtype)
{
    if (view->numel == 0) {
        return NULL;
    }
    expect(op, name, view, numel, torch_dtype);
    return view->data;
}

struct rows rows_of(const char *op, const char *name, const struct view *view)
{
    if (view->ndim < 1) {
        raise_error("%s: %s must have at least one axis", op, name);
    }
    int64_t count = 1;
    for (int64_t axis = 0; axis < view->ndim - 1; axis++) {
        count *= view->sizes[axis];
    }
    return (struct rows){count, view->sizes[view->ndim - 1]};
}

void expect_like(const char *op, const char *name, const struct view *view, const struct view *other, const char *other_name)
{
    bool same = view->ndim == other->ndim && view->torch_dtype == other->torch_dtype;
    for (int64_t axis = 0; same && axis < view->ndim; axis++) {
        same = view->sizes[axis] == other->sizes[axis];
    }
    if (!same) {
        raise_error("%s: %s must have the shape and dtype of %s", op, name, other_name);
    }
}

struct layout layout_of(const char *op, const struct view *x, int64_t channels, int64_t inner)
{
    const int64_t row = channels * inner;
    if (x->numel == 0) {
        return (struct layout){0, channels, inner};
    }
    if (row < 1 || x->numel % row != 0) {
        raise_error("%s: %lld elements are not rows of %lld channels times %lld inner elements", op, (long long)x->numel,
                    (long long)channels, (long long)inner);
    }
    return (struct layout){x->numel / row, channels, inner};
}

/*
 * A large result is fresh memory whose pages the system hands out, zeroed, one by one as they are written: that costs more than
 * the arithmetic. Pages of 2 MiB instead of 4 KiB make it several times cheaper. Where the system has none, nothing changes.
 */
static void use_huge_pages(void *data, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = (uintptr_t)2 << 20, begin = ((uintptr_t)data + huge - 1) / huge * huge;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) / huge * huge;
    if (data && end > begin) {
        madvise((void *)begin, end - begin, MADV_HUGEPAGE);
    }
#else
    (void)data, (void)bytes;
#endif
}

static int64_t element_size(int32_t torch_dtype)
{
    if (torch_dtype == torch.aoti_torch_dtype_float64()) {
        return 8;
    }
    if (torch_dtype == torch.aoti_torch_dtype_float32()) {
        return 4;
    }
    return torch_dtype == torch.aoti_torch_dtype_bfloat16() || torch_dtype == torch.aoti_torch_dtype_float16() ? 2 : 1;
}

tensor_handle new_tensor(const char *op, int64_t ndim, const int64_t *sizes, int32_t torch_dtype)
{
    int64_t strides[MAX_NDIM], stride = 1, numel = 1;
    tensor_handle tensor = NULL;
    if (ndim > MAX_NDIM) {
        raise_error("%s: %lld axes are more than the %d supported", op, (long long)ndim, MAX_NDIM);
    }
    for (int64_t axis = ndim - 1; axis >= 0; axis--) {
        strides[axis] = stride;
        stride *= sizes[axis] > 0 ? sizes[axis] : 1;
        numel *= sizes[axis];
    }
    if (torch.aoti_torch_empty_strided(ndim, sizes, strides, torch_dtype, torch.aoti_torch_device_type_cpu(), 0, &tensor)) {
        raise_error("%s: a result could not be allocated", op);
    }
    use_huge_pages(data_of(tensor), numel * (int64_t)element_size(torch_dtype));
    return tensor;
}

tensor_handle new_like(const char *op, const struct view *view)
{
    return new_tensor(op, view->ndim, view->sizes, view->torch_dtype);
}

tensor_handle new_row_values(const char *op, const struct view *view)
{
    int64_t sizes[MAX_NDIM];
    if (view->ndim > MAX_NDIM) {
        raise_error("%s: %lld axes are more than the %d supported", op, (long long)view->ndim, MAX_NDIM);
    }
    for (int64_t axis = 0; axis < view->ndim; axis++) {
        sizes[axis] = axis < view->ndim - 1 ? view->sizes[axis] : 1;
    }
    return new_tensor(op, view->ndim, sizes, compute_dtype(floating_dtype(op, "x", view)));
}

tensor_handle new_absent(const char *op, int32_t torch_dtype)
{
    const int64_t no_elements[1] = {0};
    return new_tensor(op, 1, no_elements, torch_dtype);
}

void *data_of(tensor_handle tensor)
{
    void *data = NULL;
    int64_t numel = 0;
    torch.aoti_torch_get_numel(tensor, &numel);
    if (numel > 0) {
        torch.torch_get_mutable_data_ptr(tensor, &data);
    }
    return data;
}

/* Registers every operator once per process. Returns NULL, or a message that says what is missing. */
FPTQ_EXPORT const char *fptq_register_torch(void)
{
    static char message[256];
    static bool registered;
    if (registered) {
        return NULL;
    }
    void *libtorch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
    if (!libtorch) {
        return "libtorch_cpu.so is not loaded: import torch first";
    }
#define RESOLVE(ret, name, params)                                                                               \
    if (!(*(void **)&torch.name = dlsym(libtorch, #name))) {                                                     \
        snprintf(message, sizeof message, "this PyTorch lacks %s: fptquant needs PyTorch 2.11 or newer", #name); \
        return message;                                                                                          \
    }
    TORCH_FUNCTIONS(RESOLVE)
#undef RESOLVE
    const uint64_t abi_version = (uint64_t)2 << 56 | (uint64_t)10 << 48; /* written against PyTorch 2.10's ABI */
    library_handle library = NULL; /* lives as long as the process: operators cannot be taken back */
    if (torch.aoti_torch_library_init_impl("fptquant", "CPU", __FILE__, __LINE__, &library)) {
        return "PyTorch refused the library fptquant for CPU";
    }
#define REGISTER(name)                                                         \
    if (torch.torch_library_impl(library, #name, boxed_##name, abi_version)) { \
        return "PyTorch refused the operator fptquant::" #name;                \
    }
    FPTQ_OPERATORS(REGISTER)
#undef REGISTER
    fptq_set_parallel_for(torch.torch_parallel_for);
    registered = true;
    return NULL;
}
