"""Captum's metrics of small perturbations of the input: infidelity and max-sensitivity."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from captum.metrics import infidelity as captum_infidelity
from captum.metrics import sensitivity_max as captum_sensitivity_max
from torch import Tensor
from typing_extensions import Unpack

from captum_mipin.calls import explained
from captum_mipin.errors import InputError
from captum_mipin.metrics.case import Case, Method, Model, Options, explain
from captum_mipin.metrics.examples import Examples, Inputs
from captum_mipin.metrics.maps import flattened
from captum_mipin.metrics.result import Result, finite_rows
from captum_mipin.options import check_number


@explained
def infidelity(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    perturb: Callable[[Any], tuple[Any, Any]] | None = None,
    noise: float = 0.02,
    samples: int = 10,
    normalize: bool = False,
    **options: Unpack[Options],
) -> Result:
    """Return the error with which the attribution predicts the loss of output under perturbations.

    Args:
        method, inputs, target: As for :func:`sensitivity_max`. Maps have the shape of the inputs.
        perturb: Captum's ``perturb_func``: inputs -> (subtracted noise, perturbed inputs).
        noise: Standard deviation of the Gaussian noise that is subtracted by default.
        samples: Number of perturbations per example.
        normalize: True to scale each map by the factor of least error, as Captum's ``normalize``.
        **options: As for :func:`sensitivity_max`. The generator draws the noise.

    Returns:
        Mean squared errors. Reason for no score: "NaN".

    Source: Yeh et al., NeurIPS 2019; computed by ``captum.metrics.infidelity``.

    Examples:
        >>> x, weight = torch.randn(2, 5), torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0])
        >>> infidelity(weight.expand(2, 5), x, model=lambda x: x @ weight).mean < 1e-9
        True
    """
    check_number("samples", samples, 1, whole=True)
    case = Case.of(method, inputs, target, **options)
    model, random, x = case.model, case.generator, case.examples.inputs
    _check_shapes(case.maps, x)
    draw = partial(torch.randn, generator=random, device=random.device)
    values = [
        # infidelity = E_I [(I·A - (y(x) - y(x - I)))²]: I noise, A attribution, y output
        captum_infidelity(
            _with_extras(model, batch),
            perturb or _Noise(batch, samples, draw, noise).taken_away,
            batch.as_passed(batch.inputs),
            batch.as_passed(tuple(m[index] for m in case.maps)),
            target=batch.target,
            n_perturb_samples=samples,
            normalize=normalize,
            max_examples_per_batch=_per_call(batch, case.rows_per_call, samples),
        )
        for index, batch in case.batches()
    ]
    disturbance: Any = {"perturb": perturb} if perturb else {"noise": noise}
    settings = case.settings(case.maps, **disturbance, samples=samples, normalize=normalize)
    unscored = {"NaN": ~finite_rows(*case.maps)}
    return Result.of("infidelity", torch.cat(values), "lower", settings, unscored)


def _check_shapes(maps: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Raise InputError if maps do not have the shapes of the inputs."""
    found, expected = ([tuple(t.shape) for t in tensors] for tensors in (maps, inputs))
    if found != expected:
        raise InputError(
            f"the maps have shapes {found}, but infidelity needs maps shaped like the inputs, "
            f"{expected}: pass a method that explains the inputs, not a layer"
        )


@explained
def sensitivity_max(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    radius: float = 0.02,
    samples: int = 10,
    **options: Unpack[Options],
) -> Result:
    """Return the largest relative change of the map when the input changes by up to ``radius``.

    Args:
        method: Any method, but not maps.
        inputs: Tensor (examples, ...) or tuple of such.
        target: The class, as Captum takes it.
        radius: Largest change of each input element; changes are uniform in [-radius, radius].
        samples: Number of changed inputs per example.
        **options: See :class:`~captum_mipin.metrics.case.Options`. The generator draws changes.

    Returns:
        Largest ‖change of the map‖ / ‖map‖. Reasons for no score: "zero map", "NaN".

    Source: Yeh et al., NeurIPS 2019; computed by ``captum.metrics.sensitivity_max``.

    Examples:
        >>> sensitivity_max(lambda x, target: torch.ones_like(x), torch.rand(3, 4)).mean
        0.0
    """
    check_number("samples", samples, 1, whole=True)
    check_number("radius", radius, 0)
    if isinstance(method, (Tensor, tuple)):
        raise InputError(
            "the method is a tensor of maps, but sensitivity_max needs maps of changed inputs: "
            "pass an Attribution or a function (inputs, target) -> maps"
        )
    case = Case.of(method, inputs, target, **options)
    draw = partial(_uniform, case.generator)
    values, zero, finite = [], [], []
    with case.reasons():
        for _, batch in case.batches():
            maps = _double(explain(method, batch))
            # max-sensitivity = max_{‖d‖_∞ ≤ radius} ‖A(x + d) - A(x)‖ / ‖A(x)‖
            largest = captum_sensitivity_max(
                _explanation(method, batch, maps),
                batch.inputs,
                _Noise(batch, samples, draw, radius).added,
                n_perturb_samples=samples,
                max_examples_per_batch=_per_call(batch, case.examples_per_call, samples),
            )
            values.append(largest)
            zero.append((flattened(maps) == 0).all(1).cpu())
            finite.append(finite_rows(*maps))
    settings = case.settings(maps, radius=radius, samples=samples)
    unscored = {"NaN": ~torch.cat(finite), "zero map": torch.cat(zero)}
    return Result.of("max-sensitivity", torch.cat(values), "lower", settings, unscored)


