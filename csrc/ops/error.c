#include "error.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char last_error[512];

const char *fptq_last_error(void)
{
    return last_error;
}

fptq_status fptq_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return FPTQ_INVALID;
}

fptq_status fptq_fail_memory(const char *op, int64_t bytes)
{
    snprintf(last_error, sizeof last_error, "%s: %lld bytes of scratch memory could not be allocated", op, (long long)bytes);
    return FPTQ_OUT_OF_MEMORY;
}

fptq_status fptq_check_dtype(const char *op, int32_t dtype)
{
    if (dtype < 0 || dtype >= FPTQ_NUM_DTYPES) {
        return fptq_fail("%s: dtype %d is unknown; float32, float64, bfloat16 and float16 are supported", op, dtype);
    }
    return FPTQ_OK;
}

fptq_status fptq_check_size(const char *op, const char *name, int64_t size)
{
    return size < 0 ? fptq_fail("%s: %s = %lld must not be negative", op, name, (long long)size) : FPTQ_OK;
}

fptq_status fptq_check_grid(const char *op, fptq_grid grid)
{
    if (grid.kind != FPTQ_GRID_INTEGER) {
        return fptq_fail("%s: grid kind %d is unknown; only integer grids (0) exist", op, grid.kind);
    }
    if (grid.qmin >= grid.qmax) {
        return fptq_fail("%s: qmin = %d must be below qmax = %d", op, grid.qmin, grid.qmax);
    }
    return FPTQ_OK;
}

double fptq_get(const void *array, int64_t i, int32_t dtype)
{
    return dtype == FPTQ_F64 ? ((const double *)array)[i] : (double)((const float *)array)[i];
}

void fptq_put(void *array, int64_t i, int32_t dtype, double value)
{
    if (dtype == FPTQ_F64) {
        ((double *)array)[i] = value;
    } else {
        ((float *)array)[i] = (float)value;
    }
}

fptq_status fptq_check_scale(const char *op, const void *scale, int64_t count, int32_t dtype)
{
    for (int64_t i = 0; i < count; i++) {
        const double value = fptq_get(scale, i, dtype);
        if (!(value > 0 && isfinite(value))) {
            return fptq_fail("%s: scale[%lld] = %g must be positive and finite", op, (long long)i, value);
        }
    }
    return FPTQ_OK;
}

fptq_status fptq_check_clip_ratio(const char *op, double clip_ratio)
{
    return clip_ratio > 0 && clip_ratio <= 1 ? FPTQ_OK : fptq_fail("%s: clip_ratio = %g must lie in (0, 1]", op, clip_ratio);
}
