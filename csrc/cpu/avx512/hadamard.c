/*
 * hadamard for AVX-512: cpu/hadamard.c with the butterflies of strides 1 to 8 (1 to 4 in double) inside one register.
 *
 * Each stride: swap partners, add, and subtract where the index has the stride's bit: the additions of the specification.
 */
#include <immintrin.h>

static inline __m512 butterfly_float(__m512 v, __m512 partner, __mmask16 subtract)
{
    return _mm512_mask_sub_ps(_mm512_add_ps(partner, v), subtract, partner, v);
}

static inline __m512d butterfly_double(__m512d v, __m512d partner, __mmask8 subtract)
{
    return _mm512_mask_sub_pd(_mm512_add_pd(partner, v), subtract, partner, v);
}

static inline void short_strides_float(float *values)
{
    __m512 v = _mm512_loadu_ps(values);
    v = butterfly_float(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);       /* stride 1 */
    v = butterfly_float(v, _mm512_permute_ps(v, 0x4e), 0xcccc);       /* stride 2 */
    v = butterfly_float(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0); /* stride 4 */
    v = butterfly_float(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00); /* stride 8 */
    _mm512_storeu_ps(values, v);
}

static inline void short_strides_double(double *values)
{
    __m512d v = _mm512_loadu_pd(values);
    v = butterfly_double(v, _mm512_permute_pd(v, 0x55), 0xaa);       /* stride 1 */
    v = butterfly_double(v, _mm512_permutex_pd(v, 0x4e), 0xcc);      /* stride 2 */
    v = butterfly_double(v, _mm512_shuffle_f64x2(v, v, 0x4e), 0xf0); /* stride 4 */
    _mm512_storeu_pd(values, v);
}

#define FPTQ_SHORT_STRIDES(values) _Generic((values), float *: short_strides_float, double *: short_strides_double)(values)
#include "../hadamard.c"
