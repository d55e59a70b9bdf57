// Every native op's schema, once. The implementations register themselves: csrc/cpu/*.cpp in the same
// library, csrc/cuda/*.cu in the second one. These are raw: argument checks, autograd and fake kernels live
// in prcl_fast/ops.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(prcl_fast_native, m) {
  m.def("cpu_isa() -> str");
  m.def("cuda_error() -> str");
  m.def("mutual_likelihood_score(Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, bool mean) -> Tensor");
  m.def(
      "mutual_likelihood_score_backward(Tensor grad, Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, "
      "bool mean, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor, Tensor)");
}
