/*
 * e^p for float e >= 0 and p in 1..4: 2^(p log2 e) by polynomials, without branches and without libm, so that loops over it
 * vectorize and give the same bits on every machine. Relative error below 1e-7 (2 + p |log2 e|); below 1e-30 the result is 0,
 * results beyond 2^127 stay there.
 */
#ifndef FPTQ_CPU_POWER_H
#define FPTQ_CPU_POWER_H

#include "dtypes.h"

/* log2 of a positive normal float: exponent plus a series in (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)). */
static inline float fptq_log2(float value)
{
    const int32_t bits = (int32_t)fptq_bits_from_float(value), exponent = (bits - 0x3f3504f3) >> 23;
    const float m = fptq_float_from_bits((uint32_t)(bits - (int32_t)((uint32_t)exponent << 23)));
    const float t = (m - 1) / (m + 1), t2 = t * t;
    const float series = 2.8853900818f + t2 * (0.9617966939f + t2 * (0.5770780164f + t2 * (0.4121985831f + t2 * 0.3205988980f)));
    return (float)exponent + t * series;
}

/* 2^v for v in [-126, 127]: integer part into the exponent, fraction in [-1/2, 1/2] by Taylor's series. */
static inline float fptq_exp2(float v)
{
    const float whole = rintf(v), f = (v - whole) * 0.6931471806f;
    const float series =
        1 + f * (1 + f * (0.5f + f * (1.6666667e-1f + f * (4.1666667e-2f + f * (8.3333333e-3f + f * 1.3888889e-3f)))));
    return series * fptq_float_from_bits((uint32_t)((int32_t)whole + 127) << 23);
}

static inline float fptq_power(float e, float p)
{
    float v = p * fptq_log2(e < 1e-30f ? 1e-30f : e);
    v = v < -126 ? -126 : v > 127 ? 127 : v;
    return e < 1e-30f ? 0 : fptq_exp2(v);
}

#endif
