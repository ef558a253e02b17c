/* coordinate_descent in C: against one column after the other, every number of rows and columns around a unit, and what is refused.
 */
#include "check.h"

static const fptq_grid int4 = {FPTQ_GRID_INTEGER, -8, 7};

/* Numbers of both signs that repeat after a long time. */
static double number(int64_t i)
{
    return (double)(i * 7919 % 1009) / 504.5 - 1;
}

/* One row at a time, with scratch memory for its error and for -E H. */
static void plain(float *quantized, const float *weight, const float *hessian, float scale, int64_t columns, int sweeps,
                  float *scratch)
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
        const float q = fminf(fmaxf(rintf(lowest / scale) + 0.0f, -8), 7) * scale, move = q - quantized[j];
        quantized[j] = q;
        for (int64_t k = 0; k < columns; k++) {
            const float change = move * hessian[j * columns + k];
            slope[k] += change;
        }
    }
}

static void test_size(int64_t rows, int64_t columns)
{
    const size_t size = (size_t)(rows * columns) * sizeof(float);
    float *weight = malloc(size + 4), *quantized = malloc(size + 4), *expected = malloc(size + 4);
    float *scale = malloc((size_t)rows * sizeof(float) + 4), *scratch = malloc((size_t)columns * 2 * sizeof(float) + 4);
    float *hessian = malloc((size_t)(columns * columns) * sizeof(float) + 4);
    double *loss = malloc((size_t)rows * sizeof(double) + 8);
    for (int64_t r = 0; r < rows; r++) {
        scale[r] = 0.125f + 0.01f * (float)(r % 5);
        for (int64_t k = 0; k < columns; k++) {
            const int64_t i = r * columns + k;
            weight[i] = (float)number(i);
            quantized[i] = expected[i] = rintf(weight[i] / scale[r]) * scale[r];
        }
    }
    for (int64_t i = 0; i < columns * columns; i++) {
        const int64_t j = i / columns, k = i % columns, low = j < k ? j : k, high = j < k ? k : j;
        hessian[i] = k == j ? 2 + (float)number(j) / 4 : (float)number(low * columns + high) / 2;
    }
    quantized[rows * columns] = 42;
    for (int64_t r = 0; r < rows; r++) {
        plain(expected + r * columns, weight + r * columns, hessian, scale[r], columns, 2, scratch);
    }
    const struct fptq_coordinate_descent args = {.quantized = quantized,
                                                 .loss = loss,
                                                 .weight = weight,
                                                 .hessian = hessian,
                                                 .scale = scale,
                                                 .rows = rows,
                                                 .columns = columns,
                                                 .groups = 1,
                                                 .sweeps = 2,
                                                 .grid = int4,
                                                 .dtype = FPTQ_F32};
    CHECK(fptq_coordinate_descent(&args) == FPTQ_OK);
    for (int64_t i = 0; i < rows * columns; i++) {
        CHECK(quantized[i] == expected[i]);
    }
    CHECK(quantized[rows * columns] == 42);
    free(weight);
    free(quantized);
    free(expected);
    free(scale);
    free(scratch);
    free(hessian);
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
