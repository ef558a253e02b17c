/* Checks and scratch that the operators on weights share (merge_query_key, merge_scale, lp_norm, gptq, coordinate_descent). */
#ifndef FPTQ_OPS_WEIGHTS_H
#define FPTQ_OPS_WEIGHTS_H

#include "../fptq.h"

/* Units of an operator that sums over rows: at most this many runs of rows, so that their column sums stay small. */
#define FPTQ_ROW_UNITS 32

/* heads, half, columns and group of a query or key projection. */
fptq_status fptq_check_pairs(const char *op, int64_t heads, int64_t half, int64_t columns, int64_t group, int32_t dtype);

/* The quantizer of a fused operator: `inner` divides the columns, `count` scales are positive, the grid exists. */
fptq_status fptq_check_quantizer(const char *op, int64_t columns, int64_t inner, const void *scale, int64_t rows, fptq_grid grid,
                                 int32_t dtype);

/* Columns [begin, end) of an operator that works on one after the other: `matrix` [columns, columns], called `name`, has a positive
 * and finite diagonal there, and the group of each (NULL: the first) is one of `groups`. */
fptq_status fptq_check_columns(const char *op, const char *name, const void *matrix, int64_t columns, int64_t begin, int64_t end,
                               const int64_t *group, int64_t groups, int32_t dtype);

/* *factors = exp(log_scale) in the dtype of computation, to be freed by the caller; NULL where log_scale is NULL. */
fptq_status fptq_exp_factors(const char *op, const void *log_scale, int64_t count, int32_t dtype, void **factors);

static inline int64_t fptq_rows_per_unit(int64_t rows)
{
    return rows > 0 ? (rows + FPTQ_ROW_UNITS - 1) / FPTQ_ROW_UNITS : 1;
}

/* Adds partials [pairs, 2] over the heads of each group, in order: sums[kv * half + i] of entry `which`. */
double fptq_sum_group(const double *partials, int64_t parameter, int64_t half, int64_t group, int which);

#endif
