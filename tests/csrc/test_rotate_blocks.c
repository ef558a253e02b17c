/* rotate_blocks in C: values of every small size, bit for bit, both ways and with either order of channels, and what is refused. */
#include "check.h"

enum { ROWS = 70 }; /* one unit of rows and the tail of another */

/* A bijection of n channels that, from n = 3 on, is not its own inverse. */
static int64_t moved(int64_t channel, int64_t n)
{
    return (channel + n / 2 + 1) % n;
}

/* y[r, place] as the formula says, one sum in the order of its index. */
static double expected(const struct fptq_rotate_blocks *args, int64_t row, int64_t place)
{
    const int64_t size = args->size, columns = args->blocks * size, block = place / size, i = place % size;
    const double *matrix = (const double *)args->matrices + block * size * size;
    const double *x = (const double *)args->x + row * columns;
    double sum = 0;
    for (int64_t j = 0; j < size; j++) {
        const int64_t channel = block * size + j;
        sum += args->transpose ? matrix[j * size + i] * x[channel]
                               : matrix[i * size + j] * x[args->permutation ? args->permutation[channel] : channel];
    }
    return sum;
}

static void test_size(int64_t blocks, int64_t size, bool permuted, bool transpose)
{
    const int64_t columns = blocks * size, count = ROWS * columns;
    double *memory = malloc(sizeof(double) * (size_t)(2 * count + columns * size + 1));
    int64_t *permutation = malloc(sizeof(int64_t) * (size_t)columns);
    double *x = memory, *matrices = x + count, *y = matrices + columns * size;
    for (int64_t i = 0; i < count; i++) {
        x[i] = sin((double)i);
    }
    for (int64_t i = 0; i < columns * size; i++) {
        matrices[i] = cos((double)(3 * i));
    }
    for (int64_t i = 0; i < columns; i++) {
        permutation[i] = moved(i, columns);
    }
    y[count] = 42;
    const struct fptq_rotate_blocks args = {.y = y,
                                            .x = x,
                                            .matrices = matrices,
                                            .permutation = permuted ? permutation : NULL,
                                            .rows = ROWS,
                                            .blocks = blocks,
                                            .size = size,
                                            .transpose = transpose,
                                            .dtype = FPTQ_F64};
    CHECK(fptq_rotate_blocks(&args) == FPTQ_OK);
    int64_t wrong = 0;
    for (int64_t row = 0; row < ROWS; row++) {
        for (int64_t place = 0; place < columns; place++) {
            const int64_t channel = permuted && transpose ? permutation[place] : place;
            wrong += y[row * columns + channel] != expected(&args, row, place);
        }
    }
    CHECK(wrong == 0);
    CHECK(y[count] == 42);
    free(permutation);
    free(memory);
}

static void test_every_size(void)
{
    for (int64_t blocks = 1; blocks <= 3; blocks++) {
        for (int64_t size = 1; size <= 18; size++) {
            for (int way = 0; way < 4; way++) {
                test_size(blocks, size, way & 1, way & 2);
            }
        }
    }
}

static void test_nothing_to_do(void)
{
    float y[1] = {42}, matrices[9] = {0};
    struct fptq_rotate_blocks args = {.y = y, .x = y, .matrices = matrices, .rows = 0, .blocks = 1, .size = 3, .dtype = FPTQ_F32};
    CHECK(fptq_rotate_blocks(&args) == FPTQ_OK);
    args.rows = 2;
    args.blocks = 0;
    CHECK(fptq_rotate_blocks(&args) == FPTQ_OK);
    CHECK(y[0] == 42);
}

static void test_refusals(void)
{
    const float x[4] = {1, 2, 3, 4}, matrices[8] = {0, 1, 1, 0, 1, 0, 0, 1};
    int64_t permutation[4] = {3, 0, 2, 0};
    float y[4] = {42, 42, 42, 42};
    struct fptq_rotate_blocks args = {
        .y = y, .x = x, .matrices = matrices, .permutation = permutation, .rows = 1, .blocks = 2, .size = 2, .dtype = FPTQ_F32};
    CHECK_REFUSED(fptq_rotate_blocks(&args), "permutation[3] = 0 is outside of 0 .. 3 or stands there twice");
    permutation[3] = 4;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "permutation[3] = 4");
    permutation[3] = -1;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "permutation[3] = -1");
    permutation[3] = 1;
    args.rows = -1;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "rows = -1");
    args.rows = 1;
    args.blocks = -2;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "blocks = -2");
    args.blocks = 2;
    args.size = -3;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "size = -3");
    args.size = 2;
    args.dtype = 7;
    CHECK_REFUSED(fptq_rotate_blocks(&args), "dtype");
    for (int i = 0; i < 4; i++) {
        CHECK(y[i] == 42);
    }
    args.dtype = FPTQ_F32;
    CHECK(fptq_rotate_blocks(&args) == FPTQ_OK);
    const float turned[4] = {1, 4, 3, 2}; /* x in the order 3, 0, 2, 1: the first pair is swapped, the second stays */
    for (int i = 0; i < 4; i++) {
        CHECK(y[i] == turned[i]);
    }
}

int main(void)
{
    test_every_size();
    test_nothing_to_do();
    test_refusals();
    return report();
}
