"""The command line ``captum-mipin``: check, fit, explain, compare."""

import importlib
import json
import logging
import math
import os
import sys
import warnings
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from captum_mipin.attribution import LayerMIPINAttribution, MIPINAttribution
from captum_mipin.comparison.table import METHODS, METRICS, Comparison, Row, compare
from captum_mipin.errors import InputError, MIPINError, TargetError
from captum_mipin.graph import exported as programs
from captum_mipin.graph.capture import select
from captum_mipin.inverse.network import InverseNetwork
from captum_mipin.metrics.common import Examples
from captum_mipin.metrics.common import explain as maps_of
from captum_mipin.propagation.check import check
from captum_mipin.report import table
from captum_mipin.targets import per_example

_PICTURES = (".jpg", ".jpeg", ".pdf", ".png", ".svg")
_IMAGES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

#: Images that a picture shows at most.
_SHOWN = 24
#: Characters of an error at most, start and end: what a capture failed at may be long.
_LONGEST = 1000

#: What needs nothing but images and methods.
_METRICS = [name for name in METRICS if "box" not in name and name not in ("pointing_game", "effective_heat_ratio",
                                                                           "grid_pointing_game")]  # fmt: skip
_SAVE = "save the weights by torch.save(model.state_dict(), path)"
_LAYERS = {
    "check": "look only at what lies above this module, such as layer4",
    "fit": "stop at the output of this module, such as layer4, not at the pixels",
    "explain": "explain the output of this module (default: where the inverse stops, the pixels or a layer)",
    "compare": "a module, such as layer4, for Grad-CAM and Grad×Feature; MIP-IN stops where its inverse does",
}
_FITTED = {name for name in METHODS if name.startswith("MIP-IN")}
_DEFAULT = ("Saliency", "SmoothGrad", "Integrated Gradients")

_ABOUT = """\
MIP-IN attributions of a network's classes: what of an image carries a logit.

MODEL is one of
  torchvision:NAME        a network of torchvision, such as torchvision:resnet50
  package.module:FACTORY  what builds the network when called without arguments; the current folder is looked in first
  FILE.pt2                a program by torch.export.save, exported in evaluation mode and with a dynamic batch:
                          torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))

Exit codes: 0 done; 1 refused or failed, with one line on stderr; 2 wrong usage. Results go to stdout, progress to stderr."""

_EXAMPLES = """\
examples:
  captum-mipin check torchvision:resnet50
  captum-mipin fit torchvision:resnet50 photos --weights torchvision --layer layer4 --targets 207,281 --out inverse.safetensors
  captum-mipin explain torchvision:resnet50 photos --weights torchvision --inverse inverse.safetensors --targets 207 \\
      --out maps.png --out maps.safetensors
  captum-mipin compare torchvision:resnet50 photos --weights torchvision --inverse inverse.safetensors --targets 207 \\
      --methods MIP-IN,Saliency,Grad-CAM --layer layer4 --out page.html --out table.md
  captum-mipin check mynets.small:build --weights weights.safetensors --size 32 --mean 0.5 --std 0.25 --json
  captum-mipin check exported.pt2 --layer features.3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its arguments, by default those of the process.

    Returns:
        The exit code: 0 done, 1 refused or failed, with one line on stderr.

    Raises:
        SystemExit: With 2 for wrong usage, with 0 after ``--help`` and ``--version``.
    """
    asked = _parser().parse_args(argv)
    if len(asked.mean) != len(asked.std):
        asked.parser.error(f"--mean has {len(asked.mean)} values, --std {len(asked.std)}")
    asked.stdout = sys.stdout
    try:
        with _silent_logs(), redirect_stdout(sys.stderr):  # what a model prints is no result
            code: int = asked.run(asked)
            return code
    except KeyboardInterrupt:
        return _failed("interrupted")
    except Exception as error:  # of whatever kind: the model and its factory are the user's
        known = isinstance(error, (MIPINError, OSError, ImportError))
        return _failed(str(error) if known and str(error) else f"{type(error).__name__}: {error}")


