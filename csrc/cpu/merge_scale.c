/*
 * merge_scale: y[r, c] = weight[r, c] * exp(row_log_scale[r]) * exp(column_log_scale[c]), then fake-quantized where a scale
 * is given.
 *
 * Layout: weight, y, dy, dweight are [rows, columns]; scale and zero_point [rows, columns / inner], one for each run of
 * `inner` columns. The exponentials are computed in fp64 and rounded to COMPUTE; the product is taken from left to right; y
 * is not rounded to STORAGE before it is quantized.
 *
 * Backward, with dy the gradient for y (what fake_quant's straight-through rule leaves):
 *   drow[r] = sum over c of dy y        dcolumn[c] = sum over r of dy y        dweight = dy exp(row) exp(column)
 * Sums: FPTQ_LANES interleaved fp64 accumulators per row or run, added pairwise. A unit of the backward is a run of rows
 * whose column sums are added row by row in fp64; the operator adds the units in order.
 */
#ifndef STORAGE
#define FPTQ_FILE "merge_scale.c"
#include <math.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else

#include "chunks.h"

static inline COMPUTE LOCAL(row_factor)(const struct fptq_merge_scale_forward *args, int64_t r)
{
    return args->row_log_scale ? (COMPUTE)exp((double)((const COMPUTE *)args->row_log_scale)[r]) : 1;
}

/* `quantized` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void LOCAL(forward_rows)(int64_t begin, int64_t end,
                                                                      const struct fptq_merge_scale_forward *args, bool quantized)
{
    const int64_t columns = args->columns, runs = columns / args->inner;
    const COMPUTE *factors = args->column_factors;
    for (int64_t r = begin; r < end; r++) {
        const STORAGE *w_row = (const STORAGE *)args->weight + r * columns; /* weight[r, :] */
        STORAGE *y_row = (STORAGE *)args->y + r * columns;                  /* y[r, :] */
        const COMPUTE row_factor = LOCAL(row_factor)(args, r);
        for (int64_t run = 0; run < runs; run++) {
            struct LOCAL(quantizer) quantizer = {0};
            if (quantized) {
                quantizer = LOCAL(quantizer_of)(args->scale, args->zero_point, r * runs + run, args->grid);
            }
            for (int64_t c = run * args->inner, stop = c + args->inner; c < stop; c += FPTQ_LANES) {
                COMPUTE y[FPTQ_LANES];
                LOCAL(load_chunk)(y, w_row + c, stop - c);
                LOCAL(scale_chunk)(y, row_factor, factors ? factors + c : NULL, stop - c);
                if (quantized) {
                    LOCAL(quantize_chunk)(y, quantizer);
                }
                LOCAL(store_chunk)(y_row + c, y, stop - c);
            }
        }
    }
}

void KERNEL(merge_scale_forward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_merge_scale_forward *args = context;
    if (args->scale) {
        LOCAL(forward_rows)(begin, end, args, true);
    } else {
        LOCAL(forward_rows)(begin, end, args, false);
    }
}

/* One row; its terms are added to column_sums [columns] unless that is NULL. `quantized` is a constant where inlined. */
static inline __attribute__((always_inline)) void LOCAL(backward_row)(const struct fptq_merge_scale_backward *args, int64_t r,
                                                                      double *column_sums, bool quantized)
{
    const struct fptq_merge_scale_forward *forward = &args->forward;
    const int64_t columns = forward->columns, runs = columns / forward->inner;
    const COMPUTE *factors = forward->column_factors;
    const STORAGE *w_row = (const STORAGE *)forward->weight + r * columns;
    const STORAGE *dy_row = (const STORAGE *)args->dy + r * columns;
    STORAGE *dweight_row = args->dweight ? (STORAGE *)args->dweight + r * columns : NULL;
    const COMPUTE row_factor = LOCAL(row_factor)(forward, r);
    double drow[FPTQ_LANES] = {0};
    for (int64_t run = 0; run < runs; run++) {
        double dscale[FPTQ_LANES] = {0}, dzero_point[FPTQ_LANES] = {0};
        struct LOCAL(quantizer) quantizer = {0};
        if (quantized) {
            quantizer = LOCAL(quantizer_of)(forward->scale, forward->zero_point, r * runs + run, forward->grid);
        }
        for (int64_t c = run * forward->inner, stop = c + forward->inner; c < stop; c += FPTQ_LANES) {
            COMPUTE y[FPTQ_LANES], dy[FPTQ_LANES];
            double terms[FPTQ_LANES];
            LOCAL(load_chunk)(y, w_row + c, stop - c);
            LOCAL(load_chunk)(dy, dy_row + c, stop - c);
            LOCAL(scale_chunk)(y, row_factor, factors ? factors + c : NULL, stop - c);
            if (quantized) {
                LOCAL(quantize_chunk_backward)(dy, dscale, dzero_point, y, quantizer);
            }
            for (int l = 0; l < FPTQ_LANES; l++) {
                terms[l] = (double)(dy[l] * y[l]);
                drow[l] += terms[l];
            }
            if (column_sums) {
                LOCAL(add_chunk)(column_sums + c, terms, stop - c);
            }
            if (dweight_row) {
                LOCAL(scale_chunk)(dy, row_factor, factors ? factors + c : NULL, stop - c);
                LOCAL(store_chunk)(dweight_row + c, dy, stop - c);
            }
        }
        if (quantized) {
            ((COMPUTE *)args->dscale)[r * runs + run] = (COMPUTE)fptq_sum_lanes(dscale);
            if (args->dzero_point) {
                ((COMPUTE *)args->dzero_point)[r * runs + run] = (COMPUTE)fptq_sum_lanes(dzero_point);
            }
        }
    }
    if (args->drow_log_scale) {
        ((COMPUTE *)args->drow_log_scale)[r] = (COMPUTE)fptq_sum_lanes(drow);
    }
}

void KERNEL(merge_scale_backward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_merge_scale_backward *args = context;
    const int64_t rows = args->forward.rows, columns = args->forward.columns;
    for (int64_t unit = begin; unit < end; unit++) {
        double *column_sums = args->partials ? args->partials + unit * columns : NULL;
        const int64_t first = unit * args->rows_per_unit, rest = rows - first;
        for (int64_t c = 0; column_sums && c < columns; c++) {
            column_sums[c] = 0;
        }
        for (int64_t r = first; r < first + (rest < args->rows_per_unit ? rest : args->rows_per_unit); r++) {
            if (args->forward.scale) {
                LOCAL(backward_row)(args, r, column_sums, true);
            } else {
                LOCAL(backward_row)(args, r, column_sums, false);
            }
        }
    }
}

#endif
