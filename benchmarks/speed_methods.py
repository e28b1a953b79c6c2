"""Speed of the methods beside MIP-IN, as ratios to Saliency in the same run: python benchmarks/speed_methods.py.

VGG-16 and ResNet-50 at 224 x 224, batches of two images, torchvision's random weights (the time does not depend on them); ours
beside Captum's and zennit's implementation of the same method, in turn, medians of processor time on one thread, so that what
else the machine does counts little. Theirs are timed right or wrong. The C library keeps the memory that is freed: what fresh
pages cost, and how many there are, differs from machine to machine and from run to run by more than methods do.
"""

import argparse
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
from captum.attr import LRP as CaptumsLRP  # noqa: N811  # to tell it from ours
from captum.attr import Deconvolution, Saliency
from captum.attr import GuidedBackprop as CaptumsGuidedBackprop
from common import show, write
from speed import seconds
from torch import Tensor, nn

from captum_mipin import LRP
from captum_mipin.methods import (
    Deconvnet,
    DeepTaylor,
    Epsilon,
    ExcitationBackprop,
    Gamma,
    GuidedBackprop,
    PatternAttribution,
    PatternNet,
    Patterns,
    ZPlus,
)

Call = Callable[[], object]


def zennits(model: nn.Module, x: Tensor, composite: Any) -> Call:
    """A call of zennit, which changes the model while it runs and puts it back."""

    def run() -> object:
        start = torch.zeros(len(x), 1000)
        start[:, 0] = 1
        with zennit.attribution.Gradient(model=model, composite=composite) as attributor:
            return attributor(x.clone(), start)

    return run


def methods(model: nn.Module, x: Tensor) -> dict[str, dict[str, Call]]:
    """Method → whose → call; what others leave on a model, or change and put back, is a copy's."""
    patterns, other = Patterns(model).fit(x, progress=False), copy.deepcopy(model)
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
            **ours(Deconvnet(model)), "Captum": captums(Deconvolution(other)),
            "zennit": zennits(other, x, zennit_gradient["Deconvnet"]),
        },
        "Guided Backprop": {
            **ours(GuidedBackprop(model)), "Captum": captums(CaptumsGuidedBackprop(other)),
            "zennit": zennits(other, x, zennit_gradient["Guided Backprop"]),
        },
        "LRP-ε": {
            **ours(LRP(model, rule=Epsilon())), "Captum": captums(CaptumsLRP(other)),
            "zennit": zennits(other, x, rules(zennit.rules.Epsilon())),
        },
        "LRP-γ": {**ours(LRP(model, rule=Gamma())), "zennit": zennits(other, x, rules(zennit.rules.Gamma()))},
        "LRP-z⁺": {**ours(LRP(model, rule=ZPlus())), "zennit": zennits(other, x, rules(zennit.rules.ZPlus()))},
        "Deep Taylor": ours(DeepTaylor(model)),
        "Excitation backprop": ours(ExcitationBackprop(model)),
        "PatternNet": ours(PatternNet(model, patterns)),
        "PatternAttribution": ours(PatternAttribution(model, patterns)),
    }  # fmt: skip


def keep_memory() -> bool:
    """Let the C library ask for memory once and give none back, where it is glibc; whether it does so now."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "networks", nargs="*", default=["vgg16", "resnet50"], help="names of torchvision"
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
        for method, calls in methods(model, x).items():
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
            "speed-methods",
            rows,
            repeats=arguments.repeats,
            batch=2,
            size=224,
            clock=clock,
            memory_kept=kept,
        )
    print(show(rows))


if __name__ == "__main__":
    main()
