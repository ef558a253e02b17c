/* fake_quant in C: values at ties and edges, gradients, every layout, and what is refused. */
#include "check.h"

static const fptq_grid int4 = {FPTQ_GRID_INTEGER, -8, 7};

static void test_values_and_edges(void)
{
    const float scale[1] = {0.5f};
    const float x[8] = {0.25f, 0.75f, -0.25f, 9.f, -9.f, INFINITY, -INFINITY, NAN};
    const float expected[7] = {0.f, 1.f, -0.f, 3.5f, -4.f, 3.5f, -4.f}; /* 0.5 and 1.5 are ties: to even */
    float y[8];
    CHECK(fptq_fake_quant_forward(&(struct fptq_fake_quant_forward){
              .y = y, .x = x, .scale = scale, .outer = 1, .channels = 1, .inner = 8, .grid = int4, .dtype = FPTQ_F32}) == FPTQ_OK);
    for (int i = 0; i < 7; i++) {
        CHECK(y[i] == expected[i]);
    }
    CHECK(isnan(y[7]));
}

/* Each length has its own tail; the neighbor of the last element must stay untouched. */
static void test_every_length(void)
{
    for (int64_t length = 0; length <= 70; length++) {
        double *x = malloc(sizeof(double) * (size_t)(length + 1)), *y = malloc(sizeof(double) * (size_t)(length + 1));
        const double scale[1] = {0.1}, zero_point[1] = {3};
        const fptq_grid unsigned4 = {FPTQ_GRID_INTEGER, 0, 15};
        for (int64_t i = 0; i < length; i++) {
            x[i] = (double)(i % 23) * 0.07 - 0.6;
        }
        y[length] = 42;
        CHECK(fptq_fake_quant_forward(&(struct fptq_fake_quant_forward){.y = y,
                                                                        .x = x,
                                                                        .scale = scale,
                                                                        .zero_point = zero_point,
                                                                        .outer = 1,
                                                                        .channels = 1,
                                                                        .inner = length,
                                                                        .grid = unsigned4,
                                                                        .dtype = FPTQ_F64}) == FPTQ_OK);
        for (int64_t i = 0; i < length; i++) {
            const double q = fmin(fmax(rint(x[i] / 0.1) + 3, 0), 15);
            CHECK(y[i] == (q - 3) * 0.1);
        }
        CHECK(y[length] == 42);
        free(x);
        free(y);
    }
}

static void test_backward(void)
{
    const double x[6] = {0.12, 5, -5, 0.31, 0.72, -0.2}, dy[6] = {1, 2, 3, 4, 5, 6}, scale[2] = {0.1, 0.2};
    double dx[6], dscale[2];
    CHECK(fptq_fake_quant_backward(&(struct fptq_fake_quant_backward){.dx = dx,
                                                                      .dscale = dscale,
                                                                      .dy = dy,
                                                                      .x = x,
                                                                      .scale = scale,
                                                                      .outer = 1,
                                                                      .channels = 2,
                                                                      .inner = 3,
                                                                      .grid = int4,
                                                                      .dtype = FPTQ_F64}) == FPTQ_OK);
    const double expected_dx[6] = {1, 0, 0, 4, 5, 6};
    for (int i = 0; i < 6; i++) {
        CHECK(dx[i] == expected_dx[i]);
    }
    CHECK(fabs(dscale[0] - (1 * (1 - 1.2) + 2 * 7 + 3 * -8)) < 1e-12);
    CHECK(fabs(dscale[1] - (4 * (2 - 1.55) + 5 * (4 - 3.6) + 6 * 0)) < 1e-12);
}

static void test_refusals(void)
{
    float x[2] = {1, 2}, y[2], bad_scale[2] = {1, -0.5f};
    struct fptq_fake_quant_forward args = {
        .y = y, .x = x, .scale = bad_scale, .outer = 1, .channels = 2, .inner = 1, .grid = int4, .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "scale[1] = -0.5");
    bad_scale[1] = NAN;
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "scale[1] = ");
    bad_scale[1] = 1;
    args.grid.kind = 9;
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "grid kind 9");
    args.grid = (fptq_grid){FPTQ_GRID_INTEGER, 7, 7};
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "qmin = 7");
    args.grid = int4;
    args.dtype = 11;
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "dtype 11");
    args.dtype = FPTQ_F32;
    args.inner = -1;
    CHECK_REFUSED(fptq_fake_quant_forward(&args), "inner = -1");
    CHECK_REFUSED(fptq_select_isa("mmx"), "mmx is not built");
}

int main(void)
{
    test_values_and_edges();
    test_every_length();
    test_backward();
    test_refusals();
    return report();
}
