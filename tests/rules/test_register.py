"""Registered rules work as built-in ones do, and are safe where nothing else is known."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Function
from torch import Tensor, nn

from captum_mipin import InverseNetwork, MIPINError, check, register_rule
from captum_mipin.errors import FitError, ModelChangedError, RuleError, UnsupportedOperationError
from captum_mipin.propagation import surrogate as propagation
from captum_mipin.rules import Learned, Passes, Recorded, unregister_rule
from captum_mipin.rules.activations import gate
from captum_mipin.rules.linear import convolution, dense


def _operation(name: str, like: Callable[..., Tensor] = lambda x, *_: torch.empty_like(x)) -> Any:
    """Define an operation from a function; ``like`` makes its fake result of its input."""

    def define(function: Callable[..., Tensor]) -> Any:
        made = torch.library.custom_op(f"own::{name}", function, mutates_args=())
        made.register_fake(like)
        return made

    return define


@_operation("swish")
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@_operation("dense", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
def own_dense(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


@_operation("reverse")
def reverse(x: Tensor) -> Tensor:
    return x.flip(1)


reverse.register_autograd(lambda ctx, s: s.flip(1))


@_operation("sigmoid")
def own_sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


@_operation("cumsum")
def cumsum(x: Tensor) -> Tensor:
    return x.cumsum(0)


@_operation("turned", lambda x: x.new_empty(x.shape[1], x.shape[0]))
def turned(x: Tensor) -> Tensor:
    return x.T.clone()


@_operation("scaled")
def scaled(x: Tensor, by: Tensor) -> Tensor:
    return x * by


@_operation("steered", lambda by, x: torch.empty_like(x))
def steered(by: Tensor, x: Tensor) -> Tensor:
    return x * by


GATE = Recorded(run=gate, note="my gate")
HALF = Recorded(run=lambda options, operation, x: (operation(x), lambda s: s / 2), note="half")


class Steps(nn.Module):
    """A small network around a step."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.step = lambda h: step(h)  # an operation itself cannot be copied with its module

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.first(x)))


def _model(step: Callable[[Tensor], Tensor]) -> nn.Module:
    return Steps(step).double().eval()


def _fitted(step: Callable[[Tensor], Tensor]) -> InverseNetwork:
    return InverseNetwork(_model(step)).fit(_data(), progress=False)


def _data() -> Tensor:
    return torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """``register_rule``, undone at the end."""
    names: set[Any] = set()

    def register(operation: Any, rule: Any, **options: Any) -> None:
        register_rule(operation, rule, **options)
        names.add(operation)

    yield register
    for name in names:
        unregister_rule(name)


# -------------------------------------------------------------------------------- each kind of rule


