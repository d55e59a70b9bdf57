// Every native op's schema, once. They are raw: argument checks, autograd and fake kernels live in
// prcl_fast/ops, whose docstrings say what the arguments mean.
#pragma once

#include <torch/csrc/stable/library.h>

namespace prcl {

template <class Library>
void define_schemas(Library& m) {
  m.def("mutual_likelihood_score(Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, bool mean) -> Tensor");
  m.def(
      "mutual_likelihood_score_backward(Tensor grad, Tensor mu_a, Tensor var_a, Tensor mu_b, Tensor var_b, "
      "bool mean, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "class_lists(Tensor label, Tensor valid, Tensor hard, int num_classes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prototype_statistics(Tensor mu, Tensor var, Tensor label, Tensor valid, Tensor? order, Tensor? start, "
      "int num_classes, bool with_norms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sample_anchors(Tensor order, Tensor start, int num_anchors, Tensor seed) -> Tensor");
  m.def("philox_normal(Tensor seed, int count, int purpose) -> Tensor");
  m.def(
      "sample_negatives(Tensor class_probability, Tensor order, Tensor start, int num_anchors, "
      "int num_negatives, Tensor seed) -> Tensor");
  m.def(
      "probabilistic_info_nce(Tensor mu, Tensor var, Tensor anchor_index, Tensor negative_index, "
      "Tensor positive_mean, Tensor positive_variance, Tensor positive_count, Tensor? virtual_mu, "
      "Tensor? virtual_var, Tensor? virtual_known, Tensor? class_factor, Tensor? inverse_norm, float tau, "
      "bool mean, bool normalize, bool needs_grad) -> (Tensor, Tensor, Tensor)");
  m.def(
      "probabilistic_info_nce_backward(Tensor grad_loss, Tensor grad_mu_rows, Tensor grad_var_rows, "
      "Tensor anchor_index, int batch, int height, int width, ScalarType mu_dtype, ScalarType var_dtype, "
      "bool mu_channels_last, bool var_channels_last) -> (Tensor, Tensor)");
  m.def("pseudo_label(Tensor logits, int height, int width, bool align_corners) -> (Tensor, Tensor)");
  m.def(
      "upsample_bilinear(Tensor x, int height, int width, bool align_corners, bool channels_last) -> Tensor");
  m.def(
      "upsample_bilinear_backward(Tensor grad, int height, int width, bool align_corners, "
      "bool channels_last) -> Tensor");
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "bool align_corners, bool mean, bool needs_grad) -> (Tensor, Tensor)");
  m.def("variance_head_moments(Tensor x) -> (Tensor, Tensor)");
  m.def(
      "variance_head(Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta, float eps, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "variance_head_backward_sums(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, "
      "Tensor beta, float eps) -> Tensor");
  m.def(
      "variance_head_backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor gamma, Tensor beta, "
      "Tensor? means, float eps) -> Tensor");
}

}  // namespace prcl
