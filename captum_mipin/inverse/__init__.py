"""Inverses of a network: fitted once for all examples, or per example on its neighbours."""

from captum_mipin.inverse.neighbours import NeighbourInverse
from captum_mipin.inverse.network import InverseNetwork

__all__ = ["InverseNetwork", "NeighbourInverse"]
