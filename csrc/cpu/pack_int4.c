/*
 * pack_int4, unpack_int4: byte[r, c] = nibble(q[r, 2c]) + 16 nibble(q[r, 2c + 1]), nibbles in two's complement.
 *
 * Layout: q is [rows, columns] int8, packed [rows, (columns + 1) / 2] uint8; a missing odd column is packed as 0. One unit is
 * one row. Bytes have no floating dtype: the four kernels that this file makes are the same, the operator asks for f32's.
 */
#ifndef STORAGE
#define FPTQ_FILE "pack_int4.c"
#include "for_each_dtype.h"
#else

void KERNEL(pack_int4)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_pack_int4 *args = context;
    const int64_t columns = args->columns, pairs = columns / 2, bytes = (columns + 1) / 2;
    const int least = args->is_signed ? -8 : 0;
    int outside = 0; /* has bits beyond the lowest four where a value does not fit */
    for (int64_t r = begin; r < end; r++) {
        const int8_t *restrict q_row = args->q + r * columns;    /* q[r, :] */
        uint8_t *restrict packed_row = args->packed + r * bytes; /* packed[r, :] */
        for (int64_t c = 0; c < pairs; c++) {
            const int low = q_row[2 * c], high = q_row[2 * c + 1];
            outside |= (low - least) | (high - least);
            packed_row[c] = (uint8_t)((low & 15) | (high & 15) << 4);
        }
        if (columns % 2) {
            outside |= q_row[columns - 1] - least;
            packed_row[pairs] = (uint8_t)(q_row[columns - 1] & 15);
        }
    }
    if (outside & ~15) {
        *args->out_of_range = true; /* the only value ever written: threads may race to write it */
    }
}

void KERNEL(unpack_int4)(int64_t begin, int64_t end, const void *context)
{
    const struct fptq_unpack_int4 *args = context;
    const int64_t columns = args->columns, pairs = columns / 2, bytes = (columns + 1) / 2;
    const int sign = args->is_signed ? 8 : 0; /* (n ^ 8) - 8 extends the sign of a nibble, (n ^ 0) - 0 keeps it */
    for (int64_t r = begin; r < end; r++) {
        const uint8_t *restrict packed_row = args->packed + r * bytes; /* packed[r, :] */
        int8_t *restrict q_row = args->q + r * columns;                /* q[r, :] */
        for (int64_t c = 0; c < pairs; c++) {
            q_row[2 * c] = (int8_t)(((packed_row[c] & 15) ^ sign) - sign);
            q_row[2 * c + 1] = (int8_t)(((packed_row[c] >> 4) ^ sign) - sign);
        }
        if (columns % 2) {
            q_row[columns - 1] = (int8_t)(((packed_row[pairs] & 15) ^ sign) - sign);
        }
    }
}

#endif
