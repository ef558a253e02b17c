/*
 * coordinate_descent: weights that lie on a grid, improved one column after the other (cyclic coordinate descent, as in QuantEase,
 * Behdin et al., arXiv 2309.01885). With E = w - q and H the Hessian of the inputs, the loss E H E^T of a row is, as a function of
 * one q_j, a parabola with its lowest point at q_j + (E H)_j / H_jj; q_j goes to the value of the grid that is nearest to it:
 *
 *   q'_j = fake_quant(q_j + (E H)_j / H_jj),   E_j <- w_j - q'_j,   E H <- E H - (q'_j - q_j) H[j, :]
 *
 * A sweep goes over all columns; a panel ends when a sweep changes nothing. loss = E H E^T at the end.
 *
 * Layout: quantized and weight are [rows, columns], H [columns, columns] (symmetric), scale and zero_point [rows, groups]; group[j]
 * is column j's. One unit is a panel of FPTQ_LANES rows (cpu/panel.h). The panel of slopes holds -E H.
 */
#ifndef STORAGE
#define FPTQ_FILE "coordinate_descent.c"
#include <stdlib.h>
#include <string.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else
#include "panel.h"

/* The rows of one unit, as panels of all columns. */
struct LOCAL(descent_rows) {
    COMPUTE *quantized, *weight, *error, *slope;
    int64_t row, count;
};

/* Moves column j of every row; returns whether any has moved, with `moves` the differences. */
static inline bool LOCAL(descent_column)(const struct fptq_coordinate_descent *args, const struct LOCAL(descent_rows) rows,
                                         int64_t j, struct LOCAL(panel_grid) * grid, COMPUTE moves[FPTQ_LANES])
{
    const COMPUTE *scale = (const COMPUTE *)args->scale + rows.row * args->groups;
    const COMPUTE *zero_point = args->zero_point ? (const COMPUTE *)args->zero_point + rows.row * args->groups : NULL;
    const COMPUTE diagonal = ((const COMPUTE *)args->hessian)[j * args->columns + j];
    COMPUTE *quantized = rows.quantized + j * FPTQ_LANES, *error = rows.error + j * FPTQ_LANES;
    const COMPUTE *slope = rows.slope + j * FPTQ_LANES, *weight = rows.weight + j * FPTQ_LANES;
    LOCAL(panel_grid_of)(grid, scale, zero_point, args->groups, args->group ? args->group[j] : 0, rows.count);
    int moved = 0;
    for (int l = 0; l < FPTQ_LANES; l++) {
        const COMPUTE q = LOCAL(panel_nearest)(grid, quantized[l] - slope[l] / diagonal, l);
        moves[l] = q - quantized[l];
        moved |= moves[l] != 0;
        quantized[l] = q;
        error[l] = weight[l] - q;
    }
    return moved;
}

/* All columns, one after the other; returns whether any row has changed. */
static inline bool LOCAL(descent_sweep)(const struct fptq_coordinate_descent *args, const struct LOCAL(descent_rows) rows)
{
    struct LOCAL(panel_grid) grid = {.qmin = (COMPUTE)args->grid.qmin, .qmax = (COMPUTE)args->grid.qmax};
    bool changed = false;
    for (int64_t j = 0; j < args->columns; j++) {
        COMPUTE moves[FPTQ_LANES];
        if (!LOCAL(descent_column)(args, rows, j, &grid, moves)) {
            continue;
        }
        changed = true;
        const COMPUTE *hessian = (const COMPUTE *)args->hessian + j * args->columns; /* H[j, :] */
        for (int part = 0; part < FPTQ_LANES; part += LOCAL(PANEL_WIDTH)) {
            const LOCAL(lanes) move = *(const LOCAL(lanes) *)(moves + part);
            for (int64_t k = 0; k < args->columns; k++) {
                *(LOCAL(lanes) *)(rows.slope + k * FPTQ_LANES + part) += move * hessian[k];
            }
        }
    }
    return changed;
}

void KERNEL(coordinate_descent)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_coordinate_descent *args = context;
    const int64_t columns = args->columns, size = columns * FPTQ_LANES;
    COMPUTE *values = malloc((size_t)(4 * size) * sizeof(COMPUTE));
    if (!values) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t row = unit * FPTQ_LANES, rest = args->rows - row, count = rest < FPTQ_LANES ? rest : FPTQ_LANES;
        const struct LOCAL(descent_rows) rows = {values, values + size, values + 2 * size, values + 3 * size, row, count};
        STORAGE *quantized = (STORAGE *)args->quantized + row * columns; /* quantized[row, :] */
        LOCAL(panel_load)(rows.quantized, quantized, columns, 0, columns, count);
        LOCAL(panel_load)(rows.weight, (const STORAGE *)args->weight + row * columns, columns, 0, columns, count);
        for (int64_t i = 0; i < size; i++) {
            rows.error[i] = rows.weight[i] - rows.quantized[i];
        }
        memset(rows.slope, 0, (size_t)size * sizeof(COMPUTE));
        LOCAL(panel_subtract)(rows.slope, rows.error, (const COMPUTE *)args->hessian, columns, columns, columns);
        for (int64_t sweep = 0; sweep < args->sweeps && LOCAL(descent_sweep)(args, rows); sweep++) {
        }
        double loss[FPTQ_LANES] = {0};
        for (int64_t i = 0; i < size; i++) {
            loss[i % FPTQ_LANES] -= (double)rows.error[i] * (double)rows.slope[i];
        }
        LOCAL(panel_store)(quantized, rows.quantized, columns, 0, columns, count);
        for (int64_t l = 0; l < count; l++) {
            args->loss[row + l] = loss[l];
        }
    }
    free(values);
}

#endif
