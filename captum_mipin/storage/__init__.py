"""Files of fitted methods, and the watch over the weights of a model."""
