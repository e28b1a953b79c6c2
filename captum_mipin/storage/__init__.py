"""Files of fitted methods, and the detection of changes in a model's weights."""
