"""Layer-wise relevance propagation: rules of layers, the table of all other operations, methods."""

from captum_mipin.methods.lrp.deep_taylor import DeepTaylor
from captum_mipin.methods.lrp.lrp import LRP
from captum_mipin.methods.lrp.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    LayerCall,
    LayerRule,
    WSquare,
    ZBox,
    ZPlus,
)

__all__ = [
    "LRP",
    "AlphaBeta",
    "DeepTaylor",
    "Epsilon",
    "Flat",
    "Gamma",
    "LayerCall",
    "LayerRule",
    "WSquare",
    "ZBox",
    "ZPlus",
]
