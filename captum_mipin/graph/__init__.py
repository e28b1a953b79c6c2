"""From a model to its graph of operations, without any rules of a method."""
