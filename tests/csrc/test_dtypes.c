/* bf16 and f16 conversions, all 65,536 patterns, against plain arithmetic. */
#include "../../csrc/cpu/dtypes.h"

#include "check.h"

/* The value of a f16 pattern by its definition. */
static double f16_by_definition(uint16_t half)
{
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double sign = half & 0x8000 ? -1 : 1;
    if (exponent == 31) {
        return mantissa ? NAN : sign * INFINITY;
    }
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static void test_round_trips(void)
{
    for (uint32_t pattern = 0; pattern < 65536; pattern++) {
        const uint16_t half = (uint16_t)pattern;
        const double value = f16_by_definition(half);
        if (isnan(value)) {
            CHECK(isnan(fptq_load_f16(half)) && isnan(fptq_load_f16(fptq_store_f16(fptq_load_f16(half)))));
        } else {
            CHECK((double)fptq_load_f16(half) == value && fptq_store_f16(fptq_load_f16(half)) == half);
        }
        const float wide = fptq_load_bf16(half);
        CHECK(isnan(wide) ? isnan(fptq_load_bf16(fptq_store_bf16(wide))) : fptq_store_bf16(wide) == half);
    }
}

/* Between two neighbors: below, at and above the middle. */
static void test_rounding(void)
{
    for (uint32_t pattern = 0; pattern < 0x7c00 - 1; pattern++) {
        const float low = fptq_load_f16((uint16_t)pattern), high = fptq_load_f16((uint16_t)(pattern + 1)),
                    middle = low + (high - low) / 2;
        CHECK(fptq_store_f16(middle) == (pattern & 1 ? pattern + 1 : pattern));
        CHECK(fptq_store_f16(nextafterf(middle, 0)) == pattern);
        CHECK(fptq_store_f16(nextafterf(middle, INFINITY)) == pattern + 1);
    }
    CHECK(fptq_store_f16(65519.f) == 0x7bff && fptq_store_f16(65520.f) == 0x7c00 && fptq_store_f16(-INFINITY) == 0xfc00);
    CHECK(fptq_store_bf16(1.00390625f) == 0x3f80 && fptq_store_bf16(1.01171875f) == 0x3f82);
}

int main(void)
{
    test_round_trips();
    test_rounding();
    return report();
}
