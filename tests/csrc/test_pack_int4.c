/* pack_int4 and unpack_int4 in C: every pair of values, every width, and what is refused. */
#include "check.h"

static void test_every_pair_comes_back(bool is_signed)
{
    const int least = is_signed ? -8 : 0;
    int8_t q[512], back[512];
    uint8_t packed[256];
    for (int pair = 0; pair < 256; pair++) {
        q[2 * pair] = (int8_t)(pair % 16 + least);
        q[2 * pair + 1] = (int8_t)(pair / 16 + least);
    }
    CHECK(fptq_pack_int4(&(struct fptq_pack_int4){.packed = packed, .q = q, .rows = 1, .columns = 512, .is_signed = is_signed}) ==
          FPTQ_OK);
    CHECK(fptq_unpack_int4(&(struct fptq_unpack_int4){
              .q = back, .packed = packed, .rows = 1, .columns = 512, .is_signed = is_signed}) == FPTQ_OK);
    CHECK(memcmp(q, back, sizeof q) == 0);
    for (int pair = 0; pair < 256; pair++) {
        CHECK((packed[pair] & 15) == (q[2 * pair] & 15) && packed[pair] >> 4 == (q[2 * pair + 1] & 15));
    }
}

static void test_every_width(void)
{
    for (int64_t columns = 0; columns <= 70; columns++) {
        const int64_t bytes = (columns + 1) / 2;
        int8_t *q = malloc((size_t)(3 * columns + 1)), *back = malloc((size_t)(3 * columns + 1));
        uint8_t *packed = malloc((size_t)(3 * bytes + 1));
        for (int64_t i = 0; i < 3 * columns; i++) {
            q[i] = (int8_t)(i * 7 % 16 - 8);
        }
        packed[3 * bytes] = 42;
        back[3 * columns] = 42;
        const struct fptq_pack_int4 pack = {.packed = packed, .q = q, .rows = 3, .columns = columns, .is_signed = true};
        CHECK(fptq_pack_int4(&pack) == FPTQ_OK);
        CHECK(fptq_unpack_int4(&(struct fptq_unpack_int4){
                  .q = back, .packed = packed, .rows = 3, .columns = columns, .is_signed = true}) == FPTQ_OK);
        CHECK(memcmp(q, back, (size_t)(3 * columns)) == 0);
        CHECK(packed[3 * bytes] == 42 && back[3 * columns] == 42);
        for (int64_t i = 0; i < 3 * columns; i++) { /* each place is looked at */
            const int8_t kept = q[i];
            q[i] = 8;
            CHECK_REFUSED(fptq_pack_int4(&pack), "outside -8..7");
            q[i] = kept;
        }
        free(q);
        free(back);
        free(packed);
    }
}

int main(void)
{
    test_every_pair_comes_back(true);
    test_every_pair_comes_back(false);
    test_every_width();
    struct fptq_unpack_int4 bad = {.rows = -1};
    CHECK_REFUSED(fptq_unpack_int4(&bad), "rows = -1");
    return report();
}
