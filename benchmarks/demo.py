"""Fit MIP-IN, and compare it with Captum's methods.

    python benchmarks/demo.py [photographs] [--out FOLDER] [--photos FOLDER]
    python benchmarks/demo.py digits|mnist|fashion-mnist|cifar10 [--out FOLDER] [--data FOLDER]

The first explains photographs by a network that was trained on ImageNet, see
``demo_photographs.py``. The second trains a small network on a small data set, and writes
``side-by-side.png``, the maps of all methods, and ``completeness.md``, how complete the
source signal is. ``digits`` are the 8 x 8 handwritten digits that come with scikit-learn; the other
data sets are downloaded by torchvision, or read from ``--data``.
"""

import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_photographs
from captum.attr import LRP, Deconvolution, GuidedBackprop, InputXGradient, NoiseTunnel, Saliency
from captum.attr import visualization as viz
from common import parser_of, show
from completeness import apc, controls
from data import NAMES, Images, load
from matplotlib.figure import Figure
from networks import Network, accuracy, trained
from torch import Tensor

from captum_mipin import InverseNetwork, MIPINAttribution

logger = logging.getLogger("demo")

#: Training images that MIP-IN is fitted on at most.
FITTED = 5_000


def methods(model: Network, mipin: MIPINAttribution) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Return name → (one image, class) → the map of the method.

    SmoothGrad takes 50 samples with σ = 15 % of the image's range.
    """

    def by(method: Any, **options: Any) -> Callable[[Tensor, int], Tensor]:
        return lambda x, label: method.attribute(x, target=label, **options)

    def smoothgrad(x: Tensor, label: int) -> Tensor:
        spread = 0.15 * float(x.max() - x.min())
        return by(NoiseTunnel(Saliency(model)), nt_samples=50, stdevs=spread, abs=False)(x, label)

    return {
        "source signal S": lambda x, label: mipin.source_signal(x, target=label),
        "MIP-IN A": by(mipin),
        "class map": lambda x, label: mipin.class_attribution(label),
        "Saliency": by(Saliency(model), abs=False),
        "SmoothGrad": smoothgrad,
        "Input×Gradient": by(InputXGradient(model)),
        "Deconvnet": by(Deconvolution(model)),
        "Guided Backprop": by(GuidedBackprop(model)),
        "LRP": by(LRP(model)),
    }


def figure(images: Images, model: Network, mipin: MIPINAttribution, rows: int = 8) -> Figure:
    """Draw the first test image of each of some classes, and every method's map for that class."""
    labels = list(range(len(images.classes)))[:rows]
    maps = methods(model, mipin)
    page = Figure(figsize=(1.35 * (len(maps) + 1), 1.4 * len(labels)), layout="constrained")
    axes = page.subplots(len(labels), len(maps) + 1)
    for row, label in enumerate(labels):
        x = images.test[images.test_labels == label][:1]
        _picture(axes[row, 0], x, f"{images.classes[label]}")
        for axis, (name, method) in zip(axes[row, 1:], maps.items(), strict=True):
            found = method(x, label).detach()
            if name == "source signal S":
                _picture(axis, found.clamp(0, 1))
            else:
                _signed(page, axis, found)
            if row == 0:
                axis.set_title(name, fontsize=9)
    axes[0, 0].set_title("image", fontsize=9)
    page.supxlabel(
        "each map for the digit or class at the left: blue is positive, red negative, on its own "
        "scale",
        fontsize=9,
    )
    return page


def _picture(axis: Any, x: Tensor, name: str = "") -> None:
    axis.imshow(_hwc(x).squeeze(), cmap="gray", vmin=0, vmax=1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_ylabel(name, fontsize=9)


def _signed(page: Figure, axis: Any, maps: Tensor) -> None:
    """Draw a map: blue is positive, red is negative."""
    viz.visualize_image_attr(
        _hwc(maps), method="heat_map", sign="all", plt_fig_axis=(page, axis), use_pyplot=False,
        cmap="RdBu",
    )  # fmt: skip


def _hwc(x: Tensor) -> Any:
    return x[0].permute(1, 2, 0).numpy()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings(
        "ignore", module="captum|torch"
    )  # Captum's methods announce their hooks on every call
    parser = parser_of(__doc__)
    parser.add_argument(
        "data_set", nargs="?", default="photographs", choices=("photographs", *NAMES)
    )
    parser.add_argument("--photos", type=Path, help="folder with photographs of your own")
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument(
        "--data",
        help="folder with mnist.npz or the CIFAR-10 sheets; default: download with torchvision",
    )
    arguments = parser.parse_args()
    if arguments.data_set == "photographs":
        demo_photographs.run(arguments.out, arguments.photos)
        return
    begin = time.perf_counter()
    images = load(arguments.data_set, arguments.data)
    model = trained(f"cnn-{images.name}", images)
    inverse = InverseNetwork(model).fit(images.train[:FITTED], batch_size=500)
    logger.info("%s", inverse.report)
    rows = []
    for name, signal in controls(model, images, inverse).items():
        rows.append({"signal": name, **apc(model, images, signal)})
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure(images, model, MIPINAttribution(model, inverse)).savefig(
        arguments.out / "side-by-side.png", dpi=110
    )
    text = (
        f"{images.name}: {len(images.train[:FITTED])} training images fitted on, "
        f"{len(images.test)} test images, network cnn-{images.name} (test accuracy "
        f"{100 * accuracy(model, images.test, images.test_labels):.1f} %), target: true class, "
        f"layer: input\n\n{show(rows)}\n\n"
        "APC: by how many percent the logit changes if a signal takes the place of the image; "
        "positive APC counts falls alone. S is more complete than a control if its APC is lower.\n"
    )
    (arguments.out / "completeness.md").write_text(text)
    print(
        f"\n{text}\nwrote {arguments.out}/side-by-side.png and completeness.md "
        f"in {time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
