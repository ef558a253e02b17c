/*
 * Includes FPTQ_FILE once per dtype. Inside it: STORAGE and COMPUTE are types, LOAD(v) and STORE(v) convert between them,
 * RINT, FABS, SQRT work on COMPUTE, whose largest and least normal numbers are LARGEST and LEAST (float.h), KERNEL(op) names an
 * exported kernel, LOCAL(name) a static helper. There is no include guard on purpose: each kernel file includes this once, and this
 * includes the kernel file four times.
 */
#include "dtypes.h"
#include "kernels.h"
#include "names.h"

#define KERNEL(name) FPTQ_PASTE(name, DTYPE)
#define LOCAL2(name, dtype) name##_##dtype
#define LOCAL1(name, dtype) LOCAL2(name, dtype)
#define LOCAL(name) LOCAL1(name, DTYPE)

#define DTYPE f64
#define STORAGE double
#define COMPUTE double
#define LOAD(v) (v)
#define STORE(v) (v)
#define RINT(v) rint(v)
#define FABS(v) fabs(v)
#define SQRT(v) sqrt(v)
#define LARGEST DBL_MAX
#define LEAST DBL_MIN
#include FPTQ_FILE
#undef DTYPE
#undef STORAGE
#undef COMPUTE
#undef LOAD
#undef STORE
#undef RINT
#undef FABS
#undef SQRT
#undef LARGEST
#undef LEAST

#define COMPUTE float
#define RINT(v) rintf(v)
#define FABS(v) fabsf(v)
#define SQRT(v) sqrtf(v)
#define LARGEST FLT_MAX
#define LEAST FLT_MIN

#define DTYPE f32
#define STORAGE float
#define LOAD(v) (v)
#define STORE(v) (v)
#include FPTQ_FILE
#undef DTYPE
#undef STORAGE
#undef LOAD
#undef STORE

#define STORAGE uint16_t

#define DTYPE bf16
#define LOAD(v) fptq_load_bf16(v)
#define STORE(v) fptq_store_bf16(v)
#include FPTQ_FILE
#undef DTYPE
#undef LOAD
#undef STORE

#define DTYPE f16
#define LOAD(v) fptq_load_f16(v)
#define STORE(v) fptq_store_f16(v)
#include FPTQ_FILE
#undef DTYPE
#undef LOAD
#undef STORE

#undef STORAGE
#undef COMPUTE
#undef RINT
#undef FABS
#undef SQRT
#undef LARGEST
#undef LEAST
