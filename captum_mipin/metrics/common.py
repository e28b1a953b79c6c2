"""What all metrics share: asking any method for its maps, batch by batch, reducing them to heat, running the model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from captum.attr import Attribution
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin.errors import InputError, TargetError, TrainingModeError
from captum_mipin.targets import per_example

#: A Captum ``Attribution``; its ``attribute`` with options bound by ``functools.partial``; a callable (inputs, target) or, with
#: further arguments, (inputs, target, additional_forward_args) → maps; or the maps themselves, one an example.
Method = Attribution | Callable[..., Any] | Tensor | tuple[Tensor, ...]
Inputs = Tensor | tuple[Tensor, ...]
Pairs = list[tuple[Tensor, Tensor]]
Reduction = (
    Literal["sum", "relu_of_sum", "sum_of_relu", "sum_of_abs", "max_of_abs"]
    | Callable[[Tensor], Tensor]
)

#: Examples that a method is asked for at once, unless ``batch_size`` says.
EXPLAINED = 32
#: Elements of the inputs that a model is given at once, unless ``batch_size`` says: on the CPU, where more run out of its
#: caches, but at least so many examples; and elsewhere.
ELEMENTS, LEAST, ELEMENTS_ELSEWHERE = 1 << 17, 4, 1 << 25

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda maps: maps.sum(1),
    "relu_of_sum": lambda maps: maps.sum(1).relu(),
    "sum_of_relu": lambda maps: maps.relu().sum(1),
    "sum_of_abs": lambda maps: maps.abs().sum(1),
    "max_of_abs": lambda maps: maps.abs().amax(1),
}


@dataclass(frozen=True)
class Examples:
    """Inputs with the target and the further arguments of each.

    Attributes:
        inputs: Tensors (examples, ...).
        alone: Whether the inputs were one tensor, not a tuple.
        target: One for all, or a list or integer tensor of one an example.
        extras: ``additional_forward_args``; tensors as long as the batch have one row an example.
    """

    inputs: tuple[Tensor, ...]
    alone: bool
    target: Any
    extras: tuple[Any, ...]

    @classmethod
    def of(cls, inputs: Inputs, target: Any, additional_forward_args: Any = None) -> "Examples":
        """What users give, checked."""
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            raise InputError(
                f"inputs are a {type(inputs).__name__}, expected a torch.Tensor or a tuple of them"
            )
        lengths = {len(x) if x.ndim else 0 for x in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise InputError(
                f"inputs hold {sorted(lengths)} examples, expected the same number in each, and at least one"
            )
        target = torch.from_numpy(target) if isinstance(target, np.ndarray) else target
        many = (
            len(target)
            if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1)
            else None
        )
        if many is not None and many != len(tensors[0]):
            raise TargetError(f"{many} targets were given for {len(tensors[0])} examples")
        extras = additional_forward_args
        further = extras if isinstance(extras, tuple) else () if extras is None else (extras,)
        return cls(tensors, not isinstance(inputs, tuple), target, further)

    def __len__(self) -> int:
        return len(self.inputs[0])

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs[0].device

    @property
    def given(self) -> Inputs:
        """The inputs as they were given."""
        return self.inputs[0] if self.alone else self.inputs

    @property
    def targets(self) -> list[Any]:
        """The target of each, as it was given."""
        found = self.target.tolist() if isinstance(self.target, Tensor) else self.target
        return found if isinstance(found, list) and len(found) == len(self) else [found] * len(self)

    @property
    def alike(self) -> bool:
        """Whether all have the same target and further arguments."""
        targets = self.targets
        return all(target == targets[0] for target in targets) and not any(
            map(self._one_each, self.extras)
        )

    def one(self, metric: str) -> Tensor:
        """The one input tensor."""
        if not self.alone and len(self.inputs) != 1:
            raise InputError(f"{metric} needs one input tensor, but there are {len(self.inputs)}")
        return self.inputs[0]

    def pick(self, index: Tensor) -> "Examples":
        """Some of them, in any order and number."""
        return self.pick_for(index, *(x[index.to(x.device)] for x in self.inputs))

    def pick_for(self, index: Tensor, *inputs: Tensor) -> "Examples":
        """Other inputs, with the targets and further arguments of some of the examples."""
        one_each = isinstance(self.target, list)
        target = (
            [self.target[i] for i in index.tolist()] if one_each else self._row(self.target, index)
        )
        return Examples(
            inputs, self.alone, target, tuple(self._row(extra, index) for extra in self.extras)
        )

    def with_inputs(self, *inputs: Tensor) -> "Examples":
        """Others in their place."""
        return Examples(inputs, self.alone, self.target, self.extras)

    def with_target(self, target: Any) -> "Examples":
        """The same with another target."""
        return Examples.of(self.given, target, self.extras)

    def chunks(self, size: int) -> Iterator["Examples"]:
        """Some after the other."""
        for index in torch.arange(len(self)).split(size):
            yield self.pick(index)

    def _row(self, value: Any, index: Tensor) -> Any:
        return value[index.to(value.device)] if self._one_each(value) else value

    def _one_each(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self)


def explain(
    method: Method, examples: Examples, batch_size: int | None = None
) -> tuple[Tensor, ...]:
    """The maps of a method, one tensor for each that it gives, detached."""
    size = explained_at_once(batch_size)
    if isinstance(method, (Tensor, tuple)):
        return _maps(method, examples)
    found = [ask(method, part) for part in examples.chunks(size)]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def ask(method: Method, examples: Examples) -> tuple[Tensor, ...]:
    """The maps of some examples, in one call."""
    by_name = owner(method) is not None
    call = method.attribute if isinstance(method, Attribution) else method
    if not callable(call):
        raise InputError(
            f"the method is a {type(method).__name__}, expected a Captum Attribution, a callable, or maps"
        )
    with torch.inference_mode(False), torch.enable_grad():
        mine = tuple(
            x.detach().clone() for x in examples.inputs
        )  # whatever happens to them, the user's stay as they are
        if by_name:  # Captum's gradient methods warn of inputs that do not require a gradient
            mine = tuple(x.requires_grad_(x.is_floating_point()) for x in mine)
        inputs = mine[0] if examples.alone else mine
        if by_name:
            extras = {"additional_forward_args": examples.extras} if examples.extras else {}
            found = call(inputs, target=examples.target, **extras)
        else:
            found = call(inputs, examples.target, *((examples.extras,) if examples.extras else ()))
    return _maps(found, examples)


def _maps(found: Any, examples: Examples) -> tuple[Tensor, ...]:
    maps = found if isinstance(found, tuple) else (found,)
    for one in maps:
        if not isinstance(one, Tensor):
            raise InputError(
                f"the method gave a {type(one).__name__}, expected a tensor of maps, or a tuple of them"
            )
        if one.ndim < 2 or len(one) != len(examples):
            raise InputError(
                f"the maps have shape {tuple(one.shape)}, expected one map for each of {len(examples)} examples"
            )
    return tuple(one.detach() for one in maps)


def owner(method: Any) -> Attribution | None:
    """The ``Attribution`` that a method is, or whose bound method it is."""
    while isinstance(method, partial):
        method = method.func
    found = method if isinstance(method, Attribution) else getattr(method, "__self__", None)
    return found if isinstance(found, Attribution) else None


def name(method: Any) -> str:
    """What to call a method."""
    found = owner(method)
    if found is not None:
        return str(found.get_name())
    return (
        "maps"
        if isinstance(method, (Tensor, tuple))
        else getattr(method, "__name__", type(method).__name__)
    )


def model_of(method: Any, model: Callable[..., Any] | None) -> Callable[..., Any]:
    """The model that is explained.

    Raises:
        InputError: It was not given, and a mere callable does not tell.
        TrainingModeError: It is in training mode, so that it would give other outputs each time.
    """
    found = owner(method)
    if model is None and found is None:
        raise InputError(f"{name(method)} does not tell which model it explains: pass model=")
    model = found.forward_func if model is None and found is not None else model
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise TrainingModeError(
            f"{type(model).__name__} is in training mode: call eval() on it first"
        )
    assert model is not None
    return model


def raw_outputs(model: Callable[..., Any], examples: Examples) -> Tensor:
    """All that the model gives for some examples, in one call."""
    with torch.no_grad():
        found = model(*examples.inputs, *examples.extras)
    if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != len(examples):
        what = (
            f"a tensor of shape {tuple(found.shape)}"
            if isinstance(found, Tensor)
            else f"a {type(found).__name__}"
        )
        raise InputError(
            f"the model gives {what}, expected one tensor (examples, ...): where it gives several, pass a function as model= "
            "that selects one"
        )
    return found


Score = Literal["logit", "softmax"] | Callable[[Tensor], Tensor]


def outputs(model: Callable[..., Any], examples: Examples, score: Score = "logit") -> Tensor:
    """(examples,) float64: what the model gives for each example's target.

    Args:
        model: The model.
        examples: Given to it in one call.
        score: The "logit", its "softmax" over the classes, or a function of all outputs: a score of each class, or one of all.
    """
    return pick_target(raw_outputs(model, examples), examples.target, score)


def pick_target(found: Tensor, target: Any, score: Score = "logit") -> Tensor:
    """(examples,) float64: the entry of each example's target."""
    if score == "softmax":
        if found.ndim < 2 or found.shape[1] < 2:
            raise InputError(
                f"outputs of shape {tuple(found.shape)} have no classes to take a softmax over: use score='logit'"
            )
        found = found.softmax(1)
    elif callable(score):
        found = score(found)
    elif score != "logit":
        raise InputError(
            f"score={score!r} is not one of 'logit', 'softmax', or a function of the outputs"
        )
    if callable(score) and found.ndim == 1:  # one score an example
        return found.double()
    index = per_example(target, found)
    if all(i is index[0] for i in index):  # one for all
        return found.movedim(0, -1)[index[0]].double()
    rows = torch.arange(len(found), device=found.device)
    return found[
        (rows, *(torch.tensor(i, device=found.device) for i in zip(*index, strict=True)))
    ].double()


