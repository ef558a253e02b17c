/*
 * residual_scale: m = sqrt(mean(r^2) + eps / sigma^2),  normalized = r / m,  new sigma = sigma * m, for each token.
 *
 * Layout: residual r, normalized, dresidual, dnormalized are [tokens, hidden]; sigma (the running scale) is [tokens]. One
 * unit is one token: a row stays in cache between its two passes. m is computed in fp64 and rounded to COMPUTE once.
 *
 * Backward, with n = r / m:
 *   dm = dnew sigma - sum(dn r) / m^2        dr = dn / m + r dm / (hidden m)        dsigma = dnew m - dm eps / (m sigma^3)
 * Sums: FPTQ_LANES interleaved fp64 accumulators, added pairwise. NaN and infinities spread over their token.
 */
#ifndef STORAGE
#define FPTQ_FILE "residual_scale.c"
#include <math.h>

#include "../ops/units.h"
#include "for_each_dtype.h"
#else

#include "chunks.h"

void KERNEL(residual_scale_forward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_residual_scale_forward *args = context;
    const int64_t hidden = args->hidden;
    for (int64_t t = begin; t < end; t++) {
        const STORAGE *restrict r_row = (const STORAGE *)args->residual + t * hidden; /* residual[t, :] */
        STORAGE *restrict n_row = (STORAGE *)args->normalized + t * hidden;           /* normalized[t, :] */
        const COMPUTE sigma = ((const COMPUTE *)args->running_scale)[t];
        double squares[FPTQ_LANES] = {0};
        for (int64_t h = 0; h < hidden; h += FPTQ_LANES) {
            COMPUTE r[FPTQ_LANES];
            LOCAL(load_chunk)(r, r_row + h, hidden - h);
            for (int l = 0; l < FPTQ_LANES; l++) {
                squares[l] += (double)r[l] * (double)r[l];
            }
        }
        const double mean = fptq_sum_lanes(squares) / (double)hidden;
        const COMPUTE m = (COMPUTE)sqrt(mean + args->eps / ((double)sigma * (double)sigma));
        for (int64_t h = 0; h < hidden; h++) {
            n_row[h] = STORE(LOAD(r_row[h]) / m);
        }
        ((COMPUTE *)args->new_running_scale)[t] = sigma * m;
    }
}

void KERNEL(residual_scale_backward)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_residual_scale_backward *args = context;
    const int64_t hidden = args->hidden;
    for (int64_t t = begin; t < end; t++) {
        const STORAGE *restrict r_row = (const STORAGE *)args->residual + t * hidden;
        const STORAGE *restrict dn_row = (const STORAGE *)args->dnormalized + t * hidden;
        STORAGE *restrict dr_row = (STORAGE *)args->dresidual + t * hidden;
        const double sigma = (double)((const COMPUTE *)args->running_scale)[t];
        const double dnew = (double)((const COMPUTE *)args->dnew_running_scale)[t];
        double squares[FPTQ_LANES] = {0}, products[FPTQ_LANES] = {0};
        for (int64_t h = 0; h < hidden; h += FPTQ_LANES) {
            COMPUTE r[FPTQ_LANES], dn[FPTQ_LANES];
            LOCAL(load_chunk)(r, r_row + h, hidden - h);
            LOCAL(load_chunk)(dn, dn_row + h, hidden - h);
            for (int l = 0; l < FPTQ_LANES; l++) {
                squares[l] += (double)r[l] * (double)r[l];
                products[l] += (double)r[l] * (double)dn[l];
            }
        }
        const double m = sqrt(fptq_sum_lanes(squares) / (double)hidden + args->eps / (sigma * sigma));
        const double dm = dnew * sigma - fptq_sum_lanes(products) / (m * m);
        const COMPUTE from_normalized = (COMPUTE)(1 / m), from_residual = (COMPUTE)(dm / (m * (double)hidden));
        for (int64_t h = 0; h < hidden; h++) {
            dr_row[h] = STORE(LOAD(dn_row[h]) * from_normalized + LOAD(r_row[h]) * from_residual);
        }
        ((COMPUTE *)args->drunning_scale)[t] = (COMPUTE)(dnew * m - dm * args->eps / (m * sigma * sigma * sigma));
    }
}

#endif
