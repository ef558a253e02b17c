/*
 * Products of small matrices, included inside a kernel's body (once per dtype; no include guard on purpose).
 *
 * Each entry of a product is one sum in COMPUTE, in the order of its index, on every instruction set. Matrices that are written
 * have rows of a multiple of LANES values, zeros behind the last column, and a multiple of TILE rows, so that products need no
 * tails.
 */
#ifndef LANES
#define LANES 8
#define TILE 8 /* rows of a product that are computed together: each load of the right matrix serves them all */
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
#define TILED(n) (((n) + TILE - 1) / TILE * TILE)
#ifdef __AVX512F__
#define LARGEST_VECTOR 64 /* bytes of a register */
#define WIDE_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define WIDE_TILE 8 /* rows of two vectors whose sums fit the registers, of which there are 32 */
#else
#define LARGEST_VECTOR 32
#define WIDE_ROWS(X) X(0) X(1) X(2) X(3)
#define WIDE_TILE 4 /* 16 registers */
#endif
#endif

/* A matrix that may be read by rows or by columns. */
struct LOCAL(matrix) {
    const COMPUTE *values;
    int64_t row, column; /* steps from one entry to the next below, and to the next beside it */
};

/*
 * c[i, :] = sum over k of a[i, k] b[k, :] for TILE rows from i on (the last one again beyond the end) and the columns of one
 * vector; n is the step from row to row of b and c. Sums have names so that they live in registers.
 */
#define ADD_ROW(t) s##t += a##t[k * a.column] * b_row;
#define ROW_OF(t) const COMPUTE *a##t = a.values + (i + t < m ? i + t : m - 1) * a.row;
#define STORE_ROW(t) *(vector *)(c + (i + t) * n) = s##t;
#define FOR_ROWS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define MULTIPLY_TILE                                                                      \
    vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, s5 = {0}, s6 = {0}, s7 = {0}; \
    FOR_ROWS(ROW_OF)                                                                       \
    for (int64_t k = 0; k < depth; k++) {                                                  \
        const vector b_row = *(const vector *)(b + k * n);                                 \
        FOR_ROWS(ADD_ROW)                                                                  \
    }                                                                                      \
    FOR_ROWS(STORE_ROW)

static void LOCAL(multiply_lanes)(COMPUTE *c, struct LOCAL(matrix) a, const COMPUTE *b, int64_t i, int64_t m, int64_t depth,
                                  int64_t n)
{
    typedef COMPUTE vector __attribute__((vector_size(LANES * sizeof(COMPUTE)), aligned(sizeof(COMPUTE)), may_alias));
    MULTIPLY_TILE
}

static void LOCAL(multiply_two_lanes)(COMPUTE *c, struct LOCAL(matrix) a, const COMPUTE *b, int64_t i, int64_t m, int64_t depth,
                                      int64_t n)
{
    typedef COMPUTE vector __attribute__((vector_size(2 * LANES * sizeof(COMPUTE)), aligned(sizeof(COMPUTE)), may_alias));
    MULTIPLY_TILE
}

/* As above for WIDE_TILE rows and the columns of two vectors: each value of a serves both, each vector of b all rows. */
#define WIDE_SUMS(t) vector p##t = {0}, q##t = {0};
#define WIDE_ADD(t) p##t += a##t[k * a.column] * left, q##t += a##t[k * a.column] * right;
#define WIDE_STORE(t) *(vector *)(c + (i + t) * n) = p##t, *(vector *)(c + (i + t) * n + lanes) = q##t;

static void LOCAL(multiply_wide)(COMPUTE *c, struct LOCAL(matrix) a, const COMPUTE *b, int64_t i, int64_t m, int64_t depth,
                                 int64_t n)
{
    typedef COMPUTE vector __attribute__((vector_size(LARGEST_VECTOR), aligned(sizeof(COMPUTE)), may_alias));
    const int64_t lanes = LARGEST_VECTOR / sizeof(COMPUTE);
    WIDE_ROWS(WIDE_SUMS)
    WIDE_ROWS(ROW_OF)
    for (int64_t k = 0; k < depth; k++) {
        const vector left = *(const vector *)(b + k * n), right = *(const vector *)(b + k * n + lanes);
        WIDE_ROWS(WIDE_ADD)
    }
    WIDE_ROWS(WIDE_STORE)
}

/* c = a b: c [TILED(m), n], a [m, depth], b [depth, n]; n is a multiple of LANES. */
static void LOCAL(multiply)(COMPUTE *c, struct LOCAL(matrix) a, const COMPUTE *b, int64_t m, int64_t depth, int64_t n)
{
    const int64_t wide = 2 * LARGEST_VECTOR / sizeof(COMPUTE);
    int64_t j = 0;
    for (; j + wide <= n; j += wide) {
        for (int64_t i = 0; i < m; i += WIDE_TILE) {
            LOCAL(multiply_wide)(c + j, a, b + j, i, m, depth, n);
        }
    }
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
        for (int64_t i = 0; i < m; i += TILE) {
            LOCAL(multiply_two_lanes)(c + j, a, b + j, i, m, depth, n);
        }
    }
    for (; j < n; j += LANES) {
        for (int64_t i = 0; i < m; i += TILE) {
            LOCAL(multiply_lanes)(c + j, a, b + j, i, m, depth, n);
        }
    }
}

/* out [n, PADDED(m)] = in^T, in [m, :n] with rows of `step` values. */
static void LOCAL(transpose)(COMPUTE *out, const COMPUTE *in, int64_t m, int64_t n, int64_t step)
{
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < PADDED(m); i++) {
            out[j * PADDED(m) + i] = i < m ? in[i * step + j] : 0;
        }
    }
}

#undef ADD_ROW
#undef ROW_OF
#undef STORE_ROW
#undef FOR_ROWS
#undef MULTIPLY_TILE
#undef WIDE_SUMS
#undef WIDE_ADD
#undef WIDE_STORE
