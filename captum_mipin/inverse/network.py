"""The inverse network: fitted to a model and data, layer by layer from a class's logit back."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_mipin.errors import (
    FitError,
    InputError,
    InverseFileError,
    NotFittedError,
)
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.signature import first_example
from captum_mipin.graph.validate import check_choice, check_model, device_of, generator_kept
from captum_mipin.inverse.checkpoint import Checkpoint, FitOptions
from captum_mipin.inverse.classes import ClassInverse
from captum_mipin.inverse.data import Activations, Batches, Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.fit import Fit
from captum_mipin.inverse.lazy import Lazy
from captum_mipin.inverse.request import FitRequest, Fitted, Solver
from captum_mipin.inverse.state import PARTS, Origin, State, packed, unpacked
from captum_mipin.inverse.surrogates import shapes
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.report import FitReport
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import target_indices
from captum_mipin.types import Extras, Inputs, Output, Target


class InverseNetwork(ClassInverse):
    """MIP-IN: an inverse of a trained network, learned layer by layer from a class's logit back.

    The model is never changed; its parameters are read as they are at each call. An inverse that
    was fitted on inputs of one size explains inputs of another, such as larger images, if the
    network takes them and only sizes of pooling windows, slices and paddings differ. The inverse
    has the dtype of the model, which may be half precision; sums are gathered in float64.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits (batch, classes) or
            (batch,). It may be in ``nn.DataParallel`` or ``torch.compile``; nothing is compiled.
        layer: Stop at the output of this module instead of the input (the paper's setting on
            ImageNet). Only the part above is inverted, and the forward mask applies to the output
            of the module as well. The inputs may then be integers, as the tokens of a text that is
            explained at its embedding.
        output: Which output, if the model returns several tensors: index, key or field of a tuple,
            list, dictionary, named tuple or dataclass, or a tuple of these for nested ones.
        ridge: λ of equation 6.
        ridge_scale: The unit of λ: the mean variance of the signals ("relative"), or the "mean" or
            the "sum" of their Gram matrix. The paper does not say which.
        pooling: Average pooling sends the signal back by recorded "shares" of the average, or
            spreads it "even".
        forks: What comes back to a tensor from several branches, as of a residual connection, is
            learned in one "joint" regression, or is the "sum" of the branches.
        precision: Products of moments are taken in the dtype of the "model", after centring, or in
            "double". With float32, second moments are exact to a millionth of the variances.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for the forward passes of a fit: products
            with weights, and everything below ``layer``, are computed as in ``torch.autocast``.
            Features, signals and inverses keep the model's dtype.
        positions: Fit convolutions on this number of positions of their maps, or on this share of
            them (a float such as 0.1); None for all. They are drawn for each batch and layer, for
            all classes alike. The report tells the number of rows.
        generator: Draws the positions; without it, they are always the same.
        sharing: "nothing": each class has an inverse of its own. "classes": all classes share one
            below the first step, fitted on all pairs of example and class. A class that is fitted
            later then takes one regression.
        solver: "exact" least squares, or the paper's "sgd" for convolutions.
        epochs: Passes of the SGD solver over the data.
        learning_rate: Of the SGD solver; None for the inverse of the largest curvature on the first
            batch.
        changed: If the model's weights have changed since the fit: "refuse" to explain, "warn"
            once a change by a :class:`~captum_mipin.errors.ModelChangedWarning`, or "ignore" it, as
            tests with random weights need. Also an attribute; files do not keep it. Classes are
            always fitted to the weights of the first fit.

    Raises:
        InputError: An option is out of its range.

    Source: Deng et al., KDD 2021, section 4 and algorithm 1.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(200, 6)
        >>> inverse = InverseNetwork(model).fit(x, targets=[0, 2], progress=False)
        >>> inverse.targets
        [0, 2]
        >>> inverse.source_signal(x[:5], target=2).shape
        torch.Size([5, 6])
    """

    _kind = "an inverse network"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: nn.Module | None = None,
        output: Output = None,
        ridge: float = 1e-3,
        ridge_scale: RidgeScale = "relative",
        pooling: Literal["shares", "even"] = "shares",
        forks: Literal["joint", "sum"] = "joint",
        precision: Literal["model", "double"] = "model",
        autocast: torch.dtype | None = None,
        positions: float | None = None,
        generator: torch.Generator | None = None,
        sharing: Literal["nothing", "classes"] = "nothing",
        solver: Solver = "exact",
        epochs: int = 20,
        learning_rate: float | None = None,
        changed: Literal["refuse", "warn", "ignore"] = "refuse",
    ) -> None:
        super().__init__(
            model, layer=layer, output=output, ridge=ridge, ridge_scale=ridge_scale,
            pooling=pooling, forks=forks, precision=precision, changed=changed,
        )  # fmt: skip
        check_choice("autocast", autocast, (None, torch.bfloat16, torch.float16))
        check_choice("sharing", sharing, ("nothing", "classes"))
        check_choice("solver", solver, ("exact", "sgd"))
        if epochs < 1:
            raise InputError(f"epochs={epochs!r} must be at least 1")
        if learning_rate is not None and not learning_rate > 0:
            raise InputError(f"learning_rate={learning_rate!r} must be above 0")
        if solver == "sgd" and (sharing == "classes" or positions is not None):
            option = "positions=" if sharing == "nothing" else 'sharing="classes"'
            raise InputError(f'{option} needs solver="exact"')
        _check_positions(positions)
        self.settings = replace(
            self.settings,
            autocast=None if autocast is None else str(autocast).removeprefix("torch."),
            positions=positions,
            seed=_seed(generator),
            sharing=sharing == "classes",
            solver=solver,
            epochs=epochs,
            learning_rate=learning_rate,
        )

    @property
    def report(self) -> FitReport:
        """How well each layer was inverted for each fitted target; prints as a table."""
        if self._state is None:
            return FitReport(())
        lazy = dict.fromkeys(self._state.lazy.values())
        fits = [self._state.fitted, *(fitted for classes in lazy for fitted in classes.ready)]
        return FitReport(tuple(row for fitted in fits for row in fitted.layers))

    def to(self, device: torch.device | str) -> "InverseNetwork":
        """Move the fitted inverses to a device and return self; else each call moves them."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that classes share stay shared

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, tensor.to(device)
            return moved[id(tensor)][1]

        for inverses in self._fitted().fitted.inverses.values():
            for key, inverse in inverses.items():
                tensors = {part: getattr(inverse, part) for part in PARTS}
                moves = {part: move(t) for part, t in tensors.items() if t is not None}
                inverses[key] = replace(inverse, **moves)
        return self

    def fit(
        self,
        data: Any,
        targets: Any = None,
        *,
        unpack: Unpack | None = None,
        batch_size: int = 256,
        memory: int = 4 << 30,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        distributed: bool = False,
        lazy: bool = False,
        keep: str | os.PathLike[str] | None = None,
        cache: int = 1 << 30,
    ) -> "InverseNetwork":
        """Learn the inverse for some classes (algorithm 1); classes fitted before are kept.

        All examples are used for every class. If the fit fails, everything is as it was before.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader``
                of (images, labels), or any iterable of batches, with the input first.
            targets: The class or classes, as Captum's ``target``; None for all outputs.
            unpack: Batch → (inputs, additional_forward_args), for batches of any other kind.
            batch_size: Examples in a batch, for data that does not come in batches.
            memory: Bytes for what is kept of the data between layers, and as many for moments. What
                does not fit is computed again, by one more pass over the data a layer.
            progress: Show a progress bar.
            checkpoint: A file for what is done after each layer. If it exists, that fit is
                continued: give the same data in the same batches. It is removed at the end.
            distributed: Fit together with the other processes of ``torch.distributed``; each goes
                through a share of the data, unless a ``DistributedSampler`` shares it out.
            lazy: Keep the data's activations, and fit a class when it is first explained, with the
                same result. Such an inverse cannot be saved or copied.
            keep: With ``lazy``, an empty folder for the activations; by default they are in memory.
            cache: With ``lazy``, bytes for fitted classes: the least recently used are dropped.

        Raises:
            FitError: The data is empty, not finite, changes its shape, or has a class with constant
                output; or a regression is larger than the machine's memory.
            CaptureError: The model cannot be captured, or uses an operation without a rule.
            TargetError: The model has no such class.
            ModelChangedError: The model has changed since earlier classes were fitted.
            InverseFileError: The checkpoint is damaged, or belongs to another fit.
            RuleError: A registered rule returns a wrong value or signal.
        """
        options = FitOptions(
            unpack=unpack, batch_size=batch_size, memory=memory, progress=progress, lazy=lazy,
            checkpoint=checkpoint, distributed=distributed, keep=keep, cache=cache,
        )  # fmt: skip
        self._state, done = self._fit(data, targets, options)
        done.remove()
        return self

    def _fit(self, data: Any, targets: Any, options: FitOptions) -> tuple[State, Checkpoint]:
        """Return the state after a fit, and its checkpoint, which is to be removed."""
        before, processes = self._state, Processes(options.distributed)
        with processes.fail_together():
            model = check_model(self.model)
            if before is not None:
                self._check_unchanged(before)
            options.check(self.settings)
        with generator_kept(), plain_modes(device_of(model)):
            batches, call = self._batches(data, options, processes)
            with processes.fail_together():
                surrogate = self._surrogate(*call, self.layer)
                watch = Watch(model) if before is None else before.origin.watch
                origin = Origin.of(surrogate.captured, *call, watch)
                if before is not None and before.origin.signature != origin.signature:
                    raise InputError(
                        f"the data has inputs and further arguments {shapes(origin.signature)}, "
                        f"that of earlier fits {shapes(before.origin.signature)}: fit a new "
                        "InverseNetwork on it"
                    )
                chosen = target_indices(targets, origin.dims)
            processes.check_same("classes", (chosen, self.targets))
            processes.check_same("inputs", (origin.signature, origin.structure))
            processes.check_same("weights", watch.fingerprint)
            processes.check_same("settings", (self.settings, options.memory))
            activations = Activations(options.keep, options.memory) if options.lazy else None
            request = FitRequest(
                model=model, surrogate=surrogate, batches=batches, targets=chosen,
                settings=self.settings, memory=options.memory, progress=options.progress,
                processes=processes, example=first_example(*call, surrogate.captured.shared),
                activations=activations,
            )  # fmt: skip
            fit = Fit(request)
            try:
                unfinished = {"classes": [list(target) for target in chosen], "data": fit.scan()}
            except BaseException:
                if activations is not None:
                    activations.clear()
                raise
            head = self._head(origin)
            checkpoint = Checkpoint(options.checkpoint, head, unfinished, processes)
            fitted = checkpoint.read(self._shared_inverses(surrogate, chosen), device_of(model))
            if options.lazy:
                lazy = dict.fromkeys(chosen, Lazy(fit, options.cache, watch.marks))
                state = State(origin, fitted, lazy)
            else:
                state = State(origin, fit.run(fitted, checkpoint.write))
        if before is not None:
            state.join(before, chosen)
        state.share_rows()
        return state, checkpoint

    def _batches(
        self, data: Any, options: FitOptions, processes: Processes
    ) -> tuple[Batches, tuple[Inputs, Extras]]:
        """Return the batches of this process, and the first one.

        A process without data takes the first batch of another one, to learn the shapes.
        """
        with processes.fail_together():
            batches = Batches(
                data,
                options.batch_size,
                options.unpack,
                device_of(self.model),
                explained=self.layer is None,
                shard=(processes.rank, processes.count),
            )
            first = next(iter(batches), None)
        if not all(processes.gather(first is not None)):
            first = processes.first(first)
        with processes.fail_together():
            if first is None:
                raise FitError("the data yields no batch: nothing to fit on")
        return batches, first

    def _shared_inverses(self, surrogate: Surrogate, chosen: Sequence[Target]) -> Fitted:
        """Return the inverses below the first step that new classes share with earlier ones."""
        if not self.settings.sharing or self._state is None:
            return Fitted()
        earlier = next(iter(self._state.fitted.inverses.values()))
        return Fitted(
            {target: {key: earlier[key] for key in surrogate.learned[1:]} for target in chosen}
        )

    @classmethod
    def _accepts(cls, content: dict[str, Any]) -> bool:
        return "unfinished" in content

    def _pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._fitted()
        if state.lazy:
            raise NotFittedError(
                f"the {len(state.lazy)} classes of fit(..., lazy=True) are fitted only when they "
                "are explained: fit those to save without lazy=True"
            )
        tensors, content = packed(state.fitted)
        return tensors, {**self._head(state.origin), **content, "unfinished": None}

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "InverseNetwork":
        if content["unfinished"] is not None:
            raise InverseFileError(
                "the file is the checkpoint of an unfinished fit: continue it with "
                "fit(checkpoint=...)"
            )
        inverse = cls._rebuild(content, model)
        inverse._state = State(Origin.from_content(content, model), unpacked(tensors, content))
        return inverse


def _check_positions(positions: float | None) -> None:
    """Raise InputError unless positions are a number, a share or None."""
    share = isinstance(positions, float) and 0 < positions <= 1
    if positions is not None and not share and (type(positions) is not int or positions < 1):
        raise InputError(
            f"positions={positions!r} must be a number of at least 1, or a share above 0 and up "
            "to 1"
        )


def _seed(generator: torch.Generator | None) -> int:
    """Return a random seed from a generator; 0 without one."""
    if generator is None:
        return 0
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}, expected a torch.Generator")
    return int(torch.randint(2**62, (), generator=generator))
