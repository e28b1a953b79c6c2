"""Errors of the library, in the words of the command line."""

import re

from captum_mipin.graph.diagnosis import RUNS

#: Arguments in Python that are options of the command line.
_OPTIONS = (
    "batch_size|budget|checkpoint|device|inverse|layer|metrics|names|ridge|sharing|steps|targets?"
)


def plainly(text: str) -> str:
    """Return the text of an error with options of the command line for arguments in Python.

    Examples:
        >>> plainly("no layer was given: pass layer=, a module of the network or its name")
        'no layer was given: pass --layer, a module of the network or its name'
        >>> plainly("ridge=-1.0 is negative. Add it with fit(data, targets=[1])")
        '--ridge -1.0 is negative. Add it with captum-mipin fit --targets 1'
    """
    text = text.replace(RUNS, "Pass --size, --mean and --std with which the model runs.")
    text = re.sub(r"\bfit\(data, targets=\[(.*?)\]\)", r"captum-mipin fit --targets \1", text)
    text = re.sub(r"\bfit\(data(, targets=\.\.\.)?\)", "captum-mipin fit", text)

    def option(match: re.Match[str]) -> str:
        name = match[1].replace("_", "-").replace("targets", "target").replace("target", "targets")
        return f"--{name}{match[2]}" if match[2] in " ,.:;)" else f"--{name} {match[2]}"

    return re.sub(rf"(?<![\w-])({_OPTIONS})=(.|$)", option, text)
