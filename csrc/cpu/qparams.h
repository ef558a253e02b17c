/*
 * The dynamic scale and zero point of a row, included inside a kernel's body (once per dtype; no include guard on purpose).
 * The formulas are in choose_qparams.c. Least and greatest values do not depend on the order in which they are found.
 */
#ifndef STRETCH
#define STRETCH 1.000345266983001243908
#endif

struct LOCAL(qparams) {
    COMPUTE scale, zero_point;
};

/* los and his <- the least and the greatest of themselves and of those values that are finite. */
static inline void LOCAL(widen_range)(COMPUTE los[FPTQ_LANES], COMPUTE his[FPTQ_LANES], const COMPUTE values[FPTQ_LANES])
{
    for (int l = 0; l < FPTQ_LANES; l++) {
        const COMPUTE finite = FABS(values[l]) <= LARGEST ? values[l] : 0;
        los[l] = finite < los[l] ? finite : los[l];
        his[l] = finite > his[l] ? finite : his[l];
    }
}

/* Scale and zero point of a row whose lanes have these ranges; 0 belongs to each of them. */
static inline struct LOCAL(qparams) LOCAL(qparams_of)(const COMPUTE los[FPTQ_LANES], const COMPUTE his[FPTQ_LANES],
                                                      COMPUTE clip_ratio, bool symmetric, fptq_grid grid)
{
    const COMPUTE qmin = (COMPUTE)grid.qmin, qmax = (COMPUTE)grid.qmax;
    COMPUTE lo = 0, hi = 0;
    for (int l = 0; l < FPTQ_LANES; l++) {
        lo = los[l] < lo ? los[l] : lo;
        hi = his[l] > hi ? his[l] : hi;
    }
    lo *= clip_ratio;
    hi *= clip_ratio;
    COMPUTE scale = symmetric ? (hi > -lo ? hi : -lo) / qmax : hi / (qmax - qmin) - lo / (qmax - qmin);
    scale *= (COMPUTE)STRETCH;
    scale = scale == 0 ? (hi == lo ? 1 : LEAST) : scale < LEAST ? LEAST : scale;
    COMPUTE zero_point = RINT(qmin - lo / scale);
    zero_point = zero_point < qmin ? qmin : zero_point;
    zero_point = zero_point > qmax ? qmax : zero_point;
    return (struct LOCAL(qparams)){scale, symmetric ? 0 : zero_point};
}
