"""Configuration: typed schema, model presets, loading with overrides, and checks of the whole."""