# --------------------------------------------------------------------------------------------------------- commands


def _check(asked: Namespace) -> int:
    model = _model(asked)
    found = check(
        model,
        torch.zeros(2, len(asked.mean), *asked.size, device=asked.device),
        layer=_layer(model, asked.layer),
    )
    rows = [asdict(row) for row in found.rows]
    _show(asked, str(found), {"ok": found.ok, "operations": rows})
    if found.ok:
        return 0
    refused = dict.fromkeys(f"{row.path or '(model)'}/{row.operation}" for row in found.refused)
    return _failed(
        f"{len(found.refused)} of {len(found.rows)} operations are refused: {', '.join(refused)}"
    )


def _fit(asked: Namespace) -> int:
    model = _model(asked)
    inverse = InverseNetwork(
        model, layer=_layer(model, asked.layer), ridge=asked.ridge, sharing=asked.sharing
    )
    inverse.fit(
        _Images(asked),
        asked.targets,
        batch_size=asked.batch_size,
        progress=not asked.quiet,
        checkpoint=asked.checkpoint,
    )
    inverse.save(asked.out)
    told = {"out": str(asked.out), "targets": inverse.targets, "layers": inverse.report.to_dict()}
    _show(asked, str(inverse.report), told)
    return 0


def _explain(asked: Namespace) -> int:
    model = _model(asked)
    inverse, layer = InverseNetwork.load(asked.inverse, model), _layer(model, asked.layer)
    mipin: Any = MIPINAttribution(model, inverse)
    if layer is not None or inverse.layer is not None:
        mipin = LayerMIPINAttribution(model, inverse, layer)
    images = _Images(asked)
    x = images.all()
    targets, scores = _targets(asked, model, x)
    (maps,) = maps_of(mipin, Examples.of(x, targets), asked.batch_size)
    for path in asked.out:
        if path.suffix.lower() in _PICTURES:
            row = Row("MIP-IN", control=False, maps=maps.cpu())
            _draw(Comparison((row,), (), images.shown(x), _titles(targets, len(x))), path)
        else:
            (signals,) = maps_of(mipin.source_signal, Examples.of(x, targets), asked.batch_size)
            _write_maps(path, maps, signals, targets, images.names)
    rows = list(
        zip(images.names, targets if targets is not None else [None] * len(x), scores, strict=True)
    )
    told = [{"image": image, "target": target, "score": score} for image, target, score in rows]
    lines = [
        (image, "" if target is None else str(target), f"{score:.4g}")
        for image, target, score in rows
    ]
    _show(
        asked,
        table(("image", "target", "score"), lines),
        {"images": told, "out": list(map(str, asked.out))},
    )
    return 0


def _compare(asked: Namespace) -> int:
    if asked.inverse is None and not _FITTED.isdisjoint(asked.methods):
        asked.parser.error(
            "MIP-IN among the methods needs --inverse FILE, written by captum-mipin fit"
        )
    model = _model(asked)
    layer = _layer(model, asked.layer)
    inverse = None if asked.inverse is None else InverseNetwork.load(asked.inverse, model)
    if inverse is not None:
        inverse.changed = "ignore"  # for randomization; load has compared the weights
    images = _Images(asked)
    x = images.all()
    targets, _ = _targets(asked, model, x)
    chosen = asked.methods or sorted(_FITTED) * (inverse is not None) + list(_DEFAULT) + [
        "Grad-CAM"
    ] * (layer is not None)
    found = compare(
        chosen, x, targets, metrics=asked.metrics or None, model=model, inverse=inverse, layer=layer,
        batch_size=asked.batch_size, progress=not asked.quiet,
    )  # fmt: skip
    found = replace(found, images=images.shown(x))
    for path in asked.out:
        _write_comparison(found, path)
    _show(
        asked,
        found.table(),
        {**found.to_dict(), "files": images.names, "out": list(map(str, asked.out))},
    )
    rows = [row for row in found.rows if row.name in chosen]
    if any(row.results for row in rows):
        return 0
    metric, why = next((metric, why) for row in rows for metric, why in row.errors.items())
    return _failed(
        f"nothing could be measured: {metric} failed, first with {why}"
        if metric
        else f"every method failed: {why}"
    )


