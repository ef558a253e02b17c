/* gptq in C: against one column after the other, every number of rows and columns around a unit and a block, and what is refused.
 */
#include "check.h"

static const fptq_grid int4 = {FPTQ_GRID_INTEGER, -8, 7};

/* Numbers of both signs that repeat after a long time. */
static double number(int64_t i)
{
    return (double)(i * 7919 % 1009) / 504.5 - 1;
}

static void plain(float *weight, const float *factor, const float *scale, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r++) {
        float *row = weight + r * columns;
        for (int64_t j = 0; j < columns; j++) {
            const float q = fminf(fmaxf(rintf(row[j] / scale[r]) + 0.0f, -8), 7) * scale[r],
                        error = (row[j] - q) / factor[j * columns + j];
            for (int64_t k = j + 1; k < columns; k++) {
                const float change = error * factor[j * columns + k];
                row[k] -= change;
            }
            row[j] = q;
        }
    }
}

static void test_size(int64_t rows, int64_t columns)
{
    const size_t size = (size_t)(rows * columns) * sizeof(float);
    float *weight = malloc(size + 4), *expected = malloc(size + 4), *scale = malloc((size_t)rows * sizeof(float) + 4);
    float *factor = malloc((size_t)(columns * columns) * sizeof(float) + 4);
    double *loss = malloc((size_t)rows * sizeof(double) + 8);
    for (int64_t i = 0; i < rows * columns; i++) {
        weight[i] = expected[i] = (float)number(i);
    }
    for (int64_t r = 0; r < rows; r++) {
        scale[r] = 0.125f + 0.01f * (float)(r % 5);
    }
    for (int64_t i = 0; i < columns * columns; i++) { /* what lies below the diagonal must not be read */
        const int64_t j = i / columns, k = i % columns;
        factor[i] = k < j ? NAN : k == j ? 1.5f + (float)number(j) / 4 : (float)number(i) / 32;
    }
    weight[rows * columns] = 42;
    plain(expected, factor, scale, rows, columns);
    const struct fptq_gptq args = {.weight = weight,
                                   .loss = loss,
                                   .factor = factor,
                                   .scale = scale,
                                   .rows = rows,
                                   .columns = columns,
                                   .groups = 1,
                                   .begin = 0,
                                   .end = columns,
                                   .grid = int4,
                                   .dtype = FPTQ_F32};
    CHECK(fptq_gptq(&args) == FPTQ_OK);
    CHECK(memcmp(weight, expected, size) == 0);
    CHECK(weight[rows * columns] == 42);
    for (int64_t r = 0; r < rows; r++) {
        CHECK(loss[r] >= 0);
    }
    free(weight);
    free(expected);
    free(scale);
    free(factor);
    free(loss);
}

static void test_refused(void)
{
    float weight[4] = {0}, factor[4] = {1, 0, 0, 1}, scale[2] = {1, 1};
    double loss[2];
    const int64_t group[2] = {0, 1};
    const struct fptq_gptq good = {.weight = weight,
                                   .loss = loss,
                                   .factor = factor,
                                   .scale = scale,
                                   .rows = 2,
                                   .columns = 2,
                                   .groups = 1,
                                   .begin = 0,
                                   .end = 2,
                                   .grid = int4,
                                   .dtype = FPTQ_F32};
    CHECK(fptq_gptq(&good) == FPTQ_OK);
    struct fptq_gptq bad = good;
    bad.dtype = FPTQ_BF16;
    CHECK_REFUSED(fptq_gptq(&bad), "must be float32 or float64");
    bad = good;
    bad.end = 3;
    CHECK_REFUSED(fptq_gptq(&bad), "columns 0 to 3 are not within 0 and 2");
    bad = good;
    bad.group = group;
    CHECK_REFUSED(fptq_gptq(&bad), "column 1 belongs to group 1, but there are 1");
    factor[3] = -1;
    CHECK_REFUSED(fptq_gptq(&good), "factor[1, 1] = -1 must be positive and finite");
}

int main(void)
{
    for (int64_t rows = 0; rows <= 33; rows += rows < 2 || rows > 14 ? 1 : 7) {
        test_size(rows, 1);
        test_size(rows, 67);
    }
    for (int64_t columns = 0; columns <= 135; columns += columns < 6 || columns % 64 < 4 || columns % 64 > 60 ? 1 : 5) {
        test_size(3, columns);
    }
    test_refused();
    return report();
}
