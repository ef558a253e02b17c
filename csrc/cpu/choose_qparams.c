/*
 * choose_qparams: the dynamic scale and zero point of every row, from its least and greatest finite value.
 *
 * with lo and hi multiplied by clip_ratio:
 *   symmetric    scale = STRETCH * max |x| / qmax                zero_point = 0
 *   asymmetric   scale = STRETCH * (hi - lo) / (qmax - qmin)     zero_point = clamp(rint(qmin - lo / scale)), lo <= 0 <= hi
 *
 * STRETCH = 1 + sqrt(2) / 4096. Where x was rounded before, its values are integers times products of scales, and without the
 * stretch x / scale is a ratio of integers that often lies exactly between two steps. The last bit of a matrix product would
 * then decide a whole step, and that bit differs between a pass over a text and the same text token by token. No ratio of
 * integers times 1 / STRETCH is a tie, because STRETCH is irrational, and what was a tie is 1e-4 of a step or more away from
 * one: more than fp32 sums are off. The grid covers the range still; its error grows by 0.03 %.
 *
 * Layout: x is [rows, columns]. NaN and infinities are left out of the range (fake_quant keeps NaN and clamps infinities).
 * A row without any nonzero finite value gets scale 1, so that zeros stay zeros. A scale that would be denormal becomes the
 * least normal number.
 */
#ifndef STORAGE
#define FPTQ_FILE "choose_qparams.c"
#include <float.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else

#include "chunks.h"
#include "qparams.h"

void KERNEL(choose_qparams)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_choose_qparams *args = context;
    for (int64_t r = begin; r < end; r++) {
        const STORAGE *restrict x_row = (const STORAGE *)args->x + r * args->columns; /* x[r, :] */
        COMPUTE los[FPTQ_LANES] = {0}, his[FPTQ_LANES] = {0};                         /* 0 always belongs to the range */
        for (int64_t c = 0; c < args->columns; c += FPTQ_LANES) {
            COMPUTE values[FPTQ_LANES];
            LOCAL(load_chunk)(values, x_row + c, args->columns - c);
            LOCAL(widen_range)(los, his, values);
        }
        const struct LOCAL(qparams) found = LOCAL(qparams_of)(los, his, (COMPUTE)args->clip_ratio, args->symmetric, args->grid);
        ((COMPUTE *)args->scale)[r] = found.scale;
        ((COMPUTE *)args->zero_point)[r] = found.zero_point;
    }
}

#endif
