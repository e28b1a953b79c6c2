"""Names of classes, for tables and pictures."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from captum_mipin.errors import InputError
from captum_mipin.graph.modules import unwrapped
from captum_mipin.metrics.case import Case, target_scores
from captum_mipin.options import type_of

#: Names of classes as users pass them: one name per class in the order of the classes, a dictionary
#: class -> name, "imagenet", or None for the names that the network itself knows.
ClassNames = Sequence[str] | Mapping[int, str] | Literal["imagenet"] | None


def class_names(names: ClassNames, model: Any = None) -> dict[int, str]:
    """Return class -> name.

    Args:
        names: The names. None stands for the names of the network: ``config.id2label``, as networks
            of transformers have it, or ImageNet's for a network of torchvision with 1000 outputs.
            "imagenet" stands for the 1000 categories of ImageNet, in the order of torchvision.
        model: The network, or None.

    Returns:
        Names by class; empty if none are known.

    Raises:
        InputError: ``names`` has none of these forms.
        ImportError: torchvision is not installed, which "imagenet" needs.

    Examples:
        >>> class_names(["cat", "dog"])
        {0: 'cat', 1: 'dog'}
    """
    if names is None:
        labels = getattr(getattr(unwrapped(model), "config", None), "id2label", None)
        if isinstance(labels, Mapping):
            # transformers writes LABEL_0, LABEL_1, ... for classes without names
            return {int(i): str(n) for i, n in labels.items() if str(n) != f"LABEL_{i}"}
        names = "imagenet" if _is_imagenet(unwrapped(model)) else ()
    if isinstance(names, str):
        if names != "imagenet":
            raise InputError(
                f"names={names!r} is not known: pass 'imagenet', a list of names, or a dictionary "
                "class -> name"
            )
        return dict(enumerate(_imagenet()))
    if isinstance(names, Mapping):
        return {int(index): str(name) for index, name in names.items()}
    if isinstance(names, Sequence):
        return {index: str(name) for index, name in enumerate(names)}
    raise InputError(
        f"names is {type_of(names)}, expected names of classes: pass a list of names, a "
        "dictionary class -> name, or 'imagenet'"
    )


def check_names(
    names: Any, known: Mapping[int, str], outputs: int, where: str = "names=", way_out: str = ""
) -> None:
    """Raise InputError unless names of a user fit a network: one per output.

    A dictionary may leave outputs out.

    Args:
        names: The names as the user passed them.
        known: The same names as :func:`class_names` returns them.
        outputs: Number of the network's outputs.
        where: What the error calls the names.
        way_out: What the error tells to pass.

    Examples:
        >>> check_names({1: "dog"}, {1: "dog"}, outputs=3)
    """
    outside = [index for index in known if not -outputs <= index < outputs]
    if isinstance(names, Mapping) and outside:
        raise InputError(
            f"{where} names class {outside[0]}, but the model has {outputs} outputs; expected "
            f"classes from 0 to {outputs - 1}: correct the numbers of the classes"
        )
    if not isinstance(names, Mapping) and len(known) != outputs:
        way_out = way_out or "pass them in the order of the outputs, or a dictionary class -> name"
        raise InputError(
            f"{where} has {len(known)} names, but the model has {outputs} outputs; expected one "
            f"name per output: {way_out}"
        )


def class_name(names: Mapping[int, str], target: Any) -> str:
    """Return the name of a class; its number as text if the class has no name.

    Args:
        names: Names by class, see :func:`class_names`.
        target: The class: an int, a tuple of ints, or None for a network with one output.

    Examples:
        >>> class_name({3: "bird"}, 3), class_name({3: "bird"}, 4), class_name({}, None)
        ('bird', '4', '')
    """
    index = target[0] if isinstance(target, tuple) and len(target) == 1 else target
    if index is None:
        return ""
    if isinstance(index, int) and index < 0 and names and set(names) == set(range(len(names))):
        index += len(names)  # as Captum counts classes from the end
    return names.get(index, str(target)) if isinstance(index, int) else str(target)


def captions(case: Case, titles: Sequence[str]) -> list[str]:
    """Return the titles of images, each with the model's output for the target in lines below.

    The lines are softmax and logit; or the output alone, if all outputs lie in [0, 1] or are not
    those of several classes. If the model cannot be run, the titles are returned.

    Args:
        case: The images, their targets and the model.
        titles: One title per image.
    """
    try:
        outputs = case.outputs(case.examples).detach()
        scores = target_scores(outputs, case.examples.target)
    except Exception:  # of any type: a model that fails has its error in the rows
        return list(titles)
    lines = _output_lines(outputs, scores, case.examples.target)
    return [f"{title}\n{line}".strip() for title, line in zip(titles, lines, strict=True)]


def _output_lines(outputs: Tensor, scores: Tensor, target: Any) -> list[str]:
    """Return the text for each image that :func:`captions` adds."""
    are_shares = bool(((outputs >= 0) & (outputs <= 1)).all())
    if outputs.ndim != 2 or outputs.shape[1] == 1 or are_shares:
        return [f"output {score:.3g}" for score in scores.tolist()]
    shares = target_scores(outputs, target, "softmax").tolist()
    pairs = zip(shares, scores.tolist(), strict=True)
    return [f"softmax {share:.2f}\nlogit {score:.1f}" for share, score in pairs]


def _is_imagenet(model: Any) -> bool:
    """Return True for a network of torchvision with 1000 outputs."""
    if not type(model).__module__.startswith("torchvision.models."):
        return False
    sizes = [p.shape[0] for p in model.parameters() if p.ndim]
    return bool(sizes) and sizes[-1] == 1000


def _imagenet() -> Sequence[str]:
    try:
        models: Any = import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(
            "torchvision is not installed; names='imagenet' needs its list of names: pip install "
            "torchvision"
        ) from error
    categories: Sequence[str] = models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    return categories
