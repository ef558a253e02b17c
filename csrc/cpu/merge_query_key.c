/*
 * merge_query_key: rows i and j = i + half of each head rotated by `angle` and scaled by s = exp(+-log_scale), then
 * fake-quantized where a scale is given.
 *
 *   y_i = s cos(a) w_i - s sin(a) w_j        y_j = s sin(a) w_i + s cos(a) w_j        z = fake_quant(y)
 *
 * Layout: weight, y, dy, dweight are [heads, 2, half, columns]; angle and log_scale [heads / group, half]; scale and
 * zero_point [heads, 2, half, columns / inner], one for each run of `inner` columns. One unit is one pair of rows.
 * s cos(a) and s sin(a) are computed in fp64 and rounded to COMPUTE; y is not rounded to STORAGE before it is quantized.
 *
 * Backward, with dy the gradient for y (what fake_quant's straight-through rule leaves of the gradient for z):
 *   dangle += dy_j y_i - dy_i y_j        dlog_scale += +-(dy_i y_i + dy_j y_j)
 *   dw_i = s cos(a) dy_i + s sin(a) dy_j        dw_j = s cos(a) dy_j - s sin(a) dy_i
 * Sums: FPTQ_LANES interleaved fp64 accumulators per pair (dangle, dlog_scale) or run (dscale, dzero_point), added pairwise;
 * the operator adds the pairs of a group in order.
 */
#ifndef STORAGE
#define FPTQ_FILE "merge_query_key.c"
#include "../ops/units.h"
#include "rotation.h"
#include "for_each_dtype.h"
#else

#include "chunks.h"

static inline void LOCAL(rotation_of)(const struct fptq_merge_query_key_forward *args, int64_t parameter, COMPUTE *cosine,
                                      COMPUTE *sine)
{
    double wide_cosine, wide_sine;
    fptq_rotation((double)((const COMPUTE *)args->angle)[parameter], (double)((const COMPUTE *)args->log_scale)[parameter],
                  args->inverse, &wide_cosine, &wide_sine);
    *cosine = (COMPUTE)wide_cosine;
    *sine = (COMPUTE)wide_sine;
}

static inline void LOCAL(rotate_chunk)(COMPUTE y_i[FPTQ_LANES], COMPUTE y_j[FPTQ_LANES], const COMPUTE w_i[FPTQ_LANES],
                                       const COMPUTE w_j[FPTQ_LANES], COMPUTE cosine, COMPUTE sine)
{
    for (int l = 0; l < FPTQ_LANES; l++) {
        y_i[l] = cosine * w_i[l] - sine * w_j[l];
        y_j[l] = sine * w_i[l] + cosine * w_j[l];
    }
}

/* `quantized` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void
LOCAL(forward_pairs)(int64_t begin, int64_t end, const struct fptq_merge_query_key_forward *args, bool quantized)
{
    const int64_t columns = args->columns, runs = columns / args->inner;
    for (int64_t index = begin; index < end; index++) {
        const struct fptq_pair pair = fptq_pair_of(index, args->half, args->group);
        const STORAGE *first = (const STORAGE *)args->weight + pair.first * columns, *second = first + args->half * columns;
        STORAGE *y_first = (STORAGE *)args->y + pair.first * columns, *y_second = y_first + args->half * columns;
        COMPUTE cosine, sine;
        LOCAL(rotation_of)(args, pair.parameter, &cosine, &sine);
        for (int64_t run = 0; run < runs; run++) {
            struct LOCAL(quantizer) quantizer_i = {0}, quantizer_j = {0};
            if (quantized) {
                quantizer_i = LOCAL(quantizer_of)(args->scale, args->zero_point, pair.first * runs + run, args->grid);
                quantizer_j = LOCAL(quantizer_of)(args->scale, args->zero_point, pair.second * runs + run, args->grid);
            }
            for (int64_t c = run * args->inner, stop = c + args->inner; c < stop; c += FPTQ_LANES) {
                COMPUTE w_i[FPTQ_LANES], w_j[FPTQ_LANES], y_i[FPTQ_LANES], y_j[FPTQ_LANES];
                LOCAL(load_chunk)(w_i, first + c, stop - c);
                LOCAL(load_chunk)(w_j, second + c, stop - c);
                LOCAL(rotate_chunk)(y_i, y_j, w_i, w_j, cosine, sine);
                if (quantized) {
                    LOCAL(quantize_chunk)(y_i, quantizer_i);
                    LOCAL(quantize_chunk)(y_j, quantizer_j);
                }
                LOCAL(store_chunk)(y_first + c, y_i, stop - c);
                LOCAL(store_chunk)(y_second + c, y_j, stop - c);
            }
        }
    }
}

void KERNEL(merge_query_key_forward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_merge_query_key_forward *args = context;
    if (args->scale) {
        LOCAL(forward_pairs)(begin, end, args, true);
    } else {
        LOCAL(forward_pairs)(begin, end, args, false);
    }
}

/* Writes the gradients of the scale and the zero point of one run. */
static inline void LOCAL(finish_run)(const struct fptq_merge_query_key_backward *args, const double dscale[FPTQ_LANES],
                                     const double dzero_point[FPTQ_LANES], int64_t entry)
{
    ((COMPUTE *)args->dscale)[entry] = (COMPUTE)fptq_sum_lanes(dscale);
    if (args->dzero_point) {
        ((COMPUTE *)args->dzero_point)[entry] = (COMPUTE)fptq_sum_lanes(dzero_point);
    }
}

