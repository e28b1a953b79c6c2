"""The inverse network: fitted to a model and data, it sends a class's logit back to the input or to a layer."""

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_mipin.errors import (
    CaptureError,
    FitError,
    InputError,
    InverseFileError,
    ModelChangedError,
    ModelChangedWarning,
    NotFittedError,
)
from captum_mipin.graph.cache import Graphs
from captum_mipin.graph.capture import TURNS, CapturedGraph, capture
from captum_mipin.graph.marks import value_of
from captum_mipin.graph.modules import unwrapped
from captum_mipin.graph.signature import Signature, first_example, pick, plain
from captum_mipin.graph.validate import (
    as_extras,
    as_inputs,
    check_finite,
    check_inputs,
    check_model,
    check_output,
    device_of,
    finite,
    generator_kept,
    like,
)
from captum_mipin.inverse.data import Activations, Batches, Unpack
from captum_mipin.inverse.distributed import Processes
from captum_mipin.inverse.fit import Fit
from captum_mipin.inverse.lazy import Lazy
from captum_mipin.inverse.request import FitRequest, Fitted, Settings, Solver
from captum_mipin.inverse.state import PARTS, State, head_of, joined, packed, share_rows, unpacked
from captum_mipin.propagation.fingerprint import difference, structure
from captum_mipin.propagation.runtime import Inverses, Run, seed
from captum_mipin.propagation.surrogate import Surrogate
from captum_mipin.regression.ridge import RidgeScale
from captum_mipin.report import FitReport
from captum_mipin.rules import MIPIN, Inverse, Options, Rule, table
from captum_mipin.storage import files
from captum_mipin.storage.saved import Saved
from captum_mipin.storage.watch import Watch, fingerprint
from captum_mipin.targets import per_example, target_index, target_indices, target_label
from captum_mipin.types import Extras, Inputs, Output, Target
from captum_mipin.version import __version__


@dataclass(frozen=True)
class Explanation:
    """What one pass forward and some passes back yield.

    Attributes:
        features: Values where the passes end, at the inputs or a layer's output, each (batch, ...).
        signals: For each pass back one tuple like ``features``.
        output: (batch,) the explained output Φ_c(x) of each example.
    """

    features: Inputs
    signals: tuple[Inputs, ...]
    output: Tensor


