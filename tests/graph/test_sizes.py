"""What the results of an export look like is what torch finds without the rules of the package."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from small import Function
from torch import Tensor, fx
from torch._subclasses import fake_impls
from torch.nn import functional as F

from captum_mipin.graph import exporting, sizes

aten = torch.ops.aten
NORM = torch.rand(4, 3)

#: Uses of an input (batch, 3, 4) by every rule, and by inputs that the rules leave to torch.
USES: dict[str, Callable[[Tensor], Tensor]] = {
    **{str(op): lambda x, op=op: op(x) for op in sizes._ELEMENTWISE if op is not aten.clamp_min},
    **{f"{op} in place": lambda x, op=op: op(x + 0) for op in sizes._IN_PLACE},
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "ELU with numbers": lambda x: F.elu(x, 0.5),
    "ReLU6": lambda x: F.relu6(x + 0, inplace=True),
    "lower bound": lambda x: x.clamp_min(0.5),
    "a bound that is a size": lambda x: x.clamp_min(x.shape[1]),
    "softmax": lambda x: x.softmax(1),
    "softmax of the last": lambda x: x.log_softmax(-1),
    "softmax in another dtype": lambda x: x.softmax(1, dtype=torch.float64),
    "sums": lambda x: x.cumsum(2),
    "sums in another dtype": lambda x: x.cumsum(-2, dtype=torch.float64),
    "sums of integers": lambda x: (x > 0).cumsum(1),
    "integers": lambda x: torch.relu((x * 5).long()),
    "exponentials of integers": lambda x: torch.exp((x * 5).long()),
    "of integers": lambda x: torch.sigmoid((x > 0).long()),
    "bfloat16": lambda x: torch.tanh(x.bfloat16()),
    "softmax of half precision": lambda x: x.half().softmax(1, dtype=torch.float32),
    "transposed": lambda x: torch.relu(x.transpose(1, 2)),
    "transposed, in place": lambda x: torch.relu_((x + 0).transpose(1, 2)),
    "a slice": lambda x: torch.tanh(x[:, :, ::2]),
    "one channel last": lambda x: torch.relu(
        x[:, :1, :, None].contiguous(memory_format=torch.channels_last)),
    "copies": lambda x: torch.relu(x[:, :1].expand(-1, 5, -1)),
    "batch norm": lambda x: F.batch_norm(x, *NORM[:2, :], *NORM[2:]),
    "batch norm without weights": lambda x: F.batch_norm(x, *NORM[:2]),
    "batch norm of rows": lambda x: F.batch_norm(x[:, :, 0], *NORM[:2]),
    "batch norm, transposed": lambda x: F.batch_norm(x.mT.contiguous().mT, *NORM[:2]),
    "batch norm of half precision": lambda x: F.batch_norm(x.half(), *NORM[:2]),
    "layer norm": lambda x: F.layer_norm(x, (4,), torch.ones(4), torch.zeros(4)),
    "layer norm of two dimensions": lambda x: F.layer_norm(x, (3, 4)),
    "layer norm of half precision": lambda x: F.layer_norm(x.bfloat16(), (4,)),
    "layer norm, transposed": lambda x: F.layer_norm(x.transpose(1, 2), (3,)),
    "linear": lambda x: F.linear(x, torch.ones(5, 4), torch.ones(5)),
    "linear of rows": lambda x: F.linear(x[:, 0], torch.ones(5, 4), torch.ones(5)),
    "addmm": lambda x: torch.addmm(torch.ones(5), x[:, 0], torch.ones(4, 5)),
    "addmm of one number": lambda x: torch.addmm(torch.ones(1), x[:, 0], torch.ones(4, 5)),
    "addmm of a matrix": lambda x: torch.addmm(x[:, 0], x[:, 1], torch.ones(4, 4)),
    "addmm with a factor": lambda x: torch.addmm(torch.ones(5), x[:, 0], torch.ones(4, 5), beta=2),
    "cat": lambda x: torch.cat([x, x[:, :2], x], 1),
    "cat of the last": lambda x: torch.cat([x, x], -1),
    "cat of the batch": lambda x: torch.cat([x, x]),
    "cat of other dtypes": lambda x: torch.cat([x, x.double()], 1),
    "cat, transposed": lambda x: torch.cat([x.transpose(1, 2), x.transpose(1, 2)], 1),
    "cat with nothing": lambda x: torch.cat([x[0], x.new_zeros(0)]) * x.sum((1, 2))[:, None, None],
}  # fmt: skip


#: Of each other rule, a use that it applies to.
PLAIN = (
    *(f"{operation} in place" for operation in sizes._IN_PLACE),
    "lower bound", "softmax", "softmax of the last", "sums", "batch norm", "layer norm", "linear",
    "cat of the last",
)  # fmt: skip


def written(graph: fx.Graph) -> list[Any]:
    """Return all operations of a graph with what their results look like."""

    def looks(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return [looks(one) for one in value]
        if not isinstance(value, Tensor):
            return str(value)
        return str(value.shape), str(value.stride()), value.dtype, value.device

    return [(str(n.target), str(n.args), str(n.kwargs), looks(n.meta["val"]))
            for n in graph.nodes if n.op != "output"]  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore:.*strides:UserWarning")
def test_results_look_as_torch_finds(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = torch.randn(2, 3, 4), []
    for rules in (sizes.quick_sizes, nullcontext):
        monkeypatch.setattr(exporting, "quick_sizes", rules)
        arguments, shapes = exporting.free_batch((x,), (), True)
        model = Function(lambda m, x: USES[use](x)).eval()
        program, graph, _ = exporting.export_graph(model, arguments, shapes, False)
        found.append((written(program.graph), written(graph), str(program.range_constraints)))
    assert found[0] == found[1]


def test_every_rule_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation has a use above that is not left to torch."""
    left = dict.fromkeys(sizes.RULES, 0)

    def count(operation: Any, rule: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            found = rule(*args, **named)
            left[operation] += found is not NotImplemented
            return found

        return sizes._or_torch(operation, run)

    plain = {op.default: rule for rule, ops in sizes._BY_RULE.items() for op in ops}
    monkeypatch.setattr(sizes, "RULES", {op: count(op, plain[op]) for op in sizes.RULES})
    for use in (*USES.keys() & {str(operation) for operation in sizes._ELEMENTWISE}, *PLAIN):
        model = Function(lambda m, x, use=use: USES[use](x)).eval()
        arguments = exporting.free_batch((torch.randn(2, 3, 4),), (), True)
        exporting.export_graph(model, *arguments, False)
    assert [str(operation) for operation in left if not left[operation]] == []


def test_torch_is_as_before() -> None:
    before = dict(fake_impls.get_fast_op_impls())
    with pytest.raises(KeyError), sizes.quick_sizes():
        assert fake_impls.get_fast_op_impls() != before
        raise KeyError
    assert fake_impls.get_fast_op_impls() == before
