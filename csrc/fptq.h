/*
 * The C ABI of fptquant's core. No torch, no Python, no allocation that outlives a call (Hadamard factors alone are kept).
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
    double clip_ratio; /* in (0, 1]: the share of a row's range that the grid covers */
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

/* ---- hadamard: y = H x / sqrt(size), or H^T x / sqrt(size), on each block --------------------------------------- */

#define FPTQ_HADAMARD_MAX_FACTORS 16
struct fptq_hadamard_plan {
    int64_t num_factors, power;                      /* H = H_order[0] (x) H_order[1] (x) ... (x) H_2^power */
    int64_t order[FPTQ_HADAMARD_MAX_FACTORS];        /* each a multiple of 4, at most 1024 */
    const int8_t *matrix[FPTQ_HADAMARD_MAX_FACTORS]; /* [order, order] of +1 and -1, row-major; kept by the core */
};
/* Finds the cheapest plan for a size; FPTQ_INVALID names the nearest possible sizes where there is none. */
FPTQ_EXPORT fptq_status fptq_hadamard_plan_of(int64_t size, struct fptq_hadamard_plan *plan);
FPTQ_EXPORT bool fptq_hadamard_exists(int64_t size);

struct fptq_hadamard {
    void *y;       /* [blocks, size] storage */
    const void *x; /* [blocks, size] storage */
    int64_t blocks, size;
    bool transpose;
    int32_t dtype;
    const struct fptq_hadamard_plan *plan; /* set by the operator */
    bool *out_of_memory;                   /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_hadamard(const struct fptq_hadamard *args);

/* ---- kronecker: y = (left (x) right) x, then fake-quantized with given scales, or with those of each block's own range */

struct fptq_kronecker_forward {
    void *y;                /* [blocks, rows, columns] storage: left X right^T of each block X of x */
    const void *x;          /* [blocks, rows, columns] storage */
    const void *left;       /* [rows, rows] compute, or NULL for the identity */
    const void *right;      /* [columns, columns] compute, or NULL for the identity */
    const void *scale;      /* [1] or [blocks] compute, or NULL: none is given */
    const void *zero_point; /* like scale, or NULL for 0 */
    int64_t blocks, rows, columns, scales;
    fptq_grid grid;
    void *dynamic_scale;      /* [blocks] compute: written, and used; or NULL: ranges are not those of the blocks */
    void *dynamic_zero_point; /* like dynamic_scale */
    const void *clip;         /* [1] compute: multiplies dynamic_scale; or NULL for 1 */
    double clip_ratio;        /* in (0, 1]: the share of a block's range that the grid covers */
    bool symmetric;           /* whether dynamic zero points are 0 */
    int32_t dtype;
    bool *out_of_memory; /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_kronecker_forward(const struct fptq_kronecker_forward *args);

struct fptq_kronecker_backward {
    void *dx;                              /* [blocks, rows, columns] storage, or NULL when not wanted */
    void *dleft;                           /* [rows, rows] compute, or NULL when not wanted */
    void *dright;                          /* [columns, columns] compute, or NULL when not wanted */
    void *dscale;                          /* like scale */
    void *dzero_point;                     /* like zero_point, or NULL when not wanted */
    const void *dy;                        /* [blocks, rows, columns] storage */
    struct fptq_kronecker_forward forward; /* the arguments of the forward call; y is not used */
    int64_t blocks_per_unit;               /* set by the operator */
    double *partials;                      /* set by the operator: [units, rows^2 + columns^2] sums of dleft and dright */
    double *scale_partials;                /* set by the operator: [blocks, 2] sums of dscale and dzero_point */
};
FPTQ_EXPORT fptq_status fptq_kronecker_backward(const struct fptq_kronecker_backward *args);

/* ---- rotate_blocks: channels permuted, then each block of them multiplied by a matrix of its own ------------------- */

struct fptq_rotate_blocks {
    void *y;                    /* [rows, blocks * size] storage */
    const void *x;              /* [rows, blocks * size] storage */
    const void *matrices;       /* [blocks, size, size] compute */
    const int64_t *permutation; /* [blocks * size]: which channel of x comes to each place, or NULL: all stay */
    int64_t rows, blocks, size;
    bool transpose; /* the transposed matrices first, then every channel back to where it came from */
    int32_t dtype;
    int64_t rows_per_unit; /* set by the operator */
    bool *out_of_memory;   /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_rotate_blocks(const struct fptq_rotate_blocks *args);

/* ---- merge_query_key: RoPE pairs of rows rotated and scaled, then fake-quantized where a scale is given ---------- */

struct fptq_merge_query_key_forward {
    void *y;                /* [heads, 2, half, columns] storage */
    const void *weight;     /* [heads, 2, half, columns] storage */
    const void *angle;      /* [heads / group, half] compute */
    const void *log_scale;  /* [heads / group, half] compute */
    const void *scale;      /* [heads, 2, half, columns / inner] compute, or NULL: not quantized */
    const void *zero_point; /* like scale, or NULL for 0 */
    int64_t heads, half, columns, group, inner;
    bool inverse; /* scale by exp(-log_scale) */
    fptq_grid grid;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_merge_query_key_forward(const struct fptq_merge_query_key_forward *args);

struct fptq_merge_query_key_backward {
    void *dweight;                               /* [heads, 2, half, columns] storage, or NULL when not wanted */
    void *dangle;                                /* [heads / group, half] compute */
    void *dlog_scale;                            /* [heads / group, half] compute */
    void *dscale;                                /* like scale */
    void *dzero_point;                           /* like zero_point, or NULL when not wanted */
    const void *dy;                              /* [heads, 2, half, columns] storage */
    struct fptq_merge_query_key_forward forward; /* the arguments of the forward call; y is not used */
    double *partials; /* set by the operator: [heads * half, 2] sums of dangle and dlog_scale over one pair of rows */
};
FPTQ_EXPORT fptq_status fptq_merge_query_key_backward(const struct fptq_merge_query_key_backward *args);

struct fptq_query_key_moments {
    double *moments;    /* [heads, half, 5]: sums of a^4, a^3 b, a^2 b^2, a b^3, b^4 over the columns */
    const void *weight; /* [heads, 2, half, columns] storage */
    int64_t heads, half, columns;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_query_key_moments(const struct fptq_query_key_moments *args);

struct fptq_solve_query_key {
    double *angle, *log_scale; /* [pairs] */
    const double *key, *query; /* [pairs, 5] moments */
    int64_t pairs;
};
FPTQ_EXPORT fptq_status fptq_solve_query_key(const struct fptq_solve_query_key *args);

/* ---- merge_scale: rows and columns multiplied by exp(log scale), then fake-quantized where a scale is given ------- */

struct fptq_merge_scale_forward {
    void *y;                      /* [rows, columns] storage */
    const void *weight;           /* [rows, columns] storage */
    const void *row_log_scale;    /* [rows] compute, or NULL for 0 */
    const void *column_log_scale; /* [columns] compute, or NULL for 0 */
    const void *scale;            /* [rows, columns / inner] compute, or NULL: not quantized */
    const void *zero_point;       /* like scale, or NULL for 0 */
    int64_t rows, columns, inner;
    fptq_grid grid;
    int32_t dtype;
    const void *column_factors; /* set by the operator: [columns] compute, exp(column_log_scale) */
};
FPTQ_EXPORT fptq_status fptq_merge_scale_forward(const struct fptq_merge_scale_forward *args);

struct fptq_merge_scale_backward {
    void *dweight;                           /* [rows, columns] storage, or NULL when not wanted */
    void *drow_log_scale;                    /* [rows] compute, or NULL when not wanted */
    void *dcolumn_log_scale;                 /* [columns] compute, or NULL when not wanted */
    void *dscale;                            /* like scale */
    void *dzero_point;                       /* like zero_point, or NULL when not wanted */
    const void *dy;                          /* [rows, columns] storage */
    struct fptq_merge_scale_forward forward; /* the arguments of the forward call; y is not used */
    int64_t rows_per_unit;                   /* set by the operator */
    double *partials;                        /* set by the operator: [units, columns] sums of dcolumn_log_scale, or NULL */
};
FPTQ_EXPORT fptq_status fptq_merge_scale_backward(const struct fptq_merge_scale_backward *args);

/* ---- lp_norm: sum |w'|^p of a merged weight w', with the gradients of its parameters ------------------------------ */

struct fptq_lp_norm_query_key {
    double *value;         /* [1] */
    void *dangle;          /* [heads / group, half] compute */
    void *dlog_scale;      /* [heads / group, half] compute */
    const void *weight;    /* [heads, 2, half, columns] storage */
    const void *angle;     /* [heads / group, half] compute */
    const void *log_scale; /* [heads / group, half] compute */
    int64_t heads, half, columns, group;
    bool inverse;
    double p; /* 1 to 16 */
    int32_t dtype;
    double *partials; /* set by the operator: [heads * half, 2] sums of |w'|^p and of d value / d angle */
};
FPTQ_EXPORT fptq_status fptq_lp_norm_query_key(const struct fptq_lp_norm_query_key *args);

struct fptq_lp_norm_scale {
    double *value;                /* [1], or NULL when not wanted */
    double *row_sums;             /* [rows]: sums of |w'|^p, or NULL when not wanted */
    double *column_sums;          /* [columns], or NULL when not wanted */
    const void *weight;           /* [rows, columns] storage */
    const void *row_log_scale;    /* [rows] compute, or NULL for 0 */
    const void *column_log_scale; /* [columns] compute, or NULL for 0 */
    int64_t rows, columns;
    double p; /* 1 to 16 */
    int32_t dtype;
    const void *column_factors; /* set by the operator: [columns] compute */
    int64_t rows_per_unit;      /* set by the operator */
    double *partials;           /* set by the operator: [rows] sums of rows, then [units, columns] sums of columns */
};
FPTQ_EXPORT fptq_status fptq_lp_norm_scale(const struct fptq_lp_norm_scale *args);

/* ---- residual_scale: m = sqrt(mean(residual^2) + eps / running_scale^2) ------------------------------------------- */

struct fptq_residual_scale_forward {
    void *normalized;          /* [tokens, hidden] storage: residual / m */
    void *new_running_scale;   /* [tokens] compute: running_scale * m */
    const void *residual;      /* [tokens, hidden] storage */
    const void *running_scale; /* [tokens] compute */
    int64_t tokens, hidden;
    double eps;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_residual_scale_forward(const struct fptq_residual_scale_forward *args);

struct fptq_residual_scale_backward {
    void *dresidual;                /* [tokens, hidden] storage */
    void *drunning_scale;           /* [tokens] compute */
    const void *dnormalized;        /* [tokens, hidden] storage */
    const void *dnew_running_scale; /* [tokens] compute */
    const void *residual;           /* [tokens, hidden] storage */
    const void *running_scale;      /* [tokens] compute */
    int64_t tokens, hidden;
    double eps;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_residual_scale_backward(const struct fptq_residual_scale_backward *args);

/* ---- divergence: of the student's next-token distribution from the teacher's, per token, with its gradient --------- */

typedef enum { FPTQ_JSD = 0, FPTQ_FORWARD_KL = 1, FPTQ_REVERSE_KL = 2, FPTQ_NUM_DIVERGENCES } fptq_divergence_kind;
struct fptq_divergence {
    void *loss;          /* [tokens] compute */
    void *gradient;      /* [tokens, vocabulary] storage: d loss[t] / d student[t, :]; may be `student`; NULL when not wanted */
    const void *student; /* [tokens, vocabulary] storage: logits */
    const void *teacher; /* [tokens, vocabulary] storage: logits */
    int64_t tokens, vocabulary;
    int32_t kind;       /* fptq_divergence_kind */
    double temperature; /* 1e-6 to 1e6: logits are divided by it */
    int32_t dtype;
    bool *out_of_memory; /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_divergence(const struct fptq_divergence *args);

/* Rows of a gradient times a factor each: what divergence and cross_entropy share as a backward. */
struct fptq_divergence_backward {
    void *dstudent;       /* [tokens, vocabulary] storage */
    const void *dloss;    /* [tokens] compute */
    const void *gradient; /* [tokens, vocabulary] storage */
    int64_t tokens, vocabulary;
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_divergence_backward(const struct fptq_divergence_backward *args);

/* ---- cross_entropy: -log softmax(student / temperature)[target], per token, with its gradient --------------------- */

struct fptq_cross_entropy {
    void *loss;            /* [tokens] compute */
    void *gradient;        /* [tokens, vocabulary] storage: d loss[t] / d student[t, :]; may be `student`; NULL when not wanted */
    const void *student;   /* [tokens, vocabulary] storage: logits */
    const int64_t *target; /* [tokens]: 0 .. vocabulary - 1 */
    int64_t tokens, vocabulary;
    double temperature; /* 1e-6 to 1e6: logits are divided by it */
    int32_t dtype;
};
FPTQ_EXPORT fptq_status fptq_cross_entropy(const struct fptq_cross_entropy *args);

/* ---- gptq: columns quantized one after the other, each error spread over those that follow ----------------------- */

struct fptq_gptq {
    void *weight;           /* [rows, columns] f32 or f64: columns [begin, end) are quantized, later ones take over the errors */
    double *loss;           /* [rows]: sum of the squared errors, each divided by factor[j, j] */
    const void *factor;     /* [columns, columns] like weight: upper triangular, factor^T factor = H^-1; below it is not read */
    const void *scale;      /* [rows, groups] like weight */
    const void *zero_point; /* [rows, groups] like weight, or NULL for 0 */
    const int64_t *group;   /* [columns]: which scale of its row a column has, or NULL: the first */
    int64_t rows, columns, groups, begin, end;
    fptq_grid grid;
    int32_t dtype;
    bool *out_of_memory; /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_gptq(const struct fptq_gptq *args);

/* ---- coordinate_descent: weights on a grid, improved one column after the other ----------------------------------- */

struct fptq_coordinate_descent {
    void *quantized;        /* [rows, columns] f32 or f64, on the grid: changed */
    double *loss;           /* [rows]: (weight - quantized) H (weight - quantized)^T at the end */
    const void *weight;     /* [rows, columns] like quantized */
    const void *hessian;    /* [columns, columns] like quantized: symmetric */
    const void *scale;      /* [rows, groups] like quantized */
    const void *zero_point; /* [rows, groups] like quantized, or NULL for 0 */
    const int64_t *group;   /* [columns]: which scale of its row a column has, or NULL: the first */
    int64_t rows, columns, groups, sweeps;
    fptq_grid grid;
    int32_t dtype;
    bool *out_of_memory; /* set by the operator: becomes true where scratch memory was missing */
};
FPTQ_EXPORT fptq_status fptq_coordinate_descent(const struct fptq_coordinate_descent *args);

/* ---- pack_int4: two columns per byte, the even one in the low nibble ---------------------------------------------- */

struct fptq_pack_int4 {
    uint8_t *packed; /* [rows, (columns + 1) / 2] */
    const int8_t *q; /* [rows, columns]: -8..7 where signed, else 0..15 */
    int64_t rows, columns;
    bool is_signed;
    bool *out_of_range; /* set by the operator: becomes true where a value does not fit */
};
FPTQ_EXPORT fptq_status fptq_pack_int4(const struct fptq_pack_int4 *args);

struct fptq_unpack_int4 {
    int8_t *q;             /* [rows, columns] */
    const uint8_t *packed; /* [rows, (columns + 1) / 2] */
    int64_t rows, columns;
    bool is_signed;
};
FPTQ_EXPORT fptq_status fptq_unpack_int4(const struct fptq_unpack_int4 *args);

#endif
