/* Compares every libtorch function declared in csrc/torch/bind.h with the installed PyTorch's own headers; compiling is the test. */
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

/* The opaque handles are the same types under PyTorch's names; the table's name would clash with the namespace. */
#define tensor_opaque AtenTensorOpaque
#define library_opaque TorchLibraryOpaque
#define torch fptq_torch_table
#include "../../csrc/torch/bind.h"
#undef torch

#define COMPARE(ret, name, params) \
    static_assert(std::is_same_v<decltype(&::name), ret(*) params>, #name " is declared otherwise in PyTorch's headers");
TORCH_FUNCTIONS(COMPARE)
