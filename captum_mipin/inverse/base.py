"""The base class of inverses: one forward pass, then backward passes to the input or a layer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from captum_mipin.calls import explained
from captum_mipin.errors import (
    InputError,
    ModelChangedError,
    NotFittedError,
)
from captum_mipin.graph.layers import LayerInput, Site
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.modules import module_of
from captum_mipin.graph.signature import plain
from captum_mipin.graph.turns import TURNS
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    as_model,
    check_finite,
    check_inputs,
    check_model,
    check_output,
    finite,
    like,
)
from captum_mipin.inverse.explain import Explanation, Request
from captum_mipin.inverse.request import Settings
from captum_mipin.inverse.scale import warn_of_scale
from captum_mipin.inverse.state import Origin
from captum_mipin.inverse.surrogates import Surrogates
from captum_mipin.options import check_choice
from captum_mipin.propagation.runtime import Inverses, Run, seed
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.rules import MIPIN, Options, table
from captum_mipin.storage.saved import Saved
from captum_mipin.targets import per_example, target_label
from captum_mipin.types import Extras, Inputs, Output, Target
from captum_mipin.version import __version__


class FittedState(Protocol):
    """The result of a fit: its model and kind of inputs, and the classes that can be explained."""

    @property
    def origin(self) -> Origin:
        """The model and the kind of inputs of the fit."""

    @property
    def targets(self) -> Sequence[Target]:
        """The classes that can be explained."""


S = TypeVar("S", bound=FittedState)
_Self = TypeVar("_Self", bound="ModelInverse[Any]")

#: One pair (class, slice of its examples) per run of equal classes in a batch.
Groups = Sequence[tuple[Target, slice]]


class ModelInverse(Saved, Generic[S]):
    """An inverse of a trained model: it sends the logit of a class back to the input or a layer.

    The model is never changed; each call reads its current parameters. Subclasses choose the
    inverse of each example. The arguments are those of :class:`InverseNetwork`.

    Raises:
        InputError: An option has a value that is not allowed.
    """

    def __init__(
        self, model: nn.Module, *, layer: nn.Module | str | None = None, output: Output = None,
        ridge: float = 1e-3, ridge_scale: RidgeScale = "relative",
        pooling: Literal["shares", "even"] = "shares", forks: Literal["joint", "sum"] = "joint",
        precision: Literal["model", "double"] = "model",
    ) -> None:  # fmt: skip
        check_choice("pooling", pooling, ("shares", "even"))
        check_choice("forks", forks, ("joint", "sum"))
        check_choice("precision", precision, ("model", "double"))
        check_output(output)
        self.settings = Settings(
            ridge=ridge, ridge_scale=ridge_scale, shares=pooling == "shares",
            joint=forks == "joint", double=precision == "double",
        )  # fmt: skip
        self.model = as_model(model)
        self.layer = None if layer is None else module_of(layer, self.model)
        self.output = output
        self._state: S | None = None
        self._surrogates = Surrogates(self.model, output)

    @property
    def targets(self) -> list[int | tuple[int, ...] | None]:
        """The classes that can be explained, in the form of ``target``; empty before a fit."""
        return [] if self._state is None else [target_label(t) for t in self._state.targets]

    @explained
    def source_signal(
        self, inputs: Tensor | Inputs, target: Any = None, additional_forward_args: Any = None, *,
        local: bool = True, mask_input: bool = False,
    ) -> Any:  # fmt: skip
        """Return the source signal S: the input's part related to a class's logit (equation 5).

        Args:
            inputs: Tensor (batch, ...) or tuple of tensors.
            target: The class, in any form of Captum's ``target``; it may differ between examples.
            additional_forward_args: Further arguments of the model.
            local: True to use the forward masks of each example (equation 9), False for the global
                view.
            mask_input: True to apply equation 9 to the input as well. The paper applies it only at
                a layer.

        Returns:
            The signal, with the shape, dtype and device of ``inputs``.

        Raises:
            NotFittedError: The class was not fitted.
            InputError, TargetError, CaptureError, ModelChangedError: See :meth:`explain`.
        """
        extras = as_extras(additional_forward_args)
        options = {"biases": (True,), "local": local, "mask": mask_input}
        return like(inputs, self.explain(as_inputs(inputs), target, extras, **options).signals[0])

    def distractor(self, inputs: Tensor | Inputs, *args: Any, **options: Any) -> Any:
        """Return the distractor X − S; the arguments are those of :meth:`source_signal`."""
        signals = as_inputs(self.source_signal(inputs, *args, **options))
        pairs = zip(as_inputs(inputs), signals, strict=True)
        return like(inputs, tuple(x.detach() - s for x, s in pairs))

    @abstractmethod
    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return the global map of a class, or raise NotFittedError if the inverse has none."""

    @explained
    def explain(
        self, inputs: Tensor | Inputs, target: Any, extras: Any = (), **options: Any
    ) -> Explanation:
        """Send the logits of the target back, once per entry of ``biases``.

        Args:
            inputs: Tensor (batch, ...) or tuple of such tensors.
            target: The class, in any form of Captum's ``target``; it may differ between examples.
            extras: Further arguments of the model: one object, or a tuple of several.
            options: ``biases``, ``local``, ``mask``, ``layer``, ``evidence`` and ``contrast``, see
                :class:`~captum_mipin.inverse.explain.Request`.

        Raises:
            NotFittedError: The class was not fitted, or the inverse does not reach the input or
                the layer.
            InputError: The inputs have the wrong type, shape or dtype, or contain NaN or Inf.
            TargetError: The model has no such class.
            CaptureError: The model's operations differ for inputs of this size.
            ModelChangedError: The model has changed since the fit.
        """
        inputs, extras = as_inputs(inputs), as_extras(extras)
        request = Request(inputs=inputs, target=target, extras=extras, **options)
        state = self._fitted()
        check_inputs(inputs, explained=self.layer is None)
        check_finite(inputs)
        warn_of_scale(inputs, state.origin.scale)
        if request.layer is None and self.layer is not None:
            raise NotFittedError(
                f"this inverse stops at {self._name(self.layer)}, it does not reach the input: use "
                "LayerMIPINAttribution, or fit InverseNetwork(model) without layer="
            )
        if request.evidence and request.contrast:
            raise InputError(
                "evidence=True and contrast=True are two questions: pass only one of them"
            )
        if request.speaks and not (request.local and self.settings.shares):
            raise InputError(
                f'{request.speaks}=True needs local=True and pooling="shares": change these '
                f"options, or leave out {request.speaks}=True"
            )
        mask = request.local and (request.mask or request.layer is not None)
        return self._back(state, replace(request, mask=mask))

    def _back(self, state: S, request: Request) -> Explanation:
        """Run the forward pass and the backward passes of a checked request."""
        check_model(self.model)
        self._check_weights(state)
        with plain_modes(request.inputs[0].device):
            inputs, extras = plain((request.inputs, request.extras))
            surrogate = self._surrogate(inputs, extras, request.layer)
            outputs = torch.empty(
                len(inputs[0]), *value_of(surrogate.captured.output).shape[1:], device="meta"
            )
            targets = per_example(request.target, outputs)
            self._check_targets(state, targets)
            request = replace(request, inputs=inputs, extras=extras, target=targets)
            # sorted by class, so that the inverse of a class is applied to all its examples at once
            order = sorted(range(len(targets)), key=targets.__getitem__)
            if order == list(range(len(targets))):
                return self._passes(state, request, surrogate)
            rows = torch.tensor(order, device=inputs[0].device)
            request = request.pick(rows, surrogate.captured.shared)
            return self._passes(state, request, surrogate).pick(rows.argsort())

    def _passes(self, state: S, request: Request, surrogate: Surrogate) -> Explanation:
        """Run one forward pass, and one backward pass per entry of ``request.biases``."""
        options = Options(local=request.local, shares=self.settings.shares)
        evidence = None
        if request.speaks:
            evidence, classes = surrogate.average(request.speaks)
            options = replace(options, contrast=classes if request.contrast else None)
        run = Run(surrogate.steps, options, evidence=evidence)
        with TURNS.explaining():
            output = surrogate(
                run, surrogate.captured.values(self.model, request.inputs, request.extras)
            )
            logits = seed(output, request.target)
            unit = request.unit or bool(request.speaks)
            start = seed(output, request.target, unit=True) if unit else logits
        features = tuple(run.sources[index] for index in range(surrogate.starts))
        run.inverses, run.groups = self._inverses(state, request, surrogate, features)
        signals: list[Inputs] = []
        with TURNS.explaining():
            for bias in request.biases:
                run.options = replace(options, bias=bias)
                # algorithm 1: the backward pass of the surrogate is the inverse network
                keep = len(request.biases) > 1
                signal = torch.autograd.grad(output, features, start, retain_graph=keep)
                if request.mask:
                    # eq. 9: S ⊙ 1[X ≠ 0]
                    signal = tuple(s * (x != 0) for s, x in zip(signal, features, strict=True))
                if not all(map(finite, signal)):
                    raise InputError(
                        "the model's output or the signal overflows for these inputs: it contains "
                        "NaN or Inf, expected finite numbers. Scale the inputs as in training, or "
                        "use a wider dtype"
                    )
                signals.append(tuple(s.detach().contiguous() for s in signal))
        explained = logits.flatten(1).sum(1) if logits.ndim > 1 else logits
        return Explanation(tuple(x.detach() for x in features), tuple(signals), explained)

    @abstractmethod
    def _inverses(
        self, state: S, request: Request, surrogate: Surrogate, features: Inputs
    ) -> tuple[Mapping[Target, Inverses], Groups]:
        """Return the inverses that a batch needs, and the examples that belong to each inverse."""

    def _check_targets(self, state: S, targets: Sequence[Target]) -> None:
        """Raise NotFittedError if a class was not fitted."""
        known = set(state.targets)
        missing = [target_label(t) for t in dict.fromkeys(targets) if t not in known]
        if missing:
            raise NotFittedError(
                f"no inverse was fitted for target {missing[0]}; fitted are {self.targets}. "
                f"Fit all of them with fit(data, targets={[*self.targets, *missing]})"
            )

    def _check_reaches(self, surrogate: Surrogate, keys: Mapping[str, Any], layer: Site) -> None:
        """Raise an error if an inverse is missing between the output and ``layer``.

        Raises:
            NotFittedError: The inverse stops closer to the output.
            ModelChangedError: The inverse stops at ``layer``, but its steps have other names.
        """
        missing = [key for key in surrogate.learned if key not in keys]
        if missing and layer is self.layer:  # then the fit has learned all of them
            raise ModelChangedError(
                f"the inverse has no {', '.join(missing[:4])}, though the model is the one that it "
                "was fitted to: an older captum-mipin wrote the file. Fit a new "
                f"{type(self).__name__}"
            )
        if missing:
            raise NotFittedError(
                f"this inverse stops at {self._name(self.layer)}, and did not learn "
                f"{', '.join(missing[:4])}, which it needs to reach {self._name(layer)}: explain a "
                "layer closer to the output, or fit another inverse that stops at "
                f"{self._name(layer)}"
            )

    def _fitted(self) -> S:
        if self._state is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet: call fit(data, targets=...) first"
            )
        return self._state

    def _check_weights(self, state: S) -> None:
        """Raise ModelChangedError if the weights have changed since the fit."""
        if state.origin.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the inverse was fitted: fit a new "
                f"{type(self).__name__}"
            )

    def _surrogate(self, inputs: Inputs, extras: Extras, layer: Site) -> Surrogate:
        """Return the surrogate for inputs of this kind, which is stored for the next call."""
        origin = None if self._state is None else self._state.origin
        return self._surrogates.of(
            (inputs, extras), layer, origin, stop=self.layer, joint=self.settings.joint
        )

    @classmethod
    def _rebuild(
        cls: type[_Self], content: dict[str, Any], model: nn.Module, **options: Any
    ) -> _Self:
        """Return an unfitted inverse with the layer, output and settings of a file."""
        path = content["layer"]
        layer = None if path is None else model.get_submodule(path)
        inverse = cls(model, layer=layer, output=content["output"], **options)
        inverse.settings = Settings(**content["settings"])
        return inverse

    def _path(self, module: nn.Module | None) -> str:
        """Return the path of a module; "" for the model itself or a module outside the model."""
        return next((path for path, part in self.model.named_modules() if part is module), "")

    def _name(self, layer: Site) -> str:
        """Return the name of a place, for error messages."""
        if isinstance(layer, LayerInput):
            return f"the input of {self._name(layer.module)}"
        return "the input" if layer is None else f"layer {self._path(layer)!r}"

    def _head(self, origin: Origin) -> dict[str, Any]:
        """Return a file's metadata of the package, the model, the fitted inputs and the options."""
        return {
            **origin.content(),
            "version": __version__,
            "model": type(self.model).__name__,
            "rules": sorted(table().keys() - MIPIN.keys()),
            "layer": None if self.layer is None else self._path(self.layer),
            "output": self.output,
            "settings": asdict(self.settings),
        }
