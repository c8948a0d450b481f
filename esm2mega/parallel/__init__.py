"""Spreads a run over processes and devices, and lets Megatron-Core run without CUDA."""
