"""Networks by name: from torchvision, from a factory, or from an exported program."""

import importlib
import operator
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_mipin.cli.optional import require_module
from captum_mipin.errors import InputError
from captum_mipin.graph import exported
from captum_mipin.graph.signature import select
from captum_mipin.targets import per_example


def load_model(args: Namespace) -> tuple[nn.Module, nn.Module | None]:
    """Return the network in evaluation mode, with its weights, and the layer that was asked for.

    Args:
        args: The command's arguments; ``command``, ``model``, ``weights``, ``layer``, ``mean``,
            ``size`` and ``device`` are read.

    Raises:
        InputError: The network, its weights or its layer cannot be had.
        CaptureError: The exported program cannot be explained.
        OSError: A file cannot be read.
        ImportError: torchvision, or the factory's module, is missing.
    """
    source, _, name = args.model.partition(":")
    pretrained = args.weights == "torchvision"
    if pretrained and source != "torchvision":
        raise InputError(
            f"--weights torchvision needs a model torchvision:NAME, not {args.model}: "
            "pass --weights FILE"
        )
    if args.model.endswith(".pt2"):
        model = exported.load(args.model, (len(args.mean), *args.size), args.device)
    elif not source or not name or source.startswith(".") or "/" in source:
        raise InputError(
            f"MODEL is {args.model!r}, expected torchvision:NAME, module:FACTORY or FILE.pt2"
        )
    elif source != "torchvision":
        model = _call_factory(source, name)
    elif args.weights is None and args.command != "check":
        raise InputError(
            f"{args.model} has random weights: pass --weights FILE, "
            "or --weights torchvision for the trained ones"
        )
    else:
        model = _from_torchvision(name, pretrained)
    if args.weights is not None and not pretrained:
        _load_weights(model, args.weights)
    return model.to(args.device).eval(), _find_layer(model, args.layer)


def predict(args: Namespace, model: nn.Module, x: Tensor) -> tuple[list[int] | None, list[float]]:
    """Return the class to explain for each image, and its score.

    Args:
        args: The command's arguments. ``targets`` is one class for all images, or one for each;
            None takes the predicted class. ``batch_size`` images go through the model at once.
        model: Returns (images, classes), or (images,) if it has one output.
        x: Images (images, channels, height, width).

    Returns:
        Classes counted from 0, None for a model with one output; scores, such as logits.

    Raises:
        InputError: The outputs have another shape.
        TargetError: The targets fit neither the images nor the outputs.
    """
    with torch.no_grad():
        outputs = torch.cat([select(model(part), None) for part in x.split(args.batch_size)])
    if outputs.ndim == 1 and args.targets is None:
        return None, outputs.tolist()
    if outputs.ndim != 2:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, expected (images, classes)"
        )
    targets = outputs.argmax(1).tolist() if args.targets is None else args.targets
    rows = per_example(targets[0] if len(targets) == 1 else targets, outputs)
    classes = [target for (target,) in rows]
    return classes, outputs[torch.arange(len(x)), classes].tolist()


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    """Return a network of torchvision."""
    models = require_module("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise InputError(
            f"torchvision has no network {name!r}: torchvision.models.list_models() names them"
        )
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    return model


def _call_factory(source: str, name: str) -> nn.Module:
    """Return the module that a factory builds, or the module itself if ``name`` is one."""
    before = sys.path
    sys.path = [str(Path.cwd()), *before]  # as `python -m` does; the console script does not
    try:
        module = importlib.import_module(source)
        try:
            factory: Any = operator.attrgetter(name)(module)
        except AttributeError as error:
            raise InputError(f"{source}:{name} does not exist: {error}") from error
        model = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except SystemExit as error:
        raise InputError(
            f"{source}:{name} ends the process: "
            "move what a script does below if __name__ == '__main__'"
        ) from error
    finally:
        sys.path = before
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source}:{name} gives a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _load_weights(model: nn.Module, weights: str) -> None:
    """Load a state dict from a file, all of it; no code in the file is run."""
    Path(weights).open("rb").close()  # raises the plain OSError of a file that cannot be read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that it then refuses
            state: Any = (
                load_file(weights)
                if weights.endswith(".safetensors")
                else torch.load(weights, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # of any type: the file may hold anything
        raise InputError(
            f"{weights!r} is damaged, or holds more than tensors, and loading that could run code: "
            "save the weights with torch.save(model.state_dict(), path)"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the weights in {weights!r} do not fit the model: {error}") from error


def _find_layer(model: nn.Module, path: str | None) -> nn.Module | None:
    """Return the submodule at a path, None without a path."""
    if path is None:
        return None
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not path or path not in modules:
        names = ", ".join(name for name, _ in model.named_children())
        raise InputError(f"the model has no layer {path!r}; {type(model).__name__} has {names}")
    return modules[path]
