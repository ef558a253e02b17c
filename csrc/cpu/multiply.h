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
#else
#define LARGEST_VECTOR 32
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

/* c = a b: c [TILED(m), n], a [m, depth], b [depth, n]; n is a multiple of LANES. */
static void LOCAL(multiply)(COMPUTE *c, struct LOCAL(matrix) a, const COMPUTE *b, int64_t m, int64_t depth, int64_t n)
{
    const bool two = sizeof(COMPUTE) * 2 * LANES <= LARGEST_VECTOR;
    for (int64_t j = 0; j < n;) {
        const bool both = two && j + 2 * LANES <= n;
        for (int64_t i = 0; i < m; i += TILE) {
            if (both) {
                LOCAL(multiply_two_lanes)(c + j, a, b + j, i, m, depth, n);
            } else {
                LOCAL(multiply_lanes)(c + j, a, b + j, i, m, depth, n);
            }
        }
        j += both ? 2 * LANES : LANES;
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
