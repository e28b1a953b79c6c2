"""Does the output change with what the attribution calls important: pixels put in, taken out, disturbed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from captum.metrics import infidelity as captum_infidelity
from torch import Tensor
from torch.nn import functional as F

from captum_mipin.errors import InputError
from captum_mipin.metrics.common import (
    Examples,
    Inputs,
    Method,
    Pairs,
    Reduction,
    Score,
    all_outputs,
    at_least,
    described,
    disturbances,
    explain,
    explained_at_once,
    finite_rows,
    heat,
    hottest_first,
    inverted,
    model_of,
    outputs,
    ranked,
    resized,
    rows_at_once,
    seeded,
    uniform,
)  # fmt: skip
from captum_mipin.metrics.result import Result

#: What takes the place of pixels: a number, a tensor that fits the inputs, a function of them, or "blur", RISE's.
Baseline = float | Tensor | Callable[[Tensor], Tensor] | Literal["blur"]


def deletion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    baseline: Baseline = 0.0,
    step: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Area under the output while pixels are replaced, the hottest first (RISE; Petsiuk et al., BMVC 2018).

    A place of the map stands for a pixel with all of its channels, or for a feature of inputs (examples, features).

    Args:
        method: See :data:`~captum_mipin.metrics.Method`.
        inputs: Tensor (examples, channels, *places) or (examples, features).
        target: As Captum takes it; RISE takes the most probable class.
        model: What is explained; by default the method's ``forward_func``.
        baseline: What replaces pixels: a number (0 is the mean image where inputs are normalised), a tensor that fits the
            inputs, a function of them, or "blur", a Gaussian of σ = 5 on 11 pixels.
        step: Pixels replaced at a time; by default the width of the image, as RISE has it, and 1 for inputs without places.
        score: "softmax" probability, "logit", or a function of all outputs: a score of each class, or one of all.
        reduction: Of channels, see :func:`~captum_mipin.metrics.common.heat`.
        additional_forward_args: Further arguments of the model.
        generator: Breaks ties between pixels of the same heat.
        batch_size: Images given to the model at once, of all steps of all examples; and examples explained at once.

    Returns:
        Areas, of width 1, with the outputs (examples, steps + 1) as ``curves``. Unscored: "NaN".

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> result = deletion(x, x, model=lambda x: x.sum(1), score="logit")
        >>> result.curves.tolist(), result.mean
        ([[6.0, 3.0, 1.0, 0.0]], 2.3333333333333335)
    """
    return _replaced("deletion", method, inputs, target, model, baseline, step, score, reduction, additional_forward_args,
                     generator, batch_size)  # fmt: skip


