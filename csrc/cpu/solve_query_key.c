/*
 * solve_query_key: the rotation phi and scale s of every RoPE pair that minimize s^4 f_k(phi) + s^-4 f_q(phi).
 *
 *   f(phi) = sum of the fourth powers of the pair after a rotation by phi = c0 + c1 cos u + c2 sin u,  u = 4 phi, with
 *   c0 = 3/4 (m0 + 2 m2 + m4),  c1 = 1/4 (m0 - 6 m2 + m4),  c2 = m3 - m1,  m the pair's five moments (merge_query_key.c)
 *
 * For a given phi the best s has s^8 = f_q / f_k and leaves 2 sqrt(f_k f_q): phi minimizes the product f_k f_q, on a grid of
 * u, then by halving the interval around the best point where the slope of log f_k + log f_q changes its sign.
 * A pair that is all zero on either side is left alone: phi = 0, log s = 0. f > 0 otherwise, as |c1|, |c2| <= c0 / 3.
 * Everything is fp64, whatever the weights were: the four kernels that this file makes are the same, f64's is used.
 */
#ifndef STORAGE
#define FPTQ_FILE "solve_query_key.c"
#include <math.h>

#include "for_each_dtype.h"
#else

enum { LOCAL(GRID) = 256, LOCAL(HALVINGS) = 60 };

struct LOCAL(series) {
    double c0, c1, c2;
};

static inline struct LOCAL(series) LOCAL(series_of)(const double moments[5])
{
    return (struct LOCAL(series)){
        .c0 = 0.75 * (moments[0] + 2 * moments[2] + moments[4]),
        .c1 = 0.25 * (moments[0] - 6 * moments[2] + moments[4]),
        .c2 = moments[3] - moments[1],
    };
}

static inline double LOCAL(value)(struct LOCAL(series) f, double cosine, double sine)
{
    return f.c0 + f.c1 * cosine + f.c2 * sine;
}

/* d/du of log f_k + log f_q */
static inline double LOCAL(slope)(struct LOCAL(series) key, struct LOCAL(series) query, double u)
{
    const double cosine = cos(u), sine = sin(u);
    return (key.c2 * cosine - key.c1 * sine) / LOCAL(value)(key, cosine, sine) +
           (query.c2 * cosine - query.c1 * sine) / LOCAL(value)(query, cosine, sine);
}

void KERNEL(solve_query_key)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_solve_query_key *args = context;
    const double turn = 6.283185307179586, step = turn / LOCAL(GRID);
    double cosine[LOCAL(GRID)], sine[LOCAL(GRID)];
    for (int g = 0; g < LOCAL(GRID); g++) {
        cosine[g] = cos(g * step);
        sine[g] = sin(g * step);
    }
    for (int64_t pair = begin; pair < end; pair++) {
        struct LOCAL(series) key = LOCAL(series_of)(args->key + 5 * pair), query = LOCAL(series_of)(args->query + 5 * pair);
        args->angle[pair] = args->log_scale[pair] = 0;
        if (!(key.c0 > 0 && query.c0 > 0)) {
            continue;
        }
        int best = 0;
        double least = INFINITY;
        for (int g = 0; g < LOCAL(GRID); g++) {
            /* Divided by c0 first: moments are fourth powers, their product might leave the range of fp64. */
            const double product =
                LOCAL(value)(key, cosine[g], sine[g]) / key.c0 * (LOCAL(value)(query, cosine[g], sine[g]) / query.c0);
            if (product < least) {
                least = product;
                best = g;
            }
        }
        double low = (best - 1) * step, high = (best + 1) * step;
        for (int halving = 0; halving < LOCAL(HALVINGS); halving++) {
            const double middle = 0.5 * (low + high);
            if (LOCAL(slope)(key, query, middle) > 0) {
                high = middle;
            } else {
                low = middle;
            }
        }
        double u = 0.5 * (low + high);
        u = u < 0 ? u + turn : u;
        const double f_key = LOCAL(value)(key, cos(u), sin(u)), f_query = LOCAL(value)(query, cos(u), sin(u));
        args->angle[pair] = u / 4;
        args->log_scale[pair] = (log(f_query) - log(f_key)) / 8;
    }
}

#endif
