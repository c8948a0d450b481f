"""Exports models as programs of PyTorch and ONNX, which run without this package."""
