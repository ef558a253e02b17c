/* Names of kernels: fptq_<isa>_<kernel>_<dtype>. FPTQ_ISA comes from the build, one value per static library. */
#ifndef FPTQ_CPU_NAMES_H
#define FPTQ_CPU_NAMES_H

#ifndef FPTQ_ISA
#define FPTQ_ISA scalar
#endif
#define FPTQ_PASTE3(isa, name, dtype) fptq_##isa##_##name##_##dtype
#define FPTQ_PASTE2(isa, name, dtype) FPTQ_PASTE3(isa, name, dtype)
#define FPTQ_PASTE(name, dtype) FPTQ_PASTE2(FPTQ_ISA, name, dtype)
#define FPTQ_TABLE2(isa) fptq_kernel_table_##isa
#define FPTQ_TABLE1(isa) FPTQ_TABLE2(isa)
#define FPTQ_TABLE FPTQ_TABLE1(FPTQ_ISA)

#endif
