"""The four commands, and the entry point that runs one of them."""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, MIPINError
from captum_mipin import check as check_model
from captum_mipin import compare as compare_methods
from captum_mipin.cli.arguments import DEFAULT_METHODS, MIPIN_METHODS, PICTURES, SHOWN, parse
from captum_mipin.cli.images import ImageFolder
from captum_mipin.cli.models import load_model, predict
from captum_mipin.comparison import Comparison, Row
from captum_mipin.metrics.case import Case
from captum_mipin.report import table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Results are printed to stdout; progress, errors and texts that the model prints, to stderr.

    Args:
        argv: Words of the command line; by default those of the process.

    Returns:
        Exit code: 0 if the command succeeded, 1 if it failed, with one line on stderr.

    Raises:
        SystemExit: With code 2 for wrong usage, with 0 after ``--help`` and ``--version``.
    """
    args = parse(argv, COMMANDS)
    logs = logging.root.manager.disable
    # torch logs many lines if an export fails: the user gets only the one line of the error
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            outcome = COMMANDS[args.command](args)
        _print(_to_json(outcome.data) if args.json else outcome.text, sys.stdout)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except Exception as error:  # of any type: the model and its factory are the user's code
        explained = isinstance(error, (MIPINError, OSError, ImportError)) and str(error)
        return _fail(explained or f"{type(error).__name__}: {error}")
    finally:
        logging.disable(logs)
    return _fail(outcome.failure) if outcome.failure else 0


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command.

    Attributes:
        text: Text to print.
        data: Data to print as one JSON object, instead of the text, with ``--json``.
        failure: Reason of the exit code 1; empty if the command succeeded.
    """

    text: str
    data: dict[str, Any]
    failure: str = ""


def check(args: Namespace) -> Outcome:
    """Report for each operation of a model whether MIP-IN supports it.

    Examples:
      captum-mipin check torchvision:resnet50
      captum-mipin check mynets.small:build --weights weights.safetensors --size 32 --mean 0 --std 1
      captum-mipin check exported.pt2 --layer features.3 --json
    """
    model, layer = load_model(args)
    example = torch.zeros(2, len(args.mean), *args.size, device=args.device)
    report = check_model(model, example, layer=layer)
    refused = dict.fromkeys(f"{row.path or '(model)'}/{row.operation}" for row in report.refused)
    count = f"{len(report.refused)} of {len(report.rows)} operations are refused: "
    data = {"ok": report.ok, "operations": [asdict(row) for row in report.rows]}
    return Outcome(str(report), data, count + ", ".join(refused) if refused else "")


def fit(args: Namespace) -> Outcome:
    """Fit the inverse of a model for some classes, and write it to a file.

    Examples:
      captum-mipin fit torchvision:resnet50 photos --weights torchvision --layer layer4 \\
          --targets 207,281 --out inverse.safetensors
    """
    model, layer = load_model(args)
    inverse = InverseNetwork(model, layer=layer, ridge=args.ridge, sharing=args.sharing)
    inverse.fit(
        ImageFolder(args),
        args.targets,
        batch_size=args.batch_size,
        progress=not args.quiet,
        checkpoint=args.checkpoint,
    )
    inverse.save(args.out)
    data = {"out": str(args.out), "targets": inverse.targets, "layers": inverse.report.to_dict()}
    return Outcome(str(inverse.report), data)


