/*
 * The Hadamard matrices that transforms are made of, constructed on first use, verified (H H^T = n I) and kept.
 *
 *   Paley I     order q + 1,   q = p^e = 3 mod 4:  I + [[0, 1], [-1, Q]]
 *   Paley II    order 2 q + 2, q = p^e = 1 mod 4:  C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],  C = [[0, 1], [1, Q]]
 *   Williamson  order 4 n: [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]], four symmetric circulants whose
 *               squares add up to 4 n I; their first rows were found by a search and are the only data here
 *
 * Q[i, j] = chi(i - j), the quadratic character of GF(q): the even powers of a generator are the squares.
 * A size is a product of odd parts, each with the least power of two that makes it one of these orders, times 2^k (Sylvester).
 * Sources: Paley, J. Math. Phys. 12 (1933); Williamson, Duke Math. J. 11 (1944).
 */
#include "../fptq.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

/* Dense factors act on runs of 2^power neighbors; shorter runs than 2^4 must be gathered, which costs like an order of 24. */
enum { GATHER_POWER = 4, GATHER_COST = 24 };
enum { LARGEST_ORDER = 1024, LARGEST_PART = LARGEST_ORDER / 4, MAX_DEGREE = 10 };

/* Bit j of each mask, 1 <= j <= (n - 1) / 2: entries j and n - j of the first row are -1. */
static const struct {
    int order;
    uint32_t rows[4];
} williamson[] = {
    {23, {0x56, 0x2a6, 0x338, 0xe36}},
    {29, {0x396, 0xdca, 0x3848, 0x49ea}},
    {39, {0x4d6fc, 0x2bcdc, 0x5f724, 0xc62fa}},
    {43, {0x2450ce, 0x3cda1c, 0x342b28, 0x135e04}},
};
enum { NUM_WILLIAMSON = sizeof williamson / sizeof *williamson };

enum construction { NONE, PALEY_1, PALEY_2, WILLIAMSON };

/* q = p^e with an odd prime p: sets both and says so. */
static bool prime_power(int q, int *p, int *e)
{
    int prime = 3;
    while (prime * prime <= q && q % prime != 0) {
        prime += 2;
    }
    prime = q % prime == 0 ? prime : q;
    *p = prime;
    for (*e = 0; q % prime == 0; ++*e) {
        q /= prime;
    }
    return q == 1;
}

static enum construction construction_of(int64_t order)
{
    int p, e;
    if (order % 4 != 0 || order < 12 || order > LARGEST_ORDER) {
        return NONE;
    }
    if (prime_power((int)order - 1, &p, &e)) { /* order - 1 = 3 mod 4 */
        return PALEY_1;
    }
    if (order % 8 == 4 && prime_power((int)order / 2 - 1, &p, &e)) { /* order / 2 - 1 = 1 mod 4 */
        return PALEY_2;
    }
    for (int i = 0; i < NUM_WILLIAMSON; i++) {
        if (order == 4 * williamson[i].order) {
            return WILLIAMSON;
        }
    }
    return NONE;
}

/* Multiplies an element of GF(p)[x] / (x^e + tail) by x; elements are base-p digits, lowest first. */
static void times_x(int digits[MAX_DEGREE], const int tail[MAX_DEGREE], int p, int e)
{
    const int top = digits[e - 1];
    for (int k = e - 1; k >= 0; k--) {
        const int below = k > 0 ? digits[k - 1] : 0;
        digits[k] = (below + (p - tail[k]) * top) % p;
    }
}

/* character[element] = +1 for squares, -1 for the others, 0 for 0. Tries polynomials until x generates the whole field. */
static void quadratic_character(int8_t *character, int q, int p, int e)
{
    for (int polynomial = 0;; polynomial++) {
        int tail[MAX_DEGREE], digits[MAX_DEGREE] = {1}, length = 0;
        for (int k = 0, rest = polynomial; k < e; k++, rest /= p) {
            tail[k] = rest % p;
        }
        memset(character, 0, (size_t)q);
        for (; length < q - 1; length++) {
            int element = 0;
            for (int k = e - 1; k >= 0; k--) {
                element = element * p + digits[k];
            }
            if (element == 0 || character[element] != 0) {
                break; /* x is no generator: its powers repeat too early */
            }
            character[element] = length % 2 == 0 ? 1 : -1;
            times_x(digits, tail, p, e);
        }
        if (length == q - 1) {
            return;
        }
    }
}

