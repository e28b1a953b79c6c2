"""Files of fitted methods, and the watch over a model's weights."""
