/* The table of kernels of one instruction set; this file is compiled once for each (FPTQ_ISA). */
#include "kernels.h"
#include "names.h"

#define X(name)                                                  \
    void FPTQ_PASTE(name, f32)(int64_t, int64_t, const void *);  \
    void FPTQ_PASTE(name, f64)(int64_t, int64_t, const void *);  \
    void FPTQ_PASTE(name, bf16)(int64_t, int64_t, const void *); \
    void FPTQ_PASTE(name, f16)(int64_t, int64_t, const void *);
FPTQ_KERNELS(X)
#undef X

extern fptq_kernel_table FPTQ_TABLE;
fptq_kernel_table FPTQ_TABLE = {
#define X(name)                               \
    [FPTQ_KERNEL_##name] = {                  \
        [FPTQ_F32] = FPTQ_PASTE(name, f32),   \
        [FPTQ_F64] = FPTQ_PASTE(name, f64),   \
        [FPTQ_BF16] = FPTQ_PASTE(name, bf16), \
        [FPTQ_F16] = FPTQ_PASTE(name, f16),   \
    },
    FPTQ_KERNELS(X)
#undef X
};
