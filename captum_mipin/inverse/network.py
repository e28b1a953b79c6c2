"""The inverse network, fitted to a model and data layer by layer, from the output to the input."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_mipin.calls import explained
from captum_mipin.errors import (
    FitError,
    InputError,
    InverseFileError,
    NotFittedError,
)
from captum_mipin.graph.modes import plain_modes
from captum_mipin.graph.signature import first_example, shapes
from captum_mipin.graph.validate import check_model, device_of, generator_kept
from captum_mipin.inverse.checkpoint import Checkpoint, FitOptions
from captum_mipin.inverse.classes import ClassInverse
from captum_mipin.inverse.data import Activations, Batches, Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.fit import Fit
from captum_mipin.inverse.lazy import Lazy
from captum_mipin.inverse.request import FitRequest, Fitted, Solver
from captum_mipin.inverse.scale import FEW, warn_of_few
from captum_mipin.inverse.state import PARTS, Origin, State, packed, unpacked
from captum_mipin.options import check_choice, check_generator, check_number
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.report import FitReport
from captum_mipin.storage.watch import Watch
from captum_mipin.targets import target_indices
from captum_mipin.types import Extras, Inputs, Output, Target


class InverseNetwork(ClassInverse):
    """MIP-IN: the inverse of a trained network, learned layer by layer, starting at the logit.

    The model is never changed; each call reads its current parameters. An inverse that was fitted
    on inputs of one size also explains inputs of other sizes, such as larger images, if the network
    accepts them and only the sizes of pooling windows, slices and paddings differ. The inverse has
    the dtype of the model, which may be half precision; sums are accumulated in float64.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits (batch, classes) or
            (batch,). It may be in ``nn.DataParallel`` or ``torch.compile``; nothing is compiled.
        layer: The module, or its name, at whose output the backward pass stops, instead of at the
            input (the paper's setting on ImageNet). Only the part of the model after this module is
            inverted, and the forward mask also applies to the module's output. The inputs may then
            be integers, for example the tokens of a text that is explained at its embedding.
        output: The output to explain, if the model returns several tensors: index, key or field of
            a tuple, list, dictionary, named tuple or dataclass; a tuple of these for nested ones.
        ridge: λ of equation 6.
        ridge_scale: The unit of λ. "relative": the mean variance of the signals; "mean": λ is added
            to their covariance; "sum": λ is added to their Gram matrix. The paper does not
            specify it.
        pooling: "shares": average pooling sends the signal back to each element by its recorded
            share of the average. "even": it sends the same signal to all elements.
        forks: The signal of a tensor that several branches use, such as the input of a residual
            block. "joint": one regression on the signals of all branches. "sum": their sum.
        precision: The dtype of products of moments. "model": the model's dtype, after centring;
            with float32, second moments are exact to a millionth of the variances. "double":
            float64.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for the forward passes of a fit: products
            with weights, and everything before ``layer``, are computed as in ``torch.autocast``.
            Features, signals and inverses keep the model's dtype.
        positions: Number of positions (int) of their maps that convolutions are fitted on, or the
            share of them (a float such as 0.1); None for all. They are drawn per batch and layer,
            and are the same for all classes. The report contains the number of rows.
        generator: Random generator that draws the positions; None to draw the same ones each time.
        sharing: "nothing": each class has its own inverse. "classes": all classes share the
            inverses of all steps but the first one (closest to the output), fitted on all pairs of
            example and class. A class that is fitted later then needs only one regression.
        solver: "exact" for least squares, "sgd" for the paper's gradient descent on convolutions.
        epochs: Number of passes of the SGD solver over the data.
        learning_rate: Learning rate of the SGD solver; None for 1 / L, where L is the largest
            curvature on the first batch.
        changed: The reaction if the model's weights have changed since the fit: "refuse" to
            explain, "warn" once per change by a
            :class:`~captum_mipin.errors.ModelChangedWarning`, or "ignore" the change, as tests with
            random weights need. Also an attribute, which files do not contain. :meth:`fit` refuses
            changed weights in any case.

    Raises:
        InputError: An option has a value that is not allowed.

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

    #: The reading of ``for_photographs`` or ``captum-mipin fit --layer photographs``; "" for other
    #: inverses. Files keep it, and it is the default reading of the command line.
    photographs = ""
    _kind = "an inverse network"

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: nn.Module | str | None = None,
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
        check_number("epochs", epochs, 1, whole=True)
        if learning_rate is not None:
            check_number("learning_rate", learning_rate, above=True)
        if solver == "sgd" and (sharing == "classes" or positions is not None):
            option = "positions=" if sharing == "nothing" else 'sharing="classes"'
            raise InputError(f'{option} needs solver="exact", got solver="sgd": change one of them')
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
        """The quality of the inverse of each layer for each fitted target; prints as a table."""
        if self._state is None:
            return FitReport(())
        lazy = dict.fromkeys(self._state.lazy.values())
        fits = [self._state.fitted, *(fitted for classes in lazy for fitted in classes.ready)]
        return FitReport(tuple(row for fitted in fits for row in fitted.layers))

    def to(self, device: torch.device | str) -> "InverseNetwork":
        """Move the fitted inverses to a device and return self.

        Without this, each call copies the inverses that it needs to the device of the model.
        """
        # id → (original, copy): a tensor that several classes share is copied only once
        moved: dict[int, tuple[Tensor, Tensor]] = {}

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

    @explained
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
        """Fit the inverses of classes (algorithm 1); classes that are fitted already stay fitted.

        Every class is fitted on all examples. If the fit fails, this object does not change.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader``
                of (images, labels), or any iterable of batches with the input first.
            targets: One class or several, in the form of Captum's ``target``; None for all outputs.
            unpack: Function batch → (inputs, additional_forward_args), for other kinds of batches.
            batch_size: Number of examples per batch, for data that does not come in batches.
            memory: Bytes for activations stored between layers, and as many again for moments. If
                they do not suffice, each layer takes one more pass over the data.
            progress: True to show a progress bar.
            checkpoint: File that stores the finished layers; it is removed at the end. If it
                exists, its fit is continued: pass the same data in the same batches.
            distributed: True to fit together with the other processes of ``torch.distributed``.
                Each uses a part of the data, chosen by a ``DistributedSampler`` if there is one.
            lazy: True to store the data's activations and fit a class when it is first explained,
                with the same result. Such an inverse cannot be saved or copied.
            keep: With ``lazy``, an empty folder for the activations; None for memory.
            cache: With ``lazy``, bytes for fitted classes; the least recently used are dropped.

        Raises:
            FitError: The data is empty or not finite, its shape changes, the output of a class is
                constant, or memory is short.
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
        """Return the state after a fit, and its checkpoint, which the caller has to remove."""
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
                        f"expected {shapes(before.origin.signature)} as in earlier fits: fit a new "
                        "InverseNetwork on this data"
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
            warn_of_few(batches.scale.examples if processes.count == 1 else FEW)
            head = self._head(origin)
            origin = replace(origin, scale=batches.scale.moments())
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
        """Return the batches of this process, and the first of them.

        A process without data returns the first batch of another process, for its shapes.
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
                raise FitError("the data yields no batch, expected at least one: pass more data")
        return batches, first

    def _shared_inverses(self, surrogate: Surrogate, chosen: Sequence[Target]) -> Fitted:
        """Return for new classes the inverses of earlier classes, except that of the first step."""
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
                "are explained, and cannot be saved: fit the classes to save without lazy=True"
            )
        tensors, content = packed(state.fitted)
        scale = {} if state.origin.scale is None else {"scale": state.origin.scale}
        more = {**scale, **({"photographs": self.photographs} if self.photographs else {})}
        return tensors, {**self._head(state.origin), **more, **content, "unfinished": None}

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "InverseNetwork":
        if content["unfinished"] is not None:
            raise InverseFileError(
                "the file is the checkpoint of an unfinished fit: continue it with "
                "fit(checkpoint=...), then save the result"
            )
        inverse = cls._rebuild(content, model)
        inverse.photographs = str(content.get("photographs", ""))
        inverse._state = State(Origin.from_content(content, model), unpacked(tensors, content))
        return inverse


def _check_positions(positions: float | None) -> None:
    """Raise InputError unless ``positions`` is a positive int, a share in (0, 1] or None."""
    share = isinstance(positions, float) and 0 < positions <= 1
    if positions is not None and not share and (type(positions) is not int or positions < 1):
        raise InputError(
            f"positions={positions!r} must be an int of at least 1, a float above 0 and at most "
            "1, or None"
        )


def _seed(generator: torch.Generator | None) -> int:
    """Return a random seed drawn from ``generator``; 0 without a generator."""
    if generator is None:
        return 0
    check_generator(generator)
    return int(torch.randint(2**62, (), generator=generator))
