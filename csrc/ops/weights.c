/* Checks and scratch that the operators on weights share. */
#include "weights.h"

#include <math.h>
#include <stdlib.h>

#include "error.h"

fptq_status fptq_check_pairs(const char *op, int64_t heads, int64_t half, int64_t columns, int64_t group, int32_t dtype)
{
    FPTQ_TRY(fptq_check_dtype(op, dtype));
    FPTQ_TRY(fptq_check_size(op, "heads", heads));
    FPTQ_TRY(fptq_check_size(op, "half", half));
    FPTQ_TRY(fptq_check_size(op, "columns", columns));
    if (group < 1 || heads % group != 0) {
        return fptq_fail("%s: group = %lld must divide the %lld heads", op, (long long)group, (long long)heads);
    }
    return FPTQ_OK;
}

fptq_status fptq_check_quantizer(const char *op, int64_t columns, int64_t inner, const void *scale, int64_t rows, fptq_grid grid,
                                 int32_t dtype)
{
    if (inner < 1 || columns % inner != 0) {
        return fptq_fail("%s: inner = %lld must divide the %lld columns", op, (long long)inner, (long long)columns);
    }
    FPTQ_TRY(fptq_check_grid(op, grid));
    return fptq_check_scale(op, scale, rows * (columns / inner), dtype);
}

fptq_status fptq_exp_factors(const char *op, const void *log_scale, int64_t count, int32_t dtype, void **factors)
{
    const int64_t bytes = (count > 0 ? count : 1) * (int64_t)sizeof(double);
    *factors = NULL;
    if (!log_scale) {
        return FPTQ_OK;
    }
    *factors = malloc((size_t)bytes);
    if (!*factors) {
        return fptq_fail_memory(op, bytes);
    }
    for (int64_t i = 0; i < count; i++) {
        fptq_put(*factors, i, dtype, exp(fptq_get(log_scale, i, dtype)));
    }
    return FPTQ_OK;
}

double fptq_sum_group(const double *partials, int64_t parameter, int64_t half, int64_t group, int which)
{
    const int64_t kv = parameter / half, i = parameter % half;
    double sum = 0;
    for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        sum += partials[2 * (head * half + i) + which];
    }
    return sum;
}

fptq_status fptq_check_columns(const char *op, const char *name, const void *matrix, int64_t columns, int64_t begin, int64_t end,
                               const int64_t *group, int64_t groups, int32_t dtype)
{
    for (int64_t j = begin; j < end; j++) {
        const double diagonal = fptq_get(matrix, j * columns + j, dtype);
        const int64_t index = group ? group[j] : 0;
        if (!(diagonal > 0 && isfinite(diagonal))) {
            return fptq_fail("%s: %s[%lld, %lld] = %g must be positive and finite; damp the Hessian more", op, name, (long long)j,
                             (long long)j, diagonal);
        }
        if (index < 0 || index >= groups) {
            return fptq_fail("%s: column %lld belongs to group %lld, but there are %lld", op, (long long)j, (long long)index,
                             (long long)groups);
        }
    }
    return FPTQ_OK;
}
