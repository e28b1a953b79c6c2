"""From a captured graph and rules to a module whose backward pass computes the method."""
