"""The options of the command line, with their types and help texts."""

import inspect
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from argparse import RawDescriptionHelpFormatter as _Formatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import torch

from captum_mipin import cli
from captum_mipin.comparison import METHODS, METRICS
from captum_mipin.comparison.methods import CONTROLS, READINGS, plain
from captum_mipin.version import __version__

Command = Callable[[Namespace], Any]

#: Suffixes of picture files, and the largest number of images in a picture.
PICTURES, SHOWN = (".jpg", ".jpeg", ".pdf", ".png", ".svg"), 24

MIPIN_METHODS = tuple(name for name in METHODS if name.startswith("MIP-IN"))
DEFAULT_READINGS = ("MIP-IN", "MIP-IN × gradient")
#: Value of ``--targets`` for the classes that the network predicts.
PREDICTED = "predicted"
#: The value of ``--layer`` that has a layer picked for photographs.
PHOTOGRAPHS = "photographs"
DEFAULT_METHODS = ("Saliency", "SmoothGrad", "Integrated Gradients")

#: Metrics that the command line does not have, because they need boxes or mosaics of images.
_NEED_MORE = {"pointing_game", "effective_heat_ratio", "grid_pointing_game"}
_METRICS = [name for name in METRICS if "box" not in name and name not in _NEED_MORE]


def parse(argv: Sequence[str] | None, commands: Mapping[str, Command]) -> Namespace:
    """Return the arguments of a command line.

    Args:
        argv: Words of the command line; by default those of the process.
        commands: Name of a command → function that runs it. The function's docstring is the help
            text of the command: the first paragraph is its purpose, the rest are examples.

    Raises:
        SystemExit: With code 2 for wrong usage, with 0 after ``--help`` and ``--version``.
    """
    args = build_parser(commands).parse_args(argv)
    error = args.parser.error
    if len(args.mean) != len(args.std):
        error(
            f"--mean has {len(args.mean)} values, --std {len(args.std)}, expected the same number: "
            "pass one value to both, or three"
        )
    size = getattr(args, "batch_size", None)
    if size is not None and size < 1:
        error(
            f"--batch-size is {size}, expected a whole number above 0: pass for example "
            "--batch-size 32"
        )
    if args.command == "compare":
        is_mipin = bool({*MIPIN_METHODS} & {*args.methods}) or args.reading is not None
        if is_mipin and not args.inverse:
            error(
                "MIP-IN was asked for, which needs a fitted inverse: pass --inverse FILE, a file "
                "by captum-mipin fit"
            )
        if "pattern only" in args.methods and not is_mipin:
            error(
                "pattern only is a control for MIP-IN, but MIP-IN is not among --methods: add it, "
                "and pass --inverse FILE"
            )
        if args.no_metrics and args.metrics:
            error("--no-metrics and --metrics exclude each other: pass one of them")
    if getattr(args, "photographs", None) and args.targets != PREDICTED:
        error("--for is the folder of --targets predicted: pass both, or none of them")
    try:
        args.device = torch.device(args.device)
    except RuntimeError as unknown:
        error(f"--device {args.device}: {str(unknown).splitlines()[0]}")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        error(f"--device {args.device}: this machine has no such device, pass --device cpu")
    args.size = (*args.size, *args.size)[:2]
    return args


