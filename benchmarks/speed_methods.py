"""Speed of the methods beside MIP-IN, as ratios to Saliency in the same run.

    python benchmarks/speed_methods.py

VGG-16, ResNet-50 and ViT-B/16 at 224 x 224, batches of two images, torchvision's random weights
(the time does not depend on them). Each method is timed in turn with Captum's and zennit's
implementation of the same method, whether or not theirs is right. Times are medians of processor
time on one thread, so that the load of the machine counts little. The C library keeps freed memory:
the cost of fresh pages differs more between machines and runs than methods do.
"""

import copy
import ctypes
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
import zennit.attribution
import zennit.composites
import zennit.rules
import zennit.torchvision
import zennit.types
from captum.attr import LRP, Deconvolution, GuidedBackprop, Saliency
from common import parser_of, show, write
from speed import seconds
from torch import Tensor, nn

from captum_mipin import methods as own

Call = Callable[[], object]


def zennits(model: nn.Module, x: Tensor, composite: Any) -> Call:
    """Return a call of zennit, which changes the model while it runs and restores it."""

    def run() -> object:
        start = torch.zeros(len(x), 1000)
        start[:, 0] = 1
        with zennit.attribution.Gradient(model=model, composite=composite) as attributor:
            return attributor(x.clone(), start)

    return run


def methods(model: nn.Module, x: Tensor) -> dict[str, dict[str, Call]]:
    """Return method → owner → call.

    Implementations that change the model get a copy of it.
    """
    patterns, other = own.Patterns(model).fit(x, progress=False), copy.deepcopy(model)
    canonizers = [
        (
            zennit.torchvision.ResNetCanonizer
            if isinstance(model, torchvision.models.ResNet)
            else zennit.torchvision.VGGCanonizer
        )()
    ]

    def ours(method: Any) -> dict[str, Call]:
        return {"ours": lambda: method.attribute(x, 0)}

    def captums(method: Any) -> Call:
        return lambda: method.attribute(x.clone(), target=0)

    def rules(rule: Any) -> Any:
        layers = [(zennit.types.Convolution, rule), (zennit.types.Linear, rule)]
        return zennit.composites.LayerMapComposite(
            layers + zennit.composites.layer_map_base(), canonizers
        )

    zennit_gradient = {
        "Deconvnet": zennit.composites.DeconvNet(),
        "Guided Backprop": zennit.composites.GuidedBackprop(),
    }
    return {
        "Deconvnet": {
            **ours(own.Deconvnet(model)),
            "Captum": captums(Deconvolution(other)),
            "zennit": zennits(other, x, zennit_gradient["Deconvnet"]),
        },
        "Guided Backprop": {
            **ours(own.GuidedBackprop(model)),
            "Captum": captums(GuidedBackprop(other)),
            "zennit": zennits(other, x, zennit_gradient["Guided Backprop"]),
        },
        "LRP-ε": {
            **ours(own.LRP(model, rule=own.Epsilon())),
            "Captum": captums(LRP(other)),
            "zennit": zennits(other, x, rules(zennit.rules.Epsilon())),
        },
        "LRP-γ": {
            **ours(own.LRP(model, rule=own.Gamma())),
            "zennit": zennits(other, x, rules(zennit.rules.Gamma())),
        },
        "LRP-z⁺": {
            **ours(own.LRP(model, rule=own.ZPlus())),
            "zennit": zennits(other, x, rules(zennit.rules.ZPlus())),
        },
        "Deep Taylor": ours(own.DeepTaylor(model)),
        "Excitation backprop": ours(own.ExcitationBackprop(model)),
        "PatternNet": ours(own.PatternNet(model, patterns)),
        "PatternAttribution": ours(own.PatternAttribution(model, patterns)),
    }


def of_transformers(model: nn.Module, x: Tensor) -> dict[str, dict[str, Call]]:
    """Return method → owner → call, for a transformer."""
    own_methods: dict[str, Any] = {
        "LRP-ε": own.LRP(model),
        "AttnLRP, ε": own.LRP(model, attention="attnlrp"),
        "AttnLRP, γ": own.LRP(model, rule=own.Gamma(), attention="attnlrp"),
        "Attention rollout": own.AttentionRollout(model),
        "Chefer": own.Chefer(model),
        "LeGrad": own.LeGrad(model),
    }
    return {name: {"ours": partial(method.attribute, x, 0)} for name, method in own_methods.items()}


def keep_memory() -> bool:
    """Let the C library keep freed memory, if it is glibc; return whether it does."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "networks",
        nargs="*",
        default=["vgg16", "resnet50", "vit_b_16"],
        help="names of torchvision",
    )
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kept = keep_memory()
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        x = torch.randn(2, 3, 224, 224)
        saliency = Saliency(model)
        calls_of = of_transformers if name.startswith("vit") else methods
        for method, calls in calls_of(model, x).items():
            times = seconds(
                [partial(saliency.attribute, x, 0), *calls.values()],
                arguments.repeats,
                time.process_time,
            )
            base, *others = (statistics.median(each) for each in times)
            found = {
                f"{whose} ÷ Saliency": taken / base
                for whose, taken in zip(calls, others, strict=True)
            }
            rows.append({"network": name, "method": method, **found, "Saliency ms": 1e3 * base})
            print(rows[-1], time.strftime("%X"), flush=True)
        clock = "processor time, one thread"
        write(
            "speed-methods", rows, repeats=arguments.repeats, batch=2, size=224, clock=clock,
            memory_kept=kept,
        )  # fmt: skip
    print(show(rows))


if __name__ == "__main__":
    main()
