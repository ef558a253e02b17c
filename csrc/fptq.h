/*
 * The C ABI of fptquant's core. No torch, no Python, no allocation that outlives a call.
 *
 * Every operator takes one argument struct (outputs first, then inputs, then sizes, then options) and returns a status.
 * Arrays are contiguous; shapes stand beside each field. `storage` is the dtype of the tensors the user sees, `compute`
 * the dtype of computation and of scales: float for f32, bf16 and f16 storage, double for f64.
 * A field marked "or NULL" may be absent. What a failure means is in fptq_last_error(), per thread.
 */
#ifndef FPTQ_H
#define FPTQ_H

#include <stdbool.h>
#include <stdint.h>

#define FPTQ_EXPORT __attribute__((visibility("default")))

typedef enum {
    FPTQ_OK = 0,
    FPTQ_INVALID = 1,       /* the caller's mistake; the message names the argument */
    FPTQ_OUT_OF_MEMORY = 2, /* scratch memory could not be had */
} fptq_status;

typedef enum { FPTQ_F32 = 0, FPTQ_F64 = 1, FPTQ_BF16 = 2, FPTQ_F16 = 3, FPTQ_NUM_DTYPES } fptq_dtype;

/* Which numbers a quantizer can represent. FP8 E4M3 and block-scaled FP4 are to become further kinds. */
typedef enum { FPTQ_GRID_INTEGER = 0, FPTQ_NUM_GRID_KINDS } fptq_grid_kind;
typedef struct {
    int32_t kind;       /* fptq_grid_kind */
    int32_t qmin, qmax; /* both included */
} fptq_grid;

/* ---- library ------------------------------------------------------------------------------------------------- */

FPTQ_EXPORT const char *fptq_last_error(void);

/* Chooses the kernels: "scalar", "avx2", "avx512", or NULL for the best that this processor runs. */
FPTQ_EXPORT fptq_status fptq_select_isa(const char *name);
FPTQ_EXPORT const char *fptq_isa(void);        /* the chosen instruction set */
FPTQ_EXPORT const char *fptq_isa_reason(void); /* why, in words */
FPTQ_EXPORT const char *fptq_isas_built(void); /* comma separated */
FPTQ_EXPORT const char *fptq_compiler(void);

/* How loops are spread over threads: torch_parallel_for's contract. NULL runs everything on the calling thread. */
typedef void (*fptq_parallel_body)(int64_t begin, int64_t end, void *context);
typedef int32_t (*fptq_parallel_for)(int64_t begin, int64_t end, int64_t grain, fptq_parallel_body body, void *context);
FPTQ_EXPORT void fptq_set_parallel_for(fptq_parallel_for parallel_for);

/* ---- fake_quant: y = (clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point) * scale -------------------- */

struct fptq_fake_quant_forward {
    void *y;                /* [outer, channels, inner] storage */
    const void *x;          /* [outer, channels, inner] storage */
    const void *scale;      /* [channels] compute */
    const void *zero_point; /* [channels] compute, or NULL for 0 */
    int64_t outer, channels, inner;
    fptq_grid grid;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_fake_quant_forward(const struct fptq_fake_quant_forward *args);

struct fptq_fake_quant_backward {
    void *dx;               /* [outer, channels, inner] storage */
    void *dscale;           /* [channels] compute */
    void *dzero_point;      /* [channels] compute, or NULL when not wanted */
    const void *dy;         /* [outer, channels, inner] storage */
    const void *x;          /* [outer, channels, inner] storage */
    const void *scale;      /* [channels] compute */
    const void *zero_point; /* [channels] compute, or NULL for 0 */
    int64_t outer, channels, inner;
    fptq_grid grid;
    int32_t dtype;
    double *partials; /* set by the operator: [units, 2] sums of dscale and dzero_point over one unit */
};
FPTQ_EXPORT fptq_status fptq_fake_quant_backward(const struct fptq_fake_quant_backward *args);

/* ---- choose_qparams: dynamic scale and zero point of every row ------------------------------------------------- */

struct fptq_choose_qparams {
    void *scale;      /* [rows] compute */
    void *zero_point; /* [rows] compute */
    const void *x;    /* [rows, columns] storage */
    int64_t rows, columns;
    fptq_grid grid;
    bool symmetric;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_choose_qparams(const struct fptq_choose_qparams *args);

/* ---- set_range: static scale and zero point, from data seen in any number of batches --------------------------- */

struct fptq_range_minmax {
    void *lo, *hi; /* [channels] compute: least and greatest finite value; lo = +inf, hi = -inf where there is none */
    const void *x; /* [outer, channels, inner] storage */
    int64_t outer, channels, inner;
    int32_t dtype;
    double *partials; /* set by the operator: [units, 2] */
};
FPTQ_EXPORT fptq_status fptq_range_minmax(const struct fptq_range_minmax *args);

struct fptq_range_errors {
    double *errors;       /* [channels, candidates]: sum of |x - fake_quant(x)|^p with the range shrunk by ratios[k] */
    const void *x;        /* [outer, channels, inner] storage */
    const void *lo, *hi;  /* [channels] compute */
    const double *ratios; /* [candidates], each in (0, 1] */
    int64_t outer, channels, inner, candidates;
    fptq_grid grid;
    bool symmetric;
    double p; /* 2 to 4 */
    int32_t dtype;
    double *partials; /* set by the operator: [units, candidates] */
};
FPTQ_EXPORT fptq_status fptq_range_errors(const struct fptq_range_errors *args);

struct fptq_range_histogram {
    double *counts;      /* [channels, bins]: how many finite x fall in each of `bins` equal steps from lo to hi */
    const void *x;       /* [outer, channels, inner] storage */
    const void *lo, *hi; /* [channels] compute */
    int64_t outer, channels, inner, bins;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_range_histogram(const struct fptq_range_histogram *args);

typedef enum { FPTQ_RANGE_MIN_MAX = 0, FPTQ_RANGE_CANDIDATES = 1, FPTQ_RANGE_PERCENTILE = 2 } fptq_range_rule;
struct fptq_set_range {
    void *scale, *zero_point; /* [channels] compute */
    const void *lo, *hi;      /* [channels] compute */
    const double *evidence;   /* candidates: errors [channels, n]; percentile: counts [channels, n]; min-max: NULL */
    const double *ratios;     /* candidates: [n]; otherwise NULL */
    int64_t channels, n;
    int32_t rule; /* fptq_range_rule */
    fptq_grid grid;
    bool symmetric;
    double percentile; /* percentile rule: share of the values, in percent, that lies inside the range */
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_set_range(const struct fptq_set_range *args);

#endif
