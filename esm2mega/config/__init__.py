"""The configuration: a typed schema, presets of the model sizes, loading, and checks of the whole."""
