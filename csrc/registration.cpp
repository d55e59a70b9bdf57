// Schemas of the two queries about the machine. Those of all other native ops are the schemas of the Python
// ops, and prcl_fast/ops/registry.py defines them.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(prcl_fast_native, m) {
  m.def("cpu_isa() -> str");
  m.def("cuda_error() -> str");
}
