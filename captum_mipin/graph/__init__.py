"""The capture of a model as a graph of operations; it is independent of the attribution methods."""
