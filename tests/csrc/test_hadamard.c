/* hadamard in C: matrices of every construction, the transform against them, its inverse, and what is refused. */
#include "check.h"

static void test_factors_are_orthogonal(void)
{
    const int64_t orders[] = {12, 20, 28, 36, 52, 60, 76, 92, 100, 108, 116, 156, 172, 244};
    for (size_t k = 0; k < sizeof orders / sizeof *orders; k++) {
        const int64_t n = orders[k];
        struct fptq_hadamard_plan plan;
        CHECK(fptq_hadamard_plan_of(n, &plan) == FPTQ_OK);
        CHECK(plan.num_factors == 1 && plan.order[0] == n && plan.power == 0);
        int64_t wrong = 0;
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < n; j++) {
                int64_t dot = 0;
                for (int64_t c = 0; c < n; c++) {
                    dot += plan.matrix[0][i * n + c] * plan.matrix[0][j * n + c];
                }
                wrong += dot != (i == j ? n : 0);
            }
        }
        CHECK(wrong == 0);
    }
}

static void transform(double *y, const double *x, int64_t blocks, int64_t size, bool transpose)
{
    CHECK(fptq_hadamard(&(struct fptq_hadamard){
              .y = y, .x = x, .blocks = blocks, .size = size, .transpose = transpose, .dtype = FPTQ_F64}) == FPTQ_OK);
}

/* Every size up to 400: the transform keeps lengths, its transpose undoes it, and the element after the last is untouched. */
static void test_every_size(void)
{
    int sizes = 0;
    for (int64_t n = 1; n <= 400; n++) {
        if (!fptq_hadamard_exists(n)) {
            continue;
        }
        sizes++;
        double *x = malloc(sizeof(double) * (size_t)(2 * n)), *y = malloc(sizeof(double) * (size_t)(2 * n + 1));
        double *back = malloc(sizeof(double) * (size_t)(2 * n));
        double length_x = 0, length_y = 0, error = 0;
        for (int64_t i = 0; i < 2 * n; i++) {
            x[i] = sin((double)(i * i % 101));
        }
        y[2 * n] = 42;
        transform(y, x, 2, n, n % 3 == 0);
        transform(back, y, 2, n, n % 3 != 0);
        for (int64_t i = 0; i < 2 * n; i++) {
            length_x += x[i] * x[i];
            length_y += y[i] * y[i];
            error = fmax(error, fabs(back[i] - x[i]));
        }
        CHECK(fabs(length_y / length_x - 1) < 1e-13);
        CHECK(error < 1e-13);
        CHECK(y[2 * n] == 42);
        free(x);
        free(y);
        free(back);
    }
    CHECK(sizes > 60);
}

static void test_first_column_is_the_matrix(void)
{
    double x[48] = {0}, y[48];
    struct fptq_hadamard_plan plan;
    CHECK(fptq_hadamard_plan_of(48, &plan) == FPTQ_OK);
    CHECK(plan.num_factors == 1 && plan.order[0] == 12 && plan.power == 2);
    x[4 * 5] = 1; /* column 5 of the dense factor, column 0 of the fast index */
    transform(y, x, 1, 48, false);
    for (int i = 0; i < 48; i++) {
        CHECK(fabs(y[i] - plan.matrix[0][i / 4 * 12 + 5] / sqrt(48.)) < 1e-15);
    }
}

static void test_refusals(void)
{
    float x[28] = {0}, y[28];
    struct fptq_hadamard args = {.y = y, .x = x, .blocks = 1, .size = 7, .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_hadamard(&args), "nearest possible sizes are 4 and 8");
    args.size = 0;
    CHECK_REFUSED(fptq_hadamard(&args), "size 0 must be between");
    args.size = 28;
    args.dtype = 7;
    CHECK_REFUSED(fptq_hadamard(&args), "dtype 7");
    args.dtype = FPTQ_F32;
    args.blocks = -1;
    CHECK_REFUSED(fptq_hadamard(&args), "blocks = -1");
    CHECK(!fptq_hadamard_exists(188) && !fptq_hadamard_exists(-4) && fptq_hadamard_exists(1));
}

int main(void)
{
    test_factors_are_orthogonal();
    test_every_size();
    test_first_column_is_the_matrix();
    test_refusals();
    return report();
}
