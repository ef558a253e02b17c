/*
 * hadamard: y = H x / sqrt(n), or H^T x / sqrt(n), for each block of n values.
 *
 *   H = H_a (x) H_b (x) ... (x) H_2 (x) ... (x) H_2        the plan's dense factors, then `power` factors of order 2
 *
 * Layout: x and y are [blocks, n], contiguous; one unit is one block. A block is seen as [a, b, ..., 2, ..., 2]; every factor
 * acts on its own axis, in COMPUTE, the fastest axis first: log2 additions per value for the factors of order 2, `order`
 * additions per value for a dense one, summed in the order of its columns. The scale 1 / sqrt(n) is multiplied last.
 * NaN and infinities spread over their block, as sums do. Additions and one product only: no instruction set may differ.
 */
#ifndef STORAGE
#define FPTQ_FILE "hadamard.c"
#include <math.h>
#include <stdlib.h>

/* sum + sign * value for sign = +-1: the product is exact, so a fused multiply-add gives the same bits. */
#ifdef FP_FAST_FMAF
#define FPTQ_ADD_SIGNED(sum, sign, value) __builtin_choose_expr(sizeof(sum) == 4, fmaf(sign, value, sum), fma(sign, value, sum))
#else
#define FPTQ_ADD_SIGNED(sum, sign, value) ((sum) + (sign) * (value))
#endif
#include "for_each_dtype.h"
#else

enum { LOCAL(LANES) = 64 / sizeof(COMPUTE), LOCAL(TILE) = 4 };

/* Butterflies of strides 1, 2, 4, ... inside runs of LANES values: each output reads its own and its partner's input. */
static inline void LOCAL(short_strides)(COMPUTE *restrict v)
{
    enum { LANES = LOCAL(LANES) };
    COMPUTE in[LANES], out[LANES];
    for (int i = 0; i < LANES; i++) {
        in[i] = v[i];
    }
#pragma GCC unroll 4
    for (int stride = 1; stride < LANES; stride *= 2) {
        for (int i = 0; i < LANES; i++) {
            out[i] = in[i ^ stride] + ((i & stride) ? -in[i] : in[i]);
        }
        for (int i = 0; i < LANES; i++) {
            in[i] = out[i];
        }
    }
    for (int i = 0; i < LANES; i++) {
        v[i] = in[i];
    }
}

/* One butterfly of a long stride: (v[i], v[i + stride]) <- (sum, difference). */
static inline void LOCAL(long_stride)(COMPUTE *v, int64_t n, int64_t stride)
{
    for (int64_t start = 0; start < n; start += 2 * stride) {
        COMPUTE *restrict low = v + start, *restrict high = v + start + stride;
        for (int64_t i = 0; i < stride; i++) {
            const COMPUTE a = low[i], b = high[i];
            low[i] = a + b;
            high[i] = a - b;
        }
    }
}

/* All `power` factors of order 2 on v[0 .. n), n a multiple of 2^power. */
static void LOCAL(sylvester)(COMPUTE *v, int64_t n, int64_t power)
{
    enum { LANES = LOCAL(LANES) };
    int64_t stride = 1;
    if ((int64_t)1 << power >= LANES) {
        for (int64_t i = 0; i < n; i += LANES) {
            LOCAL(short_strides)(v + i);
        }
        stride = LANES;
    }
    for (; stride < (int64_t)1 << power; stride *= 2) {
        LOCAL(long_stride)(v, n, stride);
    }
}

/* out[i .. i + TILE, c .. c + LANES] of one dense factor: sums over j of signs[i, j] * in[j, c]. */
static inline void LOCAL(mix_tile)(COMPUTE *restrict out, const COMPUTE *restrict in, const COMPUTE *restrict signs, int64_t order,
                                   int64_t inner)
{
    enum { LANES = LOCAL(LANES), TILE = LOCAL(TILE) };
    COMPUTE sums[TILE][LANES] = {{0}};
    for (int64_t j = 0; j < order; j++) {
        for (int i = 0; i < TILE; i++) {
            for (int l = 0; l < LANES; l++) {
                sums[i][l] = FPTQ_ADD_SIGNED(sums[i][l], signs[i * order + j], in[j * inner + l]);
            }
        }
    }
    for (int i = 0; i < TILE; i++) {
        for (int l = 0; l < LANES; l++) {
            out[i * inner + l] = sums[i][l];
        }
    }
}