@pytest.mark.parametrize(
    ("name", "rule", "step", "built_in"),
    [
        ("own::swish", GATE, swish, nn.functional.silu),
        ("own::reverse", Passes(note="adjoint"), reverse, lambda h: h.flip(1)),
        ("own::dense", Learned(inverter=dense, note="mine"), None, None),
    ],
)
def test_an_own_operation_is_inverted_as_the_built_in_one(
    register: Any, untouched: Any, name: str, rule: Any, step: Any, built_in: Any
) -> None:
    if step is None:
        weight = torch.randn(5, 5, dtype=torch.float64)
        step, built_in = (
            (lambda h: own_dense(h, weight)),
            (lambda h: nn.functional.linear(h, weight)),
        )
    register(name, rule)
    x, model = _data(), _model(step)
    (row,) = (row for row in check(model, x).rows if row.operation.startswith("own"))
    assert (row.status, row.note) == (
        "passes" if isinstance(rule, Passes) else "supported",
        rule.note,
    )
    with untouched(model, x):
        own = InverseNetwork(model).fit(x, progress=False)
        mixed = own.source_signal(x[:6], [0, 1, 1, 0, 1, 0])
    expected = _fitted(built_in).source_signal(x[:6], [0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)
    assert own.class_attribution(0).shape == (1, 4)


def test_carriers_and_records_of_an_own_operation(register: Any) -> None:
    """For h ⊙ by, where ``by`` depends on the input: refused, unless it is declared as recorded."""

    def run(options, operation, x, by):
        return operation(x, by), lambda s: s * by

    model = _model(lambda h: scaled(h, torch.sigmoid(h)))
    register("own::scaled", Recorded(run=run, note="times"))
    with pytest.raises(
        UnsupportedOperationError, match="a second argument of it depends on the input as well"
    ):
        InverseNetwork(model).fit(_data(), progress=False)
    register("own::scaled", Recorded(run=run, note="times", records=True), replace=True)
    result = InverseNetwork(model).fit(_data(), progress=False).source_signal(_data()[:5], 1)
    expected = _fitted(lambda h: h * torch.sigmoid(h)).source_signal(_data()[:5], 1)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def test_signal_through_another_argument_than_the_first(register: Any) -> None:
    weight = torch.rand(5, dtype=torch.float64)

    def run(options, operation, x, other):
        return operation(x, other), lambda s: s * other

    register("own::steered", Recorded(run=run, note="times", carriers=lambda node: (1,)))
    result = _fitted(lambda h: steered(weight, h)).source_signal(_data()[:5], 1)
    expected = _fitted(lambda h: weight * h).source_signal(_data()[:5], 1)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    register(
        "own::steered", Recorded(run=run, note="times", carriers=lambda node: (0, 1)), replace=True
    )
    with pytest.raises(
        UnsupportedOperationError,
        match="sends signal to several arguments or to none, which only Passes, or Recorded",
    ):
        _fitted(lambda h: steered(h, h))


@pytest.mark.parametrize(
    "name", ["aten::exp", "aten.exp", "aten.exp.default", torch.ops.aten.exp.default], ids=str
)
def test_an_operation_of_pytorch_by_any_of_its_names(register: Any, name: Any) -> None:
    model = _model(torch.exp)
    with pytest.raises(
        UnsupportedOperationError, match=r"(?s)aten\.exp\.default.*captum_mipin\.register_rule"
    ):
        InverseNetwork(model).fit(_data(), progress=False)
    register(name, GATE)
    signal = InverseNetwork(model).fit(_data(), progress=False).source_signal(_data()[:3], 0)
    assert torch.isfinite(signal).all()
    assert signal.any()


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("operation", "rule", "message"),
    [
        (
            "aten::relu",
            GATE,
            r"aten\.relu\.default has a built-in rule \(forward mask\), which cannot be "
            r"replaced.*custom_op",
        ),
        (torch.ops.aten.add.Tensor, GATE, r"aten\.add\.Tensor has a built-in rule"),
        ("aten::addcmul", GATE, r"no rule for aten\.addcmul\.default would ever be used"),
        ("aten::einsum", GATE, r"no rule for aten\.einsum\.default would ever be used"),
        ("aten::relu_", GATE, r"no rule for aten\.relu_\.default would ever be used"),
        ("own::swissh", GATE, r"there is no operation 'own::swissh': define or import it first"),
        ("swish", GATE, r"there is no operation 'swish'.*write 'namespace::name'"),
        ("aten::exp.nothing", GATE, r"there is no operation 'aten::exp.nothing'"),
        ("own::swish.default.more", GATE, r"there is no operation"),
        ("", GATE, r"there is no operation ''"),
        (swish, GATE, r"the operation is a CustomOpDef, expected 'namespace::name'"),
        (torch.sin, GATE, r"the operation is a builtin_function_or_method, expected"),
        (
            "own::swish",
            gate,
            r"the rule for own\.swish\.default is a function, "
            r"expected a Passes, Recorded or Learned",
        ),
    ],
)
def test_what_cannot_be_registered(operation: Any, rule: Any, message: str) -> None:
    for replace in (False, True):
        with pytest.raises(RuleError, match=message) as caught:
            register_rule(operation, rule, replace=replace)
        assert isinstance(caught.value, MIPINError)
    assert not check(_model(swish), _data()).ok


def test_registering_twice_takes_replace(register: Any) -> None:
    register("own::swish", GATE)
    with pytest.raises(RuleError, match=r"has a registered rule \(my gate\); pass replace=True"):
        register_rule(torch.ops.own.swish.default, HALF)
    assert [row.note for row in check(_model(swish), _data()).rows][1] == "my gate"
    register("own::swish", HALF, replace=True)
    assert [row.note for row in check(_model(swish), _data()).rows][1] == "half"


def test_taking_back_what_was_not_registered() -> None:
    for name in ("own::swish", "aten::relu"):
        with pytest.raises(RuleError, match="no rule is registered for"):
            unregister_rule(name)


def test_one_of_many_threads_registers_an_operation(register: Any) -> None:
    def attempt(number: int) -> bool:
        try:
            register("own::swish", Recorded(run=gate, note=str(number)))
        except RuleError:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(attempt, range(200))) == 1


# ---------------------------------------------------------------------------------------- the batch


def test_an_own_operation_that_mixes_examples_is_found(register: Any) -> None:
    register("own::cumsum", GATE)
    with pytest.raises(UnsupportedOperationError, match=r"own\.cumsum.* computes along the batch"):
        _fitted(cumsum)


