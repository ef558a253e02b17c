/*
 * kronecker: y = (left (x) right) x for each block of rows * columns values, then fake-quantized where a scale is given, or
 * with the scale and zero point of the block's own range (choose_qparams.c), the scale times `clip`, where these are wanted.
 *
 * With a block of x as X [rows, columns], and likewise Y:
 *   M = X right^T        Y = left M        a factor that is NULL is the identity
 * y is not rounded to STORAGE before it is quantized.
 *
 * Backward, with dY the gradient for Y (what fake_quant's straight-through rule leaves):
 *   dM = left^T dY       dX = dM right     dleft = sum over blocks of dY M^T        dright = sum over blocks of dM^T X
 *
 * Layout: x, y, dx, dy are [blocks, rows, columns]. Each entry of a product is one sum in COMPUTE, in the order of its index;
 * sums over the blocks of a unit are added block by block in fp64, and the operator adds the units in order.
 */
#ifndef STORAGE
#define FPTQ_FILE "kronecker.c"
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else

#include "chunks.h"
#include "multiply.h"
#include "qparams.h"

static void LOCAL(load_block)(COMPUTE *out, const STORAGE *in, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i++) {
        const STORAGE *restrict in_row = in + i * columns;
        COMPUTE *restrict out_row = out + i * PADDED(columns);
        for (int64_t j = 0; j < columns; j++) {
            out_row[j] = LOAD(in_row[j]);
        }
        for (int64_t j = columns; j < PADDED(columns); j++) {
            out_row[j] = 0;
        }
    }
}

static void LOCAL(store_block)(STORAGE *out, const COMPUTE *in, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; i++) {
        const COMPUTE *restrict in_row = in + i * PADDED(columns);
        STORAGE *restrict out_row = out + i * columns;
        for (int64_t j = 0; j < columns; j++) {
            out_row[j] = STORE(in_row[j]);
        }
    }
}

/* X as [rows, PADDED(columns)], M and Y; M is X, and Y is M, where a factor is the identity. */
struct LOCAL(products) {
    COMPUTE *x, *m, *y;
};

static void LOCAL(compute_products)(struct LOCAL(products) * block, COMPUTE *const scratch[3], const COMPUTE *right_transposed,
                                    const struct fptq_kronecker_forward *args, int64_t index)
{
    const int64_t rows = args->rows, columns = args->columns, step = PADDED(columns);
    LOCAL(load_block)(scratch[0], (const STORAGE *)args->x + index * rows * columns, rows, columns);
    block->x = block->m = scratch[0];
    if (args->right) {
        block->m = scratch[1];
        LOCAL(multiply)(block->m, (struct LOCAL(matrix)){block->x, step, 1}, right_transposed, rows, columns, step);
    }
    block->y = block->m;
    if (args->left) {
        block->y = scratch[2];
        LOCAL(multiply)(block->y, (struct LOCAL(matrix)){args->left, rows, 1}, block->m, rows, rows, step);
    }
}

/* The scale and zero point of a block of y. What a last chunk reads behind it is a row of y once more (multiply.h). */
static void LOCAL(choose_block_qparams)(const COMPUTE *y, const struct fptq_kronecker_forward *args, int64_t index)
{
    COMPUTE los[FPTQ_LANES] = {0}, his[FPTQ_LANES] = {0};
    for (int64_t i = 0; i < args->rows * PADDED(args->columns); i += FPTQ_LANES) {
        LOCAL(widen_range)(los, his, y + i);
    }
    const struct LOCAL(qparams) found = LOCAL(qparams_of)(los, his, (COMPUTE)args->clip_ratio, args->symmetric, args->grid);
    ((COMPUTE *)args->dynamic_scale)[index] = args->clip ? found.scale * *(const COMPUTE *)args->clip : found.scale;
    ((COMPUTE *)args->dynamic_zero_point)[index] = found.zero_point;
}

void KERNEL(kronecker_forward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_kronecker_forward *args = context;
    const int64_t rows = args->rows, columns = args->columns, size = TILED(rows) * PADDED(columns);
    COMPUTE *memory = malloc((size_t)(3 * size + columns * PADDED(columns)) * sizeof(COMPUTE));
    if (!memory) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    COMPUTE *const scratch[3] = {memory, memory + size, memory + 2 * size};
    COMPUTE *right_transposed = memory + 3 * size;
    if (args->right) {
        LOCAL(transpose)(right_transposed, args->right, columns, columns, columns);
    }
    for (int64_t index = begin; index < end; index++) {
        struct LOCAL(products) block;
        LOCAL(compute_products)(&block, scratch, right_transposed, args, index);
        if (args->dynamic_scale) {
            LOCAL(choose_block_qparams)(block.y, args, index);
        }
        if (args->scale) {
            const struct LOCAL(quantizer) quantizer =
                LOCAL(quantizer_of)(args->scale, args->zero_point, args->scales == 1 ? 0 : index, args->grid);
            for (int64_t i = 0; i < rows * PADDED(columns); i += FPTQ_LANES) {
                LOCAL(quantize_chunk)(block.y + i, quantizer);
            }
        }
        LOCAL(store_block)((STORAGE *)args->y + index * rows * columns, block.y, rows, columns);
    }
    free(memory);
}

