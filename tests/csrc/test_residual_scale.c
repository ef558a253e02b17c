/* residual_scale in C: the RMS identity at every width, gradients by differences, and what is refused. */
#include "check.h"

static double loss(const double *residual, const double *sigma, int64_t hidden, double *normalized)
{
    double new_sigma, total;
    CHECK(fptq_residual_scale_forward(&(struct fptq_residual_scale_forward){.normalized = normalized,
                                                                            .new_running_scale = &new_sigma,
                                                                            .residual = residual,
                                                                            .running_scale = sigma,
                                                                            .tokens = 1,
                                                                            .hidden = hidden,
                                                                            .eps = 0.1,
                                                                            .dtype = FPTQ_F64}) == FPTQ_OK);
    total = 0.7 * new_sigma;
    for (int64_t h = 0; h < hidden; h++) {
        total += cos((double)h) * normalized[h];
    }
    return total;
}

static void test_every_width(void)
{
    for (int64_t hidden = 1; hidden <= 40; hidden++) {
        double *memory = malloc(sizeof(double) * (size_t)(4 * hidden + 1));
        double *residual = memory, *dnormalized = residual + hidden, *dresidual = dnormalized + hidden;
        double *normalized = dresidual + hidden, sigma = 1.7, dsigma, dnew = 0.7, squares = 0;
        for (int64_t h = 0; h < hidden; h++) {
            residual[h] = 1 + sin((double)h);
            dnormalized[h] = cos((double)h);
            squares += residual[h] * residual[h];
        }
        normalized[hidden] = 42;
        loss(residual, &sigma, hidden, normalized);
        const double m = sqrt(squares / (double)hidden + 0.1 / (sigma * sigma));
        CHECK(fabs(normalized[hidden - 1] * m - residual[hidden - 1]) < 1e-14);
        CHECK(fptq_residual_scale_backward(&(struct fptq_residual_scale_backward){.dresidual = dresidual,
                                                                                  .drunning_scale = &dsigma,
                                                                                  .dnormalized = dnormalized,
                                                                                  .dnew_running_scale = &dnew,
                                                                                  .residual = residual,
                                                                                  .running_scale = &sigma,
                                                                                  .tokens = 1,
                                                                                  .hidden = hidden,
                                                                                  .eps = 0.1,
                                                                                  .dtype = FPTQ_F64}) == FPTQ_OK);
        for (int64_t h = 0; h <= hidden; h++) {
            double *value = h < hidden ? residual + h : &sigma, kept = *value;
            *value = kept + 1e-6;
            const double above = loss(residual, &sigma, hidden, normalized);
            *value = kept - 1e-6;
            const double below = loss(residual, &sigma, hidden, normalized);
            *value = kept;
            CHECK(fabs((above - below) / 2e-6 - (h < hidden ? dresidual[h] : dsigma)) < 1e-7);
        }
        CHECK(normalized[hidden] == 42);
        free(memory);
    }
}

static void test_refusals(void)
{
    float x[2] = {1, 2}, y[2], sigma[1] = {0}, new_sigma[1];
    struct fptq_residual_scale_forward args = {.normalized = y,
                                               .new_running_scale = new_sigma,
                                               .residual = x,
                                               .running_scale = sigma,
                                               .tokens = 1,
                                               .hidden = 2,
                                               .eps = 0,
                                               .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_residual_scale_forward(&args), "running_scale[0] = 0 must be positive");
    sigma[0] = 1;
    args.eps = NAN;
    CHECK_REFUSED(fptq_residual_scale_forward(&args), "eps = ");
}

int main(void)
{
    test_every_width();
    test_refusals();
    return report();
}
