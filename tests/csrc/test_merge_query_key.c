/* merge_query_key and solve_query_key in C: a quarter turn, every width, gradients by differences, the closed form, refusals. */
#include "check.h"

static void test_quarter_turn(void)
{
    const float weight[4] = {1, 2, 3, 4}, angle[1] = {1.57079632679f}, log_scale[1] = {0.69314718056f};
    float y[4];
    struct fptq_merge_query_key_forward args = {.y = y,
                                                .weight = weight,
                                                .angle = angle,
                                                .log_scale = log_scale,
                                                .heads = 1,
                                                .half = 1,
                                                .columns = 2,
                                                .group = 1,
                                                .dtype = FPTQ_F32};
    const float keys[4] = {-6, -8, 2, 4}, queries[4] = {-1.5f, -2, 0.5f, 1};
    CHECK(fptq_merge_query_key_forward(&args) == FPTQ_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(fabsf(y[i] - keys[i]) < 1e-5f);
    }
    args.inverse = true;
    CHECK(fptq_merge_query_key_forward(&args) == FPTQ_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(fabsf(y[i] - queries[i]) < 1e-5f);
    }
}

enum { HEADS = 4, HALF = 2, GROUP = 2, PARAMETERS = HEADS / GROUP * HALF };

static double loss(struct fptq_merge_query_key_forward args, const double *dy, int64_t size)
{
    double total = 0;
    CHECK(fptq_merge_query_key_forward(&args) == FPTQ_OK);
    for (int64_t i = 0; i < size; i++) {
        total += dy[i] * ((const double *)args.y)[i];
    }
    return total;
}

/* Each width has its own tail. The gradients are compared with differences of the loss sum dy * y. */
static void test_gradients_at_every_width(void)
{
    for (int64_t columns = 0; columns <= 40; columns++) {
        const int64_t size = HEADS * 2 * HALF * columns;
        double *memory = malloc(sizeof(double) * (size_t)(4 * size + 1));
        double *weight = memory, *dy = weight + size, *dweight = dy + size, *y = dweight + size;
        double angle[PARAMETERS], log_scale[PARAMETERS], dangle[PARAMETERS], dlog_scale[PARAMETERS];
        for (int64_t i = 0; i < size; i++) {
            weight[i] = sin((double)i);
            dy[i] = cos((double)(3 * i));
        }
        for (int i = 0; i < PARAMETERS; i++) {
            angle[i] = 0.3 * i;
            log_scale[i] = 0.1 * i - 0.2;
        }
        y[size] = 42;
        struct fptq_merge_query_key_forward forward = {.y = y,
                                                       .weight = weight,
                                                       .angle = angle,
                                                       .log_scale = log_scale,
                                                       .heads = HEADS,
                                                       .half = HALF,
                                                       .columns = columns,
                                                       .group = GROUP,
                                                       .inverse = columns % 2 == 1,
                                                       .dtype = FPTQ_F64};
        CHECK(fptq_merge_query_key_backward(&(struct fptq_merge_query_key_backward){
                  .dweight = dweight, .dangle = dangle, .dlog_scale = dlog_scale, .dy = dy, .forward = forward}) == FPTQ_OK);
        double *parameters[2] = {angle, log_scale}, *gradients[2] = {dangle, dlog_scale};
        for (int k = 0; k < 2 * PARAMETERS; k++) {
            double *value = &parameters[k / PARAMETERS][k % PARAMETERS], kept = *value;
            *value = kept + 1e-6;
            const double above = loss(forward, dy, size);
            *value = kept - 1e-6;
            const double below = loss(forward, dy, size);
            *value = kept;
            CHECK(fabs((above - below) / 2e-6 - gradients[k / PARAMETERS][k % PARAMETERS]) < 1e-6);
        }
        if (columns > 0) { /* y is linear in the weight: its gradient times the weight is the loss */
            double product = 0;
            for (int64_t i = 0; i < size; i++) {
                product += dweight[i] * weight[i];
            }
            CHECK(fabs(product - loss(forward, dy, size)) < 1e-10);
        }
        CHECK(y[size] == 42);
        free(memory);
    }
}

static void test_solve(void)
{
    /* Rows (1, 1) against (1, 0) per column: a turn by 45 degrees swaps which side is peaked; zero moments are left alone. */
    const double key[10] = {1, 1, 1, 1, 1, 0, 0, 0, 0, 0}, query[10] = {2, 2, 2, 2, 2, 1, 1, 1, 1, 1};
    double angle[2], log_scale[2];
    CHECK(fptq_solve_query_key(&(struct fptq_solve_query_key){
              .angle = angle, .log_scale = log_scale, .key = key, .query = query, .pairs = 2}) == FPTQ_OK);
    CHECK(fabs(angle[0]) < 1e-9 || fabs(angle[0] - 1.5707963267948966) < 1e-9); /* (1, 1) spreads evenly already */
    CHECK(fabs(log_scale[0] - log(2.) / 8) < 1e-12);
    CHECK(angle[1] == 0 && log_scale[1] == 0);
}

static void test_refusals(void)
{
    float weight[4] = {0}, parameter[1] = {0}, scale[2] = {1, 0};
    struct fptq_merge_query_key_forward args = {.y = weight,
                                                .weight = weight,
                                                .angle = parameter,
                                                .log_scale = parameter,
                                                .scale = scale,
                                                .heads = 1,
                                                .half = 1,
                                                .columns = 2,
                                                .group = 1,
                                                .inner = 2,
                                                .grid = {FPTQ_GRID_INTEGER, -8, 7},
                                                .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_merge_query_key_forward(&args), "scale[1] = 0");
    args.inner = 3;
    CHECK_REFUSED(fptq_merge_query_key_forward(&args), "inner = 3");
    args.group = 2;
    CHECK_REFUSED(fptq_merge_query_key_forward(&args), "group = 2");
}

int main(void)
{
    test_quarter_turn();
    test_gradients_at_every_width();
    test_solve();
    test_refusals();
    return report();
}