class InverseNetwork(Saved):
    """MIP-IN: an inverse of a trained network, learned layer by layer from a class's logit back to the input.

    Nothing of the model is touched, now or later; the network's parameters are read as they are at each call.

    An inverse fitted on inputs of one size explains those of others, such as larger images, where the network takes them
    and nothing but sizes of pooling windows, slices and paddings differs there; else it says which operation does. It is
    kept in the dtype of the model, which may be half precision; sums are always gathered in float64.

    Args:
        model: A ``torch.nn.Module`` in evaluation mode that returns logits (batch, classes), or (batch,). Behind
            ``nn.DataParallel`` or ``torch.compile``, the module itself is taken, and nothing is compiled.
        layer: Stop at the output of this module of the model instead of the input: only what lies above it is
            inverted (the paper's setting on ImageNet), and the forward mask applies to its output as well. The inputs
            may then be integers: a text is explained at the output of its embedding.
        output: Where the model returns several tensors, which of them: the index, key or field's name in a tuple, list,
            dictionary, named tuple or dataclass; a tuple of them leads to one inside another.
        ridge: λ of equation 6.
        ridge_scale: What λ is measured in: "relative" to the mean variance of the signals, or against the "mean" or
            the "sum" of their Gram matrix; the paper does not say.
        pooling: Average pooling sends the signal back by recorded "shares" of the average, or spreads it "even".
        forks: What comes back to a tensor from several branches (residual connections, say) is learned in one "joint"
            regression, or is the "sum" of what each brings.
        precision: Products of moments are taken, once centred, in the dtype of the "model", whose float32 keeps second moments
            to a millionth of the variances, or in "double"; they are summed and solved in float64 in either case.
        autocast: ``torch.bfloat16`` or ``torch.float16``, for the forward passes of a fit: products with weights, and all that
            lies below ``layer``, are then computed as ``torch.autocast`` does. Features, signals and inverses keep the model's
            dtype, and explanations are made without it.
        positions: Fit convolutions on so many positions of their maps, or on such a share of them, as 0.1; None for all. They
            are drawn anew for each batch and layer, for all classes alike; where windows tile a map, all are taken. The
            inverse is then an estimate: the report says from how many rows.
        generator: What draws positions, when the InverseNetwork is made; by default always the same.
        sharing: Each class has an inverse of its own, or all "classes" share one below the first step, fitted on all pairs of
            example and class together. A class fitted later then takes one regression, and takes what is below as it is.
        solver: "exact" least squares, or for convolutions the paper's "sgd".
        epochs: Passes of the SGD solver over the data.
        learning_rate: Of the SGD solver; by default the inverse of the largest curvature on the first batch.
        changed: "refuse" to explain once the model's weights differ from those it was fitted to; "warn" of it, once a change,
            by a :class:`~captum_mipin.ModelChangedWarning`; "ignore" it, for tests that make the weights random. Also an
            attribute, and not kept in files. Classes are always fitted to the weights of the first fit alone.

    Raises:
        InputError: An option out of its range.

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
        for name, value, known in (
            ("changed", changed, ("refuse", "warn", "ignore")),
            ("ridge_scale", ridge_scale, ("relative", "mean", "sum")),
            ("pooling", pooling, ("shares", "even")),
            ("forks", forks, ("joint", "sum")),
            ("precision", precision, ("model", "double")),
            ("sharing", sharing, ("nothing", "classes")),
            ("solver", solver, ("exact", "sgd")),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, known))}")
        if not 0 <= ridge < float("inf"):
            raise InputError(f"ridge={ridge!r} must be a number of at least 0")
        if epochs < 1:
            raise InputError(f"epochs={epochs!r} must be at least 1")
        check_output(output)
        self.model = unwrapped(model)
        self.layer = None if layer is None else unwrapped(layer)
        self.output = output
        self.changed = changed
        if sharing == "classes" and solver == "sgd":
            raise InputError('sharing="classes" needs solver="exact"')
        share = isinstance(positions, float) and 0 < positions <= 1
        if positions is not None and not share and (type(positions) is not int or positions < 1):
            raise InputError(
                f"positions={positions!r} must be a number of at least 1, or a share above 0 and up to 1"
            )
        if positions is not None and solver == "sgd":
            raise InputError('positions= needs solver="exact"')
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise InputError(
                f"autocast={autocast!r} is not one of None, torch.bfloat16, torch.float16"
            )
        if learning_rate is not None and not learning_rate > 0:
            raise InputError(f"learning_rate={learning_rate!r} must be above 0")
        if not isinstance(generator, torch.Generator | None):
            raise InputError(
                f"generator is a {type(generator).__name__}, expected a torch.Generator"
            )
        self.settings = Settings(
            ridge, ridge_scale, pooling == "shares", solver, epochs, learning_rate, forks == "joint", precision == "double",
            sharing == "classes", None if autocast is None else str(autocast).removeprefix("torch."), positions,
            int(torch.randint(2**62, (), generator=generator)) if generator else 0,
        )  # fmt: skip
        self._state: State | None = None
        self._graphs = Graphs[Surrogate]()

    @property
    def targets(self) -> list[int | tuple[int, ...] | None]:
        """The classes that can be explained, as ``target`` takes them; empty before the first fit."""
        return (
            [target_label(target) for target in (*self._state.fitted.inverses, *self._state.lazy)]
            if self._state
            else []
        )

    @property
    def report(self) -> FitReport:
        """How well each layer was inverted, for each target that is fitted now; prints as a table."""
        state = self._state
        if state is None:
            return FitReport(())
        later = [fitted for lazy in dict.fromkeys(state.lazy.values()) for fitted in lazy.ready]
        return FitReport(
            (*state.fitted.layers, *(row for fitted in later for row in fitted.layers))
        )

    def to(self, device: torch.device | str) -> "InverseNetwork":
        """Move the fitted inverses to a device; returns self. Otherwise each call moves what it needs."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # what classes share stays shared

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, tensor.to(device)
            return moved[id(tensor)][1]

        for inverses in self._fitted().fitted.inverses.values():
            for key, inverse in inverses.items():
                parts = (getattr(inverse, part) for part in PARTS)
                inverses[key] = Inverse(*(None if part is None else move(part) for part in parts))  # type: ignore[arg-type]  # as above
        return self

    # ------------------------------------------------------------------------------------------------- fit

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

        All examples are used for every class. They are gone through once, or once a layer, in any chunks and any order. If the
        fit fails or is interrupted, everything is as it was before.

        Args:
            data: A tensor or tuple of tensors (the model's inputs), a ``Dataset``, a ``DataLoader`` of (images,
                labels), or any iterable of batches. Of a batch that is a tuple, the first element is the input.
            targets: The class or classes, as Captum's ``target``; None for all outputs.
            unpack: Batch → (inputs, additional_forward_args), where a batch is anything else.
            batch_size: For data that does not come in batches.
            memory: Bytes that may be taken by what is kept of the data between the layers, and by as many for moments. Data
                of which more would have to be kept is gone through once a layer; moments for which there is no room take
                further passes.
            progress: Show a progress bar with layer, classes and rows a second.
            checkpoint: A file that keeps what is done after each layer. If it is there already, the fit that wrote
                it is taken up where it stopped; it is removed at the end. Give the same data in the same batches.
            distributed: Fit together with the other processes of ``torch.distributed``'s default group, which all make
                this call: each goes through a share of the data, and all end with the same inverse. A tensor, a ``Dataset``
                or a ``DataLoader`` is shared out, unless it has a ``DistributedSampler``; of other iterables, which have to
                be the same everywhere, each process takes every so many batches. The checkpoint is that of the first.
            lazy: Go through the data once and keep what the inverted part starts from; each class is fitted when it is first
                explained, and has the same inverse as otherwise. As long as ``memory`` allows, what follows from it on the way
                up is kept as well. Such an inverse cannot be saved or copied.
            keep: With ``lazy``, an empty folder to keep activations in, rather than in memory. It may be deleted afterwards.
            cache: With ``lazy``, bytes that fitted classes may take: those least recently explained are dropped, and fitted
                again, to the same bits, when asked for.

        Returns:
            self

        Raises:
            FitError: The data cannot be used: empty, not finite, changing shape, a class with constant output. Or a layer's
                regression is larger than the machine's memory, as that of a convolution with 32 x 32 taps.
            CaptureError: The model cannot be captured, or uses an operation without a rule.
            TargetError: A target that the model does not have.
            ModelChangedError: The model changed since earlier classes were fitted.
            InverseFileError: The checkpoint is damaged, or of another fit.
            RuleError: A registered rule gives another value than its operation, or a signal of another shape, or none.
        """
        before, processes = self._state, Processes(distributed)
        with processes.fail_together():
            model = check_model(self.model)
            if before is not None:
                self._check_unchanged(before)
            self._check_arguments(batch_size, cache, keep, lazy, checkpoint, distributed)
        with (
            generator_kept(),
            torch.inference_mode(False),
            torch.autocast(device_of(model).type, enabled=False),
        ):
            batches, (inputs, extras) = self._data(data, batch_size, unpack, processes)
            with processes.fail_together():
                graph, surrogate = self._surrogate(inputs, extras, self.layer)
                state = self._begun(before, inputs, extras, graph, surrogate)
                chosen = target_indices(targets, state.dims)
            processes.check_same("classes", (chosen, self.targets))
            processes.check_same("inputs", (state.signature, state.structure))
            processes.check_same("weights", state.watch.fingerprint)
            processes.check_same("settings", (self.settings, memory))
            if self.settings.sharing and before is not None:
                others = next(iter(before.fitted.inverses.values()))
                below = {key: others[key] for key in surrogate.learned[1:]}
                state.fitted.inverses.update((target, dict(below)) for target in chosen)
            kept = Activations(keep, memory) if lazy else None
            example = first_example(inputs, extras, graph.shared)
            request = FitRequest(
                model=model, captured=graph, surrogate=surrogate, batches=batches, targets=chosen,
                settings=self.settings, memory=memory, progress=progress, processes=processes,
                example=example, activations=kept,
            )  # fmt: skip
            fit = Fit(request)
            try:
                unfinished = {"classes": [list(target) for target in chosen], "data": fit.scan()}
            except BaseException:
                if kept is not None:
                    kept.clear()
                raise
            with processes.fail_together():
                if checkpoint is not None and processes.rank == 0 and Path(checkpoint).exists():
                    state.fitted = self._resume(checkpoint, state, unfinished)
            state.fitted = processes.gather(state.fitted if processes.rank == 0 else None)[0]

            def written(fitted: Fitted) -> None:
                with processes.fail_together():
                    if checkpoint is not None and processes.rank == 0:
                        files.save(checkpoint, *self._content(state, unfinished))

            if lazy:
                state.lazy = dict.fromkeys(chosen, Lazy(fit, cache, state.watch.marks))
            else:
                state.fitted = fit.run(state.fitted, written)
        if before is not None:
            state.fitted = joined(before.fitted, state.fitted, chosen)
            state.lazy = {
                **{key: value for key, value in before.lazy.items() if key not in chosen},
                **state.lazy,
            }
        share_rows(state.fitted)
        self._state = state
        if checkpoint is not None and processes.rank == 0:
            Path(checkpoint).unlink(missing_ok=True)
        return self

    def _check_arguments(
        self,
        batch_size: int,
        cache: int,
        keep: str | os.PathLike[str] | None,
        lazy: bool,
        checkpoint: str | os.PathLike[str] | None,
        distributed: bool,
    ) -> None:
        """Whether the arguments of a fit go together."""
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size!r} must be at least 1")
        if cache < 0:
            raise InputError(f"cache={cache!r} must be at least 0")
        if keep is not None and not lazy:
            raise InputError("keep= is where activations are kept for lazy=True")
        if lazy and (distributed or checkpoint is not None or self.settings.sharing):
            raise InputError(
                "lazy=True fits one class at a time, when it is explained: not with distributed=True, checkpoint= or "
                'sharing="classes"'
            )
        if distributed and self.settings.solver == "sgd":
            raise InputError(
                'solver="sgd" goes from batch to batch in one process: fit without distributed=True'
            )

    def _data(
        self, data: Any, batch_size: int, unpack: Unpack | None, processes: Processes
    ) -> tuple[Batches, tuple[Inputs, Extras]]:
        """The batches of this process, and the first of them; a process without data learns of its shape from another."""
        with processes.fail_together():
            shard = processes.rank, processes.count
            batches = Batches(
                data,
                batch_size,
                unpack,
                device_of(self.model),
                explained=self.layer is None,
                shard=shard,
            )
            first = next(iter(batches), None)
        if not all(processes.gather(first is not None)):
            first = processes.first(first)
        with processes.fail_together():
            if first is None:
                raise FitError("the data yields no batch: nothing to fit on")
        return batches, first

    def _begun(
        self,
        before: State | None,
        inputs: Inputs,
        extras: Extras,
        graph: CapturedGraph,
        surrogate: Surrogate,
    ) -> State:
        """What is known of a fit before it goes through the data; the data has to be like that of the fit before."""
        signature = Signature.of(inputs, extras, graph.shared)
        if before is not None and before.signature != signature:
            raise InputError(
                "the data has another shape, dtype or further arguments than that of earlier fits"
            )
        dims = tuple(int(n) for n in value_of(graph.output).shape[1:])
        watch = before.watch if before is not None else Watch(self.model)
        example = first_example(inputs, extras, graph.shared)
        return State(Fitted(), dims, signature, structure(graph, surrogate.rules), *example, watch)

    # ------------------------------------------------------------------------------------------------- explain

    def source_signal(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        mask_input: bool = False,
    ) -> Any:
        """S: what of the input the class's logit carries (equation 5).

        Args:
            inputs: Tensor (batch, ...) or tuple of such.
            target: The class, as Captum's ``target``; may differ between examples.
            additional_forward_args: Further arguments of the model.
            local: Adapt the inverse to each example (equation 9); without, the global view.
            mask_input: Apply equation 9 to the input as well. The paper does so only where a layer is explained.

        Returns:
            Shaped, typed and placed like ``inputs``.

        Raises:
            NotFittedError: A class that was not fitted.
            InputError, TargetError, CaptureError, ModelChangedError: As their descriptions say.
        """
        found = self.explain(
            as_inputs(inputs),
            target,
            as_extras(additional_forward_args),
            biases=(True,),
            local=local,
            mask=mask_input,
        )
        return like(inputs, found.signals[0])

    def distractor(
        self,
        inputs: Tensor | Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        local: bool = True,
        mask_input: bool = False,
    ) -> Any:
        """X − S: what of the input the class's logit does not carry; everything as in :meth:`source_signal`."""
        signal = as_inputs(
            self.source_signal(
                inputs, target, additional_forward_args, local=local, mask_input=mask_input
            )
        )
        return like(
            inputs, tuple(x.detach() - s for x, s in zip(as_inputs(inputs), signal, strict=True))
        )

    def class_attribution(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """The global, unmasked map of a class (figure 3): the attribution of one unit of its logit.

        Nothing of any example enters: no masks, and pooling spreads evenly. Gates that multiply, attention weights, and the
        switches of ``where`` and ``maximum``, are those of an input of zeros.

        Args:
            target: The class.
            additional_forward_args: Where the model takes such; by default those of the data it was fitted on.

        Returns:
            (1, ...) like one example of the model's input, or of the layer the inverse stops at; a tuple for several.

        Raises:
            NotFittedError: A class that was not fitted.
        """
        state = self._fitted()
        extras = (
            state.extras if additional_forward_args is None else as_extras(additional_forward_args)
        )
        if extras is None:
            raise InputError(
                "the model takes further arguments, which files do not hold: pass additional_forward_args"
            )
        chosen = target_index(target, state.dims)
        found = self._back(
            state, state.example, [target_label(chosen)], extras, biases=(False,), options=self._options(local=False),
            mask=False, layer=self.layer, unit=True,
        )  # fmt: skip
        return found.signals[0] if len(found.signals[0]) > 1 else found.signals[0][0]

    def information(self, target: Any = None, additional_forward_args: Any = None) -> Any:
        """The global map of a class (section 3.2): bits that each feature shares with its source signal.

        Without masks the source signal S = g(Y) is linear in the class's logit, so that the two are one variable as far as
        information goes. Over the data of the fit, feature and signal are taken as jointly Gaussian, as the paper does:
        −½ log₂(1 − ρ²), ρ their correlation. Where the signal is constant, there is none.

        Args:
            target, additional_forward_args: As for :meth:`class_attribution`.

        Returns:
            (1, ...) bits, like one example of the model's input, or of the layer the inverse stops at; a tuple for several.

        Raises:
            NotFittedError: A class that was not fitted.

        Examples:
            >>> x = torch.randn(200, 2)
            >>> model = nn.Linear(2, 1).eval()
            >>> _ = torch.nn.init.ones_(model.weight)
            >>> bits = InverseNetwork(model).fit(x, progress=False).information()
            >>> bool((bits > 0.2).all() and (bits < 0.9).all())  # 0.5 for independent features of equal variance
            True
        """
        state = self._fitted()
        chosen = target_index(target, state.dims)
        slopes = as_inputs(self.class_attribution(target, additional_forward_args))
        found = state.fitted.information.get(chosen)
        if found is None:
            with (
                torch.inference_mode(False),
                torch.autocast(device_of(self.model).type, enabled=False),
            ):
                found = state.lazy[chosen].information(chosen, self._weights_of(state))
        if [b.shape for b in found] != [a.shape for a in slopes]:
            raise InverseFileError(
                "the file that was loaded holds information of another shape than the features have"
            )
        bits = tuple(b * (a != 0).to(b) for a, b in zip(slopes, found, strict=True))
        return bits if len(bits) > 1 else bits[0]

    def explain(
        self,
        inputs: Inputs,
        target: Any,
        extras: Extras = (),
        *,
        biases: Sequence[bool] = (False,),
        local: bool = True,
        mask: bool = False,
        layer: nn.Module | None = None,
        evidence: bool = False,
    ) -> Explanation:
        """Send the logits of ``target`` back, once for each of ``biases``: True for S, False for A.

        Args:
            inputs: Tensors (batch, ...).
            target: As Captum's ``target``.
            extras: Further arguments of the model.
            biases: With or without the biases of the inverses: one pass back each, from one pass forward.
            local: Use masks, switches and shares of each example. Gates that multiply, attention weights, and the switches of
                ``where`` and ``maximum``, always are each example's own.
            mask: Apply equation 9 to the inputs as well; to the output of ``layer`` it always is, if ``local``.
            layer: Stop at this module's output instead of the inputs.
            evidence: Send back what at each place speaks for the target, of an output that is an average over places.

        Raises:
            NotFittedError, InputError, TargetError, CaptureError, ModelChangedError: As their descriptions say.
        """
        state = self._fitted()
        check_inputs(inputs, explained=self.layer is None)
        check_finite(inputs)
        if layer is None and self.layer is not None:
            raise NotFittedError(
                f"this inverse stops at layer {self._path(self.layer)!r}, it does not reach the input: use "
                "LayerMIPINAttribution, or fit InverseNetwork(model) without layer="
            )
        if evidence and not (local and self.settings.shares):
            raise InputError(
                "evidence=True is told by places, which local=False and pooling='even' leave out"
            )
        mask = local and (mask or layer is not None)
        return self._back(
            state, inputs, target, extras, biases, self._options(local, evidence), mask, layer
        )

    def _back(
        self,
        state: State,
        inputs: Inputs,
        target: Any,
        extras: Extras,
        biases: Sequence[bool],
        options: Options,
        mask: bool,
        layer: nn.Module | None,
        unit: bool = False,
    ) -> Explanation:
        check_model(self.model)
        if self.changed == "warn" and state.watch.newly_changed(self.model):
            warnings.warn(
                "the model's weights have changed since the inverse was fitted, so that it explains a mixture of both models; "
                f"their fingerprint is {fingerprint(self.model)[:12]} now",
                ModelChangedWarning,
                stacklevel=_outside(),
            )
        elif self.changed not in ("warn", "ignore"):
            self._check_unchanged(state)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(inputs[0].device.type, enabled=False),
        ):
            inputs, extras = plain((inputs, extras))
            graph, surrogate = self._surrogate(inputs, extras, layer)
            dims = value_of(graph.output).shape[1:]
            targets = per_example(target, torch.empty(len(inputs[0]), *dims, device="meta"))
            self._check_steps(state, surrogate, targets)
            order = sorted(
                range(len(targets)), key=targets.__getitem__
            )  # each class's examples one after the other
            mixed = targets[order[0]] != targets[order[-1]]
            if mixed:
                targets = [targets[index] for index in order]
                inputs, extras = pick(
                    inputs, extras, torch.tensor(order, device=inputs[0].device), graph.shared
                )
            average = surrogate.average() if options.evidence else None
            run = Run(surrogate.steps, replace(options, evidence=False), evidence=average)
            with TURNS.explaining():
                output = surrogate(run, graph.values(self.model, inputs, extras))
                start = seed(output, targets)
                sent = seed(output, targets, unit=True) if unit or options.evidence else start
                sources = [run.sources[index] for index in range(surrogate.starts)]
            run.inverses, run.groups = self._inverses(
                state, graph, surrogate, inputs, extras, targets, sources, layer
            )
            with TURNS.explaining():
                back = torch.tensor(order, device=output.device).argsort() if mixed else slice(None)
                signals: list[Inputs] = []
                for bias in biases:
                    run.options = replace(run.options, bias=bias)
                    found = torch.autograd.grad(output, sources, sent, retain_graph=len(biases) > 1)
                    if mask:
                        found = tuple(s * (x != 0) for s, x in zip(found, sources, strict=True))
                    if not all(finite(s) for s in found):
                        raise InputError(
                            "the model's output or the signal overflows for these inputs: it contains NaN or Inf"
                        )
                    signals.append(tuple(s.detach()[back].contiguous() for s in found))
            features = tuple(x.detach()[back] for x in sources)
            explained = start.flatten(1).sum(1) if start.ndim > 1 else start
            return Explanation(features, tuple(signals), explained[back])

    def _inverses(
        self,
        state: State,
        graph: CapturedGraph,
        surrogate: Surrogate,
        inputs: Inputs,
        extras: Extras,
        targets: Sequence[Target],
        sources: Sequence[Tensor],
        layer: nn.Module | None,
    ) -> tuple[Mapping[Target, Inverses], Sequence[tuple[Target, slice]]]:
        """Which inverses the examples of a batch have, and whose is whose: each class's own."""
        found = self._classes(state, targets)
        for inverses in found.values():
            missing = [key for key in surrogate.learned if key not in inverses]
            if missing:
                raise self._beyond(missing, layer)
        return found, _groups(targets)

    def _beyond(self, missing: Sequence[str], layer: nn.Module | None) -> NotFittedError:
        """What is said where something is to be explained that the inverse does not lead to."""
        here = (
            "reaches the input"
            if self.layer is None
            else f"stops at layer {self._path(self.layer)!r}"
        )
        there = "the input" if layer is None else f"layer {self._path(layer)!r}"
        return NotFittedError(
            f"this inverse {here}, and has nothing for {', '.join(missing[:4])} on the way to {there}. Explain what it leads "
            f"to, or fit another with layer= at {there}"
        )

    def _options(self, local: bool, evidence: bool = False) -> Options:
        return Options(local=local, shares=self.settings.shares, evidence=evidence)

    def _classes(self, state: State, targets: Sequence[Target]) -> dict[Target, Inverses]:
        """The inverses of classes, some of which may have to be fitted first."""
        wanted = dict.fromkeys(targets)
        found: dict[Target, Inverses] = {
            t: state.fitted.inverses[t] for t in wanted if t not in state.lazy
        }
        for lazy in dict.fromkeys(state.lazy[target] for target in wanted if target in state.lazy):
            of_it = [target for target in wanted if state.lazy.get(target) is lazy]
            found.update(lazy.get(of_it, lambda: self._weights_of(state)))
        return found

    def _weights_of(self, state: State) -> list[Any]:
        """What tells that weights may lie elsewhere than before; they have to be those that the data was looked at with."""
        if state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since its activations were kept, so that no class can be fitted to them any "
                "more: call fit again"
            )
        return state.watch.marks

    def _check_steps(self, state: State, surrogate: Surrogate, targets: Sequence[Target]) -> None:
        """Whether every class can be explained."""
        unknown = [
            target
            for target in targets
            if target not in state.fitted.inverses and target not in state.lazy
        ]
        if unknown:
            raise self._unknown(unknown[0])

    def _unknown(self, target: Target) -> NotFittedError:
        return NotFittedError(
            f"no inverse was fitted for target {target_label(target)}; fitted are {self.targets}. "
            f"Add it with fit(data, targets=[{target_label(target)}])"
        )

    # ------------------------------------------------------------------------------------------------- files

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
        return self._content(state)

    def _content(
        self, state: State, unfinished: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, content = packed(state.fitted)
        return tensors, {**self._head(state), **content, "unfinished": unfinished}

    @classmethod
    def _unpack(
        cls, tensors: dict[str, Tensor], content: dict[str, Any], model: nn.Module
    ) -> "InverseNetwork":
        if content["unfinished"] is not None:
            raise InverseFileError(
                "the file is the checkpoint of an unfinished fit; continue it with fit(checkpoint=...)"
            )
        layer = None if content["layer"] is None else model.get_submodule(content["layer"])
        inverse = cls(model, layer=layer, output=content["output"])
        inverse.settings = Settings(**content["settings"])
        inverse._state = State(unpacked(tensors, content), *head_of(content, model))
        return inverse

    def _head(self, state: State) -> dict[str, Any]:
        """What a file says of the model, of how it was captured, and of the options."""
        return {
            "version": __version__,
            "model": type(self.model).__name__,
            "rules": sorted(table().keys() - MIPIN.keys()),
            "fingerprint": state.watch.fingerprint,
            "layer": None if self.layer is None else self._path(self.layer),
            "output": self.output,
            "settings": asdict(self.settings),
            "signature": state.signature.to_json(),
            "structure": state.structure,
            "inputs": [
                (tuple(x.shape[1:]), str(x.dtype).removeprefix("torch.")) for x in state.example
            ],
            "extras": state.extras != (),
            "dims": state.dims,
        }

    def _resume(
        self, path: str | os.PathLike[str], state: State, unfinished: dict[str, Any]
    ) -> Fitted:
        """What an interrupted fit had done."""
        tensors, content = files.load(path)
        same = {**json.loads(json.dumps(self._head(state))), **unfinished}  # as files have it
        del same["version"], same["model"]  # told, not compared
        found = {**content, **(content["unfinished"] or {})}
        other = [name for name, value in same.items() if found.get(name) != value]
        if other:
            raise InverseFileError(
                f"the checkpoint {os.fspath(path)!r} is of another fit: its {', '.join(other)} differ"
            )
        device = device_of(self.model)
        return unpacked({name: t.to(device) for name, t in tensors.items()}, content)

    # ------------------------------------------------------------------------------------------------- parts

    def _surrogate(
        self, inputs: Inputs, extras: Extras, layer: nn.Module | None
    ) -> tuple[CapturedGraph, Surrogate]:
        """The graph and the surrogate for inputs of this kind, kept for the next call."""
        rules, state = table(), self._state

        def accept(signature: Signature, graph: CapturedGraph) -> None:
            if state and structure(graph, rules) != state.structure:
                self._check_alike(state, signature, graph, inputs, extras, rules)

        def find() -> Signature:
            fitted = state.signature if state else None
            hint = (lambda: self._way_out(state)) if state else str
            return self._graphs.find(
                inputs, extras, self._capture, fitted=fitted, accept=accept, hint=hint
            )

        def build(graph: CapturedGraph, start: str | None) -> Surrogate:
            return Surrogate(
                graph, rules, start, calibrate=layer is self.layer, joint=self.settings.joint
            )

        return self._graphs.build(self.model, layer, rules, find, build)

    def _capture(self, inputs: Inputs, extras: Extras, shared: bool) -> CapturedGraph:
        return capture(self.model, inputs, extras, shared, output=self.output, explained=False)

    def _check_alike(
        self,
        state: State,
        signature: Signature,
        graph: CapturedGraph,
        inputs: Inputs,
        extras: Extras,
        rules: Mapping[str, Rule],
    ) -> None:
        """Whether a graph of inputs of another size than those fitted on differs in that alone.

        The graph of those fitted on tells it from one of a changed model.
        """
        fitted = None if signature == state.signature else self._graphs.get(state.signature)
        if fitted is None and signature != state.signature:
            extras = (
                first_example(inputs, extras, graph.shared)[1]
                if state.extras is None
                else state.extras
            )
            shared = Signature.of(state.example, extras, True) == state.signature
            with suppress(CaptureError):
                fitted = self._capture(state.example, extras, shared)
        if fitted is None or structure(fitted, rules) != state.structure:
            raise ModelChangedError(
                "the model computes something else than the one the inverse was fitted to, or a registered rule has changed: "
                "fit a new InverseNetwork"
            )
        other = difference(fitted, graph, rules)
        if other is not None:
            raise CaptureError(
                f"for inputs and further arguments {_shapes(signature)} the model computes otherwise than for those that the "
                f"inverse was fitted on, first at {other}.\n{self._way_out(state)}"
            )

    def _way_out(self, state: State) -> str:
        return (
            f"The inverse was fitted on {_shapes(state.signature)}. Give it such inputs, resized if need be, or fit another "
            "InverseNetwork on the others. A network takes any size if it pools to a fixed one (nn.AdaptiveAvgPool2d) "
            "before its dense layers."
        )

    def _fitted(self) -> State:
        if self._state is None:
            raise NotFittedError(
                "this InverseNetwork is not fitted yet: call fit(data, targets=...) first"
            )
        return self._state

    def _check_unchanged(self, state: State) -> None:
        if state.watch.changed(self.model):
            raise ModelChangedError(
                "the model's weights have changed since the inverse was fitted: fit a new InverseNetwork, or keep the old one "
                "with changed='ignore'"
            )

    def _path(self, layer: nn.Module | None) -> str:
        return next((path for path, module in self.model.named_modules() if module is layer), "")


def _outside() -> int:
    """How far up the first call lies that is not of this package, for warnings to name it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        f"{__package__}."
    ):
        frame, level = frame.f_back, level + 1
    return level


def _shapes(signature: Signature) -> str:
    return ", ".join(" ".join(leaf[1:3]) for leaf in signature.leaves)


def _groups(targets: Sequence[Target]) -> list[tuple[Target, slice]]:
    """Runs of equal targets."""
    starts = [i for i, target in enumerate(targets) if i == 0 or target != targets[i - 1]]
    return [
        (targets[a], slice(a, b)) for a, b in zip(starts, [*starts[1:], len(targets)], strict=True)
    ]
