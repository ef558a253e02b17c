/*
 * hadamard for AVX2: cpu/hadamard.c with the butterflies of strides 1 to 8 (1 to 4 in double) inside two registers.
 *
 * Each stride: swap partners, add, and subtract where the index has the stride's bit: the additions of the specification.
 */
#include <immintrin.h>

/* Strides 1, 2 and 4 inside one register of eight floats. */
static inline __m256 butterflies_float(__m256 v)
{
    __m256 partner = _mm256_permute_ps(v, 0xb1);
    v = _mm256_blend_ps(_mm256_add_ps(partner, v), _mm256_sub_ps(partner, v), 0xaa);
    partner = _mm256_permute_ps(v, 0x4e);
    v = _mm256_blend_ps(_mm256_add_ps(partner, v), _mm256_sub_ps(partner, v), 0xcc);
    partner = _mm256_permute2f128_ps(v, v, 1);
    return _mm256_blend_ps(_mm256_add_ps(partner, v), _mm256_sub_ps(partner, v), 0xf0);
}

/* Strides 1 and 2 inside one register of four doubles. */
static inline __m256d butterflies_double(__m256d v)
{
    __m256d partner = _mm256_permute_pd(v, 0x5);
    v = _mm256_blend_pd(_mm256_add_pd(partner, v), _mm256_sub_pd(partner, v), 0xa);
    partner = _mm256_permute2f128_pd(v, v, 1);
    return _mm256_blend_pd(_mm256_add_pd(partner, v), _mm256_sub_pd(partner, v), 0xc);
}

static inline void short_strides_float(float *values)
{
    const __m256 low = butterflies_float(_mm256_loadu_ps(values)), high = butterflies_float(_mm256_loadu_ps(values + 8));
    _mm256_storeu_ps(values, _mm256_add_ps(low, high)); /* stride 8 */
    _mm256_storeu_ps(values + 8, _mm256_sub_ps(low, high));
}

static inline void short_strides_double(double *values)
{
    const __m256d low = butterflies_double(_mm256_loadu_pd(values)), high = butterflies_double(_mm256_loadu_pd(values + 4));
    _mm256_storeu_pd(values, _mm256_add_pd(low, high)); /* stride 4 */
    _mm256_storeu_pd(values + 4, _mm256_sub_pd(low, high));
}

#define FPTQ_SHORT_STRIDES(values) _Generic((values), float *: short_strides_float, double *: short_strides_double)(values)
#include "../hadamard.c"
