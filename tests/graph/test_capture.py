"""From a model to its graph, and the table of what is supported."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_mipin import LRP, InverseNetwork, check
from captum_mipin.errors import CaptureError, InputError, TrainingModeError
from captum_mipin.graph import capture as capture_module
from captum_mipin.graph.capture import capture
from captum_mipin.graph.modules import tree
from captum_mipin.graph.nodes import place
from captum_mipin.graph.signature import Signature, first_example
from captum_mipin.graph.subgraph import module_output

#: What torch says of a model that sets an attribute: the newest, and torch 2.9.
STATE = r"(seen.*assigned during export|attrs were created in the model.forward: \{'seen'\})"


class Wants(nn.Module):
    """Two inputs, a per-example tensor, a shared tensor and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(3, 5)
        self.relu = nn.ReLU()
        self.last = nn.Linear(5, 2)

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        scale: Tensor | None = None,
        shared: Tensor | None = None,
        k: float = 1.0,
    ) -> Tensor:
        h = self.relu(self.first(a) + self.second(b))
        if scale is not None:
            h = h * scale
        if shared is not None:
            h = h * shared
        return self.last(h * k)


def _values(model: nn.Module, inputs: tuple[Tensor, ...], extras: tuple[Any, ...] = ()) -> Tensor:
    """The captured graph's own output, run operation by operation."""
    captured = capture(model, inputs, extras)
    values = captured.values(model, inputs, extras)
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    (output,) = module.forward(
        *(values.get(node.name) for node in captured.graph.nodes if node.op == "placeholder")
    )
    return output


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("extras", ["none", "number", "per example", "shared"])
def test_the_graph_computes_what_the_model_does(batch: int, extras: str) -> None:
    model = Wants().eval()
    a, b = torch.randn(batch, 4), torch.randn(batch, 3)
    further: tuple[Any, ...] = {
        "none": (),
        "number": (None, None, 0.5),
        "per example": (torch.rand(batch, 5),),
        "shared": (None, torch.rand(5), 2),
    }[extras]
    assert torch.allclose(_values(model, (a, b), further), model(a, b, *further), atol=1e-6)


@pytest.mark.parametrize("batch", [4, 5, 6])
def test_a_shared_tensor_as_long_as_the_batch_is_still_shared(batch: int) -> None:
    model = Wants().eval()
    a, b, shared = torch.randn(batch, 4), torch.randn(batch, 3), torch.rand(5)
    captured = capture(model, (a, b), (None, shared), shared=True)
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    values = captured.values(model, (a, b), (None, shared))
    (output,) = module.forward(
        *(values[node.name] for node in captured.graph.nodes if node.op == "placeholder")
    )
    assert torch.allclose(output, model(a, b, None, shared), atol=1e-6)


def test_a_graph_captured_from_one_example_takes_any_batch() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).eval()
    captured = capture(model, (torch.randn(1, 1, 5, 5),))
    module = torch.fx.GraphModule(nn.Module(), captured.graph)
    for batch in (1, 2, 9):
        x = torch.randn(batch, 1, 5, 5)
        values = captured.values(model, (x,), ())
        (output,) = module.forward(
            *(values[node.name] for node in captured.graph.nodes if node.op == "placeholder")
        )
        assert torch.allclose(output, model(x), atol=1e-6)


def test_weights_are_read_as_they_are_at_each_call() -> None:
    model = nn.Linear(2, 2).eval()
    captured = capture(model, (torch.ones(1, 2),))
    shared = [source for source in captured.constants.values() if isinstance(source, str)]
    assert sorted(shared) == ["bias", "weight"]
    values = captured.values(model, (torch.ones(1, 2),), ())
    assert any(
        isinstance(v, Tensor) and v.data_ptr() == model.weight.data_ptr() for v in values.values()
    )


def test_signatures_tell_shapes_dtypes_and_further_arguments_apart_but_not_batches() -> None:
    x = torch.ones(2, 3)
    same = Signature.of((x,), ())
    assert Signature.of((torch.zeros(5, 3),), ()) == same
    assert Signature.from_json(same.to_json()) == same
    others = [
        ((torch.ones(2, 4),), ()),
        ((x.double(),), ()),
        ((x,), (1,)),
        ((x,), (2,)),
        ((x,), (None,)),
        ((x, x), ()),
        ((x,), (x,)),
    ]
    assert len({same, *(Signature.of(*other) for other in others)}) == len(others) + 1


def test_the_first_example_is_zeros_and_its_own_further_arguments() -> None:
    x, scale = torch.randn(4, 3), torch.arange(4.0)
    (zeros,), (first, k) = first_example((x,), (scale, 7), False)
    assert torch.equal(zeros, torch.zeros(1, 3))
    assert torch.equal(first, torch.zeros(1))
    assert k == 7