def insertion(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    baseline: Baseline = "blur",
    step: int | None = None,
    score: Score = "softmax",
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Area under the output while the image is put together from its hottest pixels (RISE; Petsiuk et al., BMVC 2018).

    Args:
        method, inputs, target, model, step, score, reduction, additional_forward_args, generator, batch_size: As for
            :func:`deletion`.
        baseline: What it starts from, as for :func:`deletion`.

    Returns:
        Areas, of width 1, with the outputs (examples, steps + 1) as ``curves``. Unscored: "NaN".

    Examples:
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> insertion(x, x, model=lambda x: x.sum(1), score="logit", baseline=0.0).curves.tolist()
        [[0.0, 3.0, 5.0, 6.0]]
    """
    return _replaced("insertion", method, inputs, target, model, baseline, step, score, reduction, additional_forward_args,
                     generator, batch_size)  # fmt: skip


def sensitivity_n(
    method: Method,
    inputs: Tensor,
    target: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    n: Sequence[int] | None = None,
    samples: int = 100,
    baseline: Baseline = 0.0,
    score: Score = "logit",
    reduction: Reduction = "sum",
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Correlation between the attribution of n random pixels and what the output loses with them (Ancona et al., ICLR 2018).

    The correlation is Pearson's over the random sets of one example and one n, then averaged over n.

    Args:
        method, inputs, target, model, score, reduction, additional_forward_args, batch_size: As for :func:`deletion`.
        n: Numbers of pixels; by default up to sixteen from 1 to 0.8 of all, evenly on a logarithmic scale.
        samples: Random sets an example.
        baseline: What takes the place of the pixels.
        generator: Chooses the sets; those of an example are nested in n.

    Returns:
        Correlations, those of each n as ``curves``. Unscored: "constant" where attributions or losses do not vary for some n,
        "NaN".

    Examples:
        >>> x, weight = torch.randn(2, 5), torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0])
        >>> sensitivity_n(x * weight, x, model=lambda x: x @ weight, n=[1, 2, 3]).values.allclose(torch.ones(2).double())
        True
    """
    at_least("samples", samples, 2)
    examples, model, ranks, flat, maps, finish = _asked("sensitivity_n", method, inputs, target, model, baseline, reduction,
                                                       additional_forward_args, generator, batch_size)  # fmt: skip
    x, random = examples.inputs[0], seeded(generator)
    places, size = ranks.shape[1], rows_at_once(x, batch_size)
    numbers = _numbers(places) if n is None else list(n)
    if not numbers or not all(1 <= number <= places for number in numbers):
        raise InputError(f"n={n!r} must be numbers of pixels from 1 to {places}")
    whole = all_outputs(model, examples, batch_size, score)
    start, change = _between(x, finish)
    taken, rows = torch.tensor(numbers, device=x.device), []
    for one in range(len(examples)):
        ranks = ranked(uniform(random, samples, places, device=x.device), stable=False)
        sums, ranks, left = flat[one][inverted(ranks)].cumsum(1).T[taken - 1], ranks.int(), []
        for part in torch.arange(len(numbers) * samples, device=x.device).split(size):
            wait = ranks.index_select(0, part % samples).sub_(taken[part // samples, None])
            left.append(
                _with(model, examples, torch.full_like(part, one), wait, start, change, score)
            )
        rows.append(_correlation(sums, (whole[one] - torch.cat(left)).view(-1, samples)))
    curves = torch.stack(rows)
    settings = described(method, examples, maps, reduction=reduction, score=score, baseline=_told(baseline), n=numbers,
                         samples=samples, correlation="an example")  # fmt: skip
    broken = ~(finite_rows(flat) & finite_rows(whole))
    reasons = {"NaN": broken, "constant": ~finite_rows(curves)}
    return Result.of("sensitivity-n", curves.mean(1), "higher", settings, reasons, curves=curves)


def infidelity(
    method: Method,
    inputs: Inputs,
    target: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    perturb: Callable[[Any], tuple[Any, Any]] | None = None,
    noise: float = 0.02,
    samples: int = 10,
    normalize: bool = False,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> Result:
    """Captum's ``infidelity``: squared error of the attribution as a prediction of what the output loses by a disturbance.

    Args:
        method, target, model, additional_forward_args: As for :func:`deletion`; maps have to be shaped like the inputs.
        inputs: Tensor (examples, ...) or tuple of such.
        perturb: Captum's ``perturb_func``: inputs → (what is taken away, what is left). By default Gaussian noise.
        noise: Its standard deviation.
        samples: Disturbances an example.
        normalize: Scale the attribution to fit best, as Captum's option of this name.
        generator: Draws the noise; ``perturb`` draws its own.
        batch_size: Examples explained at once; inputs given to the model at once.

    Returns:
        Mean squared errors. Unscored: "NaN".

    Source: Yeh et al., NeurIPS 2019.

    Examples:
        >>> x, weight = torch.randn(2, 5), torch.tensor([1.0, -2.0, 3.0, 0.5, 1.0])
        >>> infidelity(weight.expand(2, 5), x, model=lambda x: x @ weight).mean < 1e-9
        True
    """
    at_least("samples", samples, 1)
    examples, model, random = (
        Examples.of(inputs, target, additional_forward_args),
        model_of(method, model),
        seeded(generator),
    )
    maps = explain(method, examples, batch_size)
    if [m.shape for m in maps] != [x.shape for x in examples.inputs]:
        raise InputError(
            f"infidelity needs maps shaped like the inputs, {[tuple(x.shape) for x in examples.inputs]}; found "
            f"{[tuple(m.shape) for m in maps]}"
        )

    def draw(shape: Sequence[int]) -> Tensor:
        return noise * torch.randn(shape, generator=random, device=random.device)

    values, size, rows = (
        [],
        explained_at_once(batch_size),
        rows_at_once(examples.inputs[0], batch_size),
    )
    for part, *own in zip(examples.chunks(size), *(m.split(size) for m in maps), strict=True):
        disturb = perturb or partial(_less, disturbances(part, samples, draw))
        values.append(
            captum_infidelity(
                model, disturb, part.given, own[0] if examples.alone else tuple(own), target=part.target,
                additional_forward_args=part.extras or None, n_perturb_samples=samples, normalize=normalize,
                max_examples_per_batch=min(len(part) * max(1, rows // len(part)), len(part) * samples),
            )
        )  # fmt: skip
    told = {"noise": noise} if perturb is None else {"perturb": perturb}
    settings = described(method, examples, maps, **told, samples=samples, normalize=normalize)
    return Result.of(
        "infidelity", torch.cat(values), "lower", settings, {"NaN": ~finite_rows(*maps)}
    )


def _less(disturb: Callable[[Inputs], Pairs], x: Inputs) -> tuple[Inputs, Inputs]:
    """What is taken away, and what is left."""
    pairs = disturb(x)
    taken, left = tuple(by for _, by in pairs), tuple(one - by for one, by in pairs)
    return (taken, left) if isinstance(x, tuple) else (taken[0], left[0])


def _replaced(
    metric: Literal["deletion", "insertion"],
    method: Method,
    inputs: Tensor,
    target: Any,
    model: Callable[..., Any] | None,
    baseline: Baseline,
    step: int | None,
    score: Score,
    reduction: Reduction,
    additional_forward_args: Any,
    generator: torch.Generator | None,
    batch_size: int | None,
) -> Result:
    """Outputs while pixels are replaced, all steps of an example in one batch if they fit, and as many examples as do."""
    at_least("step", 1 if step is None else step, 1)
    examples, model, ranks, flat, maps, other = _asked(metric, method, inputs, target, model, baseline, reduction,
                                                      additional_forward_args, generator, batch_size)  # fmt: skip
    x = examples.inputs[0]
    step = step or (x.shape[-1] if x.ndim > 2 else 1)
    points = -(-ranks.shape[1] // step) + 1
    due = (ranks // step + 1).int()  # the point from which on each place is replaced
    start, change = _between(*((x, other) if metric == "deletion" else (other, x)))
    shared = other.stride(0) == 0 and examples.alike  # one baseline, with one output
    runs, number = _runs(
        due, change, points, None if not shared else "last" if metric == "deletion" else "first"
    )
    found = []
    for part in runs.to(x.device).tensor_split(-(-len(runs) // rows_at_once(x, batch_size))):
        rows, now = part.unbind(1)
        wait = due.index_select(0, rows).sub_(now.int()[:, None] + 1)
        found.append(_with(model, examples, rows, wait, start, change, score))
    curves = torch.cat(found)[number.to(x.device)]
    values = (curves[:, 1:] + curves[:, :-1]).sum(1) / (2 * (points - 1))
    settings = described(method, examples, maps, reduction=reduction, score=score, baseline=_told(baseline), step=step,
                         ties="random")  # fmt: skip
    reasons = {"NaN": ~finite_rows(flat)}
    better: Literal["higher", "lower"] = "lower" if metric == "deletion" else "higher"
    return Result.of(metric, values, better, settings, reasons, curves=curves)


def _asked(
    metric: str,
    method: Method,
    inputs: Tensor,
    target: Any,
    model: Callable[..., Any] | None,
    baseline: Baseline,
    reduction: Reduction,
    additional_forward_args: Any,
    generator: torch.Generator | None,
    batch_size: int | None,
) -> tuple[Examples, Callable[..., Any], Tensor, Tensor, tuple[Tensor, ...], Tensor]:
    """Examples, model, each place's rank (examples, places), its heat, the maps as they came, and the baseline."""
    examples, model = Examples.of(inputs, target, additional_forward_args), model_of(method, model)
    x = examples.one(metric)
    if x.ndim < 2:
        raise InputError(
            f"{metric} needs inputs (examples, features) or (examples, channels, ...), found {tuple(x.shape)}"
        )
    places = x.shape[2:] or x.shape[1:]
    other = _baseline(baseline, x)
    maps = explain(method, examples, batch_size)
    if len(maps) != 1:
        raise InputError(f"{metric} needs one map an example, the method gave {len(maps)}")
    warm = heat(maps[0], x, reduction).to(x.device)
    summed = maps[0].ndim > 2 and not callable(reduction)  # tokens, not the channels of their maps
    if x.ndim == 2 and (summed or warm.shape != x.shape):
        raise InputError(
            f"{metric} needs a map of shape {tuple(x.shape)}, found {tuple(maps[0].shape)}"
        )
    flat = resized(warm, places).flatten(1)
    ranks = inverted(
        hottest_first(flat.nan_to_num(), uniform(seeded(generator), *flat.shape, device=x.device))
    )
    return examples, model, ranks, flat, maps, other


def _between(start: Tensor, finish: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs, and as integers the bits in which others differ from them.

    To change these takes less time than ``torch.where``, and gives the same.
    """
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(start.element_size())
    if kind is None:
        raise InputError(
            f"inputs of dtype {start.dtype} are not supported: give them, and the model, half the precision"
        )
    start, finish = (x.detach().resolve_conj().resolve_neg() for x in (start, finish))
    return start, start.view(kind) ^ finish.view(kind)


def _with(
    model: Callable[..., Any],
    examples: Examples,
    rows: Tensor,
    wait: Tensor,
    start: Tensor,
    change: Tensor,
    score: Score,
) -> Tensor:
    """(sets,) outputs for examples ``rows``, changed where ``wait`` (sets, places), int32 and overwritten, is below 0."""
    bits = wait.bitwise_right_shift_(31).to(change.dtype)  # all or none
    bits = bits.view(-1, *((1, *change.shape[2:]) if change.ndim > 2 else change.shape[1:]))
    x = (
        change.index_select(0, rows)
        .bitwise_and_(bits)
        .bitwise_xor_(start.index_select(0, rows).view(change.dtype))
    )
    return outputs(model, examples.pick_for(rows, x.view(start.dtype)), score)


def _runs(
    due: Tensor, change: Tensor, points: int, plain: Literal["first", "last"] | None
) -> tuple[Tensor, Tensor]:
    """Examples and points (runs, 2) whose inputs to run, no input twice; (examples, points) which run has the output of each.

    Args:
        due: (examples, places) the point from which on each is changed.
        change: Its bits: a point that changes none has the input of the point before.
        points: Of a curve.
        plain: Whether the first, or the last, input of all examples is the same.
    """
    differs = (change if change.ndim == 2 else change.flatten(2).any(1)) != 0
    new = (
        torch.zeros(len(due), points, dtype=torch.bool, device=due.device)
        .scatter_(1, due * differs, True)
        .cpu()
        .numpy()
    )
    new[:, 0] = True
    found = new.cumsum(1)
    if plain is None:
        run, number = new, new.cumsum() - 1
    else:
        same = found == (1 if plain == "first" else found[:, -1:])
        first = same.argmax()
        run = new & ~same
        run.flat[first] = True
        number = run.cumsum() - 1
        number[same.ravel()] = number[first]
    return torch.from_numpy(np.argwhere(run)), torch.from_numpy(number).view(len(due), points)


def _baseline(baseline: Baseline, x: Tensor) -> Tensor:
    """What takes the place of each example."""
    if isinstance(baseline, str):
        if baseline != "blur":
            raise InputError(
                f"baseline={baseline!r} is not 'blur', a number, a tensor or a function"
            )
        if x.ndim != 4:
            raise InputError(
                f"a blur needs images, found inputs of shape {tuple(x.shape)}: pass another baseline="
            )
        return blur(x)
    found = baseline(x) if callable(baseline) else torch.as_tensor(baseline, dtype=torch.float64)
    if not x.is_floating_point() and (found != found.to(x)).any():
        raise InputError(f"the baseline is {found!r}, which inputs of dtype {x.dtype} cannot hold")
    try:
        return found.detach().to(x).expand_as(x)
    except RuntimeError as error:
        raise InputError(
            f"the baseline has shape {tuple(found.shape)}, which does not fit inputs {tuple(x.shape)}"
        ) from error


def blur(x: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Images under RISE's blur: a Gaussian cut at four σ and folded into ``size`` pixels, zeros around the image."""
    reach = int(4 * sigma + 0.5)
    away = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weight = torch.exp(-(away**2) / (2 * sigma**2))
    place = (away.long() + size // 2) % (2 * size)
    place = torch.where(
        place < size, place, 2 * size - 1 - place
    )  # reflected, as SciPy filters a lone pixel
    line = torch.zeros(size, dtype=torch.float64).index_add_(0, place, weight / weight.sum()).to(x)
    channels = x.shape[1]
    for shape in ((size, 1), (1, size)):
        kernel = line.view(1, 1, *shape).expand(channels, -1, -1, -1)
        x = F.conv2d(x, kernel, padding=(shape[0] // 2, shape[1] // 2), groups=channels)
    return x


def _numbers(places: int) -> list[int]:
    """Up to sixteen numbers of pixels from 1 to 0.8 of all."""
    most = max(1.0, 0.8 * places)
    return sorted({round(most ** (k / 15)) for k in range(16)})


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, row by row; NaN where one does not vary."""
    a, b = (
        one / one.abs().amax(1, keepdim=True) for one in (a, b)
    )  # no squares that over- or underflow
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    varies = [one.abs().amax(1) > 1e-7 for one in (a, b)]
    found = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.where(varies[0] & varies[1], found, torch.nan)


def _told(baseline: Baseline) -> Any:
    return f"tensor {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else baseline
