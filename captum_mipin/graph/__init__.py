"""From a model to its graph of operations. This package knows no rules."""
