"""Errors of the library, in the words of the command line."""

import re
from collections.abc import Iterable
from typing import Any

from captum_mipin.graph.diagnosis import RUNS

#: Arguments in Python that are options of the command line.
_OPTIONS = (
    "batch_size|budget|checkpoint|device|inverse|layer|metrics|names|ridge|sharing|steps|targets?"
)


def plainly(text: str, targets: str = "") -> str:
    """Return the text of an error with options of the command line for arguments in Python.

    Args:
        text: The text.
        targets: All classes to fit, with commas; empty for those of the text.

    Examples:
        >>> plainly("no layer was given: pass layer=, a module of the network or its name")
        'no layer was given: pass --layer, a module of the network or its name'
        >>> plainly("ridge=-1.0 is negative. Fit all of them with fit(data, targets=[0, 1])")
        '--ridge -1.0 is negative. Fit all of them with captum-mipin fit --targets 0,1'
    """
    text = text.replace(RUNS, "Pass --size, --mean and --std with which the model runs.")

    def fit(match: re.Match[str]) -> str:
        return f"captum-mipin fit --targets {targets or match[1].replace(' ', '')}"

    text = re.sub(r"\bfit\(data, targets=\[(.*?)\]\)", fit, text)
    text = re.sub(r"\bfit\(data(, targets=\.\.\.)?\)", "captum-mipin fit", text)

    def option(match: re.Match[str]) -> str:
        name = match[1].replace("_", "-").replace("targets", "target").replace("target", "targets")
        return f"--{name}{match[2]}" if match[2] in " ,.:;)" else f"--{name} {match[2]}"

    return re.sub(rf"(?<![\w-])({_OPTIONS})=(.|$)", option, text)


def all_classes(fitted: Iterable[Any], classes: Iterable[Any]) -> str:
    """Return the classes of an inverse and those of images, once each, for ``--targets``."""
    return ",".join(map(str, sorted({*fitted, *classes})))


def not_fitted(missing: Iterable[Any], fitted: Iterable[Any]) -> str:
    """Return the sentence about classes that were not fitted, and how to fit them with the others.

    Examples:
        >>> not_fitted([2], [0, 1])
        'no inverse was fitted for target 2: fit all with captum-mipin fit --targets 0,1,2'
    """
    named, both = all_classes(missing, ()), all_classes(fitted, missing)
    return (
        f"no inverse was fitted for target {named}: fit all with captum-mipin fit --targets {both}"
    )