class _Odd(nn.Module):
    """Models that cannot be captured, by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.kind == "branch":
            return y if x.sum() > 0 else -y
        if self.kind == "buffer":
            self.calls += 1
        if self.kind == "attribute":
            self.seen = y
        if self.kind == "input":
            x.mul_(2)
        return {
            "pair": (y, y),
            "one-tuple": (y,),
            "dict": {"logits": y},
            "nothing": None,
            "number": 1.0,
        }.get(self.kind, y)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "branch",
            r"(?s)torch\.export cannot capture _Odd for inputs \(4, 3\) torch\.float32 on cpu.*"
            "must not depend on the data",
        ),
        ("buffer", r"writes to 'calls' while it runs"),
        ("input", r"writes to 'x' while it runs"),
        ("attribute", rf"(?s)torch\.export cannot capture _Odd.*{STATE}"),
        ("pair", r"returns a tuple, expected one tensor.*Wrap it"),
        ("one-tuple", r"expected one tensor.*Wrap it"),
        ("dict", r"expected one tensor.*Wrap it"),
        ("nothing", r"expected one tensor"),
        ("number", r"expected one tensor"),
    ],
)
def test_models_that_cannot_be_captured_are_refused_with_a_reason(
    untouched: Any, kind: str, message: str
) -> None:
    model, x = _Odd(kind).eval(), torch.randn(4, 3)
    with pytest.raises(CaptureError, match=message), untouched(model, x):
        capture(model, (x,))


def test_a_model_that_keeps_state_is_refused_also_where_warnings_are_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CaptureError, match=STATE):
            capture(_Odd("attribute").eval(), (torch.randn(4, 3),))


def test_functions_and_training_models_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"function, expected a torch\.nn\.Module.*Wrap a function"
    ):
        capture(lambda x: x, (torch.ones(1, 1),))  # type: ignore[arg-type]  # no module, on purpose
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout())).eval()
    model[1][0].train()
    with pytest.raises(
        TrainingModeError, match=r"training mode \(1 modules, the first is '1.0'\).*model\.eval\(\)"
    ):
        capture(model, (torch.ones(1, 2),))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "no input tensor"),
        (([1.0],), "input 0 is a list, expected a torch.Tensor"),
        ((torch.ones(2, 2, dtype=torch.long),), "dtype torch.int64, expected a floating dtype"),
        ((torch.ones(2, 2, dtype=torch.bool),), "dtype torch.bool, expected a floating dtype"),
        ((torch.ones(2, 2).to_sparse(),), "torch.sparse_coo, expected a dense tensor.*to_dense"),
        ((torch.tensor(1.0),), r"input 0 is empty: its shape is \(\)"),
        ((torch.ones(0, 2),), r"input 0 is empty: its shape is \(0, 2\)"),
        ((torch.ones(2, 0),), r"input 0 is empty: its shape is \(2, 0\)"),
        ((torch.ones(2, 2), torch.ones(3, 2)), "input 1 has 3 examples, input 0 has 2"),
    ],
)
def test_inputs_that_carry_no_signal_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(nn.Linear(2, 2).eval(), inputs)


def test_module_output_finds_a_layer_and_says_why_not() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 3), nn.Linear(3, 2), nn.ReLU()
            self.drop, self.idle = nn.Dropout(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.a(self.drop(self.relu(x)))))

    model = Reuse().eval()
    graph = capture(model, (torch.randn(2, 3),))
    names = {node.name: node for node in graph.graph.nodes}
    assert str(place(names[module_output(graph, model, model.a)])) == "a/linear"
    assert module_output(graph, model, model) == graph.output.name
    with pytest.raises(CaptureError, match="Linear is not a module of this Reuse"):
        module_output(graph, model, nn.Linear(3, 3))
    with pytest.raises(
        CaptureError,
        match=r"layer .relu. \(ReLU\) is called 2 times and has 2 outputs in the graph",
    ):
        module_output(graph, model, model.relu)
    for layer, name in ((model.drop, "drop"), (model.idle, "idle")):
        with pytest.raises(
            CaptureError,
            match=rf"layer '{name}'.*not called, or does nothing.*Name the module before it",
        ):
            module_output(graph, model, layer)


def test_check_lists_every_operation_with_what_becomes_of_it(untouched: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2), nn.Softmax(1)
    ).eval()
    x = torch.randn(2, 1, 5, 5)
    with untouched(model, x):
        report = check(model, x)
    assert [(row.path, row.status) for row in report.rows] == [
        ("0", "supported"),
        ("1", "supported"),
        ("2", "passes"),
        ("3", "supported"),
        ("4", "refused"),
    ]
    assert not report.ok
    assert [row.operation for row in report.refused] == ["aten.softmax.int"]
    lines = str(report).splitlines()
    assert len(lines) == 6
    assert all(row.operation in line for row, line in zip(report.rows, lines[1:], strict=True))


def test_check_may_begin_at_a_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.Linear(3, 2)).eval()
    assert not check(model, torch.ones(1, 3)).ok
    assert check(model, torch.ones(1, 3), layer=model[1]).ok


def test_check_takes_several_inputs_and_further_arguments() -> None:
    report = check(
        Wants().eval(), (torch.ones(2, 4), torch.ones(2, 3)), (torch.ones(2, 5), None, 3.0)
    )
    assert report.ok
    assert {"first", "second", "relu", "last", ""} == {row.path for row in report.rows}


class Hides(nn.Module):
    """Holds modules and a tensor in plain containers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)
        self.known, self.hidden, self.unused = (
            [self.last],
            {"a": [nn.Linear(4, 4)]},
            [nn.Linear(4, 4)],
        )
        self.factors = [torch.ones(2000)]
        self.uses = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden["a"][0](x) if self.uses else x
        return self.known[0](x) * self.factors[0][1000:1002]


