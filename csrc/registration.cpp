#include "schemas.h"

STABLE_TORCH_LIBRARY(prcl_fast_native, m) {
  m.def("cpu_isa() -> str");
  m.def("cuda_error() -> str");
  prcl::define_schemas(m);
}
