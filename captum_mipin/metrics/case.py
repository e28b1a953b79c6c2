"""A case: a method and examples; computes the method's maps and the model's outputs for them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any, Literal, TypedDict

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_mipin.errors import CaptureError, InputError, MIPINError, TargetError
from captum_mipin.metrics.examples import Examples, Inputs
from captum_mipin.options import check_generator, check_number, for_method, is_network, type_of
from captum_mipin.targets import per_example
from captum_mipin.training import check_evaluation

#: A Captum ``Attribution``; its ``attribute`` with options bound by ``functools.partial``; a
#: callable (inputs, target) -> maps, or with further arguments (inputs, target,
#: additional_forward_args) -> maps; or the maps themselves, one per example.
Method = Attribution | Callable[..., Any] | Tensor | tuple[Tensor, ...]
Model = Callable[..., Any]
Score = Literal["logit", "softmax"] | Callable[[Tensor], Tensor]

#: Number of examples per call of a method if the user passes no ``batch_size``.
_EXPLAINED = 32
#: Number of input elements per call of the model if the user passes no ``batch_size``. On the CPU a
#: larger batch does not fit the processor's caches, and convolutions get slower.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 17, 1 << 25
#: Least number of examples per call of the model, even if an example has many elements.
_LEAST_EXAMPLES = 2


class Options(TypedDict, total=False):
    """Keyword arguments that every metric takes.

    Attributes:
        model: The explained model; by default the method's ``forward_func``.
        additional_forward_args: Further arguments of the model; a tensor as long as the batch has
            one row per example, unless the model takes it only as shared by all.
        generator: The only source of random numbers; by default a generator with seed 0.
        batch_size: Number of examples per call of the method, and of inputs per call of the model;
            by default 32 examples, and as many inputs as the processor's caches hold.

    Examples:
        >>> from captum_mipin.metrics import deletion
        >>> options: Options = {"model": lambda x: x.sum(1), "batch_size": 8}
        >>> x = torch.tensor([[3.0, 2.0, 1.0]])
        >>> deletion(x, x, score="logit", **options).curves.tolist()
        [[6.0, 3.0, 1.0, 0.0]]
    """

    model: Model | None
    additional_forward_args: Any
    generator: torch.Generator | None
    batch_size: int | None


@dataclass(frozen=True, eq=False)
class Case:
    """A method and the examples that it explains.

    Attributes:
        method: The method.
        examples: The examples.
        user_model: The model that the user passed, or None.
        generator: The only source of random numbers.
        batch_size: The option ``batch_size`` that the user passed, or None.
    """

    method: Method
    examples: Examples
    user_model: Model | None
    generator: torch.Generator
    batch_size: int | None

    @classmethod
    def of(
        cls,
        method: Method,
        inputs: Inputs,
        target: Any,
        *,
        model: Model | None = None,
        additional_forward_args: Any = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> "Case":
        """Return a case made from the arguments of a metric.

        Raises:
            InputError: The model is not callable, ``batch_size`` is below 1, or the inputs are not
                tensors of equal length.
            TargetError: The number or shape of the targets does not fit the examples.
        """
        if batch_size is not None:
            check_number("batch_size", batch_size, 1, whole=True)
        if model is not None and not callable(model):
            raise InputError(
                f"model is {type_of(model)}, expected a torch.nn.Module or a function "
                "inputs -> outputs: pass the network"
            )
        if is_network(method):
            check_method(method)
        examples = Examples.of(inputs, target, additional_forward_args)
        case = cls(method, examples, model, seeded(generator), batch_size)
        # extras as long as the batch have a row per example if the model takes them so
        shared = examples.shared or (not case._takes(shared=False) and case._takes(shared=True))
        return replace(case, examples=replace(examples, shared=shared))

    def _takes(self, shared: bool) -> bool:
        """Return True if the model takes twice an example, with all extras shared or with rows."""
        examples = replace(self.examples, shared=shared)
        try:
            raw_outputs(self.model, examples.select(torch.zeros(2, dtype=torch.long)))
        except Exception:  # of any type: the model is the user's
            return False
        return True

    @cached_property
    def maps(self) -> tuple[Tensor, ...]:
        """The maps, detached: one tensor (examples, ...) per input.

        Raises:
            InputError: The method is not callable, or it does not give one map per example.
        """
        # the user passed maps instead of a method
        if isinstance(self.method, (Tensor, tuple)):
            return _checked(self.method, self.examples)
        with self.reasons():
            maps = [explain(self.method, batch) for _, batch in self.batches()]
        return tuple(torch.cat(parts) for parts in zip(*maps, strict=True))

    @contextmanager
    def reasons(self) -> Iterator[None]:
        """Replace errors in a block by those of inputs or targets that do not fit the model."""
        try:
            yield
        except MIPINError:
            raise
        except Exception as error:  # of any type: the method is the user's
            if problem := self._problem():
                raise problem from error
            raise

    @cached_property
    def model(self) -> Model:
        """The model that the method explains.

        Raises:
            InputError: The user passed no model, and the method has no ``forward_func``.
            TrainingModeError: The model is in training mode, in which its outputs may be random.
        """
        model = self.user_model
        if model is None:
            attribution = attribution_of(self.method)
            if attribution is None:
                if isinstance(self.method, (str, type)) or is_network(self.method):
                    check_method(self.method)
                raise InputError(
                    f"the method {method_name(self.method)} does not contain its model, expected "
                    "a Captum Attribution or the argument model: pass model="
                )
            model = attribution.forward_func
        if isinstance(model, nn.Module):
            check_evaluation(model)
        return model

    def _problem(self) -> MIPINError | None:
        """Return the error of inputs or targets that do not fit the model; None if they do."""
        try:
            per_example(self.examples.target, self.outputs(self.examples))
        except (CaptureError, TargetError) as error:
            return error
        except Exception:  # of any type: the error of the method says more
            return None
        return None

    @property
    def rows_per_call(self) -> int:
        """Number of inputs per call of the model."""
        x = self.examples.inputs[0]
        elements = _CPU_ELEMENTS if x.device.type == "cpu" else _GPU_ELEMENTS
        return self.batch_size or max(_LEAST_EXAMPLES, elements // max(1, prod(x.shape[1:])))

    @property
    def examples_per_call(self) -> int:
        """Number of examples per call of the method."""
        return self.batch_size or _EXPLAINED

    def batches(self) -> Iterator[tuple[Tensor, Examples]]:
        """Yield the examples in batches for the method, each with the indices of its examples."""
        for index in torch.arange(len(self.examples)).split(self.examples_per_call):
            yield index, self.examples.select(index)

    def outputs(self, examples: Examples) -> Tensor:
        """Return the model's outputs (examples, ...), computed in batches."""
        index = torch.arange(len(examples)).split(self.rows_per_call)
        return torch.cat([raw_outputs(self.model, examples.select(part)) for part in index])

    def scores(self, examples: Examples, score: Score = "logit") -> Tensor:
        """Return the scores (examples,), float64, of the targets, computed in batches."""
        return target_scores(self.outputs(examples), examples.target, score)

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform random numbers in [0, 1) on the inputs' device.

        They are drawn on the generator's device: they do not depend on the inputs' device.
        """
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return drawn.to(self.examples.inputs[0].device)

    def settings(self, maps: Sequence[Tensor] = (), **options: Any) -> dict[str, Any]:
        """Return the settings of a result: method, target, shapes of the maps, and options.

        Functions are replaced by their names, because their addresses differ from run to run.
        """
        target = self.examples.target
        settings = {
            "method": method_name(self.method),
            "target": target.tolist() if isinstance(target, Tensor) else target,
        }
        if maps:
            settings["maps"] = ", ".join("x".join(map(str, m.shape[1:])) for m in maps)
        for key, value in options.items():
            settings[key] = method_name(value) if callable(value) else value
        return settings


def attribution_of(method: Any) -> Attribution | None:
    """Return the ``Attribution`` of a method: the method itself, or the owner of a bound method.

    Returns:
        None if the method does not belong to an ``Attribution``.
    """
    while isinstance(method, partial):
        method = method.func
    candidate = method if isinstance(method, Attribution) else getattr(method, "__self__", None)
    return candidate if isinstance(candidate, Attribution) else None


def method_name(method: Any) -> str:
    """Return the name of a method, or of a function, for results and errors."""
    attribution = attribution_of(method)
    if attribution is not None:
        return str(attribution.get_name())
    if isinstance(method, (Tensor, tuple)):
        return "maps"
    while isinstance(method, partial):
        method = method.func
    return getattr(method, "__name__", type(method).__name__)


def check_method(method: Any) -> None:
    """Raise InputError unless a method is an ``Attribution``, a function or maps."""
    known = isinstance(method, (Tensor, tuple, Attribution)) or callable(method)
    if isinstance(method, type) or is_network(method) or not known:
        raise InputError(
            f"the method is {type_of(method)}, expected a Captum Attribution, a function (inputs, "
            f"target) -> maps, or maps: {for_method(method)}"
        )


def explain(method: Any, examples: Examples) -> tuple[Tensor, ...]:
    """Return the maps of a method, detached, by one call: one tensor (examples, ...) per input.

    Raises:
        InputError: The method is not callable, or it does not give one map per example.
    """
    check_method(method)
    call = method.attribute if isinstance(method, Attribution) else method
    with torch.inference_mode(False), torch.enable_grad():
        # copy the inputs: a method that writes to them would change the user's tensors
        inputs = tuple(x.detach().clone() for x in examples.inputs)
        if attribution_of(method) is None:
            extras = (examples.extras,) if examples.extras else ()
            maps = call(examples.as_passed(inputs), examples.target, *extras)
        else:
            # Captum's gradient methods warn about inputs without requires_grad; the parameters of
            # Captum's methods have no common order, so that they are passed by name
            inputs = tuple(x.requires_grad_(x.is_floating_point()) for x in inputs)
            named = {"additional_forward_args": examples.extras} if examples.extras else {}
            maps = call(examples.as_passed(inputs), target=examples.target, **named)
    return _checked(maps, examples)


def _checked(maps: Any, examples: Examples) -> tuple[Tensor, ...]:
    """Return maps as a tuple of detached tensors.

    Raises:
        InputError: The maps are not tensors with one map per example.
    """
    maps = maps if isinstance(maps, tuple) else (maps,)
    for tensor in maps:
        if not isinstance(tensor, Tensor):
            raise InputError(
                f"the method gave {type_of(tensor)}, expected a tensor of maps, or a tuple "
                "of tensors: return one map per example"
            )
        if tensor.ndim < 2 or len(tensor) != len(examples):
            raise InputError(
                f"the maps have shape {tuple(tensor.shape)}, expected one map for each of "
                f"{len(examples)} examples: pass maps (examples, ...)"
            )
    return tuple(tensor.detach() for tensor in maps)


def raw_outputs(model: Model, examples: Examples) -> Tensor:
    """Return the model's outputs (examples, ...), computed in one call.

    Raises:
        InputError: The model does not return one tensor with a row per example.
    """
    try:
        with torch.no_grad():
            output = model(*examples.inputs, *examples.extras)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in examples.inputs)
        raise CaptureError(
            f"the model cannot run on inputs of shape {shapes}: {error}. Pass a batch of inputs "
            "with which model(inputs) runs; one example is x.unsqueeze(0)"
        ) from error
    if isinstance(output, Tensor) and output.ndim and len(output) == len(examples):
        return output
    is_tensor = isinstance(output, Tensor)
    returned = f"tensor of shape {tuple(output.shape)}" if is_tensor else type(output).__name__
    count = f"a batch of {len(examples)} input{'s' * (len(examples) != 1)}"
    raise InputError(
        f"for {count} the model gives a {returned}, expected one tensor with a row for each input: "
        "pass as model= a function that returns such a tensor"
    )


def target_scores(output: Tensor, target: Any, score: Score = "logit") -> Tensor:
    """Return the scores (examples,), float64, of the targets.

    Args:
        output: Outputs of the model (examples, ...).
        target: The targets, as Captum takes them.
        score: "logit"; "softmax" over dimension 1; or a function outputs -> scores, either one
            per class or one per example.

    Raises:
        InputError: The score is not known, or the outputs have no classes for a softmax.
    """
    if callable(score):
        output = _user_scores(score, output)
        if output.ndim == 1:
            return output.double()
    elif score == "softmax":
        if output.ndim < 2 or output.shape[1] < 2:
            raise InputError(
                f"outputs have shape {tuple(output.shape)}, but a softmax needs (examples, "
                "classes): use score='logit'"
            )
        output = output.softmax(1)
    elif score != "logit":
        raise InputError(
            f"score={score!r} is not known: pass 'logit', 'softmax', or a function of the outputs"
        )
    # score_i = y[i, c_i], c_i the target of example i
    index = torch.tensor(per_example(target, output), device=output.device, dtype=torch.long)
    rows = torch.arange(len(output), device=output.device)
    return output[(rows, *index.T)].double()


def _user_scores(score: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Return the scores that a user's function gives for outputs.

    Args:
        score: The user's function outputs -> scores.
        output: Outputs (inputs, ...) of the model for one batch of inputs.

    Raises:
        InputError: The function does not give a tensor with one row per input.
    """
    scores = score(output)
    if isinstance(scores, Tensor) and scores.ndim and len(scores) == len(output):
        return scores
    is_tensor = isinstance(scores, Tensor)
    returned = f"tensor of shape {tuple(scores.shape)}" if is_tensor else type(scores).__name__
    raise InputError(
        f"the function score= gives a {returned} for a batch of outputs of shape "
        f"{tuple(output.shape)}, expected a tensor with a row for each row of outputs: do not "
        "reduce dimension 0, the batch"
    )


def seeded(generator: torch.Generator | None = None) -> torch.Generator:
    """Return the user's generator, or the default of metrics: a new one with seed 0."""
    check_generator(generator)
    return generator or torch.Generator().manual_seed(0)
