"""Tries the package on models of other packages, as they come, with random weights.

    python benchmarks/wild.py [FAMILIES] [--package NAME] [--processes N] [--methods NAMES]

The packages are those of benchmarks/wild.txt, in an environment of their own; nothing is
downloaded. Each family runs in a process of its own: ``check``, MIP-IN fitted on 32 inputs, LRP-ε,
Guided Backprop and IBA. MIP-IN starts from a late layer where the network is large, or where an
inverse of all of it needs more memory than there is. A method works if its map is finite, has the
shape of what it explains, is the same for an example alone as in a batch, and leaves the model as
it was. Families that are named replace their rows of the results; the other rows stay.
"""

import contextlib
import copy
import importlib.metadata
import json
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import RESULTS, parser_of, read, write
from torch import Tensor, nn
from wild_models import Sample, families

from captum_mipin import (
    IBA,
    LRP,
    InverseNetwork,
    LayerMIPINAttribution,
    MIPINAttribution,
    MIPINError,
    check,
)
from captum_mipin.bottleneck import Bottleneck
from captum_mipin.bottleneck.iba import IBA_SETTINGS
from captum_mipin.errors import FitError, InputError
from captum_mipin.graph import capture, exporting
from captum_mipin.graph.signature import Signature
from captum_mipin.methods import GuidedBackprop, LayerPropagation

METHODS = ("MIP-IN", "LRP", "Guided Backprop", "IBA")
FORK = multiprocessing.get_context("fork")  # torch is imported once
LARGE = 1_500_000  # parameters; beyond that MIP-IN is fitted from a late layer
_SWITCH = torch.ops.higher_order.wrap_with_set_grad_enabled
DIFFER = "alone and in a batch differ by"
TOLERANCE = 1e-3  # of a map's largest value, float32


@dataclass
class Exports:
    """What is noted of this process's exports: most of the time is in them.

    Attributes:
        seconds: Processor seconds of the first export, None if it failed.
        switched: Whether a model switches gradients off; else all methods have the same graph.
    """

    seconds: float | None = None
    switched: bool = False


def share_captures() -> Exports:
    """Let all methods of this process share the graphs of its model, and note its exports."""
    exports, graphs = Exports(), dict[Any, tuple[Any, nn.Module]]()  # no id is used again
    names: Any = exporting
    plain_trace, plain_export, calls = capture.trace, names.export, list[float]()

    def export(*args: Any, **named: Any) -> Any:
        start = time.process_time()
        calls.append(start)
        program = plain_export(*args, **named)
        if len(calls) == 1:
            exports.seconds = time.process_time() - start
        exports.switched |= any(n.target is _SWITCH for n in program.graph.nodes)
        return program

    def trace(model: nn.Module, inputs: Any, extras: Any, shared: bool, **options: Any) -> Any:
        if not exports.switched:
            options["detached"] = False
        key = (id(model), Signature.of(inputs, extras, shared), repr(options))
        if key not in graphs:
            graphs[key] = plain_trace(model, inputs, extras, shared, **options), model
        return graphs[key][0]

    capture.trace, names.export = trace, export
    return exports


