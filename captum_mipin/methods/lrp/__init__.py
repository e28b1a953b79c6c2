"""Layer-wise relevance propagation: rules of layers, the table of all other operations, methods."""
