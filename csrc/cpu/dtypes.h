/*
 * bf16 and f16 as 16-bit patterns, converted without branches so that loops over them vectorize on any instruction set.
 * Rounding to nearest, ties to even; NaN stays NaN (quiet); f16 handles denormals, and overflows to infinity.
 */
#ifndef FPTQ_CPU_DTYPES_H
#define FPTQ_CPU_DTYPES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float fptq_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t fptq_bits_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float fptq_load_bf16(uint16_t half)
{
    return fptq_float_from_bits((uint32_t)half << 16);
}

static inline uint16_t fptq_store_bf16(float value)
{
    const uint32_t bits = fptq_bits_from_float(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    const uint32_t is_nan = (uint32_t)-(int32_t)((bits & 0x7fffffffu) > 0x7f800000u);
    return (uint16_t)((quiet_nan & is_nan) | (rounded & ~is_nan));
}

static inline float fptq_load_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    /* Normal and denormal numbers: place exponent and mantissa, then move the bias by a multiplication, which is exact. */
    const float finite = fptq_float_from_bits(magnitude << 13) * 0x1p112f;
    const uint32_t special = 0x7f800000u | (magnitude << 13); /* infinity and NaN */
    const uint32_t is_special = (uint32_t)-(int32_t)(magnitude >= 0x7c00u);
    const uint32_t bits = (special & is_special) | (fptq_bits_from_float(finite) & ~is_special);
    return fptq_float_from_bits(bits | sign);
}

static inline uint16_t fptq_store_f16(float value)
{
    const uint32_t bits = fptq_bits_from_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    /* Normal results: rebias the exponent by integer arithmetic and round the 13 lost bits, ties to even. */
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    /* Denormal results: adding 0.5 aligns the mantissa so that the addition itself rounds to a multiple of 2^-24. */
    const uint32_t denormal = fptq_bits_from_float(fptq_float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t is_small = (uint32_t)-(int32_t)(magnitude < 0x38800000u);
    const uint32_t is_large = (uint32_t)-(int32_t)(magnitude >= 0x477ff000u); /* 65520 and more round to infinity */
    const uint32_t is_nan = (uint32_t)-(int32_t)(magnitude > 0x7f800000u);
    const uint32_t quiet_nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    uint32_t half = (denormal & is_small) | (normal & ~is_small);
    half = (0x7c00u & is_large) | (half & ~is_large);
    half = (quiet_nan & is_nan) | (half & ~is_nan);
    return (uint16_t)(half | sign);
}

#endif