def _draw(found: Comparison, path: Path) -> None:
    _import("matplotlib", "a picture")
    found.figure(images=range(min(_SHOWN, len(found.images)))).savefig(path)


def _write_comparison(found: Comparison, path: Path) -> None:
    if path.suffix.lower() == ".html":
        found.save_html(path)
    elif path.suffix.lower() in _PICTURES:
        _draw(found, path)
    else:
        path.write_text(
            found.table("markdown" if path.suffix.lower() == ".md" else "text") + "\n",
            encoding="utf-8",
        )


def _write_maps(
    path: Path, maps: Tensor, signals: Tensor, targets: list[int] | None, names: list[str]
) -> None:
    tensors = {"attribution": maps, "source_signal": signals}
    if targets is not None:
        tensors["target"] = torch.tensor(targets)
    save_file(
        {name: x.cpu().contiguous() for name, x in tensors.items()},
        path,
        {"images": json.dumps(names)},
    )


# --------------------------------------------------------------------------------------------------------- models


def _model(asked: Namespace) -> nn.Module:
    """The network, with its weights, in evaluation mode."""
    source, _, name = asked.model.partition(":")
    published, exported = asked.weights == "torchvision", asked.model.endswith(".pt2")
    if not exported and (not source or not name or source.startswith(".") or "/" in source):
        raise InputError(
            f"the model {asked.model!r} is neither torchvision:NAME, package.module:FACTORY nor a FILE.pt2"
        )
    if source == "torchvision" and not exported:
        if asked.weights is None and asked.command != "check":
            raise InputError(
                f"{asked.model} has random weights: pass --weights FILE, or --weights torchvision for its own"
            )
        model = _published(name, published)
    elif published:
        raise InputError(
            f"--weights torchvision goes with torchvision:NAME, not with {asked.model}"
        )
    elif exported:
        model = programs.load(asked.model, (len(asked.mean), *asked.size), asked.device)
    else:
        model = _built(source, name)
    if asked.weights is not None and not published:
        _fill(model, asked.weights)
    return model.to(asked.device).eval()


def _published(name: str, weights: bool) -> nn.Module:
    models = _import("torchvision.models", "a network of torchvision")
    if name not in models.list_models():
        raise InputError(
            f"torchvision has no network {name!r}: torchvision.models.list_models() names them"
        )
    model: nn.Module = models.get_model(name, weights="DEFAULT" if weights else None)
    return model


def _built(source: str, name: str) -> nn.Module:
    """What a factory builds; a module that is there already is taken as it is."""
    try:
        with _current_folder():
            found: Any = importlib.import_module(source)
            for part in name.split("."):
                if not hasattr(found, part):
                    raise InputError(f"{source!r} has no {name!r}")
                found = getattr(found, part)
            model = found if isinstance(found, nn.Module) or not callable(found) else found()
    except SystemExit as error:
        raise InputError(
            f"{source}:{name} ends the process: what a script does belongs under if __name__ == '__main__'"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source}:{name} gives a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