static int difference(int i, int j, int p, int e)
{
    int result = 0;
    for (int k = 0, unit = 1; k < e; k++, unit *= p, i /= p, j /= p) {
        result += (i % p - j % p + p) % p * unit;
    }
    return result;
}

/* The core of both Paley matrices, [q + 1, q + 1]: 0 in the corner, a border of +1 (the column: `column`), and Q. */
static void bordered(int8_t *core, int q, int column)
{
    int8_t character[LARGEST_ORDER];
    int p, e;
    prime_power(q, &p, &e);
    quadratic_character(character, q, p, e);
    for (int i = 0; i <= q; i++) {
        for (int j = 0; j <= q; j++) {
            int value = i == 0 ? 1 : column;
            if (i > 0 && j > 0) {
                value = character[difference(i - 1, j - 1, p, e)];
            }
            core[i * (q + 1) + j] = (int8_t)(i + j == 0 ? 0 : value);
        }
    }
}

static void paley_1(int8_t *matrix, int order)
{
    bordered(matrix, order - 1, -1);
    for (int i = 0; i < order; i++) {
        matrix[i * order + i] = 1;
    }
}

static void paley_2(int8_t *matrix, int order)
{
    static const int8_t off_diagonal[2][2] = {{1, 1}, {1, -1}}, diagonal[2][2] = {{1, -1}, {-1, -1}};
    const int half = order / 2;
    /* The conference matrix is built in the last quarter; what is written below never overtakes what is still read. */
    int8_t *core = matrix + 3 * half * half;
    bordered(core, half - 1, 1);
    for (int i = 0; i < half; i++) {
        int8_t row[LARGEST_ORDER / 2];
        memcpy(row, core + i * half, (size_t)half);
        for (int j = 0; j < half; j++) {
            for (int u = 0; u < 2; u++) {
                for (int v = 0; v < 2; v++) {
                    matrix[(2 * i + u) * order + 2 * j + v] = (int8_t)(i == j ? diagonal[u][v] : row[j] * off_diagonal[u][v]);
                }
            }
        }
    }
}