def test_an_own_operation_that_moves_the_examples_is_refused(register: Any) -> None:
    register(
        "own::turned",
        Recorded(run=lambda options, operation, x: (operation(x), lambda s: s.T), note="turned"),
    )
    message = (
        r"own\.turned\.default .*takes the examples along dimension 0 and returns them along 1; "
        "a registered operation must not move them"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        _fitted(lambda h: turned(h).T)


def test_an_own_operation_is_not_taken_for_the_built_in_one_of_the_same_name(register: Any) -> None:
    register("own::sigmoid", GATE)
    model = Function(lambda m, x: m["last"](x * own_sigmoid(x)), last=nn.Linear(4, 2)).eval()
    (row,) = [row for row in check(model, torch.ones(2, 4)).rows if "mul" in row.operation]
    assert "neither factor is a gate" in row.caveat


# -------------------------------------------------------------------------------- rules that change


def test_an_inverse_goes_only_with_the_rules_it_was_fitted_with(
    register: Any, tmp_path: Path
) -> None:
    register("own::swish", GATE)
    inverse, x = _fitted(swish), _data()[:5]
    before = inverse.source_signal(x, 1)
    inverse.save(tmp_path / "file")

    def kept_and_loaded() -> Iterator[InverseNetwork]:
        yield from (inverse, InverseNetwork.load(tmp_path / "file", inverse.model))

    for other in (HALF, Passes(note="my gate")):
        register("own::swish", other, replace=True)
        for network in kept_and_loaded():
            with pytest.raises(ModelChangedError, match="a registered rule has changed, or an"):
                network.source_signal(x, 1)
    unregister_rule("own::swish")
    for network in kept_and_loaded():
        with pytest.raises(MIPINError):
            network.source_signal(x, 1)
    register("own::swish", Recorded(run=gate, note="my gate"))
    register("own::dense", GATE)  # another operation's rule is no matter
    for network in kept_and_loaded():
        assert torch.equal(network.source_signal(x, 1), before)


def test_examples_that_depend_on_their_neighbours_are_refused_by_the_data():
    @torch.library.custom_op("mipin_tests::pairs", mutates_args=())
    def pairs(x: torch.Tensor) -> torch.Tensor:
        return x + 0.5 * x.view(-1, 2, x.shape[1]).flip(1).reshape(x.shape)

    pairs.register_fake(torch.empty_like)
    register_rule(
        "mipin_tests::pairs",
        Recorded(run=lambda options, op, x: (op(x), lambda s: s), note="nothing"),
    )
    try:
        model = Function(
            lambda m, x: m["b"](pairs(m["a"](x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
        ).eval()
        with pytest.raises(FitError, match="other examples"):
            InverseNetwork(model).fit(torch.randn(60, 4), 0, progress=False)
    finally:
        unregister_rule("mipin_tests::pairs")


def test_what_is_learned_by_a_rule_of_ones_own_stays_apart_at_forks():
    """Beside a dense layer and the identity, on the same tensor."""

    @torch.library.custom_op("mipin_tests::filter", mutates_args=())
    def apart(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv1d(x, weight, padding=1)

    apart.register_fake(lambda x, weight: x.new_empty(x.shape))
    rule = Learned(
        inverter=lambda options, x, weight: convolution(options, x, weight, padding=1),
        note="a convolution",
    )
    register_rule("mipin_tests::filter", rule)
    torch.manual_seed(0)
    conv, x = (
        nn.Conv1d(4, 4, 3, padding=1, bias=False).double(),
        torch.randn(60, 4, 5, dtype=torch.float64),
    )
    parts = {"c": conv, "s": nn.Conv1d(4, 4, 1), "l": nn.Linear(5, 5), "o": nn.Linear(20, 3)}
    try:
        result = []
        for run in (
            lambda m, h: apart(h, m["c"].weight),
            lambda m, h: m["c"](h + 0),
        ):  # what adds something is apart as well
            model = Function(
                lambda m, x, run=run: m["o"](
                    (run(m, h := m["s"](x).relu()) + m["l"](h)).relu().flatten(1)
                ),
                **parts,
            )
            result.append(
                InverseNetwork(model.double().eval())
                .fit(x, 0, progress=False)
                .source_signal(x[:5], 0)
            )
        torch.testing.assert_close(result[0], result[1])
    finally:
        unregister_rule("mipin_tests::filter")


@pytest.mark.parametrize(("run", "message"), [
    (lambda options, op, x: (-op(x), lambda s: -s), "a value that differs"),
    (lambda options, op, x: (op(x)[:, :2], lambda s: s), "a value that differs"),
    (lambda options, op, x: op(x), "returns a Tensor"),
])  # fmt: skip
def test_a_rule_that_computes_something_else_is_refused(run, message):
    @torch.library.custom_op("mipin_tests::same", mutates_args=())
    def same(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    same.register_fake(torch.empty_like)
    register_rule("mipin_tests::same", Recorded(run=run, note="wrong"))
    try:
        model = Function(
            lambda m, x: m["b"](same(m["a"](x)).mean(1, keepdim=True)),
            a=nn.Linear(4, 4),
            b=nn.Linear(1, 3),
        ).eval()
        with pytest.raises(RuleError, match=message):
            InverseNetwork(model).fit(torch.randn(30, 4), 0, progress=False)
    finally:
        unregister_rule("mipin_tests::same")


@pytest.mark.parametrize(
    ("back", "message"),
    [
        (
            lambda s: s[:, :3],
            r"the rule of \(model\)/swish sends back \(50, 3\), expected .*\(50, 5\)",
        ),
        (
            lambda s: s.expand(2, *s.shape),
            r"sends back \(2, 50, 5\), expected .*\(50, 5\)",
        ),  # which autograd would add up
        (lambda s: (s, s), r"sends back \(50, 5\), \(50, 5\), expected .*\(50, 5\)"),
        (lambda s: None, r"sends back NoneType, expected .*\(50, 5\)"),
    ],
)
def test_a_way_back_to_another_shape_is_refused(
    register: Any, untouched: Any, back: Any, message: str
) -> None:
    register(
        "own::swish", Recorded(run=lambda options, operation, x: (operation(x), back), note="wrong")
    )
    model = _model(swish)
    with untouched(model), pytest.raises(RuleError, match=message):
        InverseNetwork(model).fit(_data(), progress=False)


def _between_steps() -> nn.Module:
    torch.manual_seed(0)
    own = Function(lambda m, x: swish(x)).eval()
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), own, nn.Tanh(), nn.Linear(6, 2)).eval()


def _by_autograd(options: Any, operation: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        y = x * torch.sigmoid(x)
    return y.detach(), lambda s: torch.autograd.grad(y, x, s, retain_graph=True)[0]


def _twice_as_wide(options: Any, operation: Any, x: Tensor) -> Any:
    return operation(x), lambda s: s.double() / 3


@pytest.mark.parametrize("run", [_by_autograd, _twice_as_wide])
def test_steps_before_and_behind_change_nothing(register: Any, monkeypatch: Any, run: Any) -> None:
    """A rule gets what requires a gradient; what it sends back is cast to the next one's dtype."""
    register("own::swish", Recorded(run=run, note="own"))
    model, x, result = _between_steps(), torch.randn(40, 5), []
    for in_sequences in (propagation._in_sequences, lambda graph: graph):
        monkeypatch.setattr(propagation, "_in_sequences", in_sequences)
        inverse = InverseNetwork(model).fit(x, 0, progress=False)
        result.append(inverse.explain((x[:3],), 0, biases=(False, True)).signals)
    torch.testing.assert_close(result[0], result[1], rtol=0, atol=0)


@pytest.mark.parametrize("other", [lambda s: s.to(torch.complex64), lambda s: s.to("meta")])
def test_a_way_back_of_another_kind_is_refused(register: Any, other: Any) -> None:
    ways = [lambda s: s]
    register(
        "own::swish",
        Recorded(
            run=lambda options, operation, x: (operation(x), lambda s: ways[-1](s)), note="own"
        ),
    )
    model, x = _between_steps(), torch.randn(40, 5)
    inverse = InverseNetwork(model).fit(x, 0, progress=False)
    ways.append(other)
    with pytest.raises(
        RuleError, match=r"the rule of 2/swish sends back torch.*, expected torch.float32 on cpu"
    ):
        inverse.source_signal(x[:2], 0)


def test_what_is_no_inverter_is_refused(register: Any) -> None:
    register("own::swish", Learned(inverter=lambda options, x: None, note="wrong"))
    with pytest.raises(
        RuleError, match=r"rule of \(model\)/swish returned None, expected an Inverter"
    ):
        _fitted(swish)


@pytest.mark.parametrize("positions", [(1,), (-1,), (0, 5), 0, None], ids=str)
def test_carriers_that_are_no_arguments_are_refused(register: Any, positions: Any) -> None:
    register("own::swish", Recorded(run=gate, note="wrong", carriers=lambda node: positions))
    for attempt in (lambda: check(_model(swish), _data()), lambda: _fitted(swish)):
        with pytest.raises(
            RuleError,
            match=r"carriers of the rule of \(model\)/swish returns .* among the 1 positional",
        ):
            attempt()


def test_passing_on_takes_an_autograd_formula(register: Any) -> None:
    register("own::swish", Passes(note="adjoint"))
    with pytest.raises(
        RuleError,
        match=r"the rule of \(model\)/swish passes .* autograd formula.*register_autograd",
    ):
        _fitted(swish)
