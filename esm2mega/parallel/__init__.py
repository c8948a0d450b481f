"""Processes, groups and devices: how a run spreads over ranks, and how Megatron-Core runs without CUDA."""
