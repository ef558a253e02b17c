/*
 * Chooses one table of kernels for the process and runs kernels from it. Compiled without any instruction-set flag, so that
 * it runs everywhere: the compiler's CPUID helper also asks the operating system (XGETBV) whether wide registers are saved.
 */
#include "dispatch.h"

#include <string.h>

#include "../ops/error.h"

/* Elements below which a second thread costs more than it brings. */
#define ELEMENTS_PER_THREAD 32768

extern fptq_kernel_table fptq_kernel_table_scalar;
#ifdef FPTQ_X86
extern fptq_kernel_table fptq_kernel_table_avx2, fptq_kernel_table_avx512;
#endif

static bool always(void)
{
    return true;
}

#ifdef FPTQ_X86
static bool has_avx2(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
}

static bool has_avx512(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

struct isa {
    const char *name, *needs;
    fptq_kernel_table *table;
    bool (*supported)(void);
};

/* Best first. */
static const struct isa isas[] = {
#ifdef FPTQ_X86
    {"avx512", "AVX-512 F, BW, DQ and VL", &fptq_kernel_table_avx512, has_avx512},
    {"avx2", "AVX2", &fptq_kernel_table_avx2, has_avx2},
#endif
    {"scalar", "nothing", &fptq_kernel_table_scalar, always},
};
enum { NUM_ISAS = sizeof isas / sizeof *isas };

static const struct isa *chosen = &isas[NUM_ISAS - 1];
static const char *reason = "no instruction set has been chosen yet";
static fptq_parallel_for parallel_for;

fptq_status fptq_select_isa(const char *name)
{
    for (int i = 0; i < NUM_ISAS; i++) {
        if (name && *name && strcmp(name, isas[i].name) != 0) {
            continue;
        }
        if (isas[i].supported()) {
            chosen = &isas[i];
            reason = name && *name ? "asked for by name" : "the best of those built that this processor runs";
            return FPTQ_OK;
        }
        if (name && *name) {
            return fptq_fail("instruction set %s: this processor lacks %s; choose another of %s", name, isas[i].needs,
                             fptq_isas_built());
        }
    }
    return fptq_fail("instruction set %s is not built; choose one of %s", name, fptq_isas_built());
}

const char *fptq_isa(void)
{
    return chosen->name;
}

const char *fptq_isa_reason(void)
{
    return reason;
}

const char *fptq_isas_built(void)
{
#ifdef FPTQ_X86
    return "avx512, avx2, scalar";
#else
    return "scalar";
#endif
}

const char *fptq_compiler(void)
{
#ifdef __clang__
    return "clang " __clang_version__;
#else
    return "gcc " __VERSION__;
#endif
}

void fptq_set_parallel_for(fptq_parallel_for function)
{
    parallel_for = function;
}

struct launch {
    fptq_kernel kernel;
    const void *args;
};

static void run_units(int64_t begin, int64_t end, void *context)
{
    const struct launch *launch = context;
    launch->kernel(begin, end, launch->args);
}

void fptq_launch(enum fptq_kernel_id kernel, int32_t dtype, int64_t units, int64_t cost, const void *args)
{
    struct launch launch = {.kernel = (*chosen->table)[kernel][dtype], .args = args};
    const int64_t grain = 1 + ELEMENTS_PER_THREAD / (cost > 0 ? cost : 1);
    if (units <= 0) {
        return;
    }
    if (!parallel_for || units <= grain || parallel_for(0, units, grain, run_units, &launch)) {
        run_units(0, units, &launch);
    }
}
