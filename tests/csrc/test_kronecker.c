/* kronecker in C: values and gradients of every small size against plain sums, the quantized form, and what is refused. */
#include "check.h"

enum { BLOCKS = 35 };

/* Fills `values` with numbers in [-1, 1] that depend on `seed`. */
static void fill(double *values, int64_t count, int seed)
{
    for (int64_t i = 0; i < count; i++) {
        values[i] = sin((double)(seed * 1000 + i));
    }
}

/* (left (x) right)[i, j], absent factors are identities. */
static double entry(const double *left, const double *right, int64_t rows, int64_t columns, int64_t i, int64_t j)
{
    const int64_t r = i / columns, c = i % columns, s = j / columns, d = j % columns;
    return (left ? left[r * rows + s] : r == s) * (right ? right[c * columns + d] : c == d);
}

static void test_size(int64_t rows, int64_t columns, bool has_left, bool has_right)
{
    const int64_t n = rows * columns, size = BLOCKS * n, squares = rows * rows + columns * columns;
    double *memory = malloc(sizeof(double) * (size_t)(4 * size + 2 * squares + 2));
    double *x = memory, *dy = x + size, *dx = dy + size, *left = dx + size, *right = left + rows * rows;
    double *dleft = right + columns * columns, *dright = dleft + rows * rows, *y = dright + columns * columns;
    fill(x, size, 1);
    fill(dy, size, 2);
    fill(left, rows * rows, 3);
    fill(right, columns * columns, 4);
    y[size] = 42;
    const struct fptq_kronecker_forward forward = {.y = y,
                                                   .x = x,
                                                   .left = has_left ? left : NULL,
                                                   .right = has_right ? right : NULL,
                                                   .blocks = BLOCKS,
                                                   .rows = rows,
                                                   .columns = columns,
                                                   .dtype = FPTQ_F64};
    CHECK(fptq_kronecker_forward(&forward) == FPTQ_OK);
    CHECK(fptq_kronecker_backward(&(struct fptq_kronecker_backward){
              .dx = dx, .dleft = has_left ? dleft : NULL, .dright = has_right ? dright : NULL, .dy = dy, .forward = forward}) ==
          FPTQ_OK);
    double error = 0, change = 0, expected = 0;
    for (int64_t b = 0; b < BLOCKS; b++) {
        for (int64_t i = 0; i < n; i++) {
            double sum = 0, gradient = 0;
            for (int64_t j = 0; j < n; j++) {
                sum += entry(forward.left, forward.right, rows, columns, i, j) * x[b * n + j];
                gradient += entry(forward.left, forward.right, rows, columns, j, i) * dy[b * n + j];
            }
            error = fmax(error, fmax(fabs(y[b * n + i] - sum), fabs(dx[b * n + i] - gradient)));
            expected += dy[b * n + i] * y[b * n + i];
        }
    }
    /* y is linear in each factor: <factor, its gradient> = <y, dy> */
    for (int64_t i = 0; has_left && i < rows * rows; i++) {
        change += left[i] * dleft[i];
    }
    CHECK(!has_left || fabs(change - expected) < 1e-9);
    change = 0;
    for (int64_t i = 0; has_right && i < columns * columns; i++) {
        change += right[i] * dright[i];
    }
    CHECK(!has_right || fabs(change - expected) < 1e-9);
    CHECK(error < 1e-11);
    CHECK(y[size] == 42);
    free(memory);
}

static void test_every_size(void)
{
    for (int64_t rows = 1; rows <= 10; rows++) {
        for (int64_t columns = 1; columns <= 18; columns++) {
            test_size(rows, columns, true, true);
            test_size(rows, columns, true, false);
            test_size(rows, columns, false, true);
        }
    }
}

static void test_quantizes_with_one_scale_or_one_for_each_block(void)
{
    const float x[4] = {0.3f, 9, 0.3f, 9}, left[1] = {2}, scale[2] = {1, 4}, one[4] = {1, 7, 1, 7}, each[4] = {1, 7, 0, 16};
    float y[4];
    struct fptq_kronecker_forward args = {.y = y,
                                          .x = x,
                                          .left = left,
                                          .scale = scale,
                                          .blocks = 2,
                                          .rows = 1,
                                          .columns = 2,
                                          .scales = 1,
                                          .grid = {FPTQ_GRID_INTEGER, -8, 7},
                                          .dtype = FPTQ_F32};
    CHECK(fptq_kronecker_forward(&args) == FPTQ_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(y[i] == one[i]);
    }
    args.scales = 2;
    CHECK(fptq_kronecker_forward(&args) == FPTQ_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(y[i] == each[i]);
    }
    args.scales = 3;
    CHECK_REFUSED(fptq_kronecker_forward(&args), "3 scales for 2 blocks");
    args.scales = 1;
    args.rows = -1;
    CHECK_REFUSED(fptq_kronecker_forward(&args), "rows = -1");
}

/* Blocks of every size: scale, zero point and values against plain loops; what is behind the results stays. */
static void test_quantizes_each_block_in_its_own_range(void)
{
    for (int64_t columns = 1; columns <= 40; columns++) {
        const int64_t size = BLOCKS * columns;
        double *memory = malloc(sizeof(double) * (size_t)(2 * size + 2 * BLOCKS + 3));
        double *x = memory, *y = x + size, *scale = y + size + 1, *zero_point = scale + BLOCKS + 1;
        const double left = 2, clip = 0.75;
        fill(x, size, 5);
        y[size] = scale[BLOCKS] = zero_point[BLOCKS] = 42;
        struct fptq_kronecker_forward args = {.y = y,
                                              .x = x,
                                              .left = &left,
                                              .blocks = BLOCKS,
                                              .rows = 1,
                                              .columns = columns,
                                              .grid = {FPTQ_GRID_INTEGER, 0, 15},
                                              .dynamic_scale = scale,
                                              .dynamic_zero_point = zero_point,
                                              .clip = &clip,
                                              .clip_ratio = 0.9,
                                              .dtype = FPTQ_F64};
        CHECK(fptq_kronecker_forward(&args) == FPTQ_OK);
        for (int64_t b = 0; b < BLOCKS; b++) {
            double lo = 0, hi = 0;
            for (int64_t i = 0; i < columns; i++) {
                lo = fmin(lo, 2 * x[b * columns + i]);
                hi = fmax(hi, 2 * x[b * columns + i]);
            }
            const double step = (1 + sqrt(2) / 4096) * 0.9 * (hi - lo) / 15, zero = fmin(15, rint(-0.9 * lo / step));
            CHECK(fabs(scale[b] - 0.75 * step) < 1e-14 && zero_point[b] == zero);
            for (int64_t i = 0; i < columns; i++) {
                const double q = fmin(15, fmax(0, rint(2 * x[b * columns + i] / scale[b]) + zero));
                CHECK(y[b * columns + i] == (q - zero) * scale[b]);
            }
        }
        CHECK(y[size] == 42 && scale[BLOCKS] == 42 && zero_point[BLOCKS] == 42);
        args.clip_ratio = 0;
        CHECK_REFUSED(fptq_kronecker_forward(&args), "clip_ratio = 0 must lie in (0, 1]");
        args.scale = &left;
        CHECK_REFUSED(fptq_kronecker_forward(&args), "not both");
        free(memory);
    }
}

int main(void)
{
    test_every_size();
    test_quantizes_each_block_in_its_own_range();
    test_quantizes_with_one_scale_or_one_for_each_block();
    return report();
}
