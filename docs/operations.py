"""Write docs/operations.md, the table of all operations with a rule.

Run it by ``python docs/operations.py``.
"""

from pathlib import Path

import torch

from captum_mipin.rules import MIPIN, Passes
from captum_mipin.rules.linear_maps import COPIES, MIXES

TABLE = Path(__file__).with_name("operations.md")

#: Test that derives rules a second time → names of the operations with these rules.
TESTS = {
    "inverse/test_method.py::test_mlp_equals_oracle": "linear relu",
    "inverse/test_method.py::test_cnn_equals_oracle": "conv2d conv2d.padding",
    "inverse/test_method.py::test_convolution_equals_its_normal_equations": (
        "conv1d conv3d conv_transpose1d conv_transpose2d.input conv_transpose3d.input"
    ),
    "inverse/test_method.py::test_spelling_of_relu_does_not_matter": "clamp_min",
    "inverse/test_method.py::test_max_pooling_sends_the_signal_to_its_switches": (
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d"
    ),
    "inverse/test_method.py::test_average_pooling_sends_the_signal_by_shares_or_evenly": (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d"
    ),
    "inverse/test_method.py::test_shares_of_the_true_average_return_what_was_averaged": "mean.dim",
    "inverse/test_method.py::test_a_pooled_logit_goes_where_it_came_from_by_hand": (
        "captum_mipin.pooled_linear"
    ),
    "inverse/test_method.py::test_batch_norm_equals_the_layer_it_is_folded_into": (
        "_native_batch_norm_legit_no_training"
    ),
    "inverse/test_method.py::test_residual_branches_are_learned_together": "add.Tensor",
    "rules/test_activations.py::test_gates_are_the_share_let_through": (
        "relu6 hardtanh clamp silu gelu hardswish leaky_relu elu celu selu rrelu mish tanh "
        "sigmoid hardsigmoid softplus log_sigmoid"
    ),
    "rules/test_activations.py::test_spelling_of_an_activation_does_not_matter": (
        "_prelu_kernel threshold clamp_max where.ScalarSelf where.ScalarOther masked_fill.Scalar"
    ),
    "rules/test_activations.py::test_glu_is_the_product_with_its_gate": "glu",
    "rules/test_linear.py::test_products_with_constant_matrices_are_dense_layers": "mm addmm",
    "rules/test_selection.py::test_where_sends_each_signal_to_where_the_value_came_from_by_hand": (
        "where.self"
    ),
    "rules/test_selection.py::"
    "test_unpooling_sends_back_from_the_places_where_it_put_the_values_by_hand": (
        "max_unpool2d max_unpool3d"
    ),
    "rules/test_selection.py::"
    "test_a_quantile_sends_back_to_the_elements_that_it_lies_between_by_hand": (
        "quantile.scalar nanquantile.scalar"
    ),
    "rules/test_selection.py::test_maximum_is_a_switch_as_pooling_is": (
        "maximum minimum max.other min.other"
    ),
    "rules/test_normalization.py::test_rms_norm_restores_the_root_mean_square_it_divided_by": (
        "rms_norm"
    ),
    "rules/test_normalization.py::test_instance_norm_is_group_norm_by_channel_or_batch_norm": (
        "instance_norm"
    ),
    "rules/test_normalization.py::test_norms_restore_the_deviation_they_divided_by": (
        "layer_norm group_norm"
    ),
    "rules/test_activations.py::test_gate_of_squeeze_and_excite_by_hand": "mul.Tensor",
    "rules/test_attention.py::test_attention_sends_each_value_its_recorded_weight_by_hand": (
        "scaled_dot_product_attention"
    ),
    "rules/test_attention.py::test_spelling_of_attention_does_not_matter": "matmul bmm",
    "propagation/test_forms.py::test_spelling_of_a_weighted_sum_does_not_matter": (
        "captum_mipin.weighted_sum"
    ),
    "rules/test_products.py::test_a_divisor_is_recorded_as_a_scale_by_hand": "captum_mipin.divided",
}

#: The tests of operations that are not in ``TESTS``: of exact `Passes` rules, and of other rules.
MAPS = "rules/test_linear_maps.py::test_copies_and_mixtures_come_back_as_weighted_means"
SWITCHES = "rules/test_selection.py::test_a_selection_sends_back_to_the_position_it_chose_by_hand"
PASSES = "rules/test_operations.py::test_what_passes_exactly_gives_back_what_was_kept"
EVERY = "rules/test_operations.py::test_every_operation_carries_the_signal"

