/*
 * Panels: FPTQ_LANES rows of a matrix side by side, [columns, FPTQ_LANES], for kernels whose rows do not depend on each other.
 * Every operation is elementwise over the rows, so that the same bits come out on every instruction set. Included inside a kernel's
 * body (once per dtype; no include guard on purpose).
 */
#ifndef FPTQ_REGISTER
#if defined __AVX512F__
#define FPTQ_REGISTER 64
#elif defined __AVX2__
#define FPTQ_REGISTER 32
#else
#define FPTQ_REGISTER 16
#endif
#endif

/* Values of rows side by side: the compiler's own vectors, as wide as a register, for it does not find them in loops here. */
enum { LOCAL(PANEL_TILE) = 8, LOCAL(PANEL_WIDTH) = FPTQ_REGISTER / sizeof(COMPUTE) };
typedef COMPUTE LOCAL(lanes) __attribute__((vector_size(FPTQ_REGISTER), aligned(sizeof(COMPUTE)), may_alias));

/* Columns [first, last) of `count` rows of `matrix` [.., columns]; the rest of the lanes is 0. */
static inline void LOCAL(panel_load)(COMPUTE *panel, const STORAGE *matrix, int64_t columns, int64_t first, int64_t last,
                                     int64_t count)
{
    for (int64_t l = 0; l < FPTQ_LANES; l++) {
        const STORAGE *row = matrix + (l < count ? l : 0) * columns;
        for (int64_t k = first; k < last; k++) {
            panel[(k - first) * FPTQ_LANES + l] = l < count ? LOAD(row[k]) : 0;
        }
    }
}

static inline void LOCAL(panel_store)(STORAGE *matrix, const COMPUTE *panel, int64_t columns, int64_t first, int64_t last,
                                      int64_t count)
{
    for (int64_t l = 0; l < count; l++) {
        STORAGE *row = matrix + l * columns;
        for (int64_t k = first; k < last; k++) {
            row[k] = STORE(panel[(k - first) * FPTQ_LANES + l]);
        }
    }
}

/* Of each row, the scale and the rounded zero point of one group; `scale` and `zero_point` are [.., groups], the latter may be
 * NULL. */
struct LOCAL(panel_grid) {
    COMPUTE scale[FPTQ_LANES], zero_point[FPTQ_LANES], qmin, qmax;
};

static inline void LOCAL(panel_grid_of)(struct LOCAL(panel_grid) * grid, const COMPUTE *scale, const COMPUTE *zero_point,
                                        int64_t groups, int64_t group, int64_t count)
{
    for (int64_t l = 0; l < FPTQ_LANES; l++) {
        const int64_t index = (l < count ? l : 0) * groups + group;
        grid->scale[l] = scale[index];
        grid->zero_point[l] = zero_point ? RINT(zero_point[index]) : 0;
    }
}

/* The value of the grid of row l that is nearest. */
static inline COMPUTE LOCAL(panel_nearest)(const struct LOCAL(panel_grid) * grid, COMPUTE value, int l)
{
    COMPUTE q = RINT(value / grid->scale[l]) + grid->zero_point[l];
    q = q < grid->qmin ? grid->qmin : q;
    q = q > grid->qmax ? grid->qmax : q;
    return (q - grid->zero_point[l]) * grid->scale[l];
}

/*
 * values[t, :] -= sum over j of errors[j, :] matrix[j, t], for j in [0, rows) in their order and t in [0, count): `matrix` points
 * at its first column that is wanted, `columns` is the length of its rows. `count` is a constant where this is inlined.
 */
static inline __attribute__((always_inline)) void LOCAL(panel_subtract_tile)(COMPUTE *values, const COMPUTE *errors,
                                                                             const COMPUTE *matrix, int64_t rows, int64_t columns,
                                                                             const int count)
{
    for (int part = 0; part < FPTQ_LANES; part += LOCAL(PANEL_WIDTH)) {
        LOCAL(lanes) sums[LOCAL(PANEL_TILE)];
        for (int t = 0; t < count; t++) {
            sums[t] = *(const LOCAL(lanes) *)(values + t * FPTQ_LANES + part);
        }
        for (int64_t j = 0; j < rows; j++) {
            const LOCAL(lanes) error = *(const LOCAL(lanes) *)(errors + j * FPTQ_LANES + part);
            for (int t = 0; t < count; t++) {
                sums[t] -= error * matrix[j * columns + t];
            }
        }
        for (int t = 0; t < count; t++) {
            *(LOCAL(lanes) *)(values + t * FPTQ_LANES + part) = sums[t];
        }
    }
}

/* The same for t in [0, wanted), tile by tile. */
static inline void LOCAL(panel_subtract)(COMPUTE *values, const COMPUTE *errors, const COMPUTE *matrix, int64_t rows,
                                         int64_t columns, int64_t wanted)
{
    int64_t t = 0;
    for (; t + LOCAL(PANEL_TILE) <= wanted; t += LOCAL(PANEL_TILE)) {
        LOCAL(panel_subtract_tile)(values + t * FPTQ_LANES, errors, matrix + t, rows, columns, LOCAL(PANEL_TILE));
    }
    for (; t < wanted; t++) {
        LOCAL(panel_subtract_tile)(values + t * FPTQ_LANES, errors, matrix + t, rows, columns, 1);
    }
}
