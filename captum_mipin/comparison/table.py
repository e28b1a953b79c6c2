"""Several attribution methods side by side: one table, one figure, one HTML page."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from math import isnan
from os import PathLike
from time import perf_counter
from typing import Any, Literal

import torch
from captum import attr
from torch import Tensor, nn
from torch.export.unflatten import UnflattenedModule
from tqdm.auto import tqdm

from captum_mipin import metrics as library
from captum_mipin import report
from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.comparison import page
from captum_mipin.copies import copy_memo
from captum_mipin.errors import InputError, NotFittedError
from captum_mipin.inverse.network import InverseNetwork
from captum_mipin.methods import (
    LRP,
    Deconvnet,
    DeepTaylor,
    ExcitationBackprop,
    GuidedBackprop,
    SmoothGrad,
)
from captum_mipin.metrics import Boxes, Method, Result, box_masks
from captum_mipin.metrics.case import Case, Options, attribution_of, seeded
from captum_mipin.metrics.examples import Examples
from captum_mipin.metrics.maps import heat, resized
from captum_mipin.metrics.result import Better

Metric = Callable[..., Result]
#: A metric, and one of its parts or "".
Column = tuple[str, str]

#: Metrics that ask for nothing but the maps, which are made once.
_OF_MAPS: tuple[Any, ...] = (
    library.bounding_box_accuracy, library.pointing_game, library.effective_heat_ratio, library.deletion, library.insertion,
    library.sensitivity_n, library.infidelity,
)  # fmt: skip

#: Metrics by the names that ``compare`` knows them by.
METRICS: dict[str, Metric] = {
    **{metric.__name__: metric for metric in _OF_MAPS},
    "completeness": library.completeness,
    "grid_pointing_game": library.grid_pointing_game,
    "class_sensitivity": library.class_sensitivity,
    "sensitivity_max": library.sensitivity_max,
    "randomization": library.randomization,
}


#: What the ends of a scale of colours mean, by the sign of what is drawn.
_ENDS = {
    "all": ("against", "0", "for"),
    "positive": ("0", "for"),
    "negative": ("0", "against"),
    "absolute_value": ("0", "for or against"),
}


@dataclass(frozen=True)
class Setup:
    """What methods are made of by their name.

    Attributes:
        model: A copy of the network, so that what a method leaves behind stays there.
        layer: Its layer for methods of layers.
        mipin: What explains by the fitted inverse, of the network itself.
    """

    model: nn.Module
    layer: nn.Module | None
    mipin: MIPINAttribution | LayerMIPINAttribution | None


#: Methods that can be asked for by name. Captum's DeepLift looks at modules, not at functions.
METHODS: dict[str, Callable[[Setup], Method]] = {
    "MIP-IN": lambda setup: _mipin(setup),
    "MIP-IN × gradient": lambda setup: _bound(_mipin(setup), multiply_by_gradients=True),
    "Saliency": lambda setup: attr.Saliency(setup.model),
    "Gradient": lambda setup: _bound(attr.Saliency(setup.model), abs=False),
    "Input×Gradient": lambda setup: attr.InputXGradient(setup.model),
    "Integrated Gradients": lambda setup: _bound(
        attr.IntegratedGradients(setup.model), internal_batch_size=64
    ),
    "SmoothGrad": lambda setup: SmoothGrad(setup.model),
    "DeepLift": lambda setup: _deep_lift(setup),
    "Guided Backprop": lambda setup: GuidedBackprop(setup.model),
    "Deconvnet": lambda setup: Deconvnet(setup.model),
    "LRP": lambda setup: LRP(setup.model),
    "Deep Taylor": lambda setup: DeepTaylor(setup.model),
    "Excitation Backprop": lambda setup: ExcitationBackprop(setup.model),
    "Grad-CAM": lambda setup: _bound(
        attr.LayerGradCam(setup.model, _layer(setup)), relu_attributions=True
    ),
    "Grad×Feature": lambda setup: attr.LayerGradientXActivation(setup.model, _layer(setup)),
}


@dataclass(frozen=True, eq=False)
class Row:
    """One method in a comparison.

    Attributes:
        name: Its name.
        control: Whether it is a control, which knows less than a method should.
        maps: (images, ...) as the method gave them; None if it failed.
        results: Metric → result.
        errors: What failed: metric, or "" for the method itself → why.
        seconds: For the maps.
    """

    name: str
    control: bool
    maps: Tensor | None
    results: Mapping[str, Result] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def error(self) -> str:
        """Why the method failed; empty if it did not."""
        return self.errors.get("", "")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Methods and controls on the same images, by the same metrics.

    Attributes:
        rows: Methods, then controls.
        metrics: Names of the metrics.
        images: (images, ...) explained.
        titles: What each was explained for.
    """

    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    images: Tensor
    titles: tuple[str, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not one of {', '.join(repr(row.name) for row in self.rows)}")

    def __str__(self) -> str:
        return str(self.table())

    def _repr_markdown_(self) -> str:
        """What notebooks show."""
        return str(self.table("markdown"))

    def table(
        self, form: Literal["text", "markdown", "pandas"] = "text", parts: bool = False
    ) -> Any:
        """One row a method: mean ± standard error of each metric, and how many images were scored if not all.

        Args:
            form: "text", "markdown", or "pandas" for a ``DataFrame`` with mean, standard error and n in columns of their own.
            parts: Show the parts of each result as well, such as positive APC or SSIM.

        Raises:
            InputError: Another form.
            ImportError: pandas is not installed.
        """
        if form == "pandas":
            return self._frame(parts)
        if form not in ("text", "markdown"):
            raise InputError(f"form={form!r} is not one of 'text', 'markdown', 'pandas'")
        columns = self._columns(parts)
        header = ["method", *map(self._heading, columns)]
        cells = [[row.name, *(self._cell(row, column) for column in columns)] for row in self.rows]
        if form == "markdown":
            lines = [header, ["---"] * len(header), *cells]
            lines = [
                [" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines
            ]
            drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        else:
            drawn = report.table(header, cells)
        failed = self._failed()
        return "\n".join([drawn, *([""] if failed else []), *failed])

    def figure(
        self,
        methods: Sequence[str] | None = None,
        images: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Images × methods, drawn by Captum's ``visualize_image_attr``: blue speaks for the target, red against it.

        A legend below says so, of whatever colours ``cmap`` and ``sign`` ask for, unless Captum draws its own.

        Args:
            methods: Names of the rows to show, by default all that have maps.
            images: Numbers of the images to show, by default the first eight.
            **options: Of ``visualize_image_attr``, instead of ``method="heat_map"``, ``sign="all"``, ``cmap="RdBu"``: for
                example ``method="blended_heat_map"``.

        Returns:
            A ``matplotlib.figure.Figure``, which notebooks show; ``savefig`` writes it. pyplot knows nothing of it.

        Raises:
            ImportError: matplotlib is not installed.
            InputError: There are no images, but other inputs.
        """
        try:
            from captum.attr import visualization

            from captum_mipin.comparison.figure import Figure
        except ImportError as error:
            raise ImportError("a figure needs matplotlib: pip install matplotlib") from error
        rows = (
            [self[name] for name in methods]
            if methods is not None
            else [row for row in self.rows if row.maps is not None]
        )
        chosen = range(min(8, len(self.images))) if images is None else images
        pictures = page.pictures(self.images)
        drawn = Figure(
            figsize=(1.4 * (len(rows) + 1), 1.5 * len(chosen) + 0.4), layout="constrained"
        )
        axes = drawn.subplots(len(chosen), len(rows) + 1, squeeze=False)
        settings = {
            "method": "heat_map",
            "sign": "all",
            "cmap": "RdBu",
            **options,
            "use_pyplot": False,
        }
        for place, (line, number) in enumerate(zip(axes, chosen, strict=True)):
            line[0].imshow(pictures[number].numpy())
            line[0].set_ylabel(self.titles[number], fontsize=8)
            for axis, row in zip(line[1:], rows, strict=True):
                found = self._heat(row, number)
                if isinstance(found, str):
                    axis.text(0.5, 0.5, found, ha="center", va="center", transform=axis.transAxes)
                else:
                    visualization.visualize_image_attr(
                        found.unsqueeze(2).numpy(),
                        pictures[number].numpy(),
                        plt_fig_axis=(drawn, axis),
                        **settings,
                    )
            for axis, title in zip(line, ["image", *(row.name for row in rows)], strict=True):
                axis.set_xticks([])
                axis.set_yticks([])
                if place == 0:
                    axis.set_title(title, fontsize=8)
        if not settings.get("show_colorbar"):
            _legend(drawn, axes, settings["sign"])
        return drawn

    def save_html(
        self,
        path: str | PathLike[str],
        title: str = "Attributions side by side",
        images: Sequence[int] | None = None,
        parts: bool = False,
    ) -> None:
        """Write one page that needs nothing else: the table, which sorts, and the maps over the images, with a slider.

        Args:
            path: The file.
            title: Its heading.
            images: Numbers of the images to show, by default the first 24; the table is of all.
            parts: As for :meth:`table`.

        Raises:
            InputError: There are no images, but other inputs.
        """
        asked = self._columns(parts)
        columns = [page.Column(self._heading(column), self._better(column)) for column in asked]
        scores = [
            page.Line(
                row.name,
                row.control,
                row.error,
                tuple((self._cell(row, c), _mean(row, c)) for c in asked),
            )
            for row in self.rows
        ]
        chosen = list(range(min(24, len(self.images))) if images is None else images)
        shown, titles = (
            page.pictures(self.images[chosen]),
            [self.titles[number] for number in chosen],
        )
        grid = [
            (row.name, [self._heat(row, number) for number in chosen])
            for row in self.rows
            if row.maps is not None
        ]
        notes = [
            str(result).splitlines()[0] for row in self.rows for result in row.results.values()
        ]
        page.write(
            path,
            title,
            len(self.images),
            columns,
            scores,
            shown,
            titles,
            grid,
            notes + self._failed(),
        )

    def to_dict(self) -> dict[str, Any]:
        """All but images and maps, as what JSON can hold."""
        return {
            "images": len(self.images),
            "titles": list(self.titles),
            "metrics": list(self.metrics),
            "rows": [
                {
                    "name": row.name, "control": row.control, "seconds": row.seconds, "errors": dict(row.errors),
                    "results": {metric: result.to_dict() for metric, result in row.results.items()},
                }
                for row in self.rows
            ],
        }  # fmt: skip

    def _failed(self) -> list[str]:
        """What failed, rows of the same error together."""
        rows: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for metric, why in row.errors.items():
                rows.setdefault((metric, why), []).append(row.name)
        return [
            f"{metric or 'failed'} ({', '.join(names)}): {why}"
            for (metric, why), names in rows.items()
        ]

    def _columns(self, parts: bool) -> list[Column]:
        """Each metric, and if asked for the parts that any of its results has."""
        found: list[Column] = []
        for metric in self.metrics:
            found.append((metric, ""))
            results = (
                [row.results[metric] for row in self.rows if metric in row.results] if parts else []
            )
            found += [
                (metric, part)
                for part in dict.fromkeys(part for result in results for part in result.parts)
            ]
        return found

    def _better(self, column: Column) -> Better:
        results = [result for row in self.rows if (result := _result(row, column)) is not None]
        return results[0].better if results else "neither"

    def _heading(self, column: Column) -> str:
        metric, part = column
        name = metric.replace("_", " ") + (f", {part}" if part else "")
        return name + {"higher": " ↑", "lower": " ↓", "neither": ""}[self._better(column)]

    def _cell(self, row: Row, column: Column) -> str:
        result = _result(row, column)
        if result is None:
            return "failed" if row.error else "–"
        scored = "" if result.n == len(result) else f" ({result.n} of {len(result)})"
        spread = "" if isnan(result.standard_error) else f" ± {result.standard_error:.2g}"
        return f"{result.mean:.3g}{spread}{scored}"

    def _frame(self, parts: bool) -> Any:
        try:
            import pandas
        except ImportError as error:
            raise ImportError("this form of the table needs pandas: pip install pandas") from error
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {"control": row.control}
            for column in self._columns(parts):
                result, name = _result(row, column), ", ".join(filter(None, column))
                line[name] = None if result is None else result.mean
                line[f"{name}, standard error"] = None if result is None else result.standard_error
                line[f"{name}, n"] = 0 if result is None else result.n
            lines.append({**line, "error": row.error})
        return pandas.DataFrame(lines, index=[row.name for row in self.rows])

    def _heat(self, row: Row, number: int) -> Tensor | str:
        """One map without channels, its largest absolute value 1; or why there is none to be seen."""
        if row.maps is None:
            return "failed"
        try:
            found = resized(
                heat(row.maps[number : number + 1], self.images[:1]), self.images.shape[2:]
            )[0].cpu()
        except InputError:
            return "no image"
        if not found.isfinite().all():
            return "NaN"
        return found / found.abs().max() if found.any() else "all 0"


@torch.inference_mode(False)  # weights copied in inference mode would have no gradients
def compare(
    methods: Mapping[str, Method | str] | Sequence[str],
    images: Tensor,
    targets: Any = None,
    *,
    metrics: Sequence[str] | Mapping[str, Metric] | None = None,
    boxes: Boxes | None = None,
    model: nn.Module | None = None,
    inverse: InverseNetwork | None = None,
    layer: nn.Module | None = None,
    controls: bool = True,
    titles: Sequence[str] | None = None,
    additional_forward_args: Any = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Comparison:
    """Put attribution methods side by side on the same images.

    Each method is asked once for its maps; a method or metric that fails leaves its error, and the others go on. Controls come
    by themselves: maps at random, a blob in the centre, the mask alone (where the input, or the layer of MIP-IN, is not 0), and
    where MIP-IN is compared its pattern alone (the same for every image). What scores no better than these shows nothing of the
    image.

    Args:
        methods: Name → method, see :data:`~captum_mipin.metrics.Method`, or the name of one of :data:`METHODS`; or just such
            names. Methods made by name work on a copy of the model.
        images: (images, channels, height, width); tables can be made of other inputs too.
        targets: What to explain, as Captum takes it.
        metrics: Names of :data:`METRICS`, or name → function called as they are, such as ``partial(deletion, step=8)``. By
            default insertion and deletion, and with ``boxes`` also bounding box accuracy and pointing game.
        boxes: For the metrics that need them, see :func:`~captum_mipin.metrics.box_masks`.
        model: The network, for methods that do not know theirs; by default that of ``inverse``, or of the first that does.
        inverse: A fitted inverse network, for "MIP-IN" by name; if it stops at a layer, that layer is explained.
        layer: For "Grad-CAM" and others at a layer, by name.
        controls: Whether to add the controls.
        titles: What to write beside each image; by default its target.
        additional_forward_args: Further arguments of the model.
        generator: Every metric of every method draws the same numbers, from a seed that this draws.
        batch_size: Examples at once.
        progress: Show a progress bar.

    Returns:
        A :class:`Comparison`: ``table()``, ``figure()``, ``save_html(path)``, ``to_dict()``.

    Raises:
        InputError: Names that are not known, boxes or titles that do not fit the images.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> found = compare(["Saliency", "Grad-CAM"], x, 0, model=model, metrics=["deletion"], progress=False)
        >>> [row.name for row in found.rows], found["Grad-CAM"].error[:32]
        (['Saliency', 'Grad-CAM', 'random', 'centre prior', 'mask only'], 'InputError: a method of a layer,')
    """
    images = Examples.of(images, targets).x
    examples = Examples.of(images, targets, additional_forward_args)
    named = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
    asked = _asked_metrics(metrics, images, boxes)
    _check_names(named, asked)
    if boxes is not None:
        _check_boxes(boxes, images)
    shown = _titles(titles, examples)
    model = _model(named, model, inverse)
    made = _made(named, model, inverse, layer)
    if controls:
        made |= {
            name: method for name, method in _controls(made, model).items() if name not in made
        }
    random = generator or seeded()
    seed = int(torch.randint(1 << 62, (1,), generator=random, device=random.device))
    common = {
        "boxes": boxes,
        "model": model,
        "additional_forward_args": additional_forward_args,
        "batch_size": batch_size,
    }
    rows = []
    with tqdm(
        total=len(made) * (1 + len(asked)), desc="compare", disable=not progress, leave=False
    ) as bar:
        for name, method in made.items():
            bar.set_postfix_str(name)
            row = _explained(name, method, name not in named, examples, batch_size)
            bar.update()
            for title, metric in asked.items():
                bar.set_postfix_str(f"{name}, {title}")
                if row.maps is not None:
                    row = _scored(row, title, metric, method, examples, common, seed)
                bar.update()
            rows.append(row)
    return Comparison(tuple(rows), tuple(asked), images.detach().cpu(), shown)


def _asked_metrics(metrics: Any, images: Tensor, boxes: Boxes | None) -> dict[str, Metric]:
    if metrics is None:
        metrics = ["bounding_box_accuracy", "pointing_game"] * (boxes is not None)
        metrics += ["insertion", "deletion"] if images.ndim == 4 else ["deletion"]
    if isinstance(metrics, Mapping):
        return dict(metrics)
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or isinstance(metrics, str):
        raise InputError(f"metrics {metrics!r} are not all among {', '.join(METRICS)}")
    return {name: METRICS[name] for name in metrics}


def _check_names(named: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if not named:
        raise InputError("there are no methods to compare")
    unknown = [
        method for method in named.values() if isinstance(method, str) and method not in METHODS
    ]
    if unknown:
        raise InputError(f"no method has the name {unknown[0]!r}; known are {', '.join(METHODS)}")
    for title, metric in asked.items():
        if not callable(metric):
            raise InputError(f"metric {title!r} is a {type(metric).__name__}, expected a function")


def _check_boxes(boxes: Boxes, images: Tensor) -> None:
    if images.ndim != 4:
        raise InputError(
            f"boxes need images (images, channels, height, width), found inputs of shape {tuple(images.shape)}"
        )
    known = len(box_masks(boxes, images.shape[2:]))
    if known != len(images):
        raise InputError(f"there are boxes for {known} images, but {len(images)} images")


def _titles(titles: Sequence[str] | None, examples: Examples) -> tuple[str, ...]:
    if titles is None:
        return tuple("" if target is None else str(target) for target in examples.targets)
    if len(titles) != len(examples):
        raise InputError(f"there are {len(titles)} titles, but {len(examples)} images")
    return tuple(map(str, titles))


def _model(
    named: Mapping[str, Any], model: nn.Module | None, inverse: InverseNetwork | None
) -> Any:
    """The network that is explained, as far as it is known."""
    if model is None and inverse is not None:
        return inverse.model
    owners = [found for found in map(attribution_of, named.values()) if found is not None]
    return owners[0].forward_func if model is None and owners else model


def _made(
    named: Mapping[str, Any], model: Any, inverse: InverseNetwork | None, layer: nn.Module | None
) -> dict[str, Any]:
    """Methods by name; where one cannot be made, its error in its place."""
    if not any(isinstance(method, str) for method in named.values()):
        return dict(named)
    if not isinstance(model, nn.Module):
        raise InputError("methods by name need the network: pass model=")
    mipin: Any = None
    if inverse is not None:
        mipin = (
            MIPINAttribution(model, inverse)
            if inverse.layer is None
            else LayerMIPINAttribution(model, inverse)
        )
    copied: tuple[nn.Module, nn.Module | None] = copy.deepcopy((model, layer), copy_memo(model))
    setup = Setup(*copied, mipin)
    return {
        name: _by_name(method, setup) if isinstance(method, str) else method
        for name, method in named.items()
    }


def _by_name(name: str, setup: Setup) -> Any:
    try:
        return METHODS[name](setup)
    except Exception as error:  # whatever a method does, the others go on
        return error


def _controls(made: Mapping[str, Any], model: Any) -> dict[str, Method]:
    """What knows less than a method should."""
    first = next(
        (
            found
            for found in map(attribution_of, made.values())
            if isinstance(found, (MIPINAttribution, LayerMIPINAttribution))
        ),
        None,
    )
    layer = first.layer if isinstance(first, LayerMIPINAttribution) else None
    generator = torch.Generator().manual_seed(0)

    def features(x: Tensor, extras: Any) -> Tensor:
        found = (
            x
            if layer is None
            else attr.LayerActivation(model, layer).attribute(x, additional_forward_args=extras)
        )
        return found.detach()

    def random(x: Tensor, target: Any, extras: Any = None) -> Tensor:
        places = features(x, extras).shape
        return torch.rand(
            len(x), *((1, *places[2:]) if len(places) > 2 else places[1:]), generator=generator
        ).to(x.device)

    def centre(x: Tensor, target: Any, extras: Any = None) -> Tensor:
        places = features(x, extras).shape
        sides = places[2:] if len(places) > 2 else places[1:]
        far = [((torch.arange(n) - (n - 1) / 2) / n) ** 2 for n in sides]
        away = sum(
            d.view(*(-1 if i == j else 1 for j in range(len(sides)))) for i, d in enumerate(far)
        )
        blob = torch.exp(-8 * torch.as_tensor(away))
        return blob.expand(len(x), *((1,) if len(places) > 2 else ()), *sides).to(x.device)

    def mask(x: Tensor, target: Any, extras: Any = None) -> Tensor:
        return (features(x, extras) != 0).float()

    found: dict[str, Method] = {"random": random, "centre prior": centre, "mask only": mask}
    if first is not None:
        found["pattern only"] = partial(first.attribute, local=False)
    return found


def _explained(
    name: str, method: Any, control: bool, examples: Examples, batch_size: int | None
) -> Row:
    start = perf_counter()
    try:
        if isinstance(method, Exception):
            raise method
        maps = Case(method, examples, None, seeded(), batch_size).maps
        if len(maps) != 1:
            raise InputError(f"the method gave {len(maps)} tensors of maps, expected one")
        return Row(name, control, maps[0], seconds=perf_counter() - start)
    except Exception as error:  # whatever a method does, the others go on
        return Row(name, control, None, errors={"": _why(error)}, seconds=perf_counter() - start)


def _scored(
    row: Row,
    title: str,
    metric: Metric,
    method: Method,
    examples: Examples,
    common: Mapping[str, Any],
    seed: int,
) -> Row:
    try:
        function, bound = (
            (metric.func, metric.keywords) if isinstance(metric, partial) else (metric, {})
        )
        from_maps = function in _OF_MAPS
        known = signature(function).parameters.keys() - bound.keys()
        if function in METRICS.values():
            known |= Options.__annotations__.keys() - bound.keys()
        options = {
            name: value for name, value in common.items() if name in known and value is not None
        }
        if "generator" in known:
            options["generator"] = torch.Generator().manual_seed(seed)
        own = attribution_of(method)
        if own is not None and "model" in known:  # each is measured on the network that it explains
            options["model"] = own.forward_func
        result = metric(
            row.maps if from_maps else method,
            examples.as_passed(examples.inputs),
            examples.target,
            **options,
        )
        return replace(
            row,
            results={
                **row.results,
                title: replace(result, settings={**result.settings, "method": row.name}),
            },
        )
    except Exception as error:  # whatever a metric does, the others go on
        return replace(row, errors={**row.errors, title: _why(error)})


def _result(row: Row, column: Column) -> Result | None:
    metric, part = column
    found = row.results.get(metric)
    return found.parts.get(part) if found is not None and part else found


def _mean(row: Row, column: Column) -> float | None:
    found = _result(row, column)
    return None if found is None else found.mean


def _legend(figure: Any, axes: Any, sign: str) -> None:
    """One key to the colours of all maps; none where they are not colours of a scale, but shades of the image."""
    coloured = [
        image for axis in axes.flat for image in axis.images[-1:] if image.get_array().ndim == 2
    ]
    if coloured:
        bar = figure.colorbar(coloured[0], ax=axes, location="bottom", shrink=0.4, aspect=30)
        low, high = coloured[0].get_clim()
        bar.set_ticks([low, 0, high] if low else [low, high], labels=_ENDS[sign])
        bar.ax.tick_params(labelsize=8, length=0)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _mipin(setup: Setup) -> Any:
    if setup.mipin is None:
        raise NotFittedError("MIP-IN by name needs a fitted inverse network: pass inverse=")
    return setup.mipin


def _deep_lift(setup: Setup) -> Method:
    if isinstance(setup.model, UnflattenedModule):
        raise InputError(
            "DeepLift looks for modules such as nn.ReLU, which an exported program no longer has: take the network that was "
            "exported"
        )
    return attr.DeepLift(setup.model)


def _bound(method: Any, **options: Any) -> Method:
    return partial(method.attribute, **options)


def _layer(setup: Setup) -> nn.Module:
    if setup.layer is None:
        raise InputError("a method of a layer, by name, needs one: pass layer=")
    return setup.layer
