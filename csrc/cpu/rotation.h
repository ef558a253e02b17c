/* The rotation and scale of one RoPE pair, and which rows it acts on; shared by merge_query_key and lp_norm. */
#ifndef FPTQ_CPU_ROTATION_H
#define FPTQ_CPU_ROTATION_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

struct fptq_pair {
    int64_t first, second; /* rows of the weight */
    int64_t parameter;     /* index of its angle and log_scale */
};

/* Pair `index` of [heads, half]; heads of one group share their parameters. */
static inline struct fptq_pair fptq_pair_of(int64_t index, int64_t half, int64_t group)
{
    const int64_t head = index / half, i = index % half, first = head * 2 * half + i;
    return (struct fptq_pair){first, first + half, head / group * half + i};
}

/* s cos(angle) and s sin(angle) with s = exp(log_scale), or exp(-log_scale) if inverse: in fp64, so that one rounding is left. */
static inline void fptq_rotation(double angle, double log_scale, bool inverse, double *cosine, double *sine)
{
    const double size = exp(inverse ? -log_scale : log_scale);
    *cosine = size * cos(angle);
    *sine = size * sin(angle);
}

#endif
