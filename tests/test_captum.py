"""The arguments that all ``attribute`` methods share are described once, and shown by each."""

import inspect

import pytest

from captum_mipin import LRP, LayerMIPINAttribution, MIPINAttribution
from captum_mipin._captum import COMMON_ENTRIES, captum_entry, describe_common
from captum_mipin.methods import (
    GradCAM,
    GuidedBackprop,
    LayerPropagation,
    PatternAttribution,
    PatternNet,
    SmoothGrad,
)

METHODS = (
    MIPINAttribution, LayerMIPINAttribution, LRP, GuidedBackprop, LayerPropagation, PatternNet,
    PatternAttribution, SmoothGrad, GradCAM,
)  # fmt: skip


def _section(doc: str, name: str) -> list[str]:
    """The lines of one section, without its indentation."""
    _, _, rest = f"{doc}\n\n".partition(f"\n{name}:\n")
    return inspect.cleandoc(rest.partition("\n\n")[0]).splitlines()


@pytest.mark.parametrize("method", METHODS)
def test_help_describes_every_argument_once(method):
    entries = _section(method.attribute.__doc__, "Args")
    named = [line.partition(":")[0] for line in entries if not line.startswith(" ")]
    parameters = [name for name in inspect.signature(method.attribute).parameters if name != "self"]
    assert named == parameters
    assert method.attribute.__wrapped__.__doc__ == method.attribute.__doc__
    common = inspect.cleandoc(COMMON_ENTRIES["Args:"]).splitlines()
    assert entries[: len(common)] == common


def test_sections_are_made_and_completed():
    @captum_entry
    def attribute():
        """Return nothing.

        Returns:
            None

        Raises:
            KeyError: Never.
        """

    sections = inspect.getdoc(attribute).split("\n\n")
    assert [section.splitlines()[0] for section in sections[1:]] == ["Args:", "Returns:", "Raises:"]
    assert _section(attribute.__doc__, "Raises")[-1] == "KeyError: Never."
    assert _section(attribute.__doc__, "Raises")[0].startswith("InputError: ")

    @describe_common
    def without():
        """Return nothing."""

    assert without.__doc__ == "Return nothing."
