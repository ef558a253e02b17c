/*
 * How [outer, channels, inner] is cut into units of work: each row (one outer index, one channel) in blocks of at most
 * FPTQ_BLOCK elements. The cut depends on the shape alone, never on the number of threads, so that sums over units, added
 * in order, are the same on every machine.
 */
#ifndef FPTQ_OPS_UNITS_H
#define FPTQ_OPS_UNITS_H

#include <stdint.h>

#define FPTQ_BLOCK 16384

/* Independent accumulators of a kernel's sums: wide enough for two AVX-512 registers of doubles, the same everywhere. */
#define FPTQ_LANES 16

static inline int64_t fptq_blocks_per_row(int64_t inner)
{
    return (inner + FPTQ_BLOCK - 1) / FPTQ_BLOCK;
}

struct fptq_unit {
    int64_t channel, begin, length; /* x[begin .. begin + length) belongs to `channel` */
};

static inline struct fptq_unit fptq_unit_of(int64_t index, int64_t channels, int64_t inner)
{
    const int64_t blocks = fptq_blocks_per_row(inner), row = index / blocks, offset = index % blocks * FPTQ_BLOCK;
    const int64_t rest = inner - offset;
    return (struct fptq_unit){row % channels, row * inner + offset, rest < FPTQ_BLOCK ? rest : FPTQ_BLOCK};
}

/* Sum of the lanes, pairwise, always in the same order. */
static inline double fptq_sum_lanes(const double lanes[FPTQ_LANES])
{
    double sums[FPTQ_LANES];
    for (int i = 0; i < FPTQ_LANES; i++) {
        sums[i] = lanes[i];
    }
    for (int width = FPTQ_LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) {
            sums[i] += sums[i + width];
        }
    }
    return sums[0];
}

#endif