/* One pair of rows; `quantized` is a constant where this is inlined. */
static inline __attribute__((always_inline)) void LOCAL(backward_pair)(const struct fptq_merge_query_key_backward *args,
                                                                       int64_t index, bool quantized)
{
    const struct fptq_merge_query_key_forward *forward = &args->forward;
    const int64_t columns = forward->columns, runs = columns / forward->inner, apart = forward->half * columns;
    const struct fptq_pair pair = fptq_pair_of(index, forward->half, forward->group);
    const STORAGE *weight = (const STORAGE *)forward->weight + pair.first * columns; /* row i; row j is `apart` from it */
    const STORAGE *dy = (const STORAGE *)args->dy + pair.first * columns;
    STORAGE *dweight = args->dweight ? (STORAGE *)args->dweight + pair.first * columns : NULL;
    double dangle[FPTQ_LANES] = {0}, dlog_scale[FPTQ_LANES] = {0};
    COMPUTE cosine, sine;
    LOCAL(rotation_of)(forward, pair.parameter, &cosine, &sine);
    for (int64_t run = 0; run < runs; run++) {
        const int64_t entry_i = pair.first * runs + run, entry_j = pair.second * runs + run;
        double dscale_i[FPTQ_LANES] = {0}, dscale_j[FPTQ_LANES] = {0}, dzero_i[FPTQ_LANES] = {0}, dzero_j[FPTQ_LANES] = {0};
        struct LOCAL(quantizer) quantizer_i = {0}, quantizer_j = {0};
        if (quantized) {
            quantizer_i = LOCAL(quantizer_of)(forward->scale, forward->zero_point, entry_i, forward->grid);
            quantizer_j = LOCAL(quantizer_of)(forward->scale, forward->zero_point, entry_j, forward->grid);
        }
        for (int64_t c = run * forward->inner, stop = c + forward->inner; c < stop; c += FPTQ_LANES) {
            COMPUTE w_i[FPTQ_LANES], w_j[FPTQ_LANES], y_i[FPTQ_LANES], y_j[FPTQ_LANES], dy_i[FPTQ_LANES], dy_j[FPTQ_LANES];
            LOCAL(load_chunk)(w_i, weight + c, stop - c);
            LOCAL(load_chunk)(w_j, weight + apart + c, stop - c);
            LOCAL(load_chunk)(dy_i, dy + c, stop - c);
            LOCAL(load_chunk)(dy_j, dy + apart + c, stop - c);
            LOCAL(rotate_chunk)(y_i, y_j, w_i, w_j, cosine, sine);
            if (quantized) {
                LOCAL(quantize_chunk_backward)(dy_i, dscale_i, dzero_i, y_i, quantizer_i);
                LOCAL(quantize_chunk_backward)(dy_j, dscale_j, dzero_j, y_j, quantizer_j);
            }
            for (int l = 0; l < FPTQ_LANES; l++) {
                dangle[l] += (double)(dy_j[l] * y_i[l] - dy_i[l] * y_j[l]);
                dlog_scale[l] += (double)(dy_i[l] * y_i[l] + dy_j[l] * y_j[l]);
            }
            if (dweight) {
                LOCAL(rotate_chunk)(w_i, w_j, dy_i, dy_j, cosine, -sine); /* the transpose: the opposite angle */
                LOCAL(store_chunk)(dweight + c, w_i, stop - c);
                LOCAL(store_chunk)(dweight + apart + c, w_j, stop - c);
            }
        }
        if (quantized) {
            LOCAL(finish_run)(args, dscale_i, dzero_i, entry_i);
            LOCAL(finish_run)(args, dscale_j, dzero_j, entry_j);
        }
    }
    args->partials[2 * index] = fptq_sum_lanes(dangle);
    args->partials[2 * index + 1] = fptq_sum_lanes(dlog_scale);
}

void KERNEL(merge_query_key_backward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_merge_query_key_backward *args = context;
    for (int64_t index = begin; index < end; index++) {
        if (args->forward.scale) {
            LOCAL(backward_pair)(args, index, true);
        } else {
            LOCAL(backward_pair)(args, index, false);
        }
    }
}

/* moments[pair, :] = sums over the columns of a^4, a^3 b, a^2 b^2, a b^3, b^4, (a, b) the pair's rows; products in fp64. */
void KERNEL(query_key_moments)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_query_key_moments *args = context;
    for (int64_t index = begin; index < end; index++) {
        const struct fptq_pair pair = fptq_pair_of(index, args->half, 1);
        const STORAGE *first = (const STORAGE *)args->weight + pair.first * args->columns; /* weight[pair.first, :] */
        const STORAGE *second = first + args->half * args->columns;
        double sums[5][FPTQ_LANES] = {{0}};
        for (int64_t c = 0; c < args->columns; c += FPTQ_LANES) {
            COMPUTE a_chunk[FPTQ_LANES], b_chunk[FPTQ_LANES];
            LOCAL(load_chunk)(a_chunk, first + c, args->columns - c);
            LOCAL(load_chunk)(b_chunk, second + c, args->columns - c);
            for (int l = 0; l < FPTQ_LANES; l++) {
                const double a = (double)a_chunk[l], b = (double)b_chunk[l], a2 = a * a, ab = a * b, b2 = b * b;
                sums[0][l] += a2 * a2;
                sums[1][l] += a2 * ab;
                sums[2][l] += a2 * b2;
                sums[3][l] += ab * b2;
                sums[4][l] += b2 * b2;
            }
        }
        for (int k = 0; k < 5; k++) {
            args->moments[5 * index + k] = fptq_sum_lanes(sums[k]);
        }
    }
}

#endif
