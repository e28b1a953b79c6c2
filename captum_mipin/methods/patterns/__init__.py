"""PatternNet and PatternAttribution: patterns fitted to data stand in the place of weights."""

from captum_mipin.methods.patterns.attributions import PatternAttribution, PatternNet
from captum_mipin.methods.patterns.fit import PatternFit, PatternReport, Patterns

__all__ = ["PatternAttribution", "PatternFit", "PatternNet", "PatternReport", "Patterns"]