def _uniform(random: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Return uniform random numbers in [-1, 1)."""
    return 2 * torch.rand(shape, generator=random, device=random.device) - 1


def _explanation(method: Method, batch: Examples, maps: tuple[Tensor, ...]) -> Callable[..., Any]:
    """Return the ``explanation_func`` that Captum calls for the maps of a batch or changed inputs.

    Args:
        method: Method that computes the maps of changed inputs.
        batch: Unchanged examples.
        maps: Maps of the unchanged examples, which are not computed a second time.
    """

    def explanation(x: Any) -> tuple[Tensor, ...]:
        return maps if x is batch.inputs else _double(explain(method, _copies(batch, x)))

    return explanation


def _copies(batch: Examples, x: tuple[Tensor, ...]) -> Examples:
    """Return examples for changed inputs x (examples * samples, ...) in Captum's order.

    It is example 1 repeated, example 2 repeated, and so on. Captum itself would repeat all tensors
    among the further arguments, also those that the examples share.
    """
    index = torch.arange(len(batch)).repeat_interleave(len(x[0]) // len(batch))
    return batch.select(index, tuple(x))


def _with_extras(model: Model, batch: Examples) -> Model:
    """Return a function of inputs alone that runs the model with the further arguments."""
    return lambda *x: model(*x, *_copies(batch, x).extras)


def _double(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return maps in float64; squares of small float32 numbers would underflow in norms."""
    return tuple(m.double() for m in maps)


def _per_call(batch: Examples, rows: int, samples: int) -> int:
    """Return Captum's option for the number of perturbed inputs per call of the model.

    It is a multiple of the batch's length, because Captum perturbs all examples equally often in a
    call. A number above ``samples`` per example would cause a warning by Captum.

    Args:
        batch: The examples.
        rows: Wanted largest number of inputs per call; a longer batch exceeds it.
        samples: Number of perturbations per example.
    """
    return len(batch) * min(max(1, rows // len(batch)), samples)


class _Noise:
    """Noise for a batch of inputs, drawn before Captum's first call.

    Each call of Captum uses the next samples of the noise. Noise drawn during the calls would
    depend on ``batch_size``, which determines the number of samples per call.

    Args:
        batch: The examples.
        samples: Number of noise samples per example.
        draw: Function shape -> random numbers of this shape.
        scale: Factor that multiplies the random numbers.
    """

    def __init__(
        self, batch: Examples, samples: int, draw: Callable[..., Tensor], scale: float
    ) -> None:
        drawn = [[draw((samples, *x.shape[1:])) for x in batch.inputs] for _ in range(len(batch))]
        pairs = zip(zip(*drawn, strict=True), batch.inputs, strict=True)
        self._noise = [(scale * torch.stack(rows)).to(x) for rows, x in pairs]
        self._examples, self._used = len(batch), 0

    def added(self, x: Inputs) -> tuple[Tensor, ...]:
        """Return inputs plus the next noise; ``x`` (examples * samples, ...) repeats examples."""
        tensors = x if isinstance(x, tuple) else (x,)
        return tuple(t + n for t, n in zip(tensors, self._next(len(tensors[0])), strict=True))

    def taken_away(self, x: Inputs) -> tuple[Inputs, Inputs]:
        """Return the next noise, and inputs ``x`` (examples * samples, ...) minus this noise."""
        tensors = x if isinstance(x, tuple) else (x,)
        noise = self._next(len(tensors[0]))
        remaining = tuple(t - n for t, n in zip(tensors, noise, strict=True))
        return (noise, remaining) if isinstance(x, tuple) else (noise[0], remaining[0])

    def _next(self, rows: int) -> tuple[Tensor, ...]:
        # Captum's rows are example 1 repeated, example 2 repeated, ...: for each example, return
        # the samples from ``start`` to ``used``
        start, self._used = self._used, self._used + rows // self._examples
        return tuple(n[:, start : self._used].flatten(0, 1) for n in self._noise)