def explained_at_once(batch_size: int | None) -> int:
    """How many examples a method is asked for."""
    at_least("batch_size", 1 if batch_size is None else batch_size, 1)
    return batch_size or EXPLAINED


def rows_at_once(x: Tensor, batch_size: int | None) -> int:
    """How many inputs a model is given at once."""
    at_least("batch_size", 1 if batch_size is None else batch_size, 1)
    on_cpu, size = x.device.type == "cpu", max(1, prod(x.shape[1:]))
    return batch_size or max(LEAST, (ELEMENTS if on_cpu else ELEMENTS_ELSEWHERE) // size)


def all_outputs(
    model: Callable[..., Any], examples: Examples, batch_size: int | None, score: Score = "logit"
) -> Tensor:
    """:func:`outputs` of any number of examples."""
    size = rows_at_once(examples.inputs[0], batch_size)
    return torch.cat([outputs(model, part, score) for part in examples.chunks(size)])


def heat(maps: Tensor, like: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Maps without channels, float64: (examples, *places), for maps (examples, features) each its own place.

    Args:
        maps: (examples, channels, *places), or without channels where ``like`` has one dimension more.
        like: The inputs.
        reduction: Over channels: "sum", "relu_of_sum" (the paper's wording), "sum_of_relu", "sum_of_abs", "max_of_abs", or a
            function of the maps.
    """
    maps = maps.double()
    if callable(reduction):
        found = reduction(maps)
        if len(found) != len(maps) or found.ndim < 2:
            raise InputError(
                f"the reduction gives shape {tuple(found.shape)} for maps of shape {tuple(maps.shape)}"
            )
        return found.detach().double()
    if reduction not in _REDUCTIONS:
        raise InputError(
            f"reduction={reduction!r} is not one of {', '.join(map(repr, _REDUCTIONS))}, or a function"
        )
    without = maps.ndim == 2 or maps.ndim == like.ndim - 1
    return _REDUCTIONS[reduction](maps.unsqueeze(1) if without else maps)


def resized(heat: Tensor, size: Sequence[int]) -> Tensor:
    """Heat (examples, *places) at another resolution: linear interpolation, as Captum's ``LayerAttribution.interpolate``.

    Raises:
        InputError: It has other dimensions, or, but for two places, other proportions: tokens and their features, say.
    """
    places = tuple(heat.shape[1:])
    if places == tuple(size):
        return heat
    modes = {1: "linear", 2: "bilinear", 3: "trilinear"}
    if len(places) != len(size) or len(size) not in modes:
        raise InputError(f"maps with places {places} cannot be laid over {tuple(size)}")
    scale = places[0] / size[0]
    if any(abs(scale * whole - part) > 2 for whole, part in zip(size, places, strict=True)):
        raise InputError(
            f"maps with places {places} have other proportions than {tuple(size)}: rearrange tokens as they lie"
        )
    found = F.interpolate(
        heat.unsqueeze(1), tuple(size), mode=modes[len(size)], align_corners=False
    ).squeeze(1)
    unit = found.flatten(1).abs().amax(1).view(-1, *(1,) * len(size)) * 2.0**-40
    return torch.where(
        unit > 0, (found / unit).round() * unit, found
    )  # what rounding parted is equal again


def hottest_first(flat: Tensor, random: Tensor) -> Tensor:
    """Places (examples, places) from hot to cold, those of the same heat by ``random``."""
    places = _in_order(-flat)
    heat = flat.gather(1, places)
    colder = heat[:, 1:] != heat[:, :-1]
    if colder.all():  # no ties
        return places
    level = F.pad(colder.long(), (1, 0)).cumsum(1)
    chance = ranked(random).gather(1, places)
    return places.gather(1, _in_order(level * flat.shape[1] + chance))


def ranked(x: Tensor, stable: bool = True) -> Tensor:
    """Where each entry stands in the order of its row, equal ones as ``x.argsort(stable=stable)`` has them."""
    order = _in_order(x)
    ordered = x.gather(1, order)
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if tied.any():
        order[tied] = x[tied].argsort(stable=stable)
    return inverted(order)


def _in_order(x: Tensor) -> Tensor:
    """``x.argsort()``, equal ones in any order: on the CPU by NumPy, several times as fast."""
    return (
        torch.from_numpy(np.argsort(x.numpy(), axis=1)) if x.device.type == "cpu" else x.argsort()
    )


def inverted(order: Tensor) -> Tensor:
    """Where each entry stands in the order of its row."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )


def finite_rows(*tensors: Tensor) -> Tensor:
    """(examples,) on the CPU: whether all of an example's entries are finite."""
    return torch.stack([t.reshape(len(t), -1).isfinite().all(1).cpu() for t in tensors]).all(0)


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or one with seed 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def uniform(generator: torch.Generator, *shape: int, device: torch.device | None = None) -> Tensor:
    """Numbers in [0, 1), the same on whatever device they are wanted."""
    return torch.rand(shape, generator=generator, device=generator.device).to(
        device or generator.device
    )


def disturbances(
    part: Examples, samples: int, draw: Callable[[Sequence[int]], Tensor]
) -> Callable[[Inputs], Pairs]:
    """Inputs, each repeated as Captum does it → these with random numbers, the next at each call, however they are split."""
    drawn = [[draw((samples, *x.shape[1:])) for x in part.inputs] for _ in range(len(part))]
    noise = [
        torch.stack(own).to(x) for own, x in zip(zip(*drawn, strict=True), part.inputs, strict=True)
    ]
    done = 0

    def following(x: Inputs) -> Pairs:
        nonlocal done
        tensors = x if isinstance(x, tuple) else (x,)
        start, done = done, done + len(tensors[0]) // len(part)
        return [
            (one, by[:, start:done].flatten(0, 1)) for one, by in zip(tensors, noise, strict=True)
        ]

    return following


def described(
    method: Any, examples: Examples, maps: Sequence[Tensor] = (), **more: Any
) -> dict[str, Any]:
    """The settings that all results have."""
    target = examples.target
    target = target.tolist() if isinstance(target, Tensor) else target
    shapes = ", ".join("x".join(map(str, one.shape[1:])) for one in maps)
    told = {
        key: getattr(value, "__name__", type(value).__name__) if callable(value) else value
        for key, value in more.items()
    }
    return {"method": name(method), "target": target, **({"maps": shapes} if maps else {}), **told}


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a number below the least that an option can have."""
    if not value >= least:
        raise InputError(f"{name}={value!r} must be at least {least}")


def option(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse a value that an option does not have."""
    if value not in known:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
