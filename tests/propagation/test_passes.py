"""Each pass from a captured graph to a surrogate, on a small graph that is made by hand."""

import operator
from types import MappingProxyType

import pytest
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from captum_mipin.errors import CaptureError, RuleError, UnsupportedOperationError
from captum_mipin.graph.capture import CapturedGraph
from captum_mipin.graph.layout import Layout
from captum_mipin.graph.marks import marks, original, set_value, value_of
from captum_mipin.graph.nodes import operation
from captum_mipin.propagation.draft import Draft
from captum_mipin.propagation.passes import PASSES
from captum_mipin.propagation.runtime import source, step
from captum_mipin.rules import MIPIN, Passes

aten = torch.ops.aten


class Network:
    """A graph with its traced values; ``x`` is (batch, *shape)."""

    def __init__(self, *shape: int) -> None:
        self.graph, self.mode, self.weights = fx.Graph(), FakeTensorMode(shape_env=ShapeEnv()), []
        sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * len(shape)]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        example, name = torch.ones(3, *shape), ConstantSource("batch")
        value = self.mode.from_tensor(example, source=name, symbolic_context=context)
        self.x = self._placeholder("x", value)
        self.batch = str(value.shape[0])

    def _placeholder(self, name: str, value: torch.Tensor) -> fx.Node:
        *_, root = self.graph.find_nodes(op="placeholder") or [self.graph._root]
        with self.graph.inserting_after(root):  # placeholders come first
            node = self.graph.placeholder(name)
        set_value(node, value)
        return node

    def weight(self, *shape: int) -> fx.Node:
        value = self.mode.from_tensor(torch.ones(shape), static_shapes=True)
        self.weights.append(self._placeholder(f"w{len(self.weights)}", value))
        return self.weights[-1]

    def call(self, operation, *args, **kwargs) -> fx.Node:
        node = self.graph.call_function(operation, args, kwargs)
        with self.mode, enable_python_dispatcher():
            set_value(node, operation(*fx.map_arg(args, value_of), **fx.map_arg(kwargs, value_of)))
        return node

    def linear(self, x: fx.Node, outputs: int) -> fx.Node:
        return self.call(aten.linear.default, x, self.weight(outputs, value_of(x).shape[-1]))

    def draft(self, output: fx.Node, upto: str, start=None, rules=MIPIN, **options) -> "Drafted":
        """The draft after all passes up to this one."""
        constants = {node.name: torch.ones(tuple(value_of(node).shape)) for node in self.weights}
        arguments = (("x",), ("x",), output, self.batch, False)
        captured = CapturedGraph(self.graph, constants, *arguments)
        draft = Draft.of(captured, rules, start and (start.name,), **options)
        names = [one.__name__ for one in PASSES]
        for one in PASSES[: names.index(upto) + 1]:
            one(draft)
        return Drafted(draft)


