/*
 * hadamard: y = H x / sqrt(n), or H^T x / sqrt(n), for each block of n values.
 *
 *   H = H_a (x) H_b (x) ... (x) H_2 (x) ... (x) H_2        the plan's dense factors, then `power` factors of order 2
 *
 * Layout: x and y are [blocks, n], contiguous; one unit is one block. A block is seen as [a, b, ..., 2, ..., 2]; every factor
 * acts on its own axis, in COMPUTE, the fastest axis first. Factors of order 2: one addition per value each. A dense factor
 * sums `order` signed values for each of its outputs, four at a time: the 16 signed sums of four inputs are tabulated once and
 * shared by all outputs, so that an output costs order / 4 additions. The scale 1 / sqrt(n) is multiplied last.
 * NaN and infinities spread over their block, as sums do. Additions in a fixed order and one product: no instruction set may
 * differ. A twin (avx2/, avx512/) replaces only the butterflies inside a register, FPTQ_SHORT_STRIDES.
 */
#ifndef STORAGE
#define FPTQ_FILE "hadamard.c"
#include <math.h>
#include <stdlib.h>

/* Inputs that one table row combines, its entries, and how many such rows are kept in cache at a time. */
enum { FPTQ_FOUR = 4, FPTQ_SIGNED_SUMS = 16, FPTQ_TABLES = 12 };
#include "for_each_dtype.h"
#else

enum { LOCAL(LANES) = 64 / sizeof(COMPUTE) };

/* LANES values at any address; the compiler cuts additions of it into registers of the instruction set at hand. */
typedef COMPUTE LOCAL(lanes) __attribute__((vector_size(64), aligned(sizeof(COMPUTE)), may_alias));

#ifndef FPTQ_SHORT_STRIDES
/* Butterflies of strides 1, 2, 4, ... inside a run of LANES values: each output reads its own and its partner's input. */
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
#endif

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
#ifdef FPTQ_SHORT_STRIDES
            FPTQ_SHORT_STRIDES(v + i);
#else
            LOCAL(short_strides)(v + i);
#endif
        }
        stride = LANES;
    }
    for (; stride < (int64_t)1 << power; stride *= 2) {
        LOCAL(long_stride)(v, n, stride);
    }
}

/* table[code, :] = +-in[0, :] +- in[1, :] +- in[2, :] +- in[3, :] on LANES columns; bit k of the code: input k is subtracted. */
static inline void LOCAL(tabulate)(COMPUTE *restrict table, const COMPUTE *restrict in, int64_t inner)
{
    enum { LANES = LOCAL(LANES) };
    for (int l = 0; l < LANES; l++) {
        const COMPUTE a = in[l], b = in[inner + l], c = in[2 * inner + l], d = in[3 * inner + l];
        const COMPUTE low[4] = {a + b, b - a, a - b, -(a + b)}, high[4] = {c + d, d - c, c - d, -(c + d)};
        for (int code = 0; code < FPTQ_SIGNED_SUMS; code++) {
            table[code * LANES + l] = low[code & 3] + high[code >> 2];
        }
    }
}

/* out[0 .. 3, :] (+)= the table entries that `codes` choose: four outputs, so that four chains of additions overlap. */
static inline void LOCAL(add_entries)(COMPUTE *out, const LOCAL(lanes) * tables, const uint8_t *codes, int64_t num_codes,
                                      int64_t count, int64_t inner, bool first)
{
    LOCAL(lanes) a = {0}, b = {0}, c = {0}, d = {0};
    LOCAL(lanes) *out_a = (LOCAL(lanes) *)out, *out_b = (LOCAL(lanes) *)(out + inner);
    LOCAL(lanes) *out_c = (LOCAL(lanes) *)(out + 2 * inner), *out_d = (LOCAL(lanes) *)(out + 3 * inner);
    if (!first) {
        a = *out_a, b = *out_b, c = *out_c, d = *out_d;
    }
    for (int64_t g = 0; g < count; g++, codes++, tables += FPTQ_SIGNED_SUMS) {
        a += tables[codes[0]];
        b += tables[codes[num_codes]];
        c += tables[codes[2 * num_codes]];
        d += tables[codes[3 * num_codes]];
    }
    *out_a = a, *out_b = b, *out_c = c, *out_d = d;
}

/* One dense factor on LANES columns of [order, inner]; codes is [order, order / 4]. */
static void LOCAL(mix_columns)(COMPUTE *out, const COMPUTE *in, const uint8_t *codes, int64_t order, int64_t inner)
{
    enum { LANES = LOCAL(LANES) };
    _Alignas(64) COMPUTE tables[FPTQ_TABLES * FPTQ_SIGNED_SUMS * LANES];
    const int64_t num_codes = order / FPTQ_FOUR;
    for (int64_t first = 0; first < num_codes; first += FPTQ_TABLES) {
        const int64_t count = num_codes - first < FPTQ_TABLES ? num_codes - first : FPTQ_TABLES;
        for (int64_t g = 0; g < count; g++) {
            LOCAL(tabulate)(tables + g * FPTQ_SIGNED_SUMS * LANES, in + FPTQ_FOUR * (first + g) * inner, inner);
        }
        for (int64_t i = 0; i < order; i += FPTQ_FOUR) {
            LOCAL(add_entries)(out + i * inner, (const LOCAL(lanes) *)tables, codes + i * num_codes + first, num_codes, count,
                               inner, first == 0);
        }
    }
}

