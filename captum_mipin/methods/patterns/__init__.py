"""PatternNet and PatternAttribution: patterns that are fitted to data replace weights."""