/* One dense factor on [outer, order, inner]; signs is [order, order]. The order is a multiple of TILE. */
static void LOCAL(mix)(COMPUTE *restrict out, const COMPUTE *restrict in, const COMPUTE *restrict signs, int64_t outer,
                       int64_t order, int64_t inner)
{
    enum { LANES = LOCAL(LANES), TILE = LOCAL(TILE) };
    for (int64_t o = 0; o < outer; o++, in += order * inner, out += order * inner) {
        for (int64_t i = 0; i < order; i += TILE) {
            int64_t c = 0;
            for (; c + LANES <= inner; c += LANES) {
                LOCAL(mix_tile)(out + i * inner + c, in + c, signs + i * order, order, inner);
            }
            for (; c < inner; c++) {
                for (int64_t k = i; k < i + TILE; k++) {
                    COMPUTE sum = 0;
                    for (int64_t j = 0; j < order; j++) {
                        sum = FPTQ_ADD_SIGNED(sum, signs[k * order + j], in[j * inner + c]);
                    }
                    out[k * inner + c] = sum;
                }
            }
        }
    }
}

/* The signs of every factor, one after the other, transposed where the transform is. */
static void LOCAL(expand_signs)(COMPUTE *signs, const struct fptq_hadamard_plan *plan, bool transpose)
{
    for (int64_t f = 0; f < plan->num_factors; f++) {
        const int64_t order = plan->order[f];
        for (int64_t i = 0; i < order; i++) {
            for (int64_t j = 0; j < order; j++) {
                signs[i * order + j] = (COMPUTE)plan->matrix[f][transpose ? j * order + i : i * order + j];
            }
        }
        signs += order * order;
    }
}

void KERNEL(hadamard)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_hadamard *args = context;
    const struct fptq_hadamard_plan *plan = args->plan;
    const int64_t n = args->size;
    int64_t num_signs = 0;
    for (int64_t f = 0; f < plan->num_factors; f++) {
        num_signs += plan->order[f] * plan->order[f];
    }
    COMPUTE *scratch = malloc((size_t)(2 * n + num_signs) * sizeof(COMPUTE));
    if (!scratch) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    COMPUTE *all_signs = scratch + 2 * n;
    LOCAL(expand_signs)(all_signs, plan, args->transpose);
    const COMPUTE norm = (COMPUTE)(1.0 / sqrt((double)n));

    for (int64_t block = begin; block < end; block++) {
        const STORAGE *restrict x_block = (const STORAGE *)args->x + block * n; /* x[block, :] */
        STORAGE *restrict y_block = (STORAGE *)args->y + block * n;             /* y[block, :] */
        COMPUTE *v = scratch, *other = scratch + n;
        for (int64_t i = 0; i < n; i++) {
            v[i] = LOAD(x_block[i]);
        }
        LOCAL(sylvester)(v, n, plan->power);
        const COMPUTE *signs = all_signs + num_signs;
        int64_t inner = (int64_t)1 << plan->power;
        for (int64_t f = plan->num_factors - 1; f >= 0; f--) {
            const int64_t order = plan->order[f];
            signs -= order * order;
            LOCAL(mix)(other, v, signs, n / (order * inner), order, inner);
            COMPUTE *mixed = other;
            other = v;
            v = mixed;
            inner *= order;
        }
        for (int64_t i = 0; i < n; i++) {
            y_block[i] = STORE(v[i] * norm);
        }
    }
    free(scratch);
}

#endif