@contextmanager
def _current_folder() -> Iterator[None]:
    """Look for modules in the current folder first."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _fill(model: nn.Module, weights: str) -> None:
    """Load a state dict, all of it; no code in the file is run."""
    Path(weights).open("rb").close()  # what is not there, or may not be read, is told as such
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of files that it then refuses
            if weights.endswith(".safetensors"):
                state: Any = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the file may hold anything
        raise InputError(
            f"{weights!r} is damaged, or holds more than tensors, whose loading could run code: {_SAVE}, or as safetensors"
        ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        keys = f" of {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) else ""
        raise InputError(
            f"{weights!r} holds a {type(state).__name__}{keys}, expected a state dict alone: {_SAVE}"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the weights in {weights!r} do not fit the model: {error}") from error


def _layer(model: nn.Module, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not path or path not in modules:
        known = [name for name in modules if name and name.count(".") == 0]
        raise InputError(
            f"the model has no layer {path!r}; {type(model).__name__} has {', '.join(known)} and what is inside"
        )
    return modules[path]


# --------------------------------------------------------------------------------------------------------- images


class _Images(Dataset[Tensor]):
    """The images of a folder and of those inside, in the order of their names: the shorter side scaled, the centre taken.

    Args:
        asked: With images, size, mean, std and device.
    """

    def __init__(self, asked: Namespace) -> None:
        self.image, self.fitting = (
            _import("PIL.Image", "an image folder"),
            _import("PIL.ImageOps", "an image folder"),
        )
        root = Path(asked.images)
        if not root.exists():
            raise FileNotFoundError(f"no image folder {asked.images!r}")
        found = root.rglob("*") if root.is_dir() else [root]
        self.paths = sorted(
            path for path in found if path.suffix.lower() in _IMAGES and path.is_file()
        )
        if not self.paths:
            raise InputError(
                f"there is no image in {asked.images!r}; looked for {', '.join(sorted(_IMAGES))}"
            )
        self.names = [
            path.relative_to(root).as_posix() if root.is_dir() else path.name for path in self.paths
        ]
        self.size, self.device = asked.size, asked.device
        self.mean, self.std = (
            torch.tensor(values).view(-1, 1, 1) for values in (asked.mean, asked.std)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with self.image.open(self.paths[index]) as file:
                if file.mode.startswith(("I", "F")):  # Pillow would clip them
                    raise ValueError(
                        f"its pixels are of mode {file.mode}, expected 8 bits a channel"
                    )
                image = self.fitting.exif_transpose(file).convert(
                    "L" if len(self.mean) == 1 else "RGB"
                )
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, and ours
            raise InputError(
                f"{str(self.paths[index])!r} cannot be read as an image: {error}"
            ) from error
        height, width = self.size
        pixels = np.array(self.fitting.fit(image, (width, height), self.image.Resampling.BILINEAR))
        x = torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1) / 255
        return (x - self.mean) / self.std

    def all(self) -> Tensor:
        """All images as the model's input."""
        return torch.stack([self[index] for index in range(len(self))]).to(self.device)

    def shown(self, x: Tensor) -> Tensor:
        """Images as they are looked at."""
        return (x.cpu() * self.std + self.mean).clamp(0, 1)


def _targets(asked: Namespace, model: nn.Module, x: Tensor) -> tuple[list[int] | None, list[float]]:
    """The class of each image, None for a model with one output, and its score."""
    with torch.no_grad():
        outputs = torch.cat([select(model(part), None) for part in x.split(asked.batch_size)])
    if outputs.ndim == 1 and asked.targets is None:
        return None, outputs.tolist()
    if outputs.ndim != 2:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, expected (images, classes)"
        )
    chosen = outputs.argmax(1).tolist() if asked.targets is None else asked.targets
    chosen = chosen * len(x) if len(chosen) == 1 else chosen
    if len(chosen) != len(x):
        raise TargetError(
            f"there are {len(chosen)} targets, but {len(x)} images: give one for all, or one for each"
        )
    classes = [target for (target,) in per_example(chosen, outputs)]
    return classes, outputs[torch.arange(len(x)), classes].tolist()


def _titles(targets: list[int] | None, count: int) -> tuple[str, ...]:
    return ("",) * count if targets is None else tuple(map(str, targets))


# --------------------------------------------------------------------------------------------------------- words


