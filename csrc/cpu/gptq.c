/*
 * gptq: columns of a weight quantized one after the other, each error spread over the columns that follow (Frantar et al.,
 * arXiv 2210.17323). With H the Hessian of the inputs, U upper triangular and U^T U = H^-1, for column j of every row:
 *
 *   q_j = fake_quant(w_j),   e_j = (w_j - q_j) / U_jj,   w_k <- w_k - e_j U_jk for k > j,   w_j <- q_j
 *
 * loss = sum of e_j^2 over the columns done; over all columns it is (w - q) H (w - q)^T, w the row before the call.
 *
 * Layout: weight is [rows, columns], U [columns, columns], scale and zero_point [rows, groups]; group[j] is column j's. Rows do
 * not depend on each other: one unit is FPTQ_LANES rows, kept as a panel [columns, FPTQ_LANES], so that every operation is
 * elementwise and the same bits come out on every instruction set. Columns behind a block of GPTQ_BLOCK take its errors over
 * when the block is done, in the order of its columns, which is what one column after the other would do.
 */
#ifndef STORAGE
#define FPTQ_FILE "gptq.c"
#include <stdlib.h>

#include "../ops/units.h"

#if defined __AVX512F__
#define FPTQ_REGISTER 64
#elif defined __AVX2__
#define FPTQ_REGISTER 32
#else
#define FPTQ_REGISTER 16
#endif

#include "for_each_dtype.h"
#else

/* Values of rows side by side: the compiler's own vectors, as wide as a register, for it does not find them in loops here. */
enum { LOCAL(GPTQ_BLOCK) = 64, LOCAL(GPTQ_TILE) = 8, LOCAL(GPTQ_WIDTH) = FPTQ_REGISTER / sizeof(COMPUTE) };
typedef COMPUTE LOCAL(lanes) __attribute__((vector_size(FPTQ_REGISTER), aligned(sizeof(COMPUTE)), may_alias));

/* The rows of one unit. */
struct LOCAL(panel) {
    COMPUTE *values; /* [columns - begin, FPTQ_LANES] */
    int64_t row, count;
};

/* Quantizes columns [first, last), spreads their errors over each other, and leaves the errors for the columns behind. */
static inline void LOCAL(gptq_block)(const struct fptq_gptq *args, const struct LOCAL(panel) panel, int64_t first, int64_t last,
                                     COMPUTE errors[LOCAL(GPTQ_BLOCK)][FPTQ_LANES], double loss[FPTQ_LANES])
{
    const COMPUTE qmin = (COMPUTE)args->grid.qmin, qmax = (COMPUTE)args->grid.qmax;
    for (int64_t j = first; j < last; j++) {
        const COMPUTE *factor_row = (const COMPUTE *)args->factor + j * args->columns; /* U[j, :] */
        const int64_t group = args->group ? args->group[j] : 0;
        COMPUTE *value = panel.values + (j - args->begin) * FPTQ_LANES, *error = errors[j - first];
        COMPUTE scale[FPTQ_LANES], zero_point[FPTQ_LANES];
        for (int64_t l = 0; l < FPTQ_LANES; l++) {
            const int64_t index = (panel.row + (l < panel.count ? l : 0)) * args->groups + group;
            scale[l] = ((const COMPUTE *)args->scale)[index];
            zero_point[l] = args->zero_point ? RINT(((const COMPUTE *)args->zero_point)[index]) : 0;
        }
        const COMPUTE diagonal = factor_row[j];
        for (int l = 0; l < FPTQ_LANES; l++) {
            COMPUTE q = RINT(value[l] / scale[l]) + zero_point[l];
            q = q < qmin ? qmin : q;
            q = q > qmax ? qmax : q;
            q = (q - zero_point[l]) * scale[l];
            error[l] = (value[l] - q) / diagonal;
            loss[l] += (double)error[l] * (double)error[l];
            value[l] = q;
        }
        for (int64_t k = j + 1; k < last; k++) {
            COMPUTE *later = panel.values + (k - args->begin) * FPTQ_LANES;
            for (int l = 0; l < FPTQ_LANES; l++) {
                later[l] -= error[l] * factor_row[k];
            }
        }
    }
}

/* Columns [k, k + count) take over the errors of columns [first, last). `count` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void LOCAL(gptq_behind)(const struct fptq_gptq *args, const struct LOCAL(panel) panel,
                                                                     int64_t first, int64_t last, int64_t k, const int count,
                                                                     const COMPUTE errors[LOCAL(GPTQ_BLOCK)][FPTQ_LANES])
{
    COMPUTE *values = panel.values + (k - args->begin) * FPTQ_LANES;
    for (int part = 0; part < FPTQ_LANES; part += LOCAL(GPTQ_WIDTH)) {
        LOCAL(lanes) sums[LOCAL(GPTQ_TILE)];
        for (int t = 0; t < count; t++) {
            sums[t] = *(const LOCAL(lanes) *)(values + t * FPTQ_LANES + part);
        }
        for (int64_t j = first; j < last; j++) {
            const COMPUTE *factor = (const COMPUTE *)args->factor + j * args->columns + k; /* U[j, k:] */
            const LOCAL(lanes) error = *(const LOCAL(lanes) *)(errors[j - first] + part);
            for (int t = 0; t < count; t++) {
                sums[t] -= error * factor[t];
            }
        }
        for (int t = 0; t < count; t++) {
            *(LOCAL(lanes) *)(values + t * FPTQ_LANES + part) = sums[t];
        }
    }
}

/* Moves columns [begin, columns) of the unit's rows into the panel, or back into the weight. */
static inline void LOCAL(gptq_move)(const struct fptq_gptq *args, const struct LOCAL(panel) panel, const int back)
{
    for (int64_t l = 0; l < FPTQ_LANES; l++) {
        STORAGE *row = (STORAGE *)args->weight + (panel.row + (l < panel.count ? l : 0)) * args->columns; /* weight[row + l, :] */
        for (int64_t k = args->begin; k < args->columns; k++) {
            COMPUTE *value = panel.values + (k - args->begin) * FPTQ_LANES + l;
            if (!back) {
                *value = l < panel.count ? LOAD(row[k]) : 0;
            } else if (l < panel.count) {
                row[k] = STORE(*value);
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
        const int64_t row = unit * FPTQ_LANES, rest = args->rows - row;
        const struct LOCAL(panel) panel = {.values = values, .row = row, .count = rest < FPTQ_LANES ? rest : FPTQ_LANES};
        COMPUTE errors[LOCAL(GPTQ_BLOCK)][FPTQ_LANES];
        double loss[FPTQ_LANES] = {0};
        LOCAL(gptq_move)(args, panel, 0);
        for (int64_t first = args->begin; first < args->end; first += LOCAL(GPTQ_BLOCK)) {
            const int64_t last = first + LOCAL(GPTQ_BLOCK) < args->end ? first + LOCAL(GPTQ_BLOCK) : args->end;
            LOCAL(gptq_block)(args, panel, first, last, errors, loss);
            int64_t k = last;
            for (; k + LOCAL(GPTQ_TILE) <= args->columns; k += LOCAL(GPTQ_TILE)) {
                LOCAL(gptq_behind)(args, panel, first, last, k, LOCAL(GPTQ_TILE), errors);
            }
            for (; k < args->columns; k++) {
                LOCAL(gptq_behind)(args, panel, first, last, k, 1, errors);
            }
        }
        LOCAL(gptq_move)(args, panel, 1);
        for (int64_t l = 0; l < panel.count; l++) {
            args->loss[row + l] = loss[l];
        }
    }
    free(values);
}

#endif
