"""Whether an attribution depends on the class.

    python benchmarks/class_sensitivity.py NETWORK --data FOLDER

Each image is explained for the same two classes. The figures compare the two maps, averaged over
images: the cosine of the maps as they are, and of their absolute values. A map that hardly changes
with the class explains no class. See ``benchmarks/pretrained.py`` for the weights.

Source: Nie et al., ICML 2018; Sixt et al., ICML 2020.
"""

from collections.abc import Callable
from typing import Any

from captum.attr import IntegratedGradients, Saliency
from common import show, write
from localization_grid import network_and_photos, network_parser
from torch import Tensor, nn
from torch.nn import functional as F

from captum_mipin import LRP, InverseNetwork, MIPINAttribution
from captum_mipin.methods import (
    Deconvnet,
    DeepTaylor,
    Epsilon,
    ExcitationBackprop,
    GuidedBackprop,
    PatternAttribution,
    PatternNet,
    Patterns,
    ZPlus,
)

Map = Callable[[Tensor, int], Any]


def methods(model: nn.Module, fit: Tensor, classes: tuple[int, int]) -> dict[str, Map]:
    """Return name → (images, class) → attributions; methods that learn are fitted on ``fit``."""
    patterns = Patterns(model).fit(fit, batch_size=50, progress=False)
    inverse = InverseNetwork(model).fit(fit, targets=list(classes), batch_size=50, progress=False)
    saliency: Any = Saliency(model)
    integrated: Any = IntegratedGradients(model)
    found: dict[str, Any] = {
        "Gradient": lambda x, c: saliency.attribute(x.clone().requires_grad_(), c, False),
        "Integrated Gradients": lambda x, c: integrated.attribute(x, None, c, n_steps=16),
        "LRP-ε": LRP(model, rule=Epsilon()).attribute,
        "LRP-z⁺": LRP(model, rule=ZPlus()).attribute,
        "Deep Taylor": DeepTaylor(model).attribute,
        "Deconvnet": Deconvnet(model).attribute,
        "Guided Backprop": GuidedBackprop(model).attribute,
        "Excitation backprop": ExcitationBackprop(model).attribute,
        "Excitation backprop, contrastive": ExcitationBackprop(model, contrastive=True).attribute,
        "PatternNet": PatternNet(model, patterns).attribute,
        "PatternAttribution": PatternAttribution(model, patterns).attribute,
        "MIP-IN": MIPINAttribution(model, inverse).attribute,
    }
    return found


def cosines(method: Map, x: Tensor, classes: tuple[int, int]) -> tuple[float, float]:
    """Return the mean cosine of the maps for two classes, and that of their absolute values."""
    one, other = (method(x, c).flatten(1).double() for c in classes)
    return float(F.cosine_similarity(one, other).mean()), float(
        F.cosine_similarity(one.abs(), other.abs()).mean()
    )


def compare(
    model: nn.Module, fit: Tensor, x: Tensor, classes: tuple[int, int], chunk: int = 10
) -> list[dict[str, Any]]:
    """Return one row a method."""
    rows = []
    for name, method in methods(model, fit, classes).items():
        found = [cosines(method, part, classes) for part in x.split(chunk)]
        signed, absolute = (sum(values) / len(found) for values in zip(*found, strict=True))
        rows.append({"method": name, "cosine": signed, "cosine of absolute values": absolute})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = network_parser(__doc__, fit=100)
    parser.add_argument("--classes", type=int, nargs=2, default=(3, 8))
    parser.add_argument("--images", type=int, default=100, help="images to explain")
    arguments = parser.parse_args()
    model, normalise, found = network_and_photos(arguments)
    classes = tuple(arguments.classes)
    rows = compare(model, normalise(found.fit), normalise(found.test[: arguments.images]), classes)
    settings = {"classes": classes, "fit images": arguments.fit, "images": arguments.images}
    write(f"class-sensitivity-{arguments.network}", rows, **settings)
    print(show(rows))


if __name__ == "__main__":
    main()