class Drafted:
    """A draft, and its nodes found by those of the network."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.calls = [node for node in draft.graph.nodes if node.op == "call_function"]

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return next(one for one in self.draft.graph.nodes if marks(one).origin == node.name)

    def __contains__(self, node: fx.Node) -> bool:
        return any(marks(one).origin == node.name for one in self.draft.graph.nodes)

    def targets(self) -> list:
        return [node.target for node in self.calls]


def test_the_passes_and_their_order() -> None:
    assert [one.__name__ for one in PASSES] == [
        "mark_varying",
        "drop_unused",
        "write_numbers",
        "replace_complex",
        "replace_copies",
        "split_positions",
        "replace_bounds",
        "replace_squares",
        "fold_padding",
        "replace_constants",
        "write_masks",
        "write_slices",
        "replace_equivalents",
        "rewrite_constant_products",
        "write_layers",
        "join_biases",
        "join_calls",
        "join_slices",
        "write_splits",
        "join_elementwise",
        "write_sums",
        "join_biases",
        "spell",
        "divide_factors",
        "recognise_norms",
        "write_group_norms",
        "expand_variances",
        "rewrite_for_method",
        "mark_signal",
        "lay_out_beside",
        "lay_out_batch",
        "check_ends",
        "check_supported",
        "canonicalise",
        "find_channels",
        "cut_recordings",
        "move_constants_first",
        "place_steps",
    ]


def test_a_draft_is_a_copy_with_names() -> None:
    net = Network(4)
    twice = net.call(aten.relu.default, net.call(aten.relu.default, net.x))
    before = [(node.target, node.args) for node in net.graph.nodes]
    drafted = net.draft(twice, "place_steps")
    assert [(node.target, node.args) for node in net.graph.nodes] == before
    assert marks(net.x).key == ""
    keys = ["input x/input/fork", "(model)/relu", "(model)/relu#2"]
    assert list(drafted.draft.steps) == keys
    assert drafted.draft.starts == drafted.draft.inputs == (drafted[net.x],)


def test_what_follows_from_shapes_or_weights_alone_does_not_vary() -> None:
    net = Network(4)
    zeros = net.call(aten.zeros_like.default, net.x)
    y = net.linear(net.x, 4)
    drafted = net.draft(net.call(aten.add.Tensor, y, zeros), "mark_varying")
    varies = {node: marks(drafted[node]).varies for node in (net.x, y, zeros, net.weights[0])}
    assert varies == {net.x: True, y: True, zeros: False, net.weights[0]: False}


def test_what_the_output_does_not_need_is_dropped() -> None:
    net = Network(4)
    y, unused = net.call(aten.relu.default, net.x), net.call(aten.neg.default, net.x)
    drafted = net.draft(y, "drop_unused")
    assert y in drafted
    assert unused not in drafted


def test_a_clamp_between_tensors_is_two_bounds() -> None:
    net = Network(4)
    y = net.call(aten.clamp.Tensor, net.x, net.weight(4), max=net.weight(4))
    drafted = net.draft(net.call(aten.neg.default, y), "replace_bounds")
    low, high, _ = drafted.calls
    assert [low.target, high.target] == [aten.maximum.default, aten.minimum.default]
    assert [node.name for node in (*low.args, *high.args)] == ["x", "w0", "maximum_default", "w1"]
    assert {marks(low).key, marks(high).key} == {"(model)/clamp/min", "(model)/clamp/max"}


def test_a_product_with_itself_is_a_square() -> None:
    net = Network(4)
    product = net.call(aten.mul.Tensor, net.x, net.x)
    drafted = net.draft(net.call(aten.square.default, product), "replace_squares")
    assert drafted.targets() == [aten.pow.Tensor_Scalar] * 2
    assert [node.args for node in drafted.calls] == [(drafted[net.x], 2), (drafted[product], 2)]


def test_complex_values_become_their_parts() -> None:
    net = Network(4)
    spectrum = net.call(aten.fft_rfft.default, net.x)
    turned = net.call(aten.mul.Tensor, spectrum, 1j)
    drafted = net.draft(net.call(aten.abs.default, turned), "replace_complex")
    assert not any(value_of(node).is_complex() for node in drafted.calls)
    layer = next(node for node in drafted.calls if operation(node) == "linear")
    assert layer.args[0].args[0] is drafted[net.x] and tuple(value_of(layer).shape[1:]) == (6,)
    assert (original(layer), marks(layer).added) == (aten.fft_rfft.default, False)
    assert operation(drafted.calls[-2]) == "linalg_vector_norm"


def test_a_variance_that_is_a_feature_is_written_out() -> None:
    net = Network(5, 4)
    variance = net.call(aten.var.correction, net.x, [1], correction=1)
    drafted = net.draft(variance, "expand_variances")
    names = ["mean", "sub", "pow", "mean", "mul", "alias"]
    assert [operation(node) for node in drafted.calls] == names
    assert drafted.calls[-2].args[1] == 5 / 4


def test_zeros_around_an_input_are_padding() -> None:
    net = Network(3, 6, 7)
    zeros = net.call(aten.pad.default, net.x, [2, 2, 1, 1])
    y = net.call(aten.conv2d.default, zeros, net.weight(4, 3, 3, 3), None, [2, 1])
    drafted = net.draft(y, "fold_padding")
    assert zeros not in drafted
    assert drafted[y].args[0] is drafted[net.x]
    assert drafted[y].args[2:] == (None, [2, 1], [1, 2])


def test_products_ratios_and_sums_take_one_form() -> None:
    net = Network(5, 4)
    weights = net.call(aten.softmax.int, net.x, 1)
    pooled = net.call(aten.sum.dim_IntList, net.call(aten.mul.Tensor, weights, net.x), [1])
    length = net.call(aten.linalg_vector_norm.default, pooled, 2, [1], True)
    ratio = net.call(aten.div.Tensor, pooled, length)
    stack = net.call(aten.stack.default, [pooled, ratio])
    drafted = net.draft(net.call(aten.sum.dim_IntList, stack, [0]), "spell")
    names = ["softmax", "weighted_sum", "linalg_vector_norm", "divided", "add", "alias"]
    assert [operation(node) for node in drafted.calls] == names
    assert original(drafted[pooled]) is aten.sum.dim_IntList
    gates = {node: marks(drafted[node]).gates for node in (net.x, weights, pooled, length, ratio)}
    assert gates == {net.x: 0, weights: 1, pooled: 0, length: 1, ratio: 0}


def test_norms_by_hand_are_named() -> None:
    net = Network(4)
    centred = net.call(aten.sub.Tensor, net.x, net.call(aten.mean.dim, net.x, [1], True))
    square = net.call(aten.mean.dim, net.call(aten.mul.Tensor, centred, centred), [1], True)
    root = net.call(aten.sqrt.default, net.call(aten.add.Tensor, square, 1e-3))
    ratio = net.call(aten.div.Tensor, centred, root)
    scaled = net.call(aten.mul.Tensor, ratio, net.weight(4))
    drafted = net.draft(scaled, "recognise_norms")
    *_, norm = drafted.calls
    assert norm.target is aten.layer_norm.default
    assert norm.args[0] is drafted[net.x]
    assert norm.args[1:2] + norm.args[3:] == ([4], None, 1e-3)
    assert original(norm) is aten.div.Tensor


def test_a_dense_layer_on_averages_is_joined_with_them() -> None:
    net = Network(4, 5, 5)
    mean = net.call(aten.mean.dim, net.x, [2, 3])
    y = net.linear(mean, 2)
    drafted = net.draft(y, "rewrite_for_method")
    joined = drafted[y]
    assert str(joined.target) == "captum_mipin.pooled_linear.default"
    assert original(joined) is aten.linear.default
    weight = drafted[net.weights[0]]
    assert joined.args == (drafted[net.x], drafted[mean], weight, None, 1, 1, None)
    assert marks(drafted[mean]).joined


def test_a_method_rewrites_the_graph_itself() -> None:
    class Table(dict):
        def rewrite(self, *arguments):
            self.arguments = arguments

    net, rules = Network(4), Table(MIPIN)
    drafted = net.draft(net.linear(net.x, 2), "rewrite_for_method", rules=rules)
    draft = drafted.draft
    assert rules.arguments == (draft.graph, net.batch, draft.starts)


def test_signal_recordings_and_other_dtypes_are_told_apart() -> None:
    net = Network(4)
    value, gate = net.linear(net.x, 4), net.call(aten.sigmoid.default, net.linear(net.x, 4))
    whole = net.call(aten._to_copy.default, value, dtype=torch.int64)
    back = net.call(aten._to_copy.default, whole, dtype=torch.float32)
    y = net.call(aten.add.Tensor, net.call(aten.mul.Tensor, value, gate), back)
    drafted = net.draft(y, "mark_signal")
    kinds = {
        node: [k for k in ("signal", "recorded", "discrete") if getattr(marks(drafted[node]), k)]
        for node in (net.x, value, gate, whole, back, y, net.weights[0])
    }
    assert kinds == {
        net.x: ["signal"],
        value: ["signal"],
        gate: ["recorded"],
        whole: ["discrete"],
        back: ["signal"],
        y: ["signal"],
        net.weights[0]: [],
    }


def test_nothing_below_a_layer_depends_on_it() -> None:
    net = Network(4)
    below = net.linear(net.x, 4)
    layer = net.call(aten.relu.default, below)
    drafted = net.draft(net.linear(layer, 2), "mark_signal", start=layer)
    assert [marks(drafted[node]).depends for node in (net.x, below, layer)] == [False, False, True]
    assert marks(drafted[below]).varies


def test_carriers_that_are_no_arguments_are_refused() -> None:
    wrong = Passes(note="wrong", carriers=lambda node: (3,))
    rules = MappingProxyType({**MIPIN, "aten.relu.default": wrong})
    net = Network(4)
    with pytest.raises(
        RuleError, match=r"carriers of the rule of .*relu returns \(3,\), expected a tuple"
    ):
        net.draft(net.call(aten.relu.default, net.x), "mark_signal", rules=rules)


def test_examples_are_followed_through_the_dimensions() -> None:
    net = Network(4, 6)
    turned = net.call(aten.permute.default, net.x, [1, 0, 2])
    outside = net.call(aten.reshape.default, net.x, [-1, 6])
    inside = net.call(aten.reshape.default, turned, [-1, 6])
    mixed = net.call(aten.softmax.int, net.x, 0)
    total = net.call(aten.add.Tensor, outside, inside)
    parts = [net.call(aten.sum.default, node) for node in (total, mixed)]
    drafted = net.draft(net.call(aten.add.Tensor, *parts), "lay_out_batch")
    assert marks(drafted[turned]).layout == Layout(1)
    assert marks(drafted[outside]).layout == Layout(0, 1, 4)
    assert marks(drafted[inside]).layout == Layout(0, 4, 1)
    assert "computes along the batch" in marks(drafted[mixed]).mixes
    assert "different orders" in marks(drafted[total]).mixes


def test_ends_without_signal_or_with_the_batch_elsewhere_are_refused() -> None:
    net = Network(4)
    weight = net.weight(4)
    with pytest.raises(CaptureError, match="output does not depend on x, so nothing"):
        net.draft(net.call(aten.relu.default, weight), "check_ends")
    gate = net.call(aten.sigmoid.default, net.x)
    with pytest.raises(CaptureError, match="uses x only for gates"):
        chosen = net.call(aten.gt.Scalar, gate, 0.5)
        net.draft(net.call(aten.where.ScalarOther, chosen, weight, 0.0), "check_ends")
    turned = net.call(aten.permute.default, net.x, [1, 0])
    with pytest.raises(CaptureError, match=r"output has shape \(4, batch\), expected the batch"):
        net.draft(turned, "check_ends")
    flat = net.call(aten.reshape.default, net.x, [-1])
    with pytest.raises(CaptureError, match=r"reshape has shape \(4\*batch,\), expected the batch"):
        net.draft(net.call(aten.reshape.default, flat, [-1, 4]), "check_ends", start=flat)


def test_operations_without_a_rule_are_refused_by_name() -> None:
    net = Network(4)
    with pytest.raises(UnsupportedOperationError, match=r"aten.softmax.int in the model itself"):
        net.draft(net.call(aten.softmax.int, net.x, 1), "check_supported")


def test_copies_go_and_equal_rearrangements_are_one() -> None:
    net = Network(4, 6)
    copied = net.call(aten.clone.default, net.x)
    first = net.call(aten.permute.default, copied, [0, 2, 1])
    second = net.call(aten.transpose.int, net.x, 1, 2)
    drafted = net.draft(net.call(aten.add.Tensor, first, second), "canonicalise")
    assert drafted.targets() == [aten.permute.default, aten.add.Tensor]
    assert drafted[first].args[0] is drafted[net.x]
    assert drafted.draft.output.args == (drafted[first], drafted[first])


def test_dense_layers_come_before_transpositions_of_other_dimensions() -> None:
    net = Network(4, 6, 5)
    turned = net.call(aten.permute.default, net.x, [0, 2, 1, 3])
    y = net.linear(turned, 2)
    drafted = net.draft(y, "canonicalise")
    assert drafted.targets() == [aten.linear.default, aten.permute.default]
    assert list(value_of(drafted.calls[0]).shape[1:]) == [4, 6, 2]
    assert list(value_of(drafted.draft.output).shape[1:]) == [6, 4, 2]


@pytest.mark.parametrize(("made", "targets"), [(aten.stack, []), (aten.cat, [aten.select.int])])
def test_of_stacked_tensors_one_is_picked(made, targets: list) -> None:
    net = Network(4)
    other = net.call(aten.neg.default, net.x)
    parts = [other, net.call(aten.relu.default, net.x)]
    if made is aten.cat:
        parts = [net.call(aten.unsqueeze.default, part, 1) for part in parts]
    picked = net.call(aten.select.int, net.call(made.default, parts, 1), 1, 1)
    drafted = net.draft(picked, "canonicalise")
    assert other not in drafted
    assert drafted.targets()[-1] is (targets or [aten.relu.default])[-1]
    assert made.default not in drafted.targets()


def test_what_only_a_dropped_operation_depends_on_is_refused() -> None:
    net = Network(4)
    layer = net.call(aten.relu.default, net.x)
    stacked = net.call(aten.stack.default, [layer, net.call(aten.neg.default, net.x)], 1)
    with pytest.raises(CaptureError, match="does not depend on"):
        net.draft(net.call(aten.select.int, stacked, 1, 1), "canonicalise", start=layer)


def test_the_nearest_operation_tells_where_channels_are() -> None:
    net = Network(4, 6)
    activated = net.call(aten.relu.default, net.x)
    tokens = net.linear(activated, 3)
    images = net.call(aten.conv1d.default, tokens, net.weight(2, 4, 1))
    drafted = net.draft(images, "find_channels")
    channels = [marks(drafted[node]).channels for node in (net.x, activated, tokens, images)]
    assert channels == [2, 2, 1, 1]


def test_gates_get_no_signal() -> None:
    net = Network(4)
    gate = net.call(aten.softmax.int, net.x, 1)
    y = net.call(aten.mul.Tensor, net.x, gate)
    drafted = net.draft(y, "cut_recordings")
    (cut,) = drafted[gate].all_input_nodes
    assert cut.target is aten.detach.default
    assert cut.args == (drafted[net.x],)
    assert not marks(cut).signal
    assert drafted[y].args == (drafted[net.x], drafted[gate])


def test_constants_are_computed_first() -> None:
    net = Network(4)
    activated = net.call(aten.relu.default, net.x)
    weight = net.call(aten.neg.default, net.weight(2, 4))
    y = net.call(aten.linear.default, activated, weight)
    drafted = net.draft(y, "move_constants_first")
    order = [node for node in drafted.draft.graph.nodes if node.op == "call_function"]
    assert order == [drafted[node] for node in (weight, activated, y)]
    assert marks(drafted[weight]).constant


def test_operations_with_rules_become_steps() -> None:
    net = Network(4)
    y = net.linear(net.call(aten.relu.default, net.x), 2)
    draft = net.draft(y, "place_steps").draft
    run, x, weight, start, relu, linear, _ = draft.graph.nodes
    assert (start.target, start.args) == (source, (run, 0, x))
    assert (relu.target, relu.args) == (step, (run, "(model)/relu", start))
    assert (linear.target, linear.args) == (step, (run, "(model)/linear", relu, weight))
    assert list(draft.steps) == ["(model)/relu", "(model)/linear"]


@pytest.mark.parametrize("joint", [True, False])
def test_a_tensor_with_several_branches_has_a_fork(joint: bool) -> None:
    net = Network(4)
    h = net.call(aten.relu.default, net.x)
    y = net.call(aten.add.Tensor, net.linear(h, 4), h)
    drafted = net.draft(y, "place_steps", joint=joint)
    draft = drafted.draft
    if not joint:
        assert list(draft.steps) == ["(model)/relu", "(model)/linear"]
        return
    assert list(draft.steps) == ["(model)/relu", "(model)/relu/fork"]
    parts = [n for n in draft.graph.nodes if n.target is operator.getitem]
    assert draft.output.args == tuple(parts)
    fork = draft.steps["(model)/relu/fork"].operation
    assert (fork.operations, fork.plain, fork.dim) == ((aten.linear.default,), 1, 1)


def test_a_start_without_scale_is_calibrated_or_refused() -> None:
    net = Network(4)
    y = net.linear(net.call(aten.mul.Tensor, net.x, 2.0), 2)
    draft = net.draft(y, "place_steps").draft
    assert "input x/input/fork" in draft.steps
    with pytest.raises(CaptureError, match="at input x/input is known only up to a factor"):
        net.draft(y, "place_steps", calibrate=False)
