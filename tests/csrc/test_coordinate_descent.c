/* coordinate_descent in C: against one column after the other, every number of rows and columns around a unit, and what is refused.
 */
#include "check.h"

static const fptq_grid int4 = {FPTQ_GRID_INTEGER, -8, 7};

/* Numbers of both signs that repeat after a long time. */
static double number(int64_t i)
{
    return (double)(i * 7919 % 1009) / 504.5 - 1;
}

/* The value of the grid with this scale and zero point that is nearest. */
static float nearest(float value, float scale, float zero)
{
    return (fminf(fmaxf(rintf(value / scale) + zero, -8), 7) - zero) * scale;
}

/* One row at a time, with two groups of columns, and scratch memory for its error and for -E H; returns the loss. */
static double plain(float *quantized, const float *weight, const float *hessian, const float scale[2], const float zero[2],
                    int64_t columns, int sweeps, float *scratch)
{
    float *error = scratch, *slope = scratch + columns;
    for (int64_t k = 0; k < columns; k++) {
        error[k] = weight[k] - quantized[k];
        slope[k] = 0;
    }
    for (int64_t k = 0; k < columns; k++) {
        for (int64_t j = 0; j < columns; j++) {
            const float change = error[j] * hessian[j * columns + k];
            slope[k] -= change;
        }
    }
    for (int64_t i = 0; i < sweeps * columns; i++) {
        const int64_t j = i % columns;
        const float lowest = quantized[j] - slope[j] / hessian[j * columns + j];
        const float q = nearest(lowest, scale[j % 2], rintf(zero[j % 2])), move = q - quantized[j];
        quantized[j] = q;
        for (int64_t k = 0; k < columns; k++) {
            const float change = move * hessian[j * columns + k];
            slope[k] += change;
        }
    }
    double loss = 0;
    for (int64_t k = 0; k < columns; k++) {
        loss -= (double)(weight[k] - quantized[k]) * (double)slope[k];
    }
    return loss;
}

static void test_size(int64_t rows, int64_t columns)
{
    const size_t size = (size_t)(rows * columns) * sizeof(float), of_rows = (size_t)rows * 2 * sizeof(float);
    float *weight = malloc(size + 4), *quantized = malloc(size + 4), *expected = malloc(size + 4);
    float *scale = malloc(of_rows + 4), *zero = malloc(of_rows + 4), *scratch = malloc((size_t)columns * 2 * sizeof(float) + 4);
    float *hessian = malloc((size_t)(columns * columns) * sizeof(float) + 4);
    int64_t *group = malloc((size_t)columns * sizeof(int64_t) + 8);
    double *loss = malloc((size_t)rows * sizeof(double) + 8);
    for (int64_t i = 0; i < 2 * rows; i++) {
        scale[i] = 0.125f + 0.01f * (float)(i % 5);
        zero[i] = (float)(i % 3) - 0.75f;
    }
    for (int64_t k = 0; k < columns; k++) {
        group[k] = k % 2;
    }
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t r = i / columns, g = i % columns % 2;
        weight[i] = (float)number(i);
        quantized[i] = expected[i] = nearest(weight[i], scale[2 * r + g], rintf(zero[2 * r + g]));
    }
    for (int64_t i = 0; i < columns * columns; i++) {
        const int64_t j = i / columns, k = i % columns, low = j < k ? j : k, high = j < k ? k : j;
        hessian[i] = k == j ? 2 + (float)number(j) / 4 : (float)number(low * columns + high) / 2;
    }
    quantized[rows * columns] = 42;
    const struct fptq_coordinate_descent args = {.quantized = quantized,
                                                 .loss = loss,
                                                 .weight = weight,
                                                 .hessian = hessian,
                                                 .scale = scale,
                                                 .zero_point = zero,
                                                 .group = group,
                                                 .rows = rows,
                                                 .columns = columns,
                                                 .groups = 2,
                                                 .sweeps = 2,
                                                 .grid = int4,
                                                 .dtype = FPTQ_F32};
    CHECK(fptq_coordinate_descent(&args) == FPTQ_OK);
    for (int64_t r = 0; r < rows && columns > 0; r++) {
        float *row = expected + r * columns;
        const double found = plain(row, weight + r * columns, hessian, scale + 2 * r, zero + 2 * r, columns, 2, scratch);
        CHECK(memcmp(row, quantized + r * columns, (size_t)columns * sizeof(float)) == 0);
        CHECK(fabs(loss[r] - found) <= 1e-9 * fabs(found));
    }
    CHECK(quantized[rows * columns] == 42);
    free(weight);
    free(quantized);
    free(expected);
    free(scale);
    free(zero);
    free(scratch);
    free(hessian);
    free(group);
    free(loss);
}

static void test_refused(void)
{
    float quantized[4] = {0}, weight[4] = {0}, hessian[4] = {1, 0, 0, 1}, scale[2] = {1, 1};
    double loss[2];
    const int64_t group[2] = {0, 1};
    const struct fptq_coordinate_descent good = {.quantized = quantized,
                                                 .loss = loss,
                                                 .weight = weight,
                                                 .hessian = hessian,
                                                 .scale = scale,
                                                 .rows = 2,
                                                 .columns = 2,
                                                 .groups = 1,
                                                 .sweeps = 1,
                                                 .grid = int4,
                                                 .dtype = FPTQ_F32};
    CHECK(fptq_coordinate_descent(&good) == FPTQ_OK);
    struct fptq_coordinate_descent bad = good;
    bad.dtype = FPTQ_BF16;
    CHECK_REFUSED(fptq_coordinate_descent(&bad), "must be float32 or float64");
    bad = good;
    bad.sweeps = -1;
    CHECK_REFUSED(fptq_coordinate_descent(&bad), "sweeps");
    bad = good;
    bad.group = group;
    CHECK_REFUSED(fptq_coordinate_descent(&bad), "column 1 belongs to group 1, but there are 1");
    hessian[3] = -1;
    CHECK_REFUSED(fptq_coordinate_descent(&good), "hessian[1, 1] = -1 must be positive and finite");
}

int main(void)
{
    for (int64_t rows = 0; rows <= 33; rows += rows < 2 || rows > 14 ? 1 : 7) {
        test_size(rows, 1);
        test_size(rows, 37);
    }
    for (int64_t columns = 0; columns <= 70; columns += columns < 20 ? 1 : 7) {
        test_size(3, columns);
    }
    test_refused();
    return report();
}
