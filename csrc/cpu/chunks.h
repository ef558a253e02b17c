/*
 * Helpers of kernels that work on chunks of FPTQ_LANES values, included inside a kernel's body (once per dtype; no include
 * guard on purpose). A short last chunk is filled with zeros, which add nothing to any sum.
 */
/* The short last chunk has a function of its own: it is rare, and inlined everywhere it would be most of the code. */
static __attribute__((noinline, unused)) void LOCAL(load_tail)(COMPUTE values[FPTQ_LANES], const STORAGE *source, int64_t count)
{
    for (int l = 0; l < FPTQ_LANES; l++) {
        values[l] = l < count ? LOAD(source[l]) : 0;
    }
}

static inline void LOCAL(load_chunk)(COMPUTE values[FPTQ_LANES], const STORAGE *source, int64_t count)
{
    if (__builtin_expect(count >= FPTQ_LANES, 1)) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            values[l] = LOAD(source[l]);
        }
    } else {
        COMPUTE tail[FPTQ_LANES]; /* so that the address of `values` is not taken and it can live in registers */
        LOCAL(load_tail)(tail, source, count);
        for (int l = 0; l < FPTQ_LANES; l++) {
            values[l] = tail[l];
        }
    }
}

static __attribute__((noinline, unused)) void LOCAL(store_tail)(STORAGE *target, const COMPUTE values[FPTQ_LANES], int64_t count)
{
    for (int64_t l = 0; l < count; l++) {
        target[l] = STORE(values[l]);
    }
}

static inline void LOCAL(store_chunk)(STORAGE *target, const COMPUTE values[FPTQ_LANES], int64_t count)
{
    if (__builtin_expect(count >= FPTQ_LANES, 1)) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            target[l] = STORE(values[l]);
        }
    } else {
        COMPUTE tail[FPTQ_LANES];
        for (int l = 0; l < FPTQ_LANES; l++) {
            tail[l] = values[l];
        }
        LOCAL(store_tail)(target, tail, count);
    }
}

static __attribute__((noinline, unused)) void LOCAL(add_tail)(double *sums, const double terms[FPTQ_LANES], int64_t count)
{
    for (int64_t l = 0; l < count; l++) {
        sums[l] += terms[l];
    }
}

/* sums[l] += terms[l]: sums of columns, which have no lanes. */
static inline void LOCAL(add_chunk)(double *sums, const double terms[FPTQ_LANES], int64_t count)
{
    if (__builtin_expect(count >= FPTQ_LANES, 1)) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            sums[l] += terms[l];
        }
    } else {
        double tail[FPTQ_LANES];
        for (int l = 0; l < FPTQ_LANES; l++) {
            tail[l] = terms[l];
        }
        LOCAL(add_tail)(sums, tail, count);
    }
}

static __attribute__((noinline, unused)) void LOCAL(scale_tail)(COMPUTE values[FPTQ_LANES], COMPUTE row_factor,
                                                                const COMPUTE *column_factors, int64_t count)
{
    for (int64_t l = 0; l < count; l++) {
        values[l] = values[l] * row_factor * column_factors[l];
    }
}

/* values <- values * exp(row) * exp(column), from left to right; column_factors may be NULL. */
static inline void LOCAL(scale_chunk)(COMPUTE values[FPTQ_LANES], COMPUTE row_factor, const COMPUTE *column_factors, int64_t count)
{
    if (!column_factors) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            values[l] *= row_factor;
        }
    } else if (__builtin_expect(count >= FPTQ_LANES, 1)) {
        for (int l = 0; l < FPTQ_LANES; l++) {
            values[l] = values[l] * row_factor * column_factors[l];
        }
    } else {
        COMPUTE tail[FPTQ_LANES];
        for (int l = 0; l < FPTQ_LANES; l++) {
            tail[l] = values[l];
        }
        LOCAL(scale_tail)(tail, row_factor, column_factors, count);
        for (int l = 0; l < FPTQ_LANES; l++) {
            values[l] = tail[l];
        }
    }
}

/* What fake_quant.c needs of a quantizer for one run of values; zero_point is rounded already. */
struct LOCAL(quantizer) {
    COMPUTE scale, zero_point, qmin, qmax;
};

static inline struct LOCAL(quantizer) LOCAL(quantizer_of)(const void *scale, const void *zero_point, int64_t index, fptq_grid grid)
{
    return (struct LOCAL(quantizer)){
        .scale = ((const COMPUTE *)scale)[index],
        .zero_point = zero_point ? RINT(((const COMPUTE *)zero_point)[index]) : 0,
        .qmin = (COMPUTE)grid.qmin,
        .qmax = (COMPUTE)grid.qmax,
    };
}

/* values <- fake_quant(values), the formula of fake_quant.c. */
static inline void LOCAL(quantize_chunk)(COMPUTE values[FPTQ_LANES], const struct LOCAL(quantizer) quantizer)
{
    for (int l = 0; l < FPTQ_LANES; l++) {
        COMPUTE q = RINT(values[l] / quantizer.scale) + quantizer.zero_point;
        q = q < quantizer.qmin ? quantizer.qmin : q;
        q = q > quantizer.qmax ? quantizer.qmax : q;
        values[l] = (q - quantizer.zero_point) * quantizer.scale;
    }
}

/* Gradients of one element, the formulas of fake_quant.c. */
static inline void LOCAL(quantize_element)(COMPUTE dy, COMPUTE value, const struct LOCAL(quantizer) quantizer, COMPUTE *dvalue,
                                           COMPUTE *dscale, COMPUTE *dzero_point)
{
    const COMPUTE ratio = value / quantizer.scale, rounded = RINT(ratio), q = rounded + quantizer.zero_point;
    COMPUTE clamped = q < quantizer.qmin ? quantizer.qmin : q;
    clamped = clamped > quantizer.qmax ? quantizer.qmax : clamped;
    const int inside = clamped == q;
    *dvalue = inside ? dy : 0;
    *dscale = dy * (inside ? rounded - ratio : clamped - quantizer.zero_point);
    *dzero_point = inside ? 0 : -dy * quantizer.scale;
}

/* dvalues <- the gradient for the values that were quantized; dscale and dzero_point are sums in lanes. */
static inline void LOCAL(quantize_chunk_backward)(COMPUTE dvalues[FPTQ_LANES], double dscale[FPTQ_LANES],
                                                  double dzero_point[FPTQ_LANES], const COMPUTE values[FPTQ_LANES],
                                                  const struct LOCAL(quantizer) quantizer)
{
    for (int l = 0; l < FPTQ_LANES; l++) {
        COMPUTE dvalue, dscale_l, dzero_l;
        LOCAL(quantize_element)(dvalues[l], values[l], quantizer, &dvalue, &dscale_l, &dzero_l);
        dvalues[l] = dvalue;
        dscale[l] += (double)dscale_l;
        dzero_point[l] += (double)dzero_l;
    }
}
