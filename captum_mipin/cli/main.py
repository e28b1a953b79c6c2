"""The five commands, and the entry point that runs one of them."""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import torch
from safetensors.torch import save_file

from captum_mipin import InverseNetwork, LayerMIPINAttribution, MIPINAttribution, MIPINError
from captum_mipin import check as check_model
from captum_mipin import compare as compare_methods
from captum_mipin.cli.arguments import (
    DEFAULT_METHODS,
    DEFAULT_READINGS,
    PICTURES,
    PREDICTED,
    SHOWN,
    parse,
)
from captum_mipin.cli.images import ImageFolder
from captum_mipin.cli.models import load_model, outputs_of, predict, read_names
from captum_mipin.cli.words import all_classes, not_fitted, plainly
from captum_mipin.comparison import Comparison, Row
from captum_mipin.comparison.methods import place_of, reading
from captum_mipin.comparison.names import captions, class_name
from captum_mipin.errors import NotFittedError
from captum_mipin.metrics.case import Case
from captum_mipin.propagation.treatments import NAMED, causes
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
    rows = causes(report.refused)
    refused = list(dict.fromkeys(f"{row.path or '(model)'}/{row.operation}" for row in rows))
    more = [f"and {len(refused) - NAMED} more"] * (len(refused) > NAMED)
    count = f"{len(report.refused)} of {len(report.rows)} operations are refused: "
    data = {"ok": report.ok, "operations": [asdict(row) for row in report.rows]}
    return Outcome(str(report), data, count + ", ".join([*refused[:NAMED], *more]) if rows else "")


def fit(args: Namespace) -> Outcome:
    """Fit the inverse of a model for some classes, and write it to a file.

    Examples:
      captum-mipin fit torchvision:resnet50 photos --weights torchvision --layer layer4 \\
          --targets 207,281 --out inverse.safetensors
      captum-mipin fit torchvision:resnet50 many --weights torchvision --layer layer4 \\
          --targets predicted --for photos --out inverse.safetensors
    """
    model, layer = load_model(args)
    inverse = InverseNetwork(model, layer=layer, ridge=args.ridge, sharing=args.sharing)
    inverse.photographs = args.picked
    images = ImageFolder(args)
    targets = args.targets
    if targets == PREDICTED:
        shown = images if args.photographs is None else ImageFolder(args, args.photographs)
        parts = (predict(args, model, part)[0] for part in shown.batches(args.batch_size))
        targets = sorted({target for part in parts for target in part or ()}) or None
    inverse.fit(
        images,
        targets,
        batch_size=args.batch_size,
        progress=not args.quiet,
        checkpoint=args.checkpoint,
    )
    inverse.save(args.out)
    data = {"out": str(args.out), "targets": inverse.targets, "layers": inverse.report.to_dict()}
    return Outcome(str(inverse.report), data)


def predict_classes(args: Namespace) -> Outcome:
    """List the classes that a model predicts for images, with their names and probabilities.

    Examples:
      captum-mipin predict torchvision:resnet50 photos --weights torchvision
    """
    model, _ = load_model(args)
    images = ImageFolder(args)
    names = read_names(args, model, images)
    outputs = torch.cat(
        [outputs_of(args, model, part).cpu() for part in images.batches(args.batch_size)]
    )
    if outputs.ndim == 1:
        data: list[dict[str, Any]] = [
            {"image": image, "score": score}
            for image, score in zip(images.names, outputs.tolist(), strict=True)
        ]
        pairs = [(row["image"], f"{row['score']:.4g}") for row in data]
        return Outcome(table(("image", "score"), pairs), {"images": data})
    best = outputs.topk(min(args.top, outputs.shape[1]))
    shares = _probabilities(outputs).gather(1, best.indices)
    columns = "image", "class", "name", "score", "probability"
    data = [
        dict(zip(columns, (image, c, class_name(names, c), float(s), float(p)), strict=True))
        for image, *ranked in zip(
            images.names, best.indices.tolist(), best.values, shares, strict=True
        )
        for c, s, p in zip(*ranked, strict=True)
    ]
    cells = [
        (r["image"], r["name"], str(r["class"]), f"{r['score']:.4g}", f"{r['probability']:.1%}")
        for r in data
    ]
    header = "image", "name", "class", "score", "probability"
    return Outcome(table(header, cells, left=2), {"images": data})


