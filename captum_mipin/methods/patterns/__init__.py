"""PatternNet and PatternAttribution: patterns fitted to data stand in the place of weights."""
