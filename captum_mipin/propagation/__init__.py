"""From a graph and rules to a module whose backward pass is the method."""
