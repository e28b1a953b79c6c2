"""Comparison of several methods on the same images: table, figure and HTML page."""

from captum_mipin.comparison.methods import METHODS
from captum_mipin.comparison.rows import Row
from captum_mipin.comparison.run import compare
from captum_mipin.comparison.scores import METRICS
from captum_mipin.comparison.table import Comparison

__all__ = ["METHODS", "METRICS", "Comparison", "Row", "compare"]
