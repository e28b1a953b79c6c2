"""Layer-wise relevance propagation: rules of layers, rules of all other operations, methods."""
