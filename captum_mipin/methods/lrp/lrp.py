"""LRP and Deep Taylor as Captum attributions, with the choice of each layer's rule."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import islice
from typing import Any, Literal

from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, PropagationRule
from torch import Tensor, fx, nn

from captum_mipin.errors import InputError
from captum_mipin.graph.layers import Site
from captum_mipin.graph.modules import tree
from captum_mipin.graph.nodes import operation
from captum_mipin.graph.validate import check_model
from captum_mipin.methods.base import Explanation, Relevance, Table
from captum_mipin.methods.layers import Layer, Scale, replace_layers
from captum_mipin.methods.lrp.rules import (
    AlphaBeta,
    Epsilon,
    FullBias,
    LayerCall,
    LayerRule,
    WSquare,
    ZBox,
    ZPlus,
)
from captum_mipin.methods.lrp.table import attnlrp, innvestigate, relevance
from captum_mipin.options import check_choice, type_of
from captum_mipin.propagation.attention import expand_attention
from captum_mipin.rules import Options, Recorded, Rule
from captum_mipin.rules.base import Back
from captum_mipin.types import Inputs, Output, Target

#: Number of paths of layers that an error lists.
_SHOWN = 8

#: A selection of layers: a type of modules, a pattern of module paths ("features.*"), or a function
#: (path, module) → bool.
Which = type[nn.Module] | str | Callable[[str, nn.Module], bool]

#: Name of an operation with weights → the type of its module.
_TYPES: Mapping[str, type[nn.Module]] = {
    "linear": nn.Linear,
    **{f"conv{d}d": getattr(nn, f"Conv{d}d") for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": getattr(nn, f"ConvTranspose{d}d") for d in (1, 2, 3)},
}
#: Name of the rule of batch norms that are not folded, and the ε of this rule.
_SCALE, _SCALE_EPSILON = "captum_mipin.scale", 1e-9


class LRP(Relevance):
    """Layer-wise relevance propagation: distribute the target's output over the input.

    A batch norm that directly follows a layer with weights is folded into it, without changing the
    model. Any other batch norm has the rule LRP-ε. Sums and averages distribute relevance over
    their terms in proportion to the terms. Maximum pooling gives it to the maxima, and ``cat`` and
    other rearrangements to the original positions. Interpolation and other weighted sums distribute
    relevance in proportion to their terms. Activations, and layer, group, instance and RMS
    norms, give the relevance of each output to the input at the same position. In a product with a
    gate (squeeze-and-excite, ``x * sigmoid(g)``) and in attention, the values get all relevance,
    and the gate or the attention weights get none; ``attention="attnlrp"`` is the other choice.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        rule: The rule of layers with weights: :class:`Epsilon`, :class:`Gamma`, :class:`AlphaBeta`,
            :class:`ZPlus`, :class:`Flat`, :class:`WSquare` or :class:`ZBox`.
        composite: Pairs (selection of layers, rule). A layer has the rule of the first pair whose
            selection contains it. A selection is a type of modules (dense layers and convolutions
            called as functions belong to their module's type), a pattern of module paths such as
            "features.*", or a function (path, module) → bool.
        input_rule: The rule of first layers, which have no other layer before them; it has priority
            over ``composite``.
        bias: "take": biases take relevance as defined by the rules; in z⁺ and αβ, only the part of
            a bias with the sign of the contributions. "none": no denominator contains a bias.
        attention: "recorded": attention weights and gates are recorded, and get no relevance.
            "attnlrp": the rules of AttnLRP. Each factor of a product gets half of the relevance:
            attention weights and values, queries and keys, gate and value. A softmax y of x sends
            back the relevance R by its Taylor expansion, x_i (R_i − y_i Σ_j R_j), which does not
            conserve it. A layer norm has LRP-ε for its centring and its shift, with σ recorded.
        output: The output to explain if the model returns several tensors.

    Raises:
        InputError: An option is not of the expected kind. In :meth:`attribute`: the selection of a
            ``composite`` pair contains no layer of the model.

    Source: Bach et al., PLOS ONE 2015; Montavon et al., 2019 (γ, composites); Binder et al., 2016
    (batch norm); Achtibat et al., ICML 2024 (AttnLRP).

    Examples:
        >>> import torch
        >>> from captum_mipin.methods import Gamma
        >>> _ = torch.manual_seed(0)  # without small denominators, where ε takes more relevance
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> lrp = LRP(model, composite=[("0", Gamma(0.25))], bias="none")
        >>> x = torch.randn(2, 4)
        >>> relevance, delta = lrp.attribute(x, target=1, return_convergence_delta=True)
        >>> bool(delta.abs().max() < 1e-4)
        True
    """

    _name = "LRP"
    #: Whether batch norms are folded.
    _folds = True

    def __init__(
        self,
        model: nn.Module,
        *,
        rule: LayerRule | None = None,
        composite: Sequence[tuple[Which, LayerRule]] = (),
        input_rule: LayerRule | None = None,
        bias: Literal["take", "none"] = "take",
        attention: Literal["recorded", "attnlrp"] = "recorded",
        output: Output = None,
    ) -> None:
        super().__init__(model, output=output)
        check_choice("bias", bias, ("take", "none"))
        check_choice("attention", attention, ("recorded", "attnlrp"))
        self.rule, self.input_rule, self.bias = rule or Epsilon(), input_rule, bias
        self.attention = attention
        self.composite = tuple(composite)
        if isinstance(composite, (str, Mapping)) or not all(map(_is_pair, self.composite)):
            raise InputError(
                f"composite is {type_of(composite)}, expected pairs (layers, rule): pass for "
                "example composite=[(nn.Conv2d, Gamma(0.25))]"
            )
        for which, _ in self.composite:
            if isinstance(which, nn.Module) or not (isinstance(which, str) or callable(which)):
                raise InputError(
                    f"composite contains {which!r}, which is {type_of(which)}: pass a "
                    "type of modules, a pattern of module paths, or a function (path, module) → "
                    "bool"
                )
        for checked in (self.rule, input_rule or self.rule, *(rule for _, rule in self.composite)):
            _check_rule(checked)

    def explain(
        self, inputs: Tensor | Inputs, target: Any, extras: Any = (), layer: Site = None
    ) -> Explanation:
        """Run one forward and one backward pass, see :meth:`Propagation.explain`.

        Raises:
            InputError: A module has a rule of Captum's LRP as its attribute ``rule``.
        """
        alone = not self.composite and self.input_rule is None
        _check_captum_rules(check_model(self.model), self.rule if alone else None)
        return super().explain(inputs, target, extras, layer)

    def _table(self) -> Table:
        takes = self.bias == "take"
        rules = dict.fromkeys(rule for rule in self._rules() if rule is not None)
        names = {rule: f"captum_mipin.lrp{index}" for index, rule in enumerate(rules)}
        table = {
            **self._others(),
            _SCALE: Recorded(
                run=partial(_run, Epsilon(_SCALE_EPSILON), takes),
                note="its own layer, LRP-ε",
                caveat=_bias_caveat if takes else lambda node: None,
            ),
        }
        for rule, name in names.items():
            table[name] = Recorded(
                run=partial(_run, rule, takes), note=rule.note, caveat=partial(_caveat, rule, takes)
            )
        return Table(table, partial(self._rewrite, names))

    def _rules(self) -> tuple[LayerRule | None, ...]:
        """Return all rules that layers with weights may have."""
        return (self.rule, self.input_rule, *(rule for _, rule in self.composite))

    def _others(self) -> Mapping[str, Rule]:
        """Return the rules of all operations without weights."""
        rules = attnlrp if self.attention == "attnlrp" else relevance
        return rules(self.bias == "take")

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        """Return the rule of a layer that has priority over ``composite``, or None."""
        return self.input_rule if first else None

    def _rewrite(
        self, names: Mapping[LayerRule, str], graph: fx.Graph, batch: str, starts: Sequence[fx.Node]
    ) -> None:
        if self.attention == "attnlrp":
            expand_attention(graph, starts)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        unmatched = dict(enumerate(which for which, _ in self.composite))
        paths: list[str] = []

        def choose(layer: Layer, first: bool, last: bool) -> str:
            if isinstance(layer, Scale):
                return _SCALE
            path = layer.key.rpartition("/")[0]
            path = "" if path == "(model)" else path
            paths.append(path)
            rules = []
            for index, (which, rule) in enumerate(self.composite):
                if _matches(which, path, modules[path], layer):
                    rules.append(rule)
                    unmatched.pop(index, None)
            return names[self._chosen(layer, first, last) or (*rules, self.rule)[0]]

        replace_layers(graph, starts, choose, fold=self._folds)
        if unmatched:
            raise InputError(
                f"composite: {', '.join(map(repr, unmatched.values()))} matches no layer with "
                "weights of the model, expected a type or a pattern of paths: pass for example one "
                f"of the paths {', '.join(map(repr, islice(paths, _SHOWN)))}"
            )


class DeepTaylor(LRP):
    """Deep Taylor decomposition: LRP with the rule z⁺ in all layers except the first.

    In hidden layers, R_i = Σ_j (x_i w_ij)⁺ / Σ_i' (x_i' w_i'j)⁺ R_j (see :class:`ZPlus`), also for
    hidden values below 0, which networks with ReLU do not have. In the first layer the rule is
    :class:`ZBox` if the inputs have bounds, else :class:`WSquare`. All other operations have the
    rules of :class:`LRP`. A ``DataWarning`` names maps that are 0.

    Args:
        model: The network, see :class:`~captum_mipin.methods.base.Propagation`.
        low: Lower bound of the first layer's input, after normalisation: a number, or a tensor that
            broadcasts against one example. None: the first layer has the rule :class:`WSquare`.
        high: Upper bound of the first layer's input, in the same form as ``low``.
        bias: The part of each bias that the denominators of z⁺ contain, so that it takes relevance:
            "none", the "positive" part, or the "full" bias.
        last: The rule of the last layer; :class:`ZPlus` by default.
        preset: "innvestigate" to compute the same as Deep Taylor of iNNvestigate 1.0. Every layer
            has the rule α1β0 with full biases, also the first one if there are no bounds. Batch
            norms give the relevance of each output to the input at the same position. Sums give all
            relevance to each term, so it is not conserved. Activations, maximum and average pooling
            multiply by their derivative. The relevance at the output is the output's positive part,
            so the map of a negative output is 0. Other operations are refused.
        output: The output to explain if the model returns several tensors.

    Source: Montavon et al., Pattern Recognition 2017; Alber et al., JMLR 2019 (iNNvestigate).

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> DeepTaylor(model, low=0, high=1).attribute(torch.rand(2, 4), target=1).shape
        torch.Size([2, 4])
    """

    _name = "Deep Taylor"
    _positive = True

    def __init__(
        self,
        model: nn.Module,
        *,
        low: float | Tensor | None = None,
        high: float | Tensor | None = None,
        bias: Literal["none", "positive", "full"] = "none",
        last: LayerRule | None = None,
        preset: Literal["innvestigate"] | None = None,
        output: Output = None,
    ) -> None:
        check_choice("bias", bias, ("none", "positive", "full"))
        check_choice("preset", preset, (None, "innvestigate"))
        if (low is None) != (high is None):
            raise InputError(
                f"low={low!r} and high={high!r}, expected two bounds or two None: pass both "
                "bounds of the input, or neither"
            )
        if preset and (bias != "none" or last is not None):
            raise InputError(
                f"bias={bias!r} and last={last!r} cannot be combined with preset='innvestigate', "
                "which defines the rules of biases and of the last layer: omit bias and last"
            )
        if last is not None:
            _check_rule(last)
        box = None if low is None or high is None else ZBox(low, high)
        super().__init__(
            model,
            rule=FullBias() if preset or bias == "full" else ZPlus(),
            input_rule=box if preset else box or WSquare(),
            bias="none" if bias == "none" and not preset else "take",
            output=output,
        )
        self.last, self.preset, self._folds = last, preset, preset is None

    def _rules(self) -> tuple[LayerRule | None, ...]:
        return (*super()._rules(), self.last)

    def _chosen(self, layer: Layer, first: bool, last: bool) -> LayerRule | None:
        return super()._chosen(layer, first, last) or (self.last if last else None)

    def _others(self) -> Mapping[str, Rule]:
        return innvestigate() if self.preset else super()._others()

    def _start(self, output: Tensor, targets: Sequence[Target]) -> Tensor:
        start = super()._start(output, targets)
        return start.clamp(min=0) if self.preset else start


def _check_captum_rules(model: nn.Module, same: LayerRule | None) -> None:
    """Raise InputError if a module's attribute ``rule`` is a rule of Captum that LRP does not use.

    Args:
        model: The model.
        same: The rule of all layers, which Captum's rules may be; None if layers have other rules.
    """
    rules: dict[str, Any] = {
        path: module.rule
        for path, module in tree(model)
        if isinstance(module.__dict__.get("rule"), PropagationRule)
    }
    if all(type(r) is EpsilonRule and Epsilon(r.STABILITY_FACTOR) == same for r in rules.values()):
        return
    pairs = [f"({path!r}, {_ours(rule)})" for path, rule in rules.items()]
    path, rule = next(iter(rules.items()))
    raise InputError(
        f"module {path!r} has rule = {type(rule).__name__}, which only Captum's LRP reads; "
        f"expected rules as arguments: pass composite=[{', '.join(pairs)}] to LRP, and delete "
        "these attributes, as in del module.rule"
    )


def _ours(rule: PropagationRule) -> str:
    """Return the code of the rule of this package that is like a rule of Captum."""
    if type(rule) is EpsilonRule:
        return f"Epsilon({rule.STABILITY_FACTOR:g})"
    if type(rule) is GammaRule:
        return f"Gamma({rule.gamma:g})"
    return "AlphaBeta(1, 0)" if type(rule) is Alpha1_Beta0_Rule else "..."


def _is_pair(entry: object) -> bool:
    return isinstance(entry, (tuple, list)) and len(entry) == 2


def _check_rule(rule: Any) -> None:
    """Raise InputError unless ``rule`` is a LayerRule and hashable."""
    if not isinstance(rule, LayerRule):
        raise InputError(
            f"{rule!r} is not a rule of layers: pass an instance of a LayerRule, such as "
            "Epsilon(), Gamma() or ZPlus() of captum_mipin.methods"
        )
    try:
        hash(rule)
    except TypeError as error:
        raise InputError(
            f"{rule!r} has no hash ({error}), expected a hashable rule: make its class a frozen "
            "dataclass"
        ) from error


def _matches(which: Which, path: str, module: nn.Module, layer: Layer) -> bool:
    if isinstance(which, str):
        return fnmatchcase(path, which)
    if not isinstance(which, type):
        return bool(which(path, module))
    return isinstance(module, which) or issubclass(_TYPES[layer.name], which)


def _run(
    rule: LayerRule, takes: bool, options: Options, layer: Layer, x: Tensor, *parameters: Any
) -> tuple[Tensor, Back]:
    """Run a layer, and return its value and the backward function of a rule.

    The backward function computes all tensors that the rule needs, and frees them at its end, so
    that memory never holds those of all layers at once.
    """
    value = layer.exact(x, *parameters)
    recorded = value.detach()

    def back(r: Tensor) -> Tensor:
        weight, bias = layer.parameters(*parameters)
        if bias is None:
            bias = recorded.new_zeros(recorded.shape[layer.dim])
        call = LayerCall(layer, x.to(recorded), weight, bias if takes else None, recorded)
        return rule.back(call)(r.to(recorded))

    return value.to(x.dtype), back


def _bias_caveat(node: Any) -> str | None:
    _, _, bias, norm = node.args
    return None if bias is None and norm is None else "its bias takes relevance"


def _caveat(rule: LayerRule, takes: bool, node: fx.Node) -> str | None:
    """Return the causes by which a layer with this rule loses relevance, or None."""
    biased, epsilon = _bias_caveat(node), getattr(rule, "epsilon", 0)
    caveats = [
        biased if takes and rule.takes else None,
        f"ε = {epsilon:g} takes relevance" if epsilon else None,
    ]
    if isinstance(rule, AlphaBeta):
        # An output before a ReLU that has relevance is positive, so it has a positive contribution:
        # from an input, or from the bias alone, to which relevance goes only if biases take it.
        rectified = all(operation(user) in ("relu", "relu6") for user in node.users)
        if rule.beta or not rectified or (biased and not takes):
            caveats.append(
                "loses the relevance of outputs without contributions of one of the two signs"
            )
    return "; ".join(filter(None, caveats)) or None