def explain(args: Namespace) -> Outcome:
    """Write the attributions of MIP-IN with a fitted inverse, as pictures and as tensors.

    Examples:
      captum-mipin explain torchvision:resnet50 photos --weights torchvision \\
          --inverse inverse.safetensors --targets 207 --out maps.png --out maps.safetensors
    """
    model, layer = load_model(args)
    inverse = InverseNetwork.load(args.inverse, model)
    mipin: Any = MIPINAttribution(model, inverse)
    if layer is not None or inverse.layer is not None:
        mipin = LayerMIPINAttribution(model, inverse, layer)
    images = ImageFolder(args)
    x = images.stack()
    targets, scores = predict(args, model, x)
    titles = [""] * len(x) if targets is None else list(map(str, targets))
    (maps,) = Case.of(mipin, x, targets, batch_size=args.batch_size).maps
    for path in args.out:
        if path.suffix.lower() in PICTURES:
            row = Row("MIP-IN", control=False, maps=maps.cpu())
            _write(Comparison((row,), (), images.denormalise(x), tuple(titles)), path)
        else:
            case = Case.of(mipin.source_signal, x, targets, batch_size=args.batch_size)
            (signals,) = case.maps
            tensors = {"attribution": maps, "source_signal": signals}
            if targets is not None:
                tensors["target"] = torch.tensor(targets)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, path, {"images": json.dumps(images.names)})
    columns = "image", "target", "score"
    classes = [None] * len(x) if targets is None else targets
    rows = zip(images.names, classes, scores, strict=True)
    data = [dict(zip(columns, row, strict=True)) for row in rows]
    cells = list(zip(images.names, titles, map("{:.4g}".format, scores), strict=True))
    return Outcome(table(columns, cells), {"images": data, "out": list(map(str, args.out))})


def compare(args: Namespace) -> Outcome:
    """Measure several methods on the same images, and show their maps side by side.

    Examples:
      captum-mipin compare torchvision:resnet50 photos --weights torchvision \\
          --inverse inverse.safetensors --targets 207 --methods MIP-IN,Saliency,Grad-CAM \\
          --layer layer4 --out page.html --out table.md
    """
    model, layer = load_model(args)
    inverse = None
    if args.inverse is not None:
        inverse = InverseNetwork.load(args.inverse, model)
        # `load` has already compared the weights with those of the fit. Without this, the metric
        # "randomization" would fail, because it changes the weights of a copy.
        inverse.changed = "ignore"
    methods = args.methods or [
        *(MIPIN_METHODS if inverse is not None else ()),
        *DEFAULT_METHODS,
        *(["Grad-CAM"] if layer is not None else ()),
    ]
    images = ImageFolder(args)
    x = images.stack()
    comparison = compare_methods(
        methods,
        x,
        predict(args, model, x)[0],
        metrics=args.metrics or None,
        model=model,
        inverse=inverse,
        layer=layer,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    comparison = replace(comparison, images=images.denormalise(x))
    for path in args.out:
        _write(comparison, path)
    rows = [row for row in comparison.rows if not row.control]
    failure = ""
    if not any(row.results for row in rows):
        metric, error = next(item for row in rows for item in row.errors.items())
        failure = f"nothing was measured: {metric or 'every method'} failed, first with {error}"
    data = {**comparison.to_dict(), "files": images.names, "out": list(map(str, args.out))}
    return Outcome(comparison.table(), data, failure)


COMMANDS = {run.__name__: run for run in (check, fit, explain, compare)}


def _write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as a page, picture or table, according to the suffix of the path."""
    suffix = path.suffix.lower()
    if suffix == ".html":
        comparison.save_html(path)
    elif suffix in PICTURES:
        comparison.figure(images=range(min(SHOWN, len(comparison.images)))).savefig(path)
    else:
        text = comparison.table("markdown" if suffix == ".md" else "text")
        path.write_text(f"{text}\n", encoding="utf-8")


def _fail(reason: str) -> int:
    """Print the reason of a failure as one line on stderr, and return the exit code 1."""
    line = " ".join(reason.split())
    # errors of captures can contain a whole graph: shorten the middle, since the end has the advice
    if len(line) > 1000:
        line = f"{line[:500]} … {line[-500:]}"
    _print(f"captum-mipin: {line}", sys.stderr)
    return 1


def _print(text: str, file: TextIO) -> None:
    """Print text; question marks replace characters that the file's encoding does not have."""
    encoding = file.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)


def _to_json(data: object) -> str:
    """Return data as JSON text, with null for NaN and infinities."""
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2)