/* One dense factor on [outer, order, inner]. Fewer than LANES columns are gathered into a buffer, so that one order of
 * additions serves them all. `gathered` holds 2 * order * LANES values. */
static void LOCAL(mix)(COMPUTE *out, const COMPUTE *in, COMPUTE *gathered, const uint8_t *codes, int64_t outer, int64_t order,
                       int64_t inner)
{
    enum { LANES = LOCAL(LANES) };
    const int64_t columns = outer * inner; /* column (o, c) begins at o * order * inner + c */
    if (inner % LANES == 0) {
        for (int64_t o = 0; o < outer; o++) {
            for (int64_t c = 0; c < inner; c += LANES) {
                LOCAL(mix_columns)(out + o * order * inner + c, in + o * order * inner + c, codes, order, inner);
            }
        }
        return;
    }
    COMPUTE *mixed = gathered + order * LANES;
    for (int64_t column = 0; column < columns; column += LANES) {
        int64_t offset[LANES];
        for (int l = 0; l < LANES; l++) {
            const int64_t which = column + l < columns ? column + l : columns - 1; /* beyond the end: the last one again */
            offset[l] = which / inner * order * inner + which % inner;
        }
        for (int64_t j = 0; j < order; j++) {
            for (int l = 0; l < LANES; l++) {
                gathered[j * LANES + l] = in[offset[l] + j * inner];
            }
        }
        LOCAL(mix_columns)(mixed, gathered, codes, order, LANES);
        for (int64_t j = 0; j < order; j++) {
            for (int l = 0; l < LANES; l++) {
                out[offset[l] + j * inner] = mixed[j * LANES + l];
            }
        }
    }
}

/* codes[i, g]: which of H[i, 4g .. 4g + 4) are -1, one factor after the other, transposed where the transform is. */
static void LOCAL(encode_signs)(uint8_t *codes, const struct fptq_hadamard_plan *plan, bool transpose)
{
    for (int64_t f = 0; f < plan->num_factors; f++) {
        const int64_t order = plan->order[f];
        for (int64_t i = 0; i < order; i++) {
            for (int64_t j = 0; j < order; j += FPTQ_FOUR) {
                uint8_t code = 0;
                for (int k = 0; k < FPTQ_FOUR; k++) {
                    const int8_t sign = plan->matrix[f][transpose ? (j + k) * order + i : i * order + j + k];
                    code = (uint8_t)(code | (sign < 0) << k);
                }
                *codes++ = code;
            }
        }
    }
}

void KERNEL(hadamard)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_hadamard *args = context;
    const struct fptq_hadamard_plan *plan = args->plan;
    const int64_t n = args->size;
    int64_t num_codes = 0, largest = 0;
    for (int64_t f = 0; f < plan->num_factors; f++) {
        num_codes += plan->order[f] * plan->order[f] / FPTQ_FOUR;
        largest = plan->order[f] > largest ? plan->order[f] : largest;
    }
    const int64_t num_values = 2 * n + 2 * largest * LOCAL(LANES);
    COMPUTE *scratch = malloc((size_t)num_values * sizeof(COMPUTE) + (size_t)num_codes);
    if (!scratch) {
        *args->out_of_memory = true; /* the only value ever written: threads may race to write it */
        return;
    }
    COMPUTE *gathered = scratch + 2 * n;
    uint8_t *all_codes = (uint8_t *)(scratch + num_values);
    LOCAL(encode_signs)(all_codes, plan, args->transpose);
    const COMPUTE norm = (COMPUTE)(1.0 / sqrt((double)n));

    for (int64_t block = begin; block < end; block++) {
        const STORAGE *restrict x_block = (const STORAGE *)args->x + block * n; /* x[block, :] */
        STORAGE *restrict y_block = (STORAGE *)args->y + block * n;             /* y[block, :] */
        COMPUTE *v = scratch, *other = scratch + n;
        for (int64_t i = 0; i < n; i++) {
            v[i] = LOAD(x_block[i]);
        }
        LOCAL(sylvester)(v, n, plan->power);
        const uint8_t *codes = all_codes + num_codes;
        int64_t inner = (int64_t)1 << plan->power;
        for (int64_t f = plan->num_factors - 1; f >= 0; f--) {
            const int64_t order = plan->order[f];
            codes -= order * order / FPTQ_FOUR;
            LOCAL(mix)(other, v, gathered, codes, n / (order * inner), order, inner);
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