#: Reason → operations of ATen's core opset that have no rule for it.
REASONS = {
    "Recorded where it makes a gate, a condition, an index or attention weights": (
        "eq.Tensor eq.Scalar ne.Tensor ne.Scalar ge.Tensor ge.Scalar gt.Tensor gt.Scalar le.Tensor "
        "le.Scalar lt.Tensor lt.Scalar logical_and logical_or logical_not logical_xor isinf isnan "
        "any.dim any.dims bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_not "
        "argmax argmin _softmax exp log log2 log10 reciprocal rsqrt"
    ),
    "Refused: it rounds, or returns conditions or indices, through which no signal can be sent": (
        "ceil floor round trunc sign nonzero any bitwise_and.Scalar bitwise_or.Scalar "
        "bitwise_xor.Scalar div.Tensor_mode div.Scalar_mode fmod.Tensor fmod.Scalar "
        "remainder.Tensor remainder.Scalar _local_scalar_dense"
    ),
    "Refused: infinite at 0, so that no share of the input passes": "acosh",
    "Refused: it multiplies elements, or combines pairs of them, and which of them gets the signal "
    "is not defined": (
        "prod prod.dim_int pow.Tensor_Tensor pow.Scalar atan2 atan2.out _cdist_forward "
        "_pdist_forward _log_softmax"
    ),
    "Refused; most functions of `torch.fft`, and `torch.stft`, are replaced by dense layers and "
    "convolutions on real and imaginary parts": "_fft_c2r _fft_r2c",
    "Refused: it computes with all examples of the batch": (
        "mean masked_scatter _native_batch_norm_legit _native_batch_norm_legit.no_stats"
    ),
    "Refused: it works on memory, and not on values": "as_strided resize_",
    "Refused: random": "native_dropout rand randn randperm",
    "Without an argument that gets a signal: it makes constants, or takes integers": (
        "arange.start_step empty.memory_format empty_strided fill.Scalar full full_like "
        "scalar_tensor embedding _embedding_bag sym_numel sym_size.int sym_storage_offset "
        "sym_stride.int sym_is_contiguous"
    ),
    "Replaced by another operation, or a part of another operation, which has a rule": (
        "clamp.Tensor convolution copy native_group_norm native_layer_norm var.dim var.correction"
    ),
    "A part of training: it computes gradients": (
        "_adaptive_avg_pool2d_backward avg_pool2d_backward convolution_backward "
        "embedding_dense_backward max_pool2d_with_indices_backward native_group_norm_backward "
        "native_layer_norm_backward"
    ),
}

CORE = """
## Operations of ATen's core opset without a rule

All other operations with PyTorch's tag `core` are in the table above.

| | operations |
| --- | --- |
"""

HEADER = """# Operations

All operations with a rule, by the names of `torch.export`. The command
`python docs/operations.py` writes this page from the table of rules. A rule is *exact* if the paper
defines it or no other rule is possible: least squares, masks, and adjoints that return the input. A
rule is *decided* if it is one of several possible rules. The test in the last column derives the
rule a second time, or checks an identity that must hold. In addition,
`test_every_operation_carries_the_signal` fits and explains a network with each of PyTorch's
operations. The operations of `captum_mipin` are not PyTorch's. `pooled_linear` is a `linear` on
averages or sums over all positions; its inverse returns a value for each position. `elementwise`
is a function of a single tensor, element by element, that the model writes by hand, such as
x / (1 + |x|); a function with the values of a known activation, such as GELU by `tanh` and
products, has the rule of that activation. `divided` is a ratio whose divisor depends on the input,
and `weighted_sum` the sum of a product of two values of the input. A product with a constant
matrix or vector, on either side, is a `linear`, and so is a sum of products with constant weights.
Operations that only stand for others (`einsum`, `addcmul`, `addcdiv`, `baddbmm`, `lerp`, `aminmax`,
`cosine_similarity`, norms written by hand, sums of stacked tensors or of slices) are replaced by
those.

An operation that copies or mixes values, y = L x, sends back the mean over its outputs, weighted by
its coefficients: S_x = Lᵀ (S / |L| 1) / |L|ᵀ 1. `detach()` and `torch.no_grad()` change no value:
only gradients, Deconvnet and Guided Backprop stop there.

| operation | the signal | | test |
| --- | --- | --- | --- |
"""


def test_of(operation: str) -> str:
    """Return the name of the test that the page lists for an operation."""
    name, rule = operation.removeprefix("aten.").removesuffix(".default"), MIPIN[operation]
    for test, names in TESTS.items():
        if name in names.split():
            return test
    if operation in COPIES or operation in MIXES:
        return MAPS
    if rule.note.startswith("recorded switch"):
        return SWITCHES
    return PASSES if rule.exact and isinstance(rule, Passes) else EVERY


def text() -> str:
    """Return the text of the page, with one line per operation."""
    rows = (
        f"| `{name}` | {rule.note} | {'exact' if rule.exact else 'decided'} | `{test_of(name)}` |\n"
        for name, rule in MIPIN.items()
    )
    return (
        HEADER
        + "".join(rows)
        + CORE
        + "".join(
            f"| {reason} | {', '.join(f'`{name}`' for name in sorted(names.split()))} |\n"
            for reason, names in REASONS.items()
        )
    )


def without_rule() -> set[str]:
    """Return the operations of the installed PyTorch's core opset without a rule."""
    names = [name.split(".") for name in torch._C._dispatch_get_all_op_names()]
    operations = []
    for name, *overload in names:
        packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
        if name.startswith("aten::") and packet is not None:
            operations.append(getattr(packet, (*overload, "default")[0], None))
    tagged = {str(op) for op in operations if op is not None and torch.Tag.core in op.tags}
    return {name.removeprefix("aten.").removesuffix(".default") for name in tagged - MIPIN.keys()}


if __name__ == "__main__":
    TABLE.write_text(text())
