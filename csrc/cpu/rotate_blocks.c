/*
 * rotate_blocks: channels are permuted, then each block of them is multiplied by a matrix of its own, or the other way round.
 *
 * forward     y[r, k b + i] = sum over j of matrices[k, i, j] x[r, permutation[k b + j]]
 * transpose   y[r, permutation[k b + j]] = sum over i of matrices[k, i, j] x[r, k b + i]
 *
 * with blocks k of b channels; without a permutation each channel stays where it is. For orthogonal matrices one undoes the other,
 * and each is the gradient of the other.
 *
 * Layout: x, y [rows, blocks * size]. A unit is a run of rows. Each value is one sum in COMPUTE, in the order of its index.
 */
#ifndef STORAGE
#define FPTQ_FILE "rotate_blocks.c"
#include <math.h>
#include <stdlib.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else

#include "multiply.h"

/* One block of channels of `count` rows from `first` on. Scratch: in, out [TILED(count), PADDED(size)], matrix [size,
 * PADDED(size)]. */
static void LOCAL(rotate_block)(const struct fptq_rotate_blocks *args, int64_t block, int64_t first, int64_t count, COMPUTE *in,
                                COMPUTE *out, COMPUTE *matrix)
{
    const int64_t size = args->size, step = PADDED(size), columns = args->blocks * size;
    const COMPUTE *values = (const COMPUTE *)args->matrices + block * size * size;
    const int64_t *order = args->permutation ? args->permutation + block * size : NULL;
    const STORAGE *x = (const STORAGE *)args->x + first * columns;
    STORAGE *y = (STORAGE *)args->y + first * columns;
    for (int64_t r = 0; r < count; r++) {
        for (int64_t j = 0; j < size; j++) {
            const int64_t channel = order && !args->transpose ? order[j] : block * size + j;
            in[r * step + j] = LOAD(x[r * columns + channel]);
        }
    }
    if (args->transpose) {
        for (int64_t i = 0; i < size; i++) {
            for (int64_t j = 0; j < step; j++) {
                matrix[i * step + j] = j < size ? values[i * size + j] : 0;
            }
        }
    } else {
        LOCAL(transpose)(matrix, values, size, size, size);
    }
    LOCAL(multiply)(out, (struct LOCAL(matrix)){in, step, 1}, matrix, count, size, step);
    for (int64_t r = 0; r < count; r++) {
        for (int64_t j = 0; j < size; j++) {
            const int64_t channel = order && args->transpose ? order[j] : block * size + j;
            y[r * columns + channel] = STORE(out[r * step + j]);
        }
    }
}

void KERNEL(rotate_blocks)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_rotate_blocks *args = context;
    const int64_t run = args->rows_per_unit, step = PADDED(args->size), rows = TILED(run);
    COMPUTE *memory = malloc((size_t)((2 * rows + args->size) * step) * sizeof(COMPUTE));
    if (!memory) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    for (int64_t unit = begin; unit < end; unit++) {
        const int64_t first = unit * run, rest = args->rows - first;
        for (int64_t block = 0; block < args->blocks; block++) {
            LOCAL(rotate_block)(args, block, first, rest < run ? rest : run, memory, memory + rows * step,
                                memory + 2 * rows * step);
        }
    }
    free(memory);
}

#endif
