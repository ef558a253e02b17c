/* The text of the last failure of this thread, and checks that write it. */
#ifndef FPTQ_OPS_ERROR_H
#define FPTQ_OPS_ERROR_H

#include "../fptq.h"

/* Writes the message and returns FPTQ_INVALID. */
__attribute__((format(printf, 1, 2))) fptq_status fptq_fail(const char *format, ...);
/* Writes "<op>: ... out of memory" and returns FPTQ_OUT_OF_MEMORY. */
fptq_status fptq_fail_memory(const char *op, int64_t bytes);

/* Leaves the calling operator with the status when it is not FPTQ_OK. */
#define FPTQ_TRY(expression)                      \
    do {                                          \
        const fptq_status status_ = (expression); \
        if (status_ != FPTQ_OK) {                 \
            return status_;                       \
        }                                         \
    } while (0)

/* Checks shared by operators; `op` begins the message. */
fptq_status fptq_check_dtype(const char *op, int32_t dtype);
fptq_status fptq_check_size(const char *op, const char *name, int64_t size);
fptq_status fptq_check_grid(const char *op, fptq_grid grid);
/* Every scale must be positive and finite; the message names the first that is not. */
fptq_status fptq_check_scale(const char *op, const void *scale, int64_t count, int32_t dtype);
/* The share of a row's own range that a dynamic grid covers. */
fptq_status fptq_check_clip_ratio(const char *op, double clip_ratio);
/* Reads entry i of an array in the dtype of computation. */
double fptq_get(const void *array, int64_t i, int32_t dtype);
void fptq_put(void *array, int64_t i, int32_t dtype, double value);

#endif