def build_parser(commands: Mapping[str, Command]) -> ArgumentParser:
    """Return the parser of all commands; ``commands`` is as for `parse`."""
    about = inspect.getdoc(cli) or ""
    parser = ArgumentParser("captum-mipin", description=about, formatter_class=_Formatter)
    parser.add_argument("--version", action="version", version=f"captum-mipin {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    models, parsers = about.partition("\n\n")[2], {}
    for name, command in commands.items():
        purpose, _, examples = (inspect.getdoc(command) or "").partition("\n\n")
        parsers[name] = subparsers.add_parser(
            name,
            help=purpose,
            description=f"{purpose}\n\n{models}",
            epilog=examples,
            formatter_class=_Formatter,
        )
        parsers[name].set_defaults(parser=parsers[name])
    _add_inputs(partial(_add, parsers))
    _add_outputs(partial(_add, parsers))
    return parser


def _add(
    parsers: Mapping[str, ArgumentParser], commands: str, option: str, text: str, **settings: Any
) -> None:
    """Add an option to commands.

    Args:
        parsers: Name of a command → its parser.
        commands: Names of commands with spaces between them; an empty string means all commands.
        option: Name of the option or positional argument.
        text: Help text.
        **settings: Further arguments of ``add_argument``.
    """
    for name in commands.split() or parsers:
        parsers[name].add_argument(option, help=text, **settings)


def _add_inputs(add: Callable[..., None]) -> None:
    """Add the options for the network and its images.

    Args:
        add: The function `_add` with its argument ``parsers`` already bound.
    """
    add("", "model", "torchvision:NAME, package.module:FACTORY or FILE.pt2", metavar="MODEL")
    add("", "--weights", 'file of a state dict; "torchvision" for the weights of torchvision')
    text = f"module, such as layer4, at which the inverse stops; {PHOTOGRAPHS} picks the one that "
    text += "for_photographs picks (default: the pixels)"
    add("check fit", "--layer", text)
    add("explain", "--layer", "module to explain (default: the layer at which the inverse stops)")
    add("compare", "--layer", "module, such as layer4, for Grad-CAM and Grad×Feature")
    reader = _numbers("pixels N, or HEIGHTxWIDTH, such as 240x320", int, (1, 2), above=0, by="x")
    text = "pixels N, or HEIGHTxWIDTH: images are scaled to cover it and cropped (default: 224)"
    add("", "--size", text, type=reader, default="224")
    expected, imagenet = "or three with commas between them", "(default: of ImageNet, %(default)s)"
    text = f"subtracted from pixels in [0, 1]; one value makes images grey {imagenet}"
    reader = _numbers(f"one number {expected}", float, (1, 3))
    add("", "--mean", text, type=reader, default="0.485,0.456,0.406")
    reader = _numbers(f"one number above 0 {expected}", float, (1, 3), above=0)
    add("", "--std", f"divides pixels {imagenet}", type=reader, default="0.229,0.224,0.225")
    add("", "--device", "such as cuda (default: cpu)", default="cpu")
    add("", "--json", "print one JSON object instead of a table", action="store_true")
    images = "fit explain compare predict"
    add(images, "images", "folder of images, or one image", metavar="IMAGES")
    text = "images per call (default: %(default)s)"
    add("fit explain predict", "--batch-size", text, type=int, default=32)
    text = "images per call (default: as few as are quick on a CPU)"
    add("compare", "--batch-size", text, type=int)
    add("fit compare", "--quiet", "show no progress", action="store_true")
    text = (
        "file with one class name per line, or imagenet (default: the names that the network has)"
    )
    add("explain compare predict", "--names", text)
    add("predict", "--top", "classes per image (default: 3)", type=_count, default=3)


def _add_outputs(add: Callable[..., None]) -> None:
    """Add the options for targets, methods, metrics and output files.

    Args:
        add: Function `_add` without the argument ``parsers``.
    """
    add("fit", "--out", "file of the inverse", type=_file(".safetensors"), required=True)
    add("fit", "--ridge", "λ of equation 6 (default: 0.001)", type=float, default=1e-3)
    text = "nothing: fit every layer per class; classes: fit per class only the layer next to the "
    text += "output, all other layers for all classes together (default: nothing)"
    add("fit", "--sharing", text, choices=("nothing", "classes"), default="nothing")
    add("fit", "--checkpoint", "file for fitted layers, from which an interrupted fit continues")
    text = "file that captum-mipin fit wrote for the same model"
    add("explain", "--inverse", text, required=True)
    add("compare", "--inverse", f"{text}; MIP-IN needs it")
    numbers = _numbers(
        "a class, several with commas between them such as 207,208, or predicted", int
    )

    def reader(text: str) -> Any:
        return PREDICTED if text == PREDICTED else numbers(text)

    text = "classes to fit, or predicted for the classes that the network predicts (default: all)"
    add("fit", "--targets", text, type=reader)
    text = (
        "folder of the photographs that will be explained, for --targets predicted (default: the "
    )
    text += "images of the fit)"
    add("fit", "--for", text, dest="photographs", metavar="PHOTOS")
    text = "class of all images, or one class per image, in the order of file names (default: "
    text += "predicted, the classes that the network predicts)"
    add("explain compare", "--targets", text, type=reader)
    text = f"which map of MIP-IN: {', '.join(READINGS)}; S is the source signal; unsigned "
    text += (
        "readings, absolute values summed over channels, are those of for_photographs (default: "
    )
    text += "the one that fit --layer photographs picked, else A)"
    one = _names("reading", READINGS)
    add("explain compare", "--reading", text, type=lambda text: one(_full(text))[0])
    names = *METHODS, *CONTROLS
    text = f"any of {', '.join(names)} (default: {', '.join(DEFAULT_METHODS)}; with --inverse "
    text += "also MIP-IN, with --layer also Grad-CAM)"
    add("compare", "--methods", text, type=_names("method", names), default=[])
    text = f"any of {', '.join(_METRICS)} (default: insertion, deletion)"
    add("compare", "--metrics", text, type=_names("metric", _METRICS), default=[])
    add("compare", "--no-metrics", "only maps, no scores", action="store_true")
    text = (
        "largest number of steps of insertion and deletion, or exact for the published protocol, "
    )
    text += "one row of pixels per step (default: 32)"
    add("compare", "--steps", text, type=lambda text: text == "exact" or _count(text), default=32)
    text = "seconds after which no more images are begun; the table says how many were used"
    add("compare", "--budget", text, type=float)
    pictures = f"{', '.join(PICTURES)} the maps; may be given several times"
    several = partial(add, action="append")
    text = f".safetensors holds the tensors, {pictures}"
    several("explain", "--out", text, type=_file(".safetensors", *PICTURES), required=True)
    text = f".html is the page, .md and .txt the table, {pictures}"
    file = _file(".html", ".md", ".txt", *PICTURES)
    several("compare", "--out", text, type=file, default=[])


def _numbers(
    expected: str,
    number: Callable[[str], float],
    counts: tuple[int, ...] = (),
    *,
    above: float = -inf,
    by: str = ",",
) -> Callable[[str], list[float]]:
    """Return a function that reads numbers from text.

    Args:
        expected: Description of a correct text, for the error message.
        number: Function that reads one number, int or float.
        counts: Allowed counts of numbers; an empty tuple allows any count.
        above: Bound that all numbers must exceed.
        by: Separator between numbers.
    """

    def read(text: str) -> list[float]:
        try:
            values = [number(part) for part in text.split(by)]
        except ValueError:
            values = [nan]
        if (counts and len(values) not in counts) or not all(
            above < value < inf for value in values
        ):
            raise ArgumentTypeError(f"{text!r} is not {expected}")
        return values

    return read


def _full(reading: str) -> str:
    """Return the full name of a reading: "times feature" is "A × feature"."""
    name = reading.strip().replace("times", "×")
    return f"A {name}" if name.startswith("×") else name


def _count(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _file(*suffixes: str) -> Callable[[str], Path]:
    """Return a function that reads the path of an output file with one of the suffixes."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in suffixes:
            raise ArgumentTypeError(
                f"{text!r} has the suffix {path.suffix!r}, expected one of {', '.join(suffixes)}: "
                "rename the file"
            )
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise ArgumentTypeError(
                f"{text!r} cannot be written: name a file in an existing folder"
            )
        return path

    return read


def _names(kind: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that reads names with commas between them.

    Upper and lower case are equal, and the letter x can be written for ×.

    Args:
        kind: "method", "metric" or "reading", for the error message.
        known: All known names.
    """
    by_plain = {plain(name): name for name in known}

    def read(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        for part in parts:
            if plain(part) not in by_plain:
                raise ArgumentTypeError(
                    f"{part!r} is not the name of a {kind}: pass names among {', '.join(known)}"
                )
        return [by_plain[plain(part)] for part in parts]

    return read
