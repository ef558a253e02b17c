/* The whole C test harness: CHECK counts and names failures; a test program ends with `return report();`. */
#ifndef FPTQ_TESTS_CHECK_H
#define FPTQ_TESTS_CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/fptq.h"

static int checks, failures;

#define CHECK(condition)                                                   \
    do {                                                                   \
        checks++;                                                          \
        if (!(condition)) {                                                \
            failures++;                                                    \
            printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
        }                                                                  \
    } while (0)

/* The call must be refused with a message that contains `words`. */
#define CHECK_REFUSED(call, words)                       \
    do {                                                 \
        CHECK((call) == FPTQ_INVALID);                   \
        CHECK(strstr(fptq_last_error(), words) != NULL); \
    } while (0)

static inline int report(void)
{
    printf("%d checks, %d failures\n", checks, failures);
    return failures || !checks;
}

#endif