static void williamson_matrix(int8_t *matrix, int order)
{
    static const int block[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
    static const int sign[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
    const int n = order / 4;
    int which = 0;
    while (williamson[which].order != n) {
        which++;
    }
    for (int i = 0; i < order; i++) {
        for (int j = 0; j < order; j++) {
            const int distance = (j % n - i % n + n) % n, folded = distance <= n / 2 ? distance : n - distance;
            const uint32_t mask = williamson[which].rows[block[i / n][j / n]];
            matrix[i * order + j] = (int8_t)(sign[i / n][j / n] * ((mask >> folded & 1) ? -1 : 1));
        }
    }
}

/* H H^T = order I, on rows packed into bits: two rows are orthogonal where they differ in half of their entries. */
static bool is_hadamard(const int8_t *matrix, int order)
{
    enum { WORDS = LARGEST_ORDER / 64 };
    uint64_t (*rows)[WORDS] = calloc((size_t)order, sizeof *rows);
    bool valid = rows != NULL;
    for (int i = 0; valid && i < order; i++) {
        for (int j = 0; j < order; j++) {
            valid = valid && (matrix[i * order + j] == 1 || matrix[i * order + j] == -1);
            rows[i][j / 64] |= (uint64_t)(matrix[i * order + j] < 0) << (j % 64);
        }
        for (int k = 0; k < i; k++) {
            int differences = 0;
            for (int word = 0; word < WORDS; word++) {
                differences += __builtin_popcountll(rows[i][word] ^ rows[k][word]);
            }
            valid = valid && differences == order / 2;
        }
    }
    free(rows);
    return valid;
}

/* The matrix of an order that construction_of knows; built once per process and never freed. */
static fptq_status factor(int order, const int8_t **out)
{
    static _Atomic(int8_t *) built[LARGEST_PART + 1];
    int8_t *matrix = atomic_load(&built[order / 4]);
    if (!matrix) {
        const int64_t bytes = (int64_t)order * order;
        matrix = malloc((size_t)bytes);
        if (!matrix) {
            return fptq_fail_memory("hadamard", bytes);
        }
        switch (construction_of(order)) {
        case PALEY_1:
            paley_1(matrix, order);
            break;
        case PALEY_2:
            paley_2(matrix, order);
            break;
        default:
            williamson_matrix(matrix, order);
        }
        if (!is_hadamard(matrix, order)) {
            free(matrix);
            return fptq_fail("hadamard: the constructed matrix of order %d failed its verification", order);
        }
        int8_t *expected = NULL;
        if (!atomic_compare_exchange_strong(&built[order / 4], &expected, matrix)) {
            free(matrix); /* another thread was quicker */
            matrix = expected;
        }
    }
    *out = matrix;
    return FPTQ_OK;
}

/* Splits `odd` into parts of at most `largest`, with `power` twos to spend; keeps the cheapest in `best`. */
static void search(int64_t odd, int64_t power, int64_t largest, int64_t cost, struct fptq_hadamard_plan *now,
                   struct fptq_hadamard_plan *best, int64_t *best_cost)
{
    if (cost >= *best_cost) {
        return;
    }
    if (odd == 1) {
        cost += now->num_factors > 0 && power < GATHER_POWER ? GATHER_COST : 0;
        if (cost < *best_cost) {
            now->power = power;
            *best = *now;
            *best_cost = cost;
        }
        return;
    }
    for (int64_t part = odd < largest ? odd : largest; part >= 3; part -= 2) {
        if (odd % part != 0 || now->num_factors == FPTQ_HADAMARD_MAX_FACTORS) {
            continue;
        }
        for (int64_t twos = 2; twos <= power && part << twos <= LARGEST_ORDER; twos++) {
            if (construction_of(part << twos) != NONE) { /* more twos are cheaper as Sylvester's */
                now->order[now->num_factors++] = part << twos;
                search(odd / part, power - twos, part, cost + (part << twos), now, best, best_cost);
                now->num_factors--;
                break;
            }
        }
    }
}

static bool find_plan(int64_t size, struct fptq_hadamard_plan *plan)
{
    struct fptq_hadamard_plan now = {0};
    int64_t best_cost = INT64_MAX, power = 0;
    if (size < 1) {
        return false;
    }
    for (; size % 2 == 0; size /= 2) {
        power++;
    }
    search(size, power, LARGEST_PART - 1, 0, &now, plan, &best_cost);
    return best_cost < INT64_MAX;
}

bool fptq_hadamard_exists(int64_t size)
{
    struct fptq_hadamard_plan plan;
    return find_plan(size, &plan);
}

fptq_status fptq_hadamard_plan_of(int64_t size, struct fptq_hadamard_plan *plan)
{
    if (size < 1 || size > (int64_t)1 << 40) {
        return fptq_fail("hadamard: size %lld must be between 1 and 2^40", (long long)size);
    }
    if (!find_plan(size, plan)) {
        int64_t below = size, above = size, divisor = size < 1 << 20 ? size : 1 << 20;
        while (!fptq_hadamard_exists(below)) {
            below--;
        }
        while (!fptq_hadamard_exists(above)) {
            above++;
        }
        do {
            divisor--;
        } while (size % divisor != 0 || !fptq_hadamard_exists(divisor));
        return fptq_fail("hadamard: no Hadamard matrix of size %lld can be constructed; the nearest possible sizes are %lld "
                         "and %lld, and block_size = %lld divides %lld",
                         (long long)size, (long long)below, (long long)above, (long long)divisor, (long long)size);
    }
    for (int64_t i = 0; i < plan->num_factors; i++) {
        FPTQ_TRY(factor((int)plan->order[i], &plan->matrix[i]));
    }
    return FPTQ_OK;
}
