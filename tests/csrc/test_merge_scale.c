/* merge_scale and lp_norm in C: values and gradients at every width and number of rows, and what is refused. */
#include "check.h"

enum { ROWS = 35 };

static void test_every_width(void)
{
    for (int64_t columns = 1; columns <= 40; columns++) {
        const int64_t size = ROWS * columns;
        double *memory = malloc(sizeof(double) * (size_t)(4 * size + 3 * columns + 1));
        double *weight = memory, *dy = weight + size, *dweight = dy + size, *column = dweight + size;
        double *dcolumn = column + columns, *sums = dcolumn + columns, *y = sums + columns;
        double row[ROWS], drow[ROWS], row_sums[ROWS], value;
        for (int64_t i = 0; i < size; i++) {
            weight[i] = sin((double)i);
            dy[i] = cos((double)(3 * i));
        }
        for (int r = 0; r < ROWS; r++) {
            row[r] = 0.01 * r - 0.1;
        }
        for (int64_t c = 0; c < columns; c++) {
            column[c] = 0.3 - 0.02 * (double)c;
        }
        y[size] = 42;
        const struct fptq_merge_scale_forward forward = {.y = y,
                                                         .weight = weight,
                                                         .row_log_scale = row,
                                                         .column_log_scale = column,
                                                         .rows = ROWS,
                                                         .columns = columns,
                                                         .dtype = FPTQ_F64};
        CHECK(fptq_merge_scale_forward(&forward) == FPTQ_OK);
        CHECK(fptq_merge_scale_backward(&(struct fptq_merge_scale_backward){
                  .dweight = dweight, .drow_log_scale = drow, .dcolumn_log_scale = dcolumn, .dy = dy, .forward = forward}) ==
              FPTQ_OK);
        CHECK(fptq_lp_norm_scale(&(struct fptq_lp_norm_scale){.value = &value,
                                                              .row_sums = row_sums,
                                                              .column_sums = sums,
                                                              .weight = weight,
                                                              .row_log_scale = row,
                                                              .column_log_scale = column,
                                                              .rows = ROWS,
                                                              .columns = columns,
                                                              .p = 4,
                                                              .dtype = FPTQ_F64}) == FPTQ_OK);
        double total = 0, error = 0;
        for (int64_t i = 0; i < size; i++) {
            const double expected = weight[i] * exp(row[i / columns]) * exp(column[i % columns]);
            error = fmax(error, fabs(y[i] - expected));
            error = fmax(error, fabs(dweight[i] * weight[i] - dy[i] * expected));
            drow[i / columns] -= dy[i] * expected;
            dcolumn[i % columns] -= dy[i] * expected;
            row_sums[i / columns] -= pow(expected, 4);
            sums[i % columns] -= pow(expected, 4);
            total += pow(expected, 4);
        }
        for (int r = 0; r < ROWS; r++) {
            error = fmax(error, fmax(fabs(drow[r]), fabs(row_sums[r])));
        }
        for (int64_t c = 0; c < columns; c++) {
            error = fmax(error, fmax(fabs(dcolumn[c]), fabs(sums[c])));
        }
        CHECK(error < 1e-11);
        CHECK(fabs(value - total) < 1e-11 * total);
        CHECK(y[size] == 42);
        free(memory);
    }
}

static void test_groups_are_quantized_apart(void)
{
    const float weight[4] = {0.4f, 9, 0.4f, 9}, scale[4] = {0.5f, 1, 2, 4}, expected[4] = {0.5f, 7, 0, 8};
    float y[4];
    struct fptq_merge_scale_forward args = {.y = y,
                                            .weight = weight,
                                            .scale = scale,
                                            .rows = 2,
                                            .columns = 2,
                                            .inner = 1,
                                            .grid = {FPTQ_GRID_INTEGER, -8, 7},
                                            .dtype = FPTQ_F32};
    CHECK(fptq_merge_scale_forward(&args) == FPTQ_OK);
    for (int i = 0; i < 4; i++) {
        CHECK(y[i] == expected[i]);
    }
    args.inner = 3;
    CHECK_REFUSED(fptq_merge_scale_forward(&args), "inner = 3 must divide the 2 columns");
    args.inner = 1;
    args.grid.qmax = -8;
    CHECK_REFUSED(fptq_merge_scale_forward(&args), "qmin = -8");
    args.rows = -2;
    CHECK_REFUSED(fptq_merge_scale_forward(&args), "rows = -2");
    double value;
    struct fptq_lp_norm_scale norm = {.value = &value, .weight = weight, .rows = 2, .columns = 2, .p = 0.5, .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_lp_norm_scale(&norm), "p = 0.5");
}

int main(void)
{
    test_every_width();
    test_groups_are_quantized_apart();
    return report();
}