def test_weights_that_nobody_would_see_change_are_refused() -> None:
    model = Hides().eval()
    capture(model, (torch.ones(2, 4),))
    model.uses = True
    with pytest.raises(
        CaptureError, match=r"a Linear in 'hidden' that is not registered.* nn.ModuleList"
    ):
        capture(nn.Sequential(model).eval()[0], (torch.ones(2, 4),))
    with pytest.raises(CaptureError, match=r"'0.hidden'"):
        capture(nn.Sequential(model).eval(), (torch.ones(2, 4),))


def test_a_tensor_in_a_list_that_changes_has_the_model_captured_again() -> None:
    model, x = Hides().eval(), torch.randn(20, 4)
    lrp = LRP(model)
    before = lrp.attribute(x, 0)
    model.factors[0][1000] = -3
    torch.testing.assert_close(lrp.attribute(x, 0), -3 * before)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (nn.utils.weight_norm, "WeightNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
        (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    ],
)
def test_weights_that_hooks_make_are_told_by_their_name(make: Any, name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), make(nn.Linear(3, 2))).eval()
    with pytest.raises(
        CaptureError,
        match=rf"module '2' computes its weight anew each time in a hook, {name}, "
        ".*parametrizations",
    ):
        check(model, torch.randn(2, 4))


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_what_torchscript_compiled_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch.jit.script(nn.Linear(3, 2))).eval()
    with pytest.raises(CaptureError, match="module '1' is compiled by TorchScript"):
        check(model, torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(4), torch.randn(4)])
    with pytest.raises(InputError, match="input 0 is a nested tensor"):
        check(nn.Linear(4, 3).eval(), nested)


def test_the_tree_of_modules_is_torchs_and_keeps_none_of_them() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), shared), shared, nn.ModuleDict({"a": nn.Linear(2, 1)})
    )
    model.register_module("none", None)
    assert tree(model) == list(model.named_modules(remove_duplicate=False))
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_weights_are_the_models_own_memory_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    values = capture(model, (torch.ones(1, 2),)).weights(model)
    found = {value.data_ptr() for value in values.values()}
    assert (
        {p.data_ptr() for p in model.parameters()}
        <= found
        <= {t.data_ptr() for t in model.state_dict().values()}
    )
    assert not any(value.requires_grad for value in values.values())


@pytest.mark.captured_anew
def test_all_methods_of_a_model_share_its_graph(monkeypatch):
    traced = []
    trace = capture_module.trace
    monkeypatch.setattr(
        capture_module, "trace", lambda *args, **named: traced.append(1) or trace(*args, **named)
    )
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(8, 4)
    check(model, x)
    InverseNetwork(model).fit(x, progress=False).source_signal(x, target=1)
    for _ in range(2):
        LRP(model).attribute(x[:3], target=0)
    assert len(traced) == 1
    model[0].weight.data.mul_(2)  # a graph holds no weights
    check(model, x)
    assert len(traced) == 1
    model[2] = nn.Linear(3, 5).eval()
    assert check(model, x).ok
    assert len(traced) == 2
    model[2].weight = nn.Parameter(torch.ones(7, 3))
    model[2].bias = nn.Parameter(torch.ones(7))
    assert LRP(model).attribute(x[:3], target=6).shape == (3, 4)
    assert len(traced) == 3


@pytest.mark.captured_anew
def test_a_graph_does_not_keep_its_model_alive():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    check(model, torch.randn(2, 4))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
