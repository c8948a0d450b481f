"""Defines the configuration: a typed schema, presets of model sizes, loading, and checks of the whole."""
