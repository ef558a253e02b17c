/*
 * gptq: columns of a weight quantized one after the other, each error spread over the columns that follow (Frantar et al.,
 * arXiv 2210.17323). With H the Hessian of the inputs, U upper triangular and U^T U = H^-1, for column j of every row:
 *
 *   q_j = fake_quant(w_j),   e_j = (w_j - q_j) / U_jj,   w_k <- w_k - e_j U_jk for k > j,   w_j <- q_j
 *
 * loss = sum of e_j^2 over the columns done; over all columns it is (w - q) H (w - q)^T, w the row before the call.
 *
 * Layout: weight is [rows, columns], U [columns, columns], scale and zero_point [rows, groups]; group[j] is column j's. One unit is
 * a panel of FPTQ_LANES rows (cpu/panel.h). Columns behind a block of GPTQ_BLOCK take its errors over when the block is done, in
 * the order of its columns, which is what one column after the other would do.
 */
#ifndef STORAGE
#define FPTQ_FILE "gptq.c"
#include <stdlib.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else
#include "panel.h"

enum { LOCAL(GPTQ_BLOCK) = 64 };

/* The rows of one unit. */
struct LOCAL(gptq_rows) {
    COMPUTE *values; /* the panel of columns [begin, columns) */
    int64_t row, count;
};

/* Quantizes columns [first, last), spreads their errors over each other, and leaves the errors for the columns behind. */
static inline void LOCAL(gptq_block)(const struct fptq_gptq *args, const struct LOCAL(gptq_rows) rows, int64_t first, int64_t last,
                                     COMPUTE errors[LOCAL(GPTQ_BLOCK)][FPTQ_LANES], double loss[FPTQ_LANES])
{
    struct LOCAL(panel_grid) grid = {.qmin = (COMPUTE)args->grid.qmin, .qmax = (COMPUTE)args->grid.qmax};
    const COMPUTE *scale = (const COMPUTE *)args->scale + rows.row * args->groups;
    const COMPUTE *zero_point = args->zero_point ? (const COMPUTE *)args->zero_point + rows.row * args->groups : NULL;
    for (int64_t j = first; j < last; j++) {
        const COMPUTE *factor_row = (const COMPUTE *)args->factor + j * args->columns; /* U[j, :] */
        COMPUTE *value = rows.values + (j - args->begin) * FPTQ_LANES, *error = errors[j - first];
        LOCAL(panel_grid_of)(&grid, scale, zero_point, args->groups, args->group ? args->group[j] : 0, rows.count);
        const COMPUTE diagonal = factor_row[j];
        for (int l = 0; l < FPTQ_LANES; l++) {
            const COMPUTE q = LOCAL(panel_nearest)(&grid, value[l], l);
            error[l] = (value[l] - q) / diagonal;
            loss[l] += (double)error[l] * (double)error[l];
            value[l] = q;
        }
        for (int64_t k = j + 1; k < last; k++) {
            COMPUTE *later = rows.values + (k - args->begin) * FPTQ_LANES;
            for (int l = 0; l < FPTQ_LANES; l++) {
                later[l] -= error[l] * factor_row[k];
            }
        }
    }
}

void KERNEL(gptq)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_gptq *args = context;
    COMPUTE *values = malloc((size_t)(args->columns - args->begin) * FPTQ_LANES * sizeof(COMPUTE));
    if (!values) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t row = unit * FPTQ_LANES, rest = args->rows - row, count = rest < FPTQ_LANES ? rest : FPTQ_LANES;
        const struct LOCAL(gptq_rows) rows = {.values = values, .row = row, .count = count};
        STORAGE *weight = (STORAGE *)args->weight + row * args->columns; /* weight[row, :] */
        COMPUTE errors[LOCAL(GPTQ_BLOCK)][FPTQ_LANES];
        double loss[FPTQ_LANES] = {0};
        LOCAL(panel_load)(values, weight, args->columns, args->begin, args->columns, count);
        for (int64_t first = args->begin; first < args->end; first += LOCAL(GPTQ_BLOCK)) {
            const int64_t last = first + LOCAL(GPTQ_BLOCK) < args->end ? first + LOCAL(GPTQ_BLOCK) : args->end;
            LOCAL(gptq_block)(args, rows, first, last, errors, loss);
            LOCAL(panel_subtract)(values + (last - args->begin) * FPTQ_LANES, errors[0],
                                  (const COMPUTE *)args->factor + first * args->columns + last, last - first, args->columns,
                                  args->columns - last); /* U[first, last:] */
        }
        LOCAL(panel_store)(weight, values, args->columns, args->begin, args->columns, count);
        for (int64_t l = 0; l < count; l++) {
            args->loss[row + l] = loss[l];
        }
    }
    free(values);
}

#endif
