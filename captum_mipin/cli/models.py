"""Loading of networks: from torchvision, from a factory, or from an exported program."""

import importlib
import operator
import os
import sys
import warnings
from argparse import Namespace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_mipin.cli.arguments import PHOTOGRAPHS, PREDICTED
from captum_mipin.cli.images import ImageFolder
from captum_mipin.cli.optional import require_module
from captum_mipin.comparison.names import check_names, class_names
from captum_mipin.errors import InputError, MIPINError, MissingFileError
from captum_mipin.graph import exported
from captum_mipin.graph.diagnosis import reasons
from captum_mipin.graph.signature import select
from captum_mipin.options import closest, type_of
from captum_mipin.photographs import photograph_layer
from captum_mipin.targets import per_example


def load_model(args: Namespace) -> tuple[nn.Module, nn.Module | None]:
    """Return the network in evaluation mode, and the module of ``--layer`` or None.

    Sets ``args.picked``: the reading of a layer that is picked for photographs, else "".

    Args:
        args: The command's arguments. These are used: ``command``, ``model``, ``weights``,
            ``layer``, ``mean``, ``size`` and ``device``.

    Raises:
        InputError: The network, its weights or its layer do not exist or cannot be loaded.
        CaptureError: The exported program cannot be explained.
        MissingFileError: There is no such file.
        ImportError: torchvision, or the module of the factory, is not installed.
    """
    source, _, name = args.model.partition(":")
    pretrained = args.weights == "torchvision"
    if pretrained and source != "torchvision":
        raise InputError(
            f"--weights torchvision needs a model torchvision:NAME, not {args.model}: "
            "pass --weights FILE"
        )
    if args.model.endswith(".pt2"):
        require_file(args.model, "MODEL", "an exported program")
        model = exported.load(args.model, (len(args.mean), *args.size), args.device)
    elif not source or not name or source.startswith(".") or "/" in source:
        raise InputError(
            f"MODEL is {args.model!r}, expected torchvision:NAME, module:FACTORY or FILE.pt2: pass "
            "for example torchvision:resnet50, and a file of weights as --weights FILE"
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
    model, path = model.to(args.device).eval(), getattr(args, "layer", None)
    args.picked = ""
    if path == PHOTOGRAPHS and PHOTOGRAPHS not in dict(model.named_modules()):
        blank = torch.zeros(1, len(args.mean), *args.size, device=args.device)
        path, args.picked = photograph_layer(model, (blank,))
    return model, _find_layer(model, path)


def outputs_of(args: Namespace, model: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of a network (images, classes), or (images,) for a single output.

    Args:
        args: The command's arguments. ``batch_size`` is used, the number of images per call; 32
            if it is None.
        model: The network.
        x: Images (images, channels, height, width).

    Raises:
        InputError: The shape of the outputs differs from these shapes.
        CaptureError: The model cannot run on the images.
    """
    with torch.no_grad(), reasons(model, (x,), None):
        outputs = torch.cat([select(model(part), None) for part in x.split(args.batch_size or 32)])
    if outputs.ndim not in (1, 2):
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, expected (images, classes): "
            "pass a model that returns one score per class"
        )
    return outputs


def predict(args: Namespace, model: nn.Module, x: Tensor) -> tuple[list[int] | None, list[float]]:
    """Return the class to explain for each image, and the model's output for this class.

    Args:
        args: The command's arguments. These are used: ``targets``, a list of one class for all
            images or one class per image, or None or "predicted" for the predicted classes; and
            ``batch_size``.
        model: Network with outputs as for `outputs_of`.
        x: Images (images, channels, height, width).

    Returns:
        Classes counted from 0, None for a model with a single output; outputs, such as logits.

    Raises:
        InputError: The shape of the outputs is not that of `outputs_of`.
        TargetError: The targets do not fit the images or the outputs.
    """
    outputs, chosen = outputs_of(args, model, x), args.targets
    if chosen in (None, PREDICTED):
        if outputs.ndim == 1:
            return None, outputs.tolist()
        chosen = outputs.argmax(1).tolist()
    rows = per_example(chosen[0] if len(chosen) == 1 else chosen, outputs)
    classes = [target for (target,) in rows]
    return classes, outputs[torch.arange(len(x)), classes].tolist()


def read_names(args: Namespace, model: nn.Module, images: ImageFolder) -> dict[int, str]:
    """Return class -> name, from the file of ``--names`` or as the network has them.

    Args:
        args: The command's arguments. ``names`` is used.
        model: The network.
        images: Its images; the network runs on the first, to count its classes.

    Raises:
        MissingFileError: There is no such file.
        InputError: The file is no text, or the names are not as many as the classes.
    """
    if args.names is None:
        return class_names(None, model)
    names = class_names("imagenet" if args.names == "imagenet" else _lines(args.names))
    outputs = outputs_of(args, model, next(images.batches(1)))
    count = outputs.shape[1] if outputs.ndim == 2 else 1
    way_out = "pass a file with one line per output, in their order"
    check_names(args.names, names, count, f"--names {args.names!r}", way_out=way_out)
    return names


def _lines(path: str) -> list[str]:
    """Return the lines of the file of ``--names``, without blank lines at its end."""
    require_file(path, "--names", "one class name per line")
    try:
        return Path(path).read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--names {path!r} is no text ({error}), expected UTF-8 with one class name per "
            "line: save it as such"
        ) from error


def require_file(path: str, option: str, content: str) -> None:
    """Raise MissingFileError unless there is a file that can be read.

    Args:
        path: The path.
        option: The option of the command line that it belongs to.
        content: What the file should contain.
    """
    file = Path(path)
    if file.is_file() and os.access(file, os.R_OK):
        return
    if file.is_dir():
        found, hint = "is a folder", "pass the path of a file in it"
    else:
        names = map(str, file.parent.glob("*"))
        near = [name for name in get_close_matches(path, names, 3) if Path(name).is_file()]
        hint = f"pass for example {' or '.join(map(repr, near))}" if near else "pass its path"
        found = "cannot be read" if file.is_file() else "does not exist"
    raise MissingFileError(f"{option} {path!r} {found}, expected a file with {content}: {hint}")


def _from_torchvision(name: str, pretrained: bool) -> nn.Module:
    """Return a network of torchvision, with its default trained weights if ``pretrained``."""
    models = require_module("torchvision.models", "torchvision")
    if name not in models.list_models():
        raise InputError(
            f"torchvision has no network {name!r}, expected a name of "
            "torchvision.models.list_models(): pass for example one of "
            f"{closest(name, models.list_models())}"
        )
    model: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None)
    return model


def _call_factory(source: str, name: str) -> nn.Module:
    """Return the network that a factory builds.

    Args:
        source: Dotted name of a Python module; the current folder is searched first.
        name: Name of a function in this module that builds the network, or of the network.

    Raises:
        InputError: The name does not exist, ends the process, or does not give a network.
    """
    before = sys.path
    # search the current folder, as `python -m` does; console scripts do not do so by default
    sys.path = [str(Path.cwd()), *before]
    try:
        module = importlib.import_module(source)
        try:
            factory: Any = operator.attrgetter(name)(module)
        except AttributeError as error:
            public = [known for known in vars(module) if not known.startswith("_")]
            raise InputError(
                f"{source}:{name} does not exist: {error}. Pass a name that the module contains, "
                f"for example one of {closest(name, public)}"
            ) from error
        model = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except ModuleNotFoundError as error:
        if not f"{source}.".startswith(f"{error.name}."):
            raise InputError(
                f"{source} imports {error.name!r}, which is not installed, expected all that it "
                "imports: install it"
            ) from error
        raise InputError(
            f"there is no Python module {error.name!r}, expected {source} in the current folder or "
            "installed: change to the folder that contains it"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise InputError(
            f"{source} cannot be imported, {type(error).__name__}: {error}; expected a module that "
            "runs: install what is missing, or correct the file"
        ) from error
    except MIPINError:
        raise
    except Exception as error:  # of any type: the factory is the user's
        raise InputError(
            f"{source}:{name} fails with {type(error).__name__}: {error}. Pass a function that "
            "builds the network without arguments"
        ) from error
    except SystemExit as error:
        raise InputError(
            f"{source}:{name} ends the process, expected a network: move the calls of a script "
            "below if __name__ == '__main__'"
        ) from error
    finally:
        sys.path = before
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{source}:{name} gives {type_of(model)}, expected a torch.nn.Module: return one"
        )
    return model


def _load_weights(model: nn.Module, weights: str) -> None:
    """Load a complete state dict from a file, without running code in the file.

    Raises:
        InputError: The file does not contain tensors only, or they do not fit the model.
        MissingFileError: There is no such file.
    """
    require_file(weights, "--weights", "a state dict")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about such files before its error
            state: Any = (
                load_file(weights)
                if weights.endswith(".safetensors")
                else torch.load(weights, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # of any type: the file may contain any bytes
        raise InputError(
            f"{weights!r} is damaged, or holds more than tensors; expected tensors only, because "
            "other objects could run code: save the weights with torch.save(model.state_dict(), "
            "path)"
        ) from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"the weights in {weights!r} do not fit the model: {str(error).strip().rstrip('.')}. "
            "Pass the weights of this model"
        ) from error


def _find_layer(model: nn.Module, path: str | None) -> nn.Module | None:
    """Return the submodule with a dotted name; None if ``path`` is None.

    Raises:
        InputError: The model has no submodule with this name.
    """
    if path is None:
        return None
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if not path or path not in modules:
        names = closest(path, filter(None, modules))
        raise InputError(
            f"the model has no layer {path!r}, expected the name of a module of this "
            f"{type(model).__name__}: pass for example one of {names}; or {PHOTOGRAPHS}, to have a "
            "layer picked"
        )
    return modules[path]