def late_layer(sample: Sample) -> nn.Module | None:
    """Return the block before the last one, of the longest row of blocks that ends latest."""
    ended: list[nn.Module] = []
    blocks = {
        child
        for module in sample.model.modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for child in module
        if any(True for _ in child.parameters())
    }
    hooks = [b.register_forward_hook(lambda m, _, out: keep(m, out)) for b in blocks]

    def keep(module: nn.Module, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and out.dim() > 2 and len(out) == 2:
            ended.append(module)

    with torch.no_grad():
        sample.model(*(x[:2] for x in sample.inputs))
    for hook in hooks:
        hook.remove()
    inner = {sub for module in ended for sub in module.modules() if sub is not module}
    outer = [module for module in dict.fromkeys(ended) if module not in inner]
    return outer[-2] if len(outer) > 1 else None


def state(model: nn.Module) -> tuple[object, ...]:
    """Return what a method must not change: weights' versions, names and hooks of all modules."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    weights = [(name, id(t), t._version, t.grad is None) for name, t in tensors.items()]
    modules = [
        (name, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._backward_hooks))
        for name, m in model.named_modules()
    ]
    return weights, modules


def examine(attribute: Callable[[tuple[Tensor, ...]], Any], sample: Sample) -> str:
    """Return "works", or what is wrong with the maps."""
    before = state(sample.model)
    batch = attribute(tuple(x[:2] for x in sample.inputs))
    alone = attribute(tuple(x[1:2] for x in sample.inputs))
    if state(sample.model) != before:
        return "failed: the model was changed"
    for one, many in zip(_maps(alone), _maps(batch), strict=True):
        if not bool(many.isfinite().all()):
            return "failed: not finite"
        if many.shape[0] != 2 or one.shape[1:] != many.shape[1:]:
            return f"failed: shape {tuple(many.shape)}"
        error = float((one[0] - many[1]).abs().max() / one.abs().max().clamp(min=1e-30))
        if error > TOLERANCE:
            return f"failed: {DIFFER} {error:.1g}"
    return "works"


def _maps(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def settle(sample: Sample) -> None:
    """Let the score vary with the input, where a model's first weights make it a constant.

    Dense layers whose weights are all 0 get random ones; batch norms get the statistics of the
    inputs, and scales of 1 where all are 0.
    """
    model, few = sample.model, tuple(x[:8] for x in sample.inputs)
    with torch.no_grad():
        output = model(*few)
        output = output if isinstance(output, Tensor) else output[sample.output]
        place = sample.target if isinstance(sample.target, tuple) else (sample.target,)
        scores = output[(slice(None), *place)]
        if scores.std() > 1e-4 * scores.abs().max():
            return
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.reset_parameters()
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.weight is not None and not module.weight.any():
                    module.weight.fill_(1)
                module.train()
                module.momentum = 1.0
        model(*few)
        model.eval()


def methods(sample: Sample, late: nn.Module | None, large: bool) -> dict[str, Callable[[], str]]:
    """Return name of the method → function that tries it."""

    def mipin(sample: Sample, late: nn.Module | None) -> str:
        layer = sample.embedding if not large else late or sample.embedding
        inverse = InverseNetwork(sample.model, layer=layer, output=sample.output)
        try:
            inverse.fit(sample.inputs, sample.target, batch_size=8, progress=False)
        except FitError as error:
            if "of free memory" not in str(error):
                raise
            layer = late or layer  # an inverse of the whole network needs more than there is
            inverse = InverseNetwork(sample.model, layer=layer, output=sample.output, positions=64)
            inverse.fit(sample.inputs, sample.target, batch_size=8, progress=False)
        method: Any = (
            MIPINAttribution(sample.model, inverse)
            if layer is None
            else LayerMIPINAttribution(sample.model, inverse)
        )
        return examine(lambda x: method.attribute(x, target=sample.target), sample)

    def propagated(kind: Any, sample: Sample) -> str:
        method = kind(sample.model, output=sample.output)
        if sample.embedding is not None:
            method = LayerPropagation(method, sample.embedding)
        return examine(lambda x: method.attribute(x, target=sample.target), sample)

    def sound(tried: Callable[[Sample, nn.Module | None], str]) -> str:
        try:
            found = tried(sample, late)
        except MIPINError as error:
            if "NaN or Inf" not in str(error):
                raise
            found = "refused: too large or too small numbers"
        if DIFFER not in found and not found.startswith("refused"):
            return found
        # a fault stays in float64; rounding, which grows where terms cancel, does not
        exact = tried(*doubled(sample, late))
        return (
            f"works in float64; in float32, {found.split(': ')[1]}" if exact == "works" else found
        )

    def bottleneck(
        sample: Sample, late: nn.Module | None, settings: Bottleneck = IBA_SETTINGS["fast"]
    ) -> str:
        at, target = late or sample.embedding, sample.target
        if at is None:
            return "not tried: no layer"
        iba = IBA(sample.model, at, settings=settings, output=sample.output)
        iba.estimate(sample.inputs, batch_size=8, progress=False)
        try:
            return examine(lambda x: iba.attribute(x, target=target), sample)
        except MIPINError as error:
            if "cannot be smoothed" in str(error):  # the layer has too few positions
                return bottleneck(sample, late, replace(settings, sigma=0))
            if not isinstance(error, InputError):
                raise
            # the layer has tokens, not positions of the input
            return examine(lambda x: iba.attribute(x, target=target, at="layer"), sample)

    tries = {
        "MIP-IN": lambda: sound(mipin),
        "LRP": lambda: sound(lambda sample, _: propagated(LRP, sample)),
        "Guided Backprop": lambda: sound(lambda sample, _: propagated(GuidedBackprop, sample)),
    }
    # IBA is defined for the cross entropy of classes
    return tries | ({"IBA": lambda: sound(bottleneck)} if isinstance(sample.target, int) else {})


def doubled(sample: Sample, late: nn.Module | None) -> tuple[Sample, nn.Module | None]:
    """Return a copy of a sample in float64, and the copy of its late layer."""
    model, place, late = copy.deepcopy((sample.model, sample.embedding, late))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in sample.inputs)
    return replace(sample, model=model.double(), inputs=inputs, embedding=place), late


def verdict(attempt: Callable[[], str]) -> str:
    """Return "works", "refused: ..." in the package's words, or "failed: ..."."""
    try:
        return attempt()
    except MIPINError as error:
        return f"refused: {str(error)[:600]}"
    except Exception as error:  # anything else is a fault
        return f"failed: {type(error).__name__}: {str(error)[:300]}"


def measure(package: str, name: str, chosen: Collection[str]) -> dict[str, Any]:
    """Return the row of one family."""
    sys.path.pop(0)  # or packages find modules of this folder in place of theirs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    exports = share_captures()
    family = next(f for p, n, f in families() if (p, n) == (package, name))
    row: dict[str, Any] = {"package": package, "family": name}
    row["version"] = importlib.metadata.version(package)
    sample = family()
    settle(sample)
    model, inputs = sample.model, sample.inputs
    row["model"] = sample.name or type(model).__name__
    count = sum(p.numel() for p in model.parameters())
    row["parameters"] = count
    start = time.process_time()

    def checked() -> str:
        report = check(
            model, tuple(x[:2] for x in inputs), layer=sample.embedding, output=sample.output
        )
        first = f"{report.refused[0]} ({len(report.refused)} in all)" if report.refused else ""
        return f"refused: {first}" if first else "works"

    row["check"] = verdict(checked)
    row["check s"], row["export s"] = time.process_time() - start, exports.seconds
    late = late_layer(sample) if chosen else None
    for method, attempt in methods(sample, late, count > LARGE).items():
        if method not in chosen:
            continue
        start = time.process_time()
        row[method] = verdict(attempt)
        row[f"{method} s"] = time.process_time() - start
    return row


def in_process(package: str, name: str, seconds: int, chosen: Collection[str]) -> dict[str, Any]:
    """Return the row of one family, measured in a process of its own, a fork of this one."""
    row: dict[str, Any] = {"package": package, "family": name}
    here, there = FORK.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        with contextlib.redirect_stdout(sys.stderr):
            try:
                there.send(measure(package, name, chosen))
            except Exception as error:  # of the package that builds the model
                why = str(error).partition(" (/")[0]  # without paths of this machine
                there.send(row | {"check": f"not built: {type(error).__name__}: {why}"[:300]})

    process = FORK.Process(target=run)
    process.start()
    there.close()
    try:
        row = here.recv()
        process.join()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        why = f"more than {seconds} s" if late else f"the process ended with {process.exitcode}"
        row["check"] = f"failed: {why}"
    return row


def main() -> None:
    """Try the chosen families, and write their rows."""
    parser = parser_of(__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--package")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seconds", type=int, default=900, help="processor time for a family")
    parser.add_argument("--methods", nargs="*", default=METHODS, help="none: check alone")
    options = parser.parse_args()
    known = [(package, name) for package, name, _ in families()]
    chosen = [key for key in known if options.package in (None, key[0])]
    if options.families:
        chosen = [key for name in options.families for key in chosen if key[1] == name]
    rows = {}
    if (RESULTS / "wild.json").exists():
        rows = {(row["package"], row["family"]): row for row in read("wild")["rows"]}
    with ThreadPoolExecutor(options.processes) as pool:
        tries = [
            pool.submit(in_process, package, name, options.seconds, options.methods)
            for package, name in chosen
        ]
        for done in as_completed(tries):
            row = done.result()
            key = row["package"], row["family"]
            print(json.dumps(row), flush=True)
            same = rows.get(key, {}).get("model") == row.get("model")
            rows[key] = (rows.get(key, {}) if same else {}) | row
            counts = Counter(package for package, _ in known)
            write("wild", [rows[key] for key in known if key in rows], inputs=32, families=counts)


if __name__ == "__main__":
    main()
