"""ESM-2 protein language models on Megatron-Core. Importing this package imports neither torch nor numpy."""

__version__ = "0.1.0"
