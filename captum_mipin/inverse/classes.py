"""Inverses that all examples of a class share, and the global maps of a class."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from torch import nn

from captum_mipin.calls import explained
from captum_mipin.errors import (
    InputError,
    InverseFileError,
    ModelChangedError,
    ModelChangedWarning,
)
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    device_of,
    level_of_caller,
)
from captum_mipin.inverse.base import Groups, ModelInverse
from captum_mipin.inverse.explain import Request
from captum_mipin.inverse.state import State
from captum_mipin.options import check_choice
from captum_mipin.propagation.runtime import Inverses
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.storage.watch import fingerprint
from captum_mipin.targets import target_index
from captum_mipin.types import Inputs, Target


class ClassInverse(ModelInverse[State]):
    """An inverse that all examples of a class share; :class:`InverseNetwork` has its arguments."""

    def __init__(
        self, model: nn.Module, *, changed: Literal["refuse", "warn", "ignore"] = "refuse",
        **options: Any,
    ) -> None:  # fmt: skip
        check_choice("changed", changed, ("refuse", "warn", "ignore"))
        super().__init__(model, **options)
        self.changed = changed

    @explained
    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return the global, unmasked map of a class (figure 3): the map for a logit of 1.

        The map does not depend on an example: no mask is applied, and pooling spreads evenly. Gates
        that multiply, attention weights, and the switches of ``where`` and ``maximum`` have their
        values for an input of zeros.

        Args:
            target: The class, as an int or a tuple; None for the only output.
            additional_forward_args: Further arguments of the model; None for those of the data
                of the fit.

        Returns:
            Tensor (1, ...) with the shape of one example's input, or of one example's output of the
            layer where the inverse stops; a tuple of tensors for several inputs.

        Raises:
            NotFittedError: The class was not fitted.
        """
        state = self._fitted()
        extras = state.origin.extras
        if additional_forward_args is not None:
            extras = as_extras(additional_forward_args)
        if extras is None:
            raise InputError(
                "the model takes further arguments, which files do not contain: pass "
                "additional_forward_args"
            )
        request = Request(
            inputs=state.origin.example,
            target=[target_index(target, state.origin.dims)],
            extras=extras,
            local=False,
            layer=self.layer,
            unit=True,
        )
        (maps,) = self._back(state, request).signals
        return maps if len(maps) > 1 else maps[0]

    def information(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Return the bits that each feature shares with its source signal (section 3.2).

        Without masks, the source signal S = g(Y) is linear in the logit Y, so feature and signal
        share as many bits as feature and logit. As in the paper, feature and logit are assumed to
        be jointly Gaussian over the data of the fit. Where the signal is constant, the result is 0.

        Args:
            target, additional_forward_args: As for :meth:`class_attribution`.

        Returns:
            Tensor (1, ...) of bits, with the shape of one example's input, or of one example's
            output of the layer where the inverse stops; a tuple of tensors for several inputs.

        Raises:
            NotFittedError: The class was not fitted.

        Examples:
            >>> import torch
            >>> from captum_mipin import InverseNetwork
            >>> x = torch.randn(200, 2)
            >>> model = torch.nn.Linear(2, 1).eval()
            >>> _ = torch.nn.init.ones_(model.weight)
            >>> bits = InverseNetwork(model).fit(x, progress=False).information()
            >>> bool((bits > 0.2).all() and (bits < 0.9).all())  # 0.5 up to sampling noise
            True
        """
        state = self._fitted()
        chosen = target_index(target, state.origin.dims)
        slopes = as_inputs(self.class_attribution(target, additional_forward_args))
        bits = state.fitted.information.get(chosen)
        if bits is None:
            with plain_modes(device_of(self.model)):
                # section 3.2: −½ log₂(1 − ρ²) bits, where ρ is the correlation of feature and logit
                bits = state.lazy[chosen].information(chosen, self._unchanged_marks(state))
        if [b.shape for b in bits] != [a.shape for a in slopes]:
            raise InverseFileError(
                "the information in the file has a shape that differs from that of the features: "
                "save the inverse again"
            )
        maps = tuple(b * (a != 0).to(b) for a, b in zip(slopes, bits, strict=True))
        return maps if len(maps) > 1 else maps[0]

    def _inverses(
        self, state: State, request: Request, surrogate: Surrogate, features: Inputs
    ) -> tuple[Mapping[Target, Inverses], Groups]:
        """Return the inverses of the classes in a batch, and the examples of each class."""
        classes = self._classes(state, request.target)
        for inverses in classes.values():
            self._check_reaches(surrogate, inverses, request.layer)
        groups: list[tuple[Target, slice]] = []
        start = 0
        for target, run in groupby(request.target):
            stop = start + len(list(run))
            groups.append((target, slice(start, stop)))
            start = stop
        return classes, groups

    def _classes(self, state: State, targets: Sequence[Target]) -> dict[Target, Inverses]:
        """Return the inverses of classes; classes of a lazy fit are fitted if necessary."""
        targets = list(dict.fromkeys(targets))
        classes: dict[Target, Inverses] = {
            target: state.fitted.inverses[target] for target in targets if target not in state.lazy
        }
        for lazy in dict.fromkeys(state.lazy[target] for target in targets if target in state.lazy):
            own = [target for target in targets if state.lazy.get(target) is lazy]
            classes.update(lazy.get(own, lambda: self._unchanged_marks(state)))
        return classes

    def _check_weights(self, state: State) -> None:
        """Warn or raise if the weights have changed since the fit, depending on ``changed``."""
        if self.changed == "warn" and state.origin.watch.newly_changed(self.model):
            warnings.warn(
                "the model's weights have changed since the inverse was fitted: explanations mix "
                "the old model with the new one. Fit a new InverseNetwork to explain the new "
                f"weights, whose fingerprint is {fingerprint(self.model)[:12]}",
                ModelChangedWarning,
                stacklevel=level_of_caller(),
            )
        elif self.changed not in ("warn", "ignore"):
            self._check_unchanged(state)

    def _check_unchanged(self, state: State) -> None:
        """Raise ModelChangedError if the weights have changed since the fit."""
        if state.origin.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the inverse was fitted: fit a new "
                "InverseNetwork, or use the old one with changed='ignore'"
            )

    def _unchanged_marks(self, state: State) -> list[Any]:
        """Return the version marks of the weights.

        Raises:
            ModelChangedError: The weights have changed since the activations were stored.
        """
        if state.origin.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since fit(..., lazy=True) stored its "
                "activations, so no class can be fitted from them: call fit again"
            )
        return state.origin.watch.marks