/* dy <- the gradient for y; the sums of dscale and dzero_point over the block. Lanes are counted from each row's beginning. */
static void LOCAL(quantize_block_backward)(COMPUTE *dy, const COMPUTE *y, double sums[2], const struct fptq_kronecker_forward *args,
                                           int64_t index)
{
    const struct LOCAL(quantizer) quantizer =
        LOCAL(quantizer_of)(args->scale, args->zero_point, args->scales == 1 ? 0 : index, args->grid);
    double dscale[FPTQ_LANES] = {0}, dzero_point[FPTQ_LANES] = {0};
    for (int64_t i = 0; i < args->rows * PADDED(args->columns); i++) {
        COMPUTE dvalue, dscale_i, dzero_i;
        LOCAL(quantize_element)(dy[i], y[i], quantizer, &dvalue, &dscale_i, &dzero_i);
        dy[i] = dvalue; /* 0 stays 0 behind the last column, and adds nothing */
        dscale[i % FPTQ_LANES] += (double)dscale_i;
        dzero_point[i % FPTQ_LANES] += (double)dzero_i;
    }
    sums[0] = fptq_sum_lanes(dscale);
    sums[1] = fptq_sum_lanes(dzero_point);
}

/* sums [m, n] += product [m, PADDED(n)] */
static void LOCAL(add_product)(double *sums, const COMPUTE *product, int64_t m, int64_t n)
{
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            sums[i * n + j] += (double)product[i * PADDED(n) + j];
        }
    }
}

/* Everything the backward of a block needs: [rows, PADDED(columns)] for the first six, then M^T, products and right^T, right. */
struct LOCAL(workspace) {
    COMPUTE *const forward[3];
    COMPUTE *dy, *dm, *dx, *m_transposed, *product, *right_transposed, *right;
};

static void LOCAL(backward_block)(const struct fptq_kronecker_backward *args, const struct LOCAL(workspace) * space, int64_t index,
                                  double *dleft, double *dright)
{
    const struct fptq_kronecker_forward *forward = &args->forward;
    const int64_t rows = forward->rows, columns = forward->columns, step = PADDED(columns);
    struct LOCAL(products) block;
    LOCAL(compute_products)(&block, space->forward, space->right_transposed, forward, index);
    LOCAL(load_block)(space->dy, (const STORAGE *)args->dy + index * rows * columns, rows, columns);
    if (forward->scale) {
        LOCAL(quantize_block_backward)(space->dy, block.y, args->scale_partials + 2 * index, forward, index);
    }
    COMPUTE *dm = space->dy;
    if (forward->left) {
        dm = space->dm;
        LOCAL(multiply)(dm, (struct LOCAL(matrix)){forward->left, 1, rows}, space->dy, rows, rows, step);
    }
    if (dleft) {
        LOCAL(transpose)(space->m_transposed, block.m, rows, columns, step);
        LOCAL(multiply)(space->product, (struct LOCAL(matrix)){space->dy, step, 1}, space->m_transposed, rows, columns,
                        PADDED(rows));
        LOCAL(add_product)(dleft, space->product, rows, rows);
    }
    if (dright) {
        LOCAL(multiply)(space->product, (struct LOCAL(matrix)){dm, 1, step}, block.x, columns, rows, step);
        LOCAL(add_product)(dright, space->product, columns, columns);
    }
    if (args->dx) {
        COMPUTE *dx = dm;
        if (forward->right) {
            dx = space->dx;
            LOCAL(multiply)(dx, (struct LOCAL(matrix)){dm, step, 1}, space->right, rows, columns, step);
        }
        LOCAL(store_block)((STORAGE *)args->dx + index * rows * columns, dx, rows, columns);
    }
}

void KERNEL(kronecker_backward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_kronecker_backward *args = context;
    const struct fptq_kronecker_forward *forward = &args->forward;
    const int64_t rows = forward->rows, columns = forward->columns, size = TILED(rows) * PADDED(columns);
    const int64_t square = TILED(columns) * PADDED(columns), other = TILED(rows) * PADDED(rows);
    const int64_t product = square > other ? square : other;
    COMPUTE *memory = malloc((size_t)(6 * size + columns * PADDED(rows) + product + 2 * square) * sizeof(COMPUTE));
    if (!memory) {
        *forward->out_of_memory = true;
        return;
    }
    COMPUTE *const squares = memory + 6 * size + columns * PADDED(rows);
    const struct LOCAL(workspace) space = {
        .forward = {memory, memory + size, memory + 2 * size},
        .dy = memory + 3 * size,
        .dm = memory + 4 * size,
        .dx = memory + 5 * size,
        .m_transposed = memory + 6 * size,
        .product = squares,
        .right_transposed = squares + product,
        .right = squares + product + square,
    };
    if (forward->right) {
        LOCAL(transpose)(space.right_transposed, forward->right, columns, columns, columns);
        LOCAL(transpose)(space.right, space.right_transposed, columns, columns, PADDED(columns));
    }
    for (int64_t unit = begin; unit < end; unit++) {
        double *sums = args->partials + unit * (rows * rows + columns * columns);
        for (int64_t i = 0; i < rows * rows + columns * columns; i++) {
            sums[i] = 0;
        }
        const int64_t first = unit * args->blocks_per_unit, rest = forward->blocks - first;
        for (int64_t b = first; b < first + (rest < args->blocks_per_unit ? rest : args->blocks_per_unit); b++) {
            LOCAL(backward_block)(args, &space, b, args->dleft ? sums : NULL, args->dright ? sums + rows * rows : NULL);
        }
    }
    free(memory);
}

#endif
