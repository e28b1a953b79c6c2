"""Several methods side by side: table, figure and HTML page."""

from captum_mipin.comparison.table import METHODS, METRICS, Comparison, Row, compare

__all__ = ["METHODS", "METRICS", "Comparison", "Row", "compare"]