def _probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """Return probabilities (images, classes): the softmax of outputs that are none themselves."""
    sums = outputs.sum(1)
    is_softmax = bool((outputs >= 0).all()) and torch.allclose(
        sums, torch.ones_like(sums), atol=1e-3
    )
    return outputs if is_softmax else outputs.softmax(1)


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
    names = read_names(args, model, images)
    x = images.stack()
    targets, scores = predict(args, model, x)
    classes = [None] * len(x) if targets is None else targets
    # images whose class was not fitted are left out: the others are explained
    known = [i for i, c in enumerate(classes) if c is None or c in inverse.targets]
    if not known:
        raise NotFittedError(not_fitted(classes, inverse.targets))
    kept, chosen = x[known], None if targets is None else [targets[i] for i in known]
    chosen_reading = args.reading or _default_reading(inverse)
    method = reading(mipin, chosen_reading)
    case = Case.of(method, kept, chosen, model=model, batch_size=args.batch_size)
    (maps,) = case.maps
    label = _label(chosen_reading)
    row = Row(label, control=False, maps=maps.cpu(), place=place_of(method, label))
    titles = tuple(class_name(names, classes[i]) for i in known)
    texts = tuple(captions(case, titles))
    shown = Comparison((row,), (), images.denormalise(kept), titles, captions=texts)
    for path in args.out:
        if path.suffix.lower() in PICTURES:
            _write(shown, path)
            continue
        (signals,) = Case.of(mipin.source_signal, kept, chosen, batch_size=args.batch_size).maps
        tensors = {"attribution": maps, "source_signal": signals}
        if chosen is not None:
            tensors["target"] = torch.tensor(chosen)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        about = {"images": json.dumps([images.names[i] for i in known])}
        save_file(tensors, path, {**about, "reading": chosen_reading})
    columns = "image", "target", "name", "score", "explained"
    data = [
        dict(zip(columns, (image, c, class_name(names, c), score, i in known), strict=True))
        for i, (image, c, score) in enumerate(zip(images.names, classes, scores, strict=True))
    ]
    return Outcome(
        _explained(data, inverse.targets), {"images": data, "out": list(map(str, args.out))}
    )


def _explained(rows: Sequence[Mapping[str, Any]], fitted: Sequence[Any]) -> str:
    """Return the table of explained images, and how to fit the classes that are missing."""
    header = ["image", "target", "score"]
    cells = [
        [
            row["image"],
            row["name"],
            f"{row['score']:.4g}" + " (not fitted)" * (not row["explained"]),
        ]
        for row in rows
    ]
    missing = [row["target"] for row in rows if not row["explained"]]
    text = table(header, cells, left=2)
    return f"{text}\n\n{not_fitted(missing, fitted)}" if missing else text


def compare(args: Namespace) -> Outcome:
    """Measure several methods on the same images, and show their maps side by side.

    Ctrl-C ends the work early: the files then hold what was done.

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
    images = ImageFolder(args)
    x = images.stack()
    written, pause, classes = perf_counter(), _EVERY, predict(args, model, x)[0]
    needed = "" if inverse is None else all_classes(inverse.targets, classes or ())

    def write(comparison: Comparison, last: bool = False) -> None:
        """Write the files of ``--out`` if the last time is long ago, or nothing comes after."""
        nonlocal written, pause
        if last or (begun := perf_counter()) - written >= pause:
            pixels = images.denormalise(x[: len(comparison.images)])
            shown = replace(_in_plain_words(comparison, needed), images=pixels)
            for path in args.out:
                _write(shown, path)
            written = perf_counter()
            pause = pause if last else max(_EVERY, _SHARE * (written - begun))

    comparison = compare_methods(
        _methods(args, inverse, layer is not None),
        x,
        classes,
        metrics=[] if args.no_metrics else args.metrics or None,
        model=model,
        inverse=inverse,
        layer=layer,
        names=read_names(args, model, images),
        steps=None if args.steps is True else args.steps,
        budget=args.budget,
        callback=write,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    comparison = _in_plain_words(comparison, needed)
    write(comparison, last=True)
    data = {**comparison.to_dict(), "files": images.names, "out": list(map(str, args.out))}
    return Outcome(comparison.table(), data, _failure(comparison))


def _in_plain_words(comparison: Comparison, needed: str) -> Comparison:
    """Return a comparison whose errors name options of the command line, and all classes to fit."""
    rows = (
        replace(
            row,
            errors={what: plainly(why, needed) for what, why in row.errors.items()},
            missing={plainly(why, needed): images for why, images in row.missing.items()},
        )
        for row in comparison.rows
    )
    return replace(comparison, rows=tuple(rows))


def _default_reading(inverse: InverseNetwork) -> str:
    """Return the reading of an inverse without ``--reading``."""
    return inverse.photographs or "A"


def _label(reading: str) -> str:
    """Return the name that a reading has as a method of ``compare``."""
    return f"MIP-IN {reading.removeprefix('A').strip()}".strip()


def _methods(args: Namespace, inverse: InverseNetwork | None, layer: bool) -> list[str]:
    """Return the names of the methods to compare; "MIP-IN" is its reading."""
    readings: Sequence[str] = () if inverse is None else DEFAULT_READINGS
    if inverse is not None and (args.reading is not None or inverse.photographs):
        readings = [_label(args.reading or _default_reading(inverse))]
    if not args.methods:
        return [*readings, *DEFAULT_METHODS, *(["Grad-CAM"] if layer else ())]
    named = [readings[0] if name == "MIP-IN" else name for name in args.methods]
    return list(dict.fromkeys(named if args.reading is None else [*readings, *named]))


def _failure(comparison: Comparison) -> str:
    """Return why the command failed: interrupted, or nothing measured. Empty after success."""
    if "interrupted" in comparison.note:
        return comparison.note
    rows = [row for row in comparison.rows if not row.control] or comparison.rows
    done = any(row.results if comparison.metrics else row.maps is not None for row in rows)
    if done:
        return ""
    metric, error = next(item for row in rows for item in row.errors.items())
    return f"nothing was measured, because {metric or 'every method'} failed: {error}"


COMMANDS = {
    "check": check,
    "predict": predict_classes,
    "fit": fit,
    "explain": explain,
    "compare": compare,
}
#: Least time between two writings of unfinished results, in seconds, and in times of a writing.
_EVERY, _SHARE = 5.0, 50.0


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
    line = " ".join(plainly(reason).split())
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