def _show(asked: Namespace, text: str, told: Mapping[str, Any]) -> None:
    _say(json.dumps(_finite(told), indent=2) if asked.json else text, asked.stdout)


def _failed(why: str) -> int:
    line = " ".join(why.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
    _say(f"captum-mipin: {line}", sys.stderr)
    return 1


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Leave to the one line what torch would log of an export that fails."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _say(text: str, file: TextIO) -> None:
    """Print; what the terminal has no letters for becomes question marks."""
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)


def _finite(value: Any) -> Any:
    """What JSON can hold: None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _import(module: str, purpose: str) -> Any:
    package = {"PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}: pip install {package}") from error


# --------------------------------------------------------------------------------------------------------- arguments


def _parser() -> ArgumentParser:
    from captum_mipin import __version__

    parser = ArgumentParser(
        "captum-mipin",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"captum-mipin {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _command(
        commands,
        "check",
        _check,
        "tell for every operation of a model whether the signal can be sent back",
        False,
    )

    one = _command(
        commands,
        "fit",
        _fit,
        "learn the inverse of a model for some classes, and write it to a file",
    )
    one.add_argument(
        "--targets", type=_TARGETS, metavar="C,C,...", help="classes to fit (default: all)"
    )
    one.add_argument(
        "--out",
        type=_file(".safetensors"),
        required=True,
        metavar="FILE",
        help="the inverse, .safetensors",
    )
    one.add_argument(
        "--ridge",
        type=_NUMBER,
        default=1e-3,
        help="of the regression, equation 6 (default: %(default)s)",
    )
    one.add_argument(
        "--sharing", choices=("nothing", "classes"), default="nothing",
        help="each class has an inverse of its own, or all classes share one below the first step (default: nothing)",
    )  # fmt: skip
    one.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="keeps what is done, so that an interrupted fit can be taken up",
    )

    one = _command(
        commands,
        "explain",
        _explain,
        "write the attributions of a fitted inverse as pictures and as tensors",
    )
    one.add_argument(
        "--inverse",
        required=True,
        metavar="FILE",
        help="written by captum-mipin fit for the same model",
    )
    _add_targets(one)
    one.add_argument(
        "--out", type=_file(".safetensors", *_PICTURES), required=True, action="append", metavar="FILE",
        help=f"may be given several times; .safetensors holds attribution, source_signal and target, {', '.join(_PICTURES)} "
        f"show the first {_SHOWN} images",
    )  # fmt: skip

    one = _command(commands, "compare", _compare, "put methods side by side on the same images")
    one.add_argument(
        "--inverse",
        metavar="FILE",
        help="for MIP-IN: written by captum-mipin fit for the same model",
    )
    _add_targets(one)
    one.add_argument(
        "--methods", type=_names("method", METHODS), default=[], metavar="M,M,...",
        help=f"any of {', '.join(METHODS)} (default: {', '.join(_DEFAULT)}; with --inverse MIP-IN's, with --layer Grad-CAM)",
    )  # fmt: skip
    one.add_argument(
        "--metrics", type=_names("metric", _METRICS), default=[], metavar="M,M,...",
        help=f"any of {', '.join(_METRICS)} (default: insertion, deletion)",
    )  # fmt: skip
    one.add_argument(
        "--out", type=_file(".html", ".md", ".txt", *_PICTURES), default=[], action="append", metavar="FILE",
        help=f"may be given several times; .html is the page, .md and .txt the table, {', '.join(_PICTURES)} the maps",
    )  # fmt: skip
    return parser


def _command(
    commands: Any, name: str, run: Callable[[Namespace], int], about: str, images: bool = True
) -> ArgumentParser:
    """A command with what all of them take."""
    described = f"{about[0].upper()}{about[1:]}.\n\n{_ABOUT.split(chr(10), 2)[2]}"
    parser: ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=described,
        epilog=f"examples:\n{_examples(name)}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    parser.add_argument(
        "model", metavar="MODEL", help="torchvision:NAME, package.module:FACTORY or FILE.pt2"
    )
    if images:
        parser.add_argument(
            "images",
            metavar="IMAGES",
            help="a folder of images, with those inside it, or one image",
        )
        parser.add_argument(
            "--batch-size",
            type=_COUNT,
            default=32,
            metavar="N",
            help="images at once (default: 32)",
        )
    if name in ("fit", "compare"):
        parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--weights",
        help='a state dict by torch.save, or .safetensors; "torchvision" for torchvision\'s own',
    )
    parser.add_argument("--layer", metavar="PATH", help=_LAYERS[name])
    parser.add_argument(
        "--size", type=_PIXELS, default=(224, 224), metavar="N",
        help="images are scaled to cover N x N pixels and cropped; or HEIGHTxWIDTH (default: 224)",
    )  # fmt: skip
    parser.add_argument(
        "--mean", type=_MEAN, default=[0.485, 0.456, 0.406], metavar="R,G,B",
        help="taken off pixels in [0, 1]; one value makes images grey (default: ImageNet's, 0.485,0.456,0.406)",
    )  # fmt: skip
    parser.add_argument(
        "--std", type=_STD, default=[0.229, 0.224, 0.225], metavar="R,G,B",
        help="what they are then divided by (default: ImageNet's, 0.229,0.224,0.225)",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=_device, default=torch.device("cpu"), help="such as cuda (default: cpu)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    return parser


def _add_targets(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--targets", type=_TARGETS, metavar="C,C,...",
        help="the class to explain for all images, or one for each in the order of their names (default: what is predicted)",
    )  # fmt: skip


def _examples(command: str) -> str:
    """The examples of one command, with their further lines."""
    found = _EXAMPLES.replace("\\\n", "\0").splitlines()
    return "\n".join(
        line for line in found if line.startswith(f"  captum-mipin {command} ")
    ).replace("\0", "\\\n")


Kind = TypeVar("Kind")


def _read(kind: Callable[[str], Kind], words: str) -> Callable[[str], Kind]:
    """A reader of an argument that says in words what it takes."""

    def read(text: str) -> Kind:
        try:
            return kind(text)
        except ValueError as error:
            raise ArgumentTypeError(f"{text!r} is not {words}") from error

    return read


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


def _channels(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise ValueError
    return values


def _deviations(text: str) -> list[float]:
    values = _channels(text)
    if min(values) <= 0:
        raise ValueError
    return values


_TARGETS = _read(_integers, "a class, or several with commas between them, such as 207,208")
_COUNT = _read(_positive, "a whole number above 0")
_PIXELS = _read(_size, "a number of pixels, or HEIGHTxWIDTH, such as 224 or 240x320")
_MEAN = _read(_channels, "one number or three with commas between them, such as 0.485,0.456,0.406")
_STD = _read(
    _deviations, "one number above 0 or three with commas between them, such as 0.229,0.224,0.225"
)
_NUMBER = _read(float, "a number")


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ArgumentTypeError(str(error).split("\n", 1)[0]) from error


def _file(*kinds: str) -> Callable[[str], Path]:
    """A file to write, whose ending says what."""

    def file(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in kinds:
            raise ArgumentTypeError(f"{text!r} ends in none of {', '.join(kinds)}")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ArgumentTypeError(f"{text!r} cannot be written")
        return path

    return file


def _names(kind: str, known: Sequence[str] | Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Names with commas between them; case does not matter, and x stands for ×."""
    plain = {name.replace("×", "x").casefold(): name for name in known}

    def names(text: str) -> list[str]:
        asked = [part.strip().replace("×", "x").casefold() for part in text.split(",")]
        unknown = [part for part in asked if part not in plain]
        if unknown:
            raise ArgumentTypeError(
                f"no {kind} has the name {unknown[0]!r}; known are {', '.join(known)}"
            )
        return [plain[part] for part in asked]

    return names
